"""The whole command `annotate describe`: what it leaves, what it says, what cannot work."""

import json
import logging
import pathlib
import re
import sys

import chat_server
import pytest
import toy_data
from describing import item, settings
from test_describe_server import BAD, KEY, annotate_one

from grain_jax import failures
from grain_jax.annotate import __main__ as annotate
from grain_jax.data import build, sources
from grain_jax.data.dataset import open_dataset


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
  # The colour, three samples; 20 captions, 20 subjects of which one twice, 19 features.
  assert manifest["totals"]["requests"] == 10 + 60 == len(server.bodies)
  assert manifest["totals"]["retries"] == 1
  assert manifest["totals"]["tokens_in"] == 68_000 and manifest["totals"]["tokens_out"] == 68 * 20
  assert manifest["totals"]["cost"] == pytest.approx(68 * 1020 * 10e-6)
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
  assert len(lines) == 1 and re.search(said, lines[0]), lines
  assert KEY not in printed.err and "secret" not in printed.err
  assert not (tmp_path / "out").exists()


def test_pictures_without_a_caption_have_a_price_too(pictures, tmp_path, capfd):
  names = [json.dumps({"image": f"{i}.jpg"}) + "\n" for i in range(20)]
  (pictures / "annotations.jsonl").write_text("".join(names))
  with chat_server.serve(chat_server.sensible) as server:
    assert command(server, pictures, tmp_path / "out", "--price_in=10", "--max_cost=0.5") == 2
    assert 0 < len(server.bodies) <= 10
  assert "is more than --max_cost=0.5" in capfd.readouterr().err


@pytest.mark.parametrize(
  "kind", ["rate_limited", "server_error", "garbage", "cut_reply", "timeout"]
)
def test_what_goes_wrong_once_at_the_first_question_is_asked_again(kind, pictures, tmp_path, capfd):
  def answer(body, number):
    return BAD[kind] if number == 0 else chat_server.sensible(body, number)

  with chat_server.serve(answer) as server:
    assert command(server, pictures, tmp_path / "out", "--timeout=0.5") == 0
  assert json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["failed"] == 0


def test_max_cost_holds_or_nothing_is_begun(pictures, tmp_path, capfd):
  """Where the server tells no tokens, and where the first pictures have nothing to ask."""

  def silent(body, number):
    return chat_server.Reply(text=chat_server.sensible(body, number), usage=None)

  priced = ("--price_in=1000", "--max_cost=0.5")
  with chat_server.serve(silent) as server:
    assert command(server, pictures, tmp_path / "out", *priced) == 2
    assert len(server.bodies) == 10
  assert "--max_cost=0.5 cannot be held: the server does not tell" in capfd.readouterr().err
  boxes = [{"description": "a dog", "box": [0.1, 0.1, 0.9, 0.9]}] * 3
  lines = [{"image": f"{i}.jpg", "captions": ["x"], "regions": boxes * (i > 4)} for i in range(20)]
  (pictures / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  with chat_server.serve(chat_server.sensible) as server:
    regions = ("--region_captions", "--price_in=10")
    assert command(server, pictures, tmp_path / "out", *regions, "--max_cost=0.4") == 2
    captured = capfd.readouterr()
    assert "estimated of 9 boxes, all 45: 45,000 tokens in" in captured.out
    assert "estimated $0.45 is more than --max_cost=0.4" in captured.err
    assert command(server, pictures, tmp_path / "out", *regions, "--max_cost=0.5") == 0


def test_what_a_stopped_run_spent_is_in_the_totals(pictures, tmp_path):
  stop = [True]

  def answer(body, number):
    if stop[0] and number >= 40:
      return chat_server.Reply(401)
    return chat_server.sensible(body, number)

  flags = ("--concurrency=1", "--price_in=1")
  with chat_server.serve(answer) as server:
    assert command(server, pictures, tmp_path / "out", *flags) == 2
    stop[0] = False
    for _ in range(2):  # the second time there is nothing to do, and nothing is asked
      assert command(server, pictures, tmp_path / "out", *flags) == 0
      manifest = (tmp_path / "out" / "manifest.json").read_text()
      assert json.loads(manifest)["totals"]["requests"] == len(server.bodies)


def test_packages_that_are_missing_are_one_line(pictures, tmp_path, capfd, monkeypatch):
  monkeypatch.setitem(sys.modules, "httpx", None)
  assert command("http://127.0.0.1:9/v1", pictures, tmp_path / "out") == 2
  assert "needs httpx: pip install -r requirements-annotate.txt." in capfd.readouterr().err


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
  for kind in sources.KINDS:
    with pytest.raises(SystemExit) as ended:
      annotate._parse(["describe", f"--source={kind}", "--help"])
    assert ended.value.code == 0
