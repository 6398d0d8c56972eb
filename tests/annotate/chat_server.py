"""A server that speaks the OpenAI protocol of chat completions, and misbehaves where a test asks.

`answer(body, number)` gives what happens to a request: a string (the model's text), or a `Reply`.
`Told` is one that answers texts as it is told. The one model that it lists is "tiny".
"""

import collections
import contextlib
import dataclasses
import http.server
import json
import threading
import time

PROMPTS = {  # words of each prompt -> what it asks for
  "Which colour is": "colour",
  "Name its main visual subjects": "subjects",
  "Its main visual subjects are": "features",
  "Describe the things": "descriptions",
  "Write one sentence": "caption",
  "This is a part": "region",
}


@dataclasses.dataclass
class Reply:
  status: int = 200
  body: bytes | None = None  # None: a good one, with `text`
  text: str | None = "a red dog"
  headers: dict = dataclasses.field(default_factory=dict)
  wait: float = 0.0  # seconds before anything is sent
  close_after: int | None = None  # bytes of the body, then the connection is closed
  more: dict = dataclasses.field(default_factory=dict)  # of the message
  finish: str = "stop"
  usage: object = dataclasses.field(
    default_factory=lambda: {"prompt_tokens": 1000, "completion_tokens": 20}
  )


def asked(body):
  """What a request asks for, one of `PROMPTS`."""
  return next(name for words, name in PROMPTS.items() if words in prompt(body))


def prompt(body):
  content = body["messages"][0]["content"]
  if isinstance(content, str):
    return content
  return next(part["text"] for part in content if part["type"] == "text")


def picture(body):
  """The data URL of a request; None: it has no picture."""
  content = body["messages"][0]["content"]
  parts = [] if isinstance(content, str) else content
  return next((p["image_url"]["url"] for p in parts if p["type"] == "image_url"), None)


class Told:
  """Answers of {words: [status, bytes of a body or text, ...]}, the last again and again.

  The words are of a prompt: as a class, "a WORDS in a photo", or as a marked word, "[WORDS]".
  """

  def __init__(self, answers):
    self.answers, self.asked = answers, collections.Counter()
    self._lock = threading.Lock()

  def __call__(self, body, number):
    text = prompt(body)
    name = next(n for n in self.answers if f"a {n} in a photo" in text or f"[{n}]" in text)
    with self._lock:
      turn = self.asked[name]
      self.asked[name] += 1
    told = self.answers[name]
    answer = told[min(turn, len(told) - 1)]
    if isinstance(answer, int):
      return Reply(answer, b"{}", headers={"Retry-After": "0"})
    if isinstance(answer, bytes):
      return Reply(body=answer)
    return Reply(text=answer, usage={"prompt_tokens": 10, "completion_tokens": 3})


class Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def __init__(self, answer):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.answer, self.lock = answer, threading.Lock()
    self.bodies, self.headers, self.times, self.paths = [], [], [], []
    self.now = self.most = 0  # requests at a time

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}/v1"

  @property
  def keys(self):
    return {headers.get("Authorization") for headers in self.headers}

  @property
  def asked(self):
    """How often each of the words of a `Told` was asked for."""
    return self.answer.asked

  def handle_error(self, request, client_address):
    pass  # the client went away


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *arguments):
    pass

  def do_GET(self):
    self.server.headers.append(dict(self.headers))
    self._send(Reply(body=json.dumps({"data": [{"id": "tiny"}]}).encode()))

  def do_POST(self):
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with server.lock:
      number = len(server.bodies)
      server.bodies.append(body)
      server.headers.append(dict(self.headers))
      server.times.append(time.monotonic())
      server.paths.append(self.path)
      server.now += 1
      server.most = max(server.most, server.now)
    try:
      found = server.answer(body, number)
      reply = Reply(text=found) if isinstance(found, str) else found
      time.sleep(reply.wait)
    finally:
      with server.lock:
        server.now -= 1
    self._send(reply)

  def _send(self, reply):
    message = {"role": "assistant", "content": reply.text, **reply.more}
    whole = {"choices": [{"message": message, "finish_reason": reply.finish}]}
    if reply.usage is not None:
      whole["usage"] = reply.usage
    data = json.dumps(whole).encode() if reply.body is None else reply.body
    if reply.close_after == 0:
      self.close_connection = True
      return
    self.send_response(reply.status)
    for name, value in {"Content-Length": len(data), **reply.headers}.items():
      self.send_header(name, str(value))
    self.end_headers()
    self.wfile.write(data[: reply.close_after])
    if reply.close_after is not None:
      self.close_connection = True


@contextlib.contextmanager
def serve(answer):
  """A running server."""
  server = Server(answer)
  thread = threading.Thread(
    target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
  )
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def sensible(body, number):
  """A model that sees: of every picture the same."""
  return {
    "colour": '{"colour": "red"}',
    "subjects": "1. a dog\n2. a sofa",
    "features": '{"list": ["a brown dog", "a green sofa"]}',
    "descriptions": "- a brown dog\n- a green sofa",
    "caption": "A brown dog sleeps on a green sofa.",
    "region": "A brown dog with a white paw, asleep on a green sofa.",
  }[asked(body)]
