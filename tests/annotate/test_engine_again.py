"""A run that goes on: after a kill within a block, over a source that changed, with odd keys."""

import io
import json
import tarfile

import pytest
import toy_data
from test_engine import Lengths, annotations, run

from grain_jax import failures
from grain_jax.annotate import __main__ as annotate
from grain_jax.annotate import block_files, engine, stages
from grain_jax.data.sources import folder as folder_source
from grain_jax.data.sources import options, webdataset


@pytest.fixture
def stage(monkeypatch):
  """The one stage of all jobs."""
  own = Lengths({})
  monkeypatch.setattr(stages, "make", lambda name, settings: own)
  return own


def folder(root, captions, *more):
  """Pictures 0.jpg, 1.jpg, ... with a caption each."""
  root.mkdir(exist_ok=True)
  lines = list(more)
  for i, caption in enumerate(captions):
    (root / f"{i}.jpg").write_bytes(toy_data.record(i)["image"])
    lines.append(json.dumps({"image": f"{i}.jpg", "captions": [caption]}))
  (root / "annotations.jsonl").write_text("\n".join(lines) + "\n")
  return folder_source.source(root)


def add_tar(root, number, names=("0", "1"), encoding="utf-8"):
  root.mkdir(exist_ok=True)
  path = root / f"{number:05d}.tar"
  with tarfile.open(path, "w", encoding=encoding, format=tarfile.GNU_FORMAT) as file:
    for i, name in enumerate(names):
      for ending, data in (("jpg", toy_data.record(i)["image"]), ("txt", b"a dog")):
        member = tarfile.TarInfo(f"{name}.{ending}")
        member.size = len(data)
        file.addfile(member, io.BytesIO(data))


def test_a_key_that_utf8_cannot_hold_is_counted_like_any_other_loss(stage, tmp_path, capsys):
  source = folder(tmp_path / "in", ["a"], r'{"image": "\ud83d.jpg", "captions": ["x"]}')
  losses = run(source, tmp_path / "out")["losses"]
  assert losses == {"pictures/malformed": {"count": 1, "first": [r"\ud83d.jpg"]}}
  add_tar(tmp_path / "tars", 0, ["caf\xe9", "dog"], encoding="latin-1")
  command = ["describe", "--source=webdataset", f"--input={tmp_path}/tars", "--ray_address=none"]
  command += [f"--out={tmp_path}/tars_out", "--server=http://127.0.0.1:9", "--model=m"]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("grain_jax.annotate.describe.check", lambda *a, **k: None)
    assert annotate.main(command) == 0
  assert r"pictures/malformed: 1 (first: 00000/caf\udce9)" in capsys.readouterr().out


def test_whatever_text_is_written_comes_back(tmp_path):
  values = [{"a": "\ud83d"}, {"a": "b\u2028\xe9\U0001f600"}]
  block_files.write_lines(tmp_path / "x.jsonl", values)
  assert block_files.read_lines(tmp_path / "x.jsonl") == values


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
  """In a pod the process that goes on has the number of the one that was killed."""
  file = tmp_path / "parts" / "000000.vm-1.jsonl"
  for value in ({"n": 1}, {"n": 2}):
    block_files.append_line(file, value)
  file.write_bytes(file.read_bytes()[:-3])
  block_files.append_line(file, {"n": 3})
  cut = {"pictures": [], "totals": {"cut_lines": 1}, "seconds": 0.0}
  assert list(block_files._read_parts(file)) == [{"n": 1}, cut, {"n": 3}]
  file.write_bytes(file.read_bytes()[:-3])
  assert list(block_files._read_parts(file)) == [{"n": 1}, cut, cut]
  assert block_files.Saved(tmp_path / "none", 0).totals == {}


def test_pictures_that_changed_are_refused(stage, tmp_path):
  add_tar(tmp_path / "tars", 0)
  run(webdataset.source(tmp_path / "tars"), tmp_path / "of_tars")
  add_tar(tmp_path / "tars", 1)  # the download went on
  with pytest.raises(
    ValueError, match=r"have changed since \(files 1 -> 2, bytes .*Choose another"
  ):
    run(webdataset.source(tmp_path / "tars"), tmp_path / "of_tars")
  source = folder(tmp_path / "in", ["a", "b"])
  run(source, tmp_path / "out")
  (tmp_path / "in" / "0.jpg").write_bytes(b"another one")
  with pytest.raises(ValueError, match="have changed since"):
    run(source, tmp_path / "out")


def test_a_stage_that_is_finished_leaves_its_files_as_they_are(stage, tmp_path):
  """So that the stage after it goes on."""
  source = folder(tmp_path / "in", ["a", "bad"])
  run(source, tmp_path / "first", max_failures=1.0)
  given = {"annotated": str(tmp_path / "first")}
  run(options.apply(source, given), tmp_path / "second", max_failures=1.0)
  before = (tmp_path / "first" / "manifest.json").stat().st_mtime_ns
  checks = []
  run(source, tmp_path / "first", max_failures=1.0, check=lambda: checks.append(1))
  assert (tmp_path / "first" / "manifest.json").stat().st_mtime_ns == before and not checks
  run(options.apply(source, given), tmp_path / "second", max_failures=1.0)


