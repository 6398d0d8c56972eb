"""A server of OpenAI's protocol on this machine, which answers as it is told."""

import collections
import http.server
import json
import threading


class Server:
  """Answers as it is told: {class: [status or reply, ...]}, the last one again and again."""

  def __init__(self, answers):
    self.answers, self.asked, self.keys = answers, collections.Counter(), set()
    self.bodies, lock = [], threading.Lock()
    server = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def log_message(self, *_):
        pass

      def send(self, status, data, **headers):
        self.send_response(status)
        for name, value in headers.items():
          self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

      def do_GET(self):
        server.keys.add(self.headers.get("Authorization"))
        self.send(200, json.dumps({"data": [{"id": "tiny"}]}).encode())

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        signs = (lambda n: f"a {n} in a photo", lambda n: f"[{n}]")
        name = next(n for n in server.answers if any(sign(n) in prompt for sign in signs))
        with lock:
          server.bodies.append(body)
          turn = server.asked[name]
          server.asked[name] += 1
        told = server.answers[name]
        answer = told[min(turn, len(told) - 1)]
        if isinstance(answer, int):
          return self.send(answer, b"{}", Retry_After="0")
        if isinstance(answer, bytes):
          return self.send(200, answer)
        choice = {"message": {"content": answer}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 3}
        self.send(200, json.dumps({"choices": [choice], "usage": usage}).encode())

    self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.http.server_port}"
    threading.Thread(target=self.http.serve_forever, daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.http.shutdown()
    self.http.server_close()
