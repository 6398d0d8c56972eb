"""Descriptions by a server that speaks the OpenAI protocol: a real one, on this machine."""

import base64
import collections
import json
import logging
import pathlib
import time

import chat_server
import numpy as np
import pytest
import toy_data

from grain_jax import failures
from grain_jax.annotate import __main__ as annotate
from grain_jax.annotate import chat, describe, stages
from grain_jax.data import build
from grain_jax.data.dataset import open_dataset

KEY = "sk-test-0123456789abcdef"


def settings(server, **changes):
  values = {flag.name: flag.default for flag in describe.FLAGS}
  own = {"server": server if isinstance(server, str) else server.url, "model": "m", "backoff": 0.01}
  return describe.settings({**values, **own, **changes})


def item(key="a.jpg", *, regions=(), captions=("a dog on a sofa",)):
  picture = toy_data.record(sum(map(ord, key)))["image"]
  return stages.Item(key, picture, list(captions), [], list(regions), [])


def annotate_one(server, found=None, **changes):
  stage = describe.make(settings(server, **changes))
  return stage.annotate([found or item()])[0], stage.totals()


def test_two_stages_a_caption_and_what_was_sent():
  with chat_server.serve(chat_server.sensible) as server:
    result, totals = annotate_one(server)
  assert result.line == {
    "captions": ["A brown dog sleeps on a green sofa."],
    "descriptions": ["a brown dog", "a green sofa"],
  }
  assert result.losses == [] and [r["prompt"] for r in result.raw] == [
    "subjects", "caption", "features",
  ]  # fmt: skip
  assert result.raw[0] == {"prompt": "subjects", "reply": "1. a dog\n2. a sofa", "attempts": 1}
  assert totals == {"requests": 3, "tokens_in": 3000, "tokens_out": 60, "cost": 0.0}
  assert set(server.paths) == {"/v1/chat/completions"}
  for body in server.bodies:
    image, text = body["messages"][0]["content"]  # the picture first
    assert image["type"] == "image_url" and text["type"] == "text"
    head, data = image["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64" and base64.b64decode(data) == item().image
    assert body["temperature"] == 0 and body["max_tokens"] == 512 and body["model"] == "m"
  asked = {chat_server.asked(body): body for body in server.bodies}
  assert '"a dog on a sofa"' in chat_server.prompt(asked["subjects"])
  assert "- a dog\n- a sofa\n" in chat_server.prompt(asked["features"])
  assert asked["features"]["response_format"]["json_schema"]["schema"]["required"] == ["list"]
  assert "response_format" not in asked["caption"]


def test_one_stage_and_no_caption_is_one_request():
  with chat_server.serve(chat_server.sensible) as server:
    result, totals = annotate_one(server, stages=1, no_caption=True)
  assert result.line == {"descriptions": ["a brown dog", "a green sofa"]}
  assert totals["requests"] == 1


def test_cost_of_tokens():
  with chat_server.serve(chat_server.sensible) as server:
    _, totals = annotate_one(server, price_in=2.0, price_out=50.0)
  assert totals["cost"] == pytest.approx(3000 * 2e-6 + 60 * 50e-6)


BAD = {  # what happens -> the reason that is counted
  "rate_limited": chat_server.Reply(429, b"slow down"),
  "server_error": chat_server.Reply(500, b"<html>oops</html>"),
  "garbage": chat_server.Reply(body=b"<html>hello</html>"),
  "garbage_json": chat_server.Reply(body=b'{"choices": []}'),
  "garbage_number": chat_server.Reply(text=7),
  "garbage_half_json": chat_server.Reply(body=b'{"choices": [{"mess'),
  "cut_reply": chat_server.Reply(close_after=30),
  "cut_reply_nothing": chat_server.Reply(close_after=0),
  "empty_reply": chat_server.Reply(text=""),
  "empty_reply_none": chat_server.Reply(text=None),
  "refusal": chat_server.Reply(text="I'm sorry, I can't help with that."),
  "refusal_field": chat_server.Reply(text=None, more={"refusal": "no"}),
  "content_filter": chat_server.Reply(text="", finish="content_filter"),
  "timeout": chat_server.Reply(wait=0.6),
  "too_long": chat_server.Reply(text="x" * 10_000),
  "other_script": chat_server.Reply(text="一只棕色的狗"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("times", [2, 3])
def test_what_goes_wrong_is_tried_again_then_counted_and_skipped(kind, times):
  """With two retries: after two failures the picture is there, after three it is skipped."""
  left = collections.Counter(subjects=times)
  reason = next(why for why in sorted(BAD, key=len) if kind.startswith(why))

  def answer(body, number):
    what = chat_server.asked(body)
    left[what] -= 1
    return BAD[kind] if left[what] >= 0 else chat_server.sensible(body, number)

  slow = {"timeout": 0.3} if kind == "timeout" else {}
  with chat_server.serve(answer) as server:
    result, totals = annotate_one(server, retries=2, no_caption=True, **slow)
  assert totals["retries"] == 2
  if times == 2:
    assert result.line == {"descriptions": ["a brown dog", "a green sofa"]}
    assert result.losses == [] and result.raw[0]["attempts"] == 3 and len(server.bodies) == 4
  else:
    assert result.line is None and result.losses == [("pictures", reason)]
    assert result.raw[0]["failed"] == reason and len(server.bodies) == 3


def test_a_refused_request_is_not_sent_again_and_costs_its_picture_alone():
  def answer(body, number):
    bad = chat_server.picture(body).endswith(base64.b64encode(item("b").image).decode())
    return chat_server.Reply(413, b"too large") if bad else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    stage = describe.make(settings(server, no_caption=True))
    results = stage.annotate([item("a"), item("b"), item("c")])
  assert [result.line is None for result in results] == [False, True, False]
  assert results[1].losses == [("pictures", "request_refused")] and len(server.bodies) == 5


def test_a_caption_that_fails_is_lost_alone():
  def answer(body, number):
    failed = chat_server.asked(body) == "caption"
    return chat_server.Reply(503) if failed else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    result, _ = annotate_one(server, retries=1)
  assert result.line == {"descriptions": ["a brown dog", "a green sofa"]}
  assert result.losses == [("captions", "server_error")]


def test_lines_that_are_dropped_are_counted():
  def answer(body, number):
    many = "\n".join(["a dog", "A dog", "x" * 200, *(f"thing {i}" for i in range(12))])
    return many if chat_server.asked(body) == "features" else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    result, _ = annotate_one(server, item(captions=["A brown dog sleeps on a green sofa."]))
  assert result.line == {"descriptions": ["a dog", *(f"thing {i}" for i in range(9))]}
  assert collections.Counter(result.losses) == {
    ("captions", "duplicate"): 1,
    ("descriptions", "duplicate"): 1,
    ("descriptions", "too_long"): 1,
    ("descriptions", "too_many"): 3,
  }


def test_the_last_line_of_a_reply_that_ended_at_max_tokens_is_half_of_one():
  def answer(body, number):
    cut = chat_server.Reply(text="- a brown dog\n- a green so", finish="length")
    return cut if chat_server.asked(body) == "features" else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    result, _ = annotate_one(server, no_caption=True)
  assert result.line == {"descriptions": ["a brown dog"]}
  assert result.losses == [("descriptions", "cut_off")]


def test_it_waits_as_long_as_the_server_asks_and_longer_each_time():
  replies = [
    chat_server.Reply(429, headers={"Retry-After": "1"}), chat_server.Reply(503),
    chat_server.Reply(502),
  ]  # fmt: skip

  def answer(body, number):
    return replies[number] if number < 3 else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    result, _ = annotate_one(server, stages=1, no_caption=True, backoff=0.1)
  waits = np.diff(server.times)
  assert result.line and waits[0] >= 1.0 and 0.2 <= waits[1] < 1.0 and waits[2] >= 0.4


def test_retry_after_as_a_date():
  from email import utils

  for seconds in (50, -50):
    date = utils.formatdate(time.time() + seconds, usegmt=True)
    assert chat._wait({"retry-after": date}) == pytest.approx(max(seconds, 0), abs=2)
  assert chat._wait({"retry-after": "soon"}) is None and chat._wait({}) is None


@pytest.mark.parametrize("concurrency", [1, 6])
def test_as_many_requests_at_a_time_as_asked_for(concurrency):
  def answer(body, number):
    return chat_server.Reply(text=chat_server.sensible(body, number), wait=0.02)

  with chat_server.serve(answer) as server:
    stage = describe.make(settings(server, concurrency=concurrency))
    found = stage.annotate([item(f"{i}.jpg") for i in range(12)])
  assert all(result.line for result in found)
  assert server.most == concurrency and len(server.bodies) == 36


def test_a_server_without_a_schema_or_with_other_parameters_is_asked_without():
  def answer(body, number):
    if "max_tokens" in body:
      return chat_server.Reply(400, b"Unsupported parameter, use 'max_completion_tokens'")
    if "temperature" in body:
      return chat_server.Reply(400, b"'temperature' does not support 0")
    if "response_format" in body:
      return chat_server.Reply(400, b"unknown field response_format")
    return chat_server.sensible(body, number)

  said = []
  with chat_server.serve(answer) as server:
    found = settings(server, sample=0)
    describe.check(found, toy_data.source([]), say=said.append)
  assert len(said) == 1 and said[0].endswith("takes no JSON schema: lines of text are asked for.")
  with chat_server.serve(answer) as server:
    stage = describe.make(settings(server, concurrency=1))
    assert stage.annotate([item()])[0].line["descriptions"] == ["a brown dog", "a green sofa"]
    before = len(server.bodies)
    assert stage.annotate([item("b")])[0].line and len(server.bodies) == before + 3


def test_a_key_that_is_refused_ends_it():
  def answer(body, number):
    return chat_server.Reply(401, json.dumps({"error": f"bad key {KEY[:8]}"}).encode())

  with chat_server.serve(answer) as server:
    with pytest.raises(ValueError, match=r"refuses the key \(401\)\. Put a valid") as error:
      annotate_one(server)
    assert "sk-" not in str(error.value)


def test_a_server_that_is_gone_is_for_another_start():
  with chat_server.serve(chat_server.sensible) as server:
    found = settings(server, retries=1)
  with pytest.raises(failures.TransientError, match="does not answer any more. Start it; the same"):
    describe.make(found).annotate([item()])


def test_long_descriptions_of_boxes():
  region = {"description": "a dog", "box": (0.25, 0.5, 0.75, 1.0), "score": 0.5,
            "negatives": ["a cat", "a cow"]}  # fmt: skip
  other = {**region, "description": "a sofa", "box": (0.0, 0.0, 0.5, 0.5), "negatives": []}

  def answer(body, number):
    bad = '"a sofa"' in chat_server.prompt(body)
    return chat_server.Reply(500) if bad else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    stage = describe.make(settings(server, region_captions=True, retries=0))
    result, without = stage.annotate([item(regions=[region, other]), item()])
  long = "A brown dog with a white paw, asleep on a green sofa."
  assert result.line == {
    "regions": [
      {"description": long, "box": [0.25, 0.5, 0.75, 1.0], "score": 0.5, "negatives": []},
      {**other, "box": [0.0, 0.0, 0.5, 0.5]},
    ]
  }
  assert sorted(result.losses) == [
    ("long_descriptions", "server_error"),
    *[("region_negatives", "description_replaced")] * 2,
  ]
  assert without.line == {} and len(server.bodies) == 2


def lines_of(folder, name):
  files = sorted((pathlib.Path(folder) / name).glob("*.jsonl"))
  return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def pictures(tmp_path):
  root = tmp_path / "pictures"
  root.mkdir()
  with (root / "annotations.jsonl").open("w") as lines:
    for i in range(20):
      (root / f"{i}.jpg").write_bytes(toy_data.record(i)["image"])
      lines.write(json.dumps({"image": f"{i}.jpg", "captions": [f"picture number {i}"]}) + "\n")
  return root


def command(server, pictures, out, *more):
  url = server if isinstance(server, str) else server.url
  return annotate.main(
    ["describe", f"--input={pictures}", f"--out={out}", "--ray_address=none", f"--server={url}",
     "--model=m", "--backoff=0.01", "--retries=1", *more]
  )  # fmt: skip


def test_the_whole_command_and_a_build_and_nothing_secret_anywhere(
  pictures, tmp_path, monkeypatch, capfd, caplog
):
  """With a server that now and then fails, and says the key and the picture back."""
  monkeypatch.setenv("A_KEY", KEY)
  caplog.set_level(logging.DEBUG)
  pictures_sent = set()

  def answer(body, number):
    pictures_sent.add(chat_server.picture(body).partition(",")[2])
    what, echo = chat_server.asked(body), f"Bearer {KEY} {chat_server.picture(body)}"
    if what != "colour" and "number 7" in chat_server.prompt(body) and what == "subjects":
      return chat_server.Reply(500, echo.encode())
    if what == "caption":
      return f"A toy. Bearer {KEY}."
    if what == "features" and number % 3 == 0:
      return f"a brown dog\n{echo}"
    return chat_server.sensible(body, number)

  out = tmp_path / "out"
  with chat_server.serve(answer) as server:
    flags = ("--api_key_env=A_KEY", "--price_in=10", "--price_out=10", "--max_failures=0.2")
    assert command(server, pictures, out, *flags) == 0
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
  found = lines_of(out, "annotations")
  assert len(found) == 20 and found[0]["descriptions"][0] == "a brown dog"
  assert "descriptions" not in next(line for line in found if line["key"] == "7.jpg")
  manifest = json.loads((out / "manifest.json").read_text())
  assert manifest["counts"]["failed"] == 1
  assert manifest["losses"]["pictures/server_error"] == {"count": 1, "first": ["7.jpg"]}
  # 20 captions, 20 subjects of which one twice, 19 features
  assert manifest["totals"]["requests"] == 60 and manifest["totals"]["retries"] == 1
  assert manifest["totals"]["tokens_in"] == 58_000 and manifest["totals"]["tokens_out"] == 58 * 20
  assert manifest["totals"]["cost"] == pytest.approx(58 * 1020 * 10e-6)
  printed = capfd.readouterr()
  assert (
    "estimated of 3 pictures, each 1,000: 3,000,000 tokens in, 60,000 out, $30.60" in printed.out
  )
  written = "".join(path.read_text() for path in out.rglob("*") if path.is_file())
  everything = printed.out + printed.err + caplog.text + written
  assert KEY not in everything and KEY[3:] not in everything and "picture number" not in printed.err
  assert len(pictures_sent) == 21
  for picture in pictures_sent:
    assert not any(picture[i : i + 80] in everything for i in range(0, len(picture) - 80, 40))

  built = ["--source=folder", f"--input={pictures}", f"--annotated={out}"]
  assert build.main([*built, f"--out={tmp_path / 'data'}", "--workers=1"]) in (0, None)
  dataset = open_dataset(tmp_path / "data")
  captions = [c.decode() for c in dataset.parse("train", 0).captions]
  assert captions[0].startswith("picture number") and captions[1].startswith("A toy.")


def test_more_failures_than_may_be_are_no_success(pictures, tmp_path, capfd):
  def answer(body, number):
    bad = any(f'number {i}"' in chat_server.prompt(body) for i in (3, 4))
    return chat_server.Reply(500) if bad else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    assert command(server, pictures, tmp_path / "out", "--sample=0") == 2
    assert "2 of 20 pictures failed (pictures/server_error 2" in capfd.readouterr().err
    flags = ("--sample=0", "--max_failures=0.1")
    assert command(server, pictures, tmp_path / "out", *flags) == 0


def blind(body, number):
  if chat_server.picture(body):
    return chat_server.Reply(400, b'{"error": "m is not a multimodal model"}')
  return "red"


@pytest.mark.parametrize(
  ("answer", "flags", "said"),
  [
    (blind, [], r"--model=m answers texts but refuses a picture \(400: .*multimodal.*sees\.$"),
    (
      lambda b, n: chat_server.Reply(404, b"no model m"),
      [],
      r"\(404: no model m\)\. Give the addr",
    ),
    (lambda b, n: chat_server.Reply(403), [], r"refuses the key \(403\)\. "),
    (lambda b, n: chat_server.Reply(body=b"<html>"), [], "not as an OpenAI-compatible server does"),
    (lambda b, n: chat_server.Reply(close_after=0), [], "not as an OpenAI-compatible server does"),
    (lambda b, n: chat_server.Reply(302, headers={"Location": "http://x"}), [], "sends elsewhere"),
    (lambda b, n: chat_server.Reply(wait=1), ["--timeout=0.2"], r"no reply within --timeout=0.2 s"),
    (chat_server.sensible, ["--price_in=10", "--max_cost=0.5"], r"estimated \$0.60 is more than "),
    (chat_server.sensible, ["--max_cost=0.5"], "--max_cost needs the prices"),
    (
      chat_server.sensible,
      ["--server=ftp://x/v1"],
      r"--server=ftp://x/v1: not an address of the f",
    ),
    (chat_server.sensible, ["--server=localhost:8000"], "not an address of the form http://HOST"),
    (chat_server.sensible, ["--server=http://127.0.0.1:9/v1"], "nobody answers there. Start the"),
    (chat_server.sensible, ["--server=http://u:secret@h/v1"], "has a name or a password in it"),
    (chat_server.sensible, ["--server="], "--server is missing"),
    (chat_server.sensible, [f"--api_key_env={KEY}"], "not the name of an environment variable"),
    (chat_server.sensible, ["--model="], "--model is missing"),
    (chat_server.sensible, ["--concurrency=0"], r"--concurrency = 0: use a number from 1 to 1,024"),
    (chat_server.sensible, ["--prompts=/nowhere"], "--prompts=/nowhere: there is no such folder"),
    (chat_server.sensible, ["--backend=transformers"], "--server goes with --backend=server"),
  ],
)
def test_what_cannot_work_is_one_line_before_anything_is_spent(
  answer, flags, said, pictures, tmp_path, capfd
):
  with chat_server.serve(answer) as server:
    assert command(server, pictures, tmp_path / "out", *flags) == 2
    assert len(server.bodies) <= 10
  printed = capfd.readouterr()
  lines = printed.err.strip().splitlines()
  assert len(lines) == 1 and pytest.importorskip("re").search(said, lines[0]), lines
  assert KEY not in printed.err and "secret" not in printed.err
  assert not (tmp_path / "out").exists()


def test_a_busy_server_is_for_another_start_and_a_blind_one_is_told(pictures, tmp_path, capfd):
  with chat_server.serve(lambda body, number: chat_server.Reply(503, b"loading")) as server:
    assert command(server, pictures, tmp_path / "out") == failures.EXIT_RESTART
  assert "fails (503: loading). Try later." in capfd.readouterr().err

  def guessing(body, number):
    return "blue" if chat_server.asked(body) == "colour" else chat_server.sensible(body, number)

  with chat_server.serve(guessing) as server:
    assert command(server, pictures, tmp_path / "out") == 0
  assert "the model said 'blue'. Look at what it writes of yours" in capfd.readouterr().out


@pytest.mark.parametrize(
  ("name", "text", "said"),
  [
    ("features.txt", "Describe them.", r"no placeholder {subjects}. A prompt features has {capt"),
    ("caption.txt", "{caption} {subject}", r"an unknown placeholder {subject}\."),
    ("feature.txt", "{subjects}", r"feature\.txt is no prompt\. They are subjects\.txt, "),
    ("caption.txt", b"\xff\xfe\x00", r"not UTF-8"),
    ("caption.txt", "{caption}" + "x" * 20_000, "20,009 characters are no prompt"),
    (None, None, "holds no prompt"),
  ],
)
def test_a_prompt_file_that_is_none_is_one_line(name, text, said, tmp_path):
  if name:
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=said) as error:
    settings("http://h", prompts=str(tmp_path))
  assert "\n" not in str(error.value)


def test_prompts_of_ones_own_with_a_caption_that_looks_like_a_placeholder(tmp_path):
  own = 'Name its main visual subjects, {most}, as {"list": [...]}, of "{caption}".'
  (tmp_path / "subjects.txt").write_text(own)
  with chat_server.serve(chat_server.sensible) as server:
    found = item(captions=["{most} of {subjects} " + "x" * 10_000])
    annotate_one(server, found, prompts=str(tmp_path), no_caption=True)
  sent = chat_server.prompt(server.bodies[0])
  assert sent.startswith(
    'Name its main visual subjects, 10, as {"list": [...]}, of "{most} of {subj'
  )
  assert len(sent) < 2000 and sent.endswith('x...".')


def test_flags_clash_with_those_of_no_source():
  from grain_jax.data import sources

  for kind in sources.KINDS:
    with pytest.raises(SystemExit) as ended:
      annotate._parse(["describe", f"--source={kind}", "--help"])
    assert ended.value.code == 0
