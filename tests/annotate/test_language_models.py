"""The one client of servers, asked from threads; and the command that goes on by another server."""

import concurrent.futures
import gc
import json
import threading

import chat_server
import pytest
import tiny_language

from grain_jax import failures
from grain_jax.annotate import __main__ as command
from grain_jax.annotate import language_models

KEY = "sk-test-0123456789abcdef"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setenv("OPENAI_API_KEY", "another-key")  # that nobody named
  monkeypatch.setenv("OWN_KEY", KEY)
  monkeypatch.setattr(language_models, "_BASE", 0.001)


def test_every_token_of_many_threads_is_counted():
  """While they are counted all the time; each prompt n costs n and 1 tokens."""

  together = threading.Barrier(4)  # the first four are at the server at the same time

  def answer(body, number):
    if number < 4:
      together.wait(timeout=60)
    n = int(chat_server.prompt(body))
    assert body["messages"] == [{"role": "user", "content": str(n)}]
    return chat_server.Reply(text=f"said {n}", usage={"prompt_tokens": n, "completion_tokens": 1})

  taken, over = [], threading.Event()
  with chat_server.serve(answer) as server:
    own = language_models.ServerChat(server.url, "tiny", at_once=4)

    def count():
      while not over.is_set():
        taken.append(own.take_totals())

    counting = threading.Thread(target=count)
    counting.start()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      replies = list(pool.map(own.ask, map(str, range(200))))
    over.set()
    counting.join()
    taken.append(own.take_totals())
    assert [reply.text for reply in replies] == [f"said {n}" for n in range(200)]
    names = ("requests", "prompt_tokens", "completion_tokens")
    assert [sum(t[name] for t in taken) for name in names] == [200, 199 * 100, 200]
    assert set(own.take_totals().values()) == {0}
    assert server.most == 4 and server.keys == {None}


def test_what_a_server_needs_otherwise_is_found_out():
  """As for pictures: the name of the limit, no temperature, content in parts."""

  def answer(body, number):
    if "max_tokens" in body:
      return chat_server.Reply(400, b"use max_completion_tokens")
    if "temperature" in body:
      return chat_server.Reply(422, b"no temperature")
    if number < 6:
      return chat_server.Reply((409, 408, 425, 429)[number - 2], b"later")
    return chat_server.Reply(
      text=[{"type": "text", "text": "- wings"}], finish="length", usage=None
    )

  with chat_server.serve(answer) as server:
    own = language_models.ServerChat(server.url, "tiny", max_tokens=7)
    assert own.ask("a hen") == ("- wings", True, "")
    assert server.bodies[-1]["max_completion_tokens"] == 7
  assert own.totals() == own.totals() == {
    "requests": 7, "prompt_tokens": 0, "completion_tokens": 0, "retries": 4, "without_usage": 1,
  }  # fmt: skip


ECHO = f"Bearer {KEY} is in it".encode()


@pytest.mark.parametrize(
  "reply, error, match",
  [
    (chat_server.Reply(401, ECHO), ValueError, r"refuses the key \(401\)"),
    (chat_server.Reply(404, ECHO), ValueError, "refuses the request"),
    (chat_server.Reply(500, ECHO), failures.TransientError, r"5 tries \(server_error\)"),
    (chat_server.Reply(close_after=20), failures.TransientError, r"5 tries \(cut_reply\)"),
    (chat_server.Reply(wait=0.5), failures.TransientError, r"5 tries \(timeout\)"),
    (chat_server.Reply(body=ECHO), None, ""),
    (chat_server.Reply(text=None), None, ""),
  ],
)
def test_failures_mean_what_they_did_and_show_no_key(reply, error, match):
  with chat_server.serve(lambda body, number: reply) as server:
    timeout = 0.2 if reply.wait else 30.0
    own = language_models.ServerChat(server.url, "m", api_key_env="OWN_KEY", timeout=timeout)
    if error is None:
      assert own.ask("a hen") == ("", False, "no_reply")
    else:
      with pytest.raises(error, match=match) as raised:
        own.ask("a hen")
      assert KEY not in str(raised.value) and "\n" not in str(raised.value)
    assert server.keys == {f"Bearer {KEY}"}
    # Whether the server refuses this one or all is asked once.
    assert len(server.bodies) == {401: 1, 404: 2}.get(reply.status, 5)


def test_a_request_that_is_refused_does_not_end_the_others():
  """As by a filter of contents, though it is the first."""

  def answer(body, number):
    refused = chat_server.prompt(body) == "a revolver"
    return chat_server.Reply(400, b"content_filter") if refused else "- legs"

  with chat_server.serve(answer) as server:
    own = language_models.ServerChat(server.url, "m")
    words = [own.ask(text).why for text in ("a revolver", "a hen", "a revolver")]
    assert words == ["request_refused", "", "request_refused"] and len(server.bodies) == 4
    assert own.take_totals()["request_refused"] == 2


def test_its_thread_ends_with_it():
  before = set(threading.enumerate())
  own = language_models.ServerChat("http://127.0.0.1:9", "m")
  (thread,) = set(threading.enumerate()) - before
  del own
  gc.collect()
  thread.join(10)
  assert not thread.is_alive()


@pytest.mark.long
def test_a_run_of_negatives_goes_on_by_another_server_and_key(tmp_path, capsys):
  """The address is no path, and what is done is not done again."""
  tiny_language.make_tagger(tmp_path / "tagger")

  def run(server, *more):
    return command.main([
      "negatives", "--source=scenes", "--train=4", "--val=1", "--objects_per_class=1",
      "--concepts=16", f"--out={tmp_path}/out", "--ray_address=none", "--backend=server",
      f"--server={server.url}", "--model=tiny", f"--spacy={tmp_path}/tagger", *more,
    ])  # fmt: skip

  with chat_server.serve(lambda body, number: "- black\n- small\n- horse") as server:
    assert run(server) == 0 and server.bodies and server.keys == {None}
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  assert manifest["totals"]["requests"] == len(server.bodies)
  assert manifest["totals"]["prompt_tokens"] == 1000 * len(server.bodies)
  (tmp_path / "out" / "facts" / "000002.json").unlink()
  with chat_server.serve(lambda body, number: "- black") as other:
    assert run(other, "--api_key_env=OWN_KEY", "--batch_size=2") == 0
    assert other.bodies and other.keys == {f"Bearer {KEY}"}
    asked = len(other.bodies)
    assert run(other) == 0 and len(other.bodies) == asked and len(other.keys) == 1  # nor a check
    assert run(other, f"--api_key_env={KEY}") == 2
  told = capsys.readouterr()
  assert "not the name of an environment variable" in told.err and KEY not in told.err + told.out