def test_a_picture_that_a_block_has_twice_is_done_once(stage, tmp_path):
  twice = json.dumps({"image": "0.jpg", "captions": ["bad"]})
  source = folder(tmp_path / "in", ["a", "bad"], twice)
  first = run(source, tmp_path / "out", max_failures=1.0)
  assert first["counts"]["pictures"] == 3 and first["counts"]["read"] == 2
  assert first["losses"]["pictures/duplicate_key"] == {"count": 1, "first": ["0.jpg"]}
  again = run(source, tmp_path / "out", max_failures=1.0, retry_failed=True)
  assert (again["counts"], again["losses"]) == (first["counts"], first["losses"])
  assert len(annotations(tmp_path / "out")) == 2


def test_what_was_done_of_a_block_is_not_done_again(stage, tmp_path, monkeypatch):
  """Nor lost what it cost. A line that was cut by the kill is counted, and none."""
  source = folder(tmp_path / "in", ["a"] * 4 + ["bad"] + ["a"] * 8)
  whole = run(source, tmp_path / "whole", max_failures=1.0)
  left = [7]

  def one(item):
    left[0] -= 1
    if left[0] < 0:
      raise failures.TransientError("gone")
    return Lengths.one(stage, item)

  monkeypatch.setattr(stage, "one", one)
  with pytest.raises(failures.TransientError):
    run(source, tmp_path / "out")
  (part,) = (tmp_path / "out" / "parts").iterdir()
  with part.open("a") as file:
    file.write('{"pictures": [{"key"')
  left[0] = 13 - 6
  found = run(source, tmp_path / "out", max_failures=1.0)
  assert left == [0]  # the first two of three at a time were there
  for name in ("counts", "losses"):
    assert found[name] == whole[name]
  assert found["totals"] == {"asked": 13 + 3, "never": 0, "cut_lines": 1}
  assert annotations(tmp_path / "out") == annotations(tmp_path / "whole")
  assert not list((tmp_path / "out" / "parts").iterdir())


def test_failed_pictures_of_a_block_that_is_not_done_are_done_again_too(
  stage, tmp_path, monkeypatch
):
  source = folder(tmp_path / "in", ["bad"] * 3 + ["a"] * 3)
  left = [3]

  def one(item):
    left[0] -= 1
    if left[0] == -1:
      raise failures.TransientError("gone")
    return Lengths.one(stage, item) if left[0] >= 0 else stages.Result({"descriptions": ["x"]})

  monkeypatch.setattr(stage, "one", one)
  with pytest.raises(failures.TransientError):
    run(source, tmp_path / "out")
  found = run(source, tmp_path / "out", retry_failed=True)
  assert found["counts"]["failed"] == 0 and found["losses"] == {}
  assert found["totals"] == {"asked": 3 + 3 + 6, "never": 0}


def test_the_time_left_is_that_of_the_blocks_of_this_start(stage, tmp_path, monkeypatch):
  source = folder(tmp_path / "in", ["a"] * 10)
  source = source.__class__(
    **{**vars(source), "blocks": lambda scratch: [{"n": n} for n in range(10)]}
  )
  now = [0.0]
  monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
  facts = {"counts": {"read": 1}, "losses": {}, "totals": {}, "seconds": 1}
  for number in range(8):
    block_files.write_lines(block_files.file_of(tmp_path / "out", "facts", number), [facts])

  def execute(job, todo, done):
    for task in todo:
      now[0] += 5.0
      number = task["number"]
      block_files.write_lines(block_files.file_of(tmp_path / "out", "facts", number), [facts])
      done(task)

  said = []
  run(source, tmp_path / "out", execute=execute, say=said.append)
  assert said[1:] == ["9 of 10 blocks, 5 s left", "10 of 10 blocks, 0 s left"]


def test_what_a_long_description_is_of_goes_on_to_the_next_stage(stage, tmp_path, monkeypatch):
  source = folder(tmp_path / "in", ["a"])
  own = {"description": "A brown dog sleeps.", "of": "a dog", "box": [0.0, 0.0, 0.5, 0.5]}
  monkeypatch.setattr(stage, "one", lambda item: stages.Result({"regions": [own]}))
  run(source, tmp_path / "first")
  seen = []
  monkeypatch.setattr(stage, "one", lambda item: seen.append(item) or stages.Result({}))
  run(options.apply(source, {"annotated": str(tmp_path / "first")}), tmp_path / "second")
  assert seen[0].regions[0]["of"] == "a dog"
