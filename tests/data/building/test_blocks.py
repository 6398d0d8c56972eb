"""A build in blocks: by one process or several, killed or not, it comes to the same shards."""

import errno
import hashlib
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import toy_data
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_jax import failures
from grain_jax.data import build, dataset
from grain_jax.data.building import block as block_lib
from grain_jax.data.building import locks, run, tasks, workers
from grain_jax.data.sources import base, folder_lines
from grain_jax.data.sources import folder as folder_source
from grain_jax.data.sources import scenes as scenes_source

ROOT = pathlib.Path(__file__).parents[3]


def shards(out):
  """{file: sha256 of its bytes} of what training reads, and the counts."""
  manifest = json.loads((out / "manifest.json").read_text())
  files = {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(out.glob("*.array_record*"))
  }
  return files, {key: manifest[key] for key in ("splits", "kept_and_dropped", "hints", "inputs")}


def write_folder(path, count, *, bad=()):
  """A folder of so many lines over few pictures; every seventh has no box, `bad` no picture."""
  path.mkdir()
  names = []
  for i in range(5):
    record = toy_data.record(i)
    (path / f"{i}.jpg").write_bytes(record["image"])
    names.append(record["regions"])
  with (path / "annotations.jsonl").open("w") as lines:
    for i in range(count):
      regions = names[i % 5] if i % 7 else []
      link = path / f"p{i}.jpg"
      if i not in bad:
        link.symlink_to(f"{i % 5}.jpg")
      line = {"image": link.name, "captions": [f"picture {i}"], "regions": regions}
      lines.write(json.dumps(line) + "\n")
  return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """Four blocks; two lines have no picture."""
  return write_folder(tmp_path_factory.mktemp("images") / "in", 3500, bad=(1700, 3000))


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
  out = tmp_path_factory.mktemp("undisturbed") / "out"
  build.build(folder_source.source(images), out, workers=0, shard_size=900, say=toy_data.quiet)
  return shards(out)


def test_several_processes_write_the_same_shards(images, undisturbed, tmp_path):
  said = []
  source = folder_source.source(images)
  build.build(source, tmp_path / "out", workers=2, shard_size=900, say=said.append)
  assert shards(tmp_path / "out") == undisturbed
  assert [entry["records"] for entry in undisturbed[1]["splits"]["train"]["shards"]] == [
    900, 900, 900, 798,
  ]  # fmt: skip
  assert undisturbed[1]["splits"]["train"]["dropped"]["records"]["missing_image"] == {
    "count": 2, "first": ["p1700.jpg", "p3000.jpg"],
  }  # fmt: skip
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def start(images, out, *flags, room=None):
  """A build in a process of its own; `room`: bytes that a file may have."""
  limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # noqa: E731
  return subprocess.Popen(
    [sys.executable, "-m", "grain_jax.data.build", "--source=folder", f"--input={images}",
     f"--out={out}", "--shard_size=900", *flags],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    preexec_fn=None if room is None else limit,
  )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_goes_on(images, undisturbed, tmp_path, seed):
  """By SIGKILL, twice; what is finished is not read again, and nothing is there twice or lost."""
  random_ = random.Random(seed)
  out, flags = tmp_path / "out", ["--workers=2"] if seed % 2 else ["--workers=0"]

  def done():
    return len(list((tmp_path / "out.part" / "blocks").glob("[0-9]*[0-9]/facts.json")))

  codes = []
  for _ in range(2):
    before, process = done(), start(images, out, *flags)
    while process.poll() is None and done() == before:
      time.sleep(0.005)
    time.sleep(random_.uniform(0, 0.3))
    process.kill()
    process.communicate()
    codes.append(process.returncode)
  assert -signal.SIGKILL in codes
  there = done()
  process = start(images, out, *flags)
  said, _ = process.communicate(timeout=120)
  assert process.returncode == 0, said
  assert f"{there} of 4 blocks are there" in said or not there
  assert shards(out) == undisturbed
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_is_a_line_and_the_build_goes_on(images, undisturbed, tmp_path, workers):
  """Here no file may grow beyond 100 kB."""
  out, flags = tmp_path / "out", f"--workers={workers}"
  process = start(images, out, flags, room=100_000)
  said, _ = process.communicate(timeout=60)
  last = said.splitlines()[-1]
  assert process.returncode == failures.EXIT_RESTART, said
  assert "the disk is full (File too large: " in last and "the same command goes on" in last
  finished = start(images, out, flags)
  assert finished.wait(timeout=60) == 0
  finished.stdout.close()
  assert shards(out) == undisturbed


@pytest.mark.slow
def test_a_killed_worker_is_a_line_and_the_build_goes_on(images, undisturbed, tmp_path):
  """Code 75: whoever starts it again may have more luck."""
  process = start(images, tmp_path / "out", "--workers=2")
  killed = False
  while process.poll() is None and not killed:
    for child in (
      pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ):
      if b"building.worker" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
        os.kill(int(child), signal.SIGKILL)
        killed = True
        break
    time.sleep(0.005)
  said, _ = process.communicate(timeout=60)
  last = said.splitlines()[-1]
  assert process.returncode == failures.EXIT_RESTART and "was killed by signal 9" in last
  assert "The same command goes on where it stopped" in last
  again = start(images, tmp_path / "out", "--workers=2")
  assert again.wait(timeout=60) == 0
  again.stdout.close()
  assert shards(tmp_path / "out") == undisturbed


def test_what_was_read_is_not_read_again(images, undisturbed, tmp_path, monkeypatch):
  """A build that stops in the third block, and one whose shards are half written."""
  source, out = folder_source.source(images), tmp_path / "out"
  calls = []
  write = block_lib.write

  def failing(source, block, path, **options):
    calls.append(path.name)
    if len(calls) == 3:
      raise failures.TransientError("the disk is gone")
    write(source, block, path, **options)

  monkeypatch.setattr(block_lib, "write", failing)
  options = {"workers": 0, "shard_size": 900, "say": toy_data.quiet}
  with pytest.raises(failures.TransientError):
    build.build(source, out, **options)
  monkeypatch.setattr(tasks.shards, "write", lambda *a, **k: (_ for _ in ()).throw(KeyError("x")))
  with pytest.raises(KeyError):
    build.build(folder_source.source(images), out, **options)
  assert calls == ["000000", "000001", "000002", "000002", "000003"]
  monkeypatch.undo()
  monkeypatch.setattr(block_lib, "write", lambda *a, **k: pytest.fail("read again"))
  build.build(folder_source.source(images), out, **options)
  assert shards(out) == undisturbed


@pytest.mark.slow
def test_ray_writes_the_same_shards(images, undisturbed, tmp_path):
  """On a cluster of this machine; one that is not there is a line."""
  ray = pytest.importorskip("ray")
  said, source = [], folder_source.source(images)
  try:
    build.build(source, tmp_path / "out", ray_address="local", shard_size=900, say=said.append)
    assert shards(tmp_path / "out") == undisturbed
    assert any(line.startswith("Ray: ") for line in said)
    broken = folder_source.source(images)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "annotations.csv").write_bytes(b"image,caption\na.jpg,\xff\n")
    broken = folder_source.source(tmp_path / "in")
    with pytest.raises(ValueError, match="not UTF-8"):
      build.build(broken, tmp_path / "bad", ray_address="local", say=toy_data.quiet)
  finally:
    ray.shutdown()
  with pytest.raises(ValueError, match="no cluster answers there") as error:
    build.build(source, tmp_path / "other", ray_address="localhost:1", say=toy_data.quiet)
  assert "\n" not in str(error.value)


def test_blocks_of_other_inputs_are_not_gone_on_with(images, tmp_path, monkeypatch):
  out, said = tmp_path / "out", []
  write = tasks.shards.write
  monkeypatch.setattr(tasks.shards, "write", lambda *a, **k: (_ for _ in ()).throw(KeyError("x")))
  with pytest.raises(KeyError):
    build.build(folder_source.source(images), out, workers=0, say=toy_data.quiet)
  monkeypatch.setattr(tasks.shards, "write", write)
  other = folder_source.source(images, val_fraction=0.5)
  build.build(other, out, workers=0, say=said.append)
  assert any("of other settings or inputs: it is begun anew" in line for line in said)
  assert set(dataset.open_dataset(out).splits) == {"train", "val"}


def test_two_builds_of_one_folder_are_told_apart(images, tmp_path):
  source = folder_source.source(images)
  with (
    locks.held(tmp_path / "out.part", toy_data.quiet),
    pytest.raises(ValueError, match="another command writes"),
  ):
    build.build(source, tmp_path / "out", say=toy_data.quiet)


def test_a_key_of_another_block_is_a_duplicate(tmp_path):
  folder = write_folder(tmp_path / "in", 2100)
  lines = (folder / "annotations.jsonl").read_text().splitlines()
  lines[2050] = lines[3].replace("picture 3", "again")
  (folder / "annotations.jsonl").write_text("\n".join(lines))
  source = folder_source.source(folder)
  build.build(source, tmp_path / "out", workers=2, say=toy_data.quiet)
  opened = dataset.open_dataset(tmp_path / "out")
  assert opened.num_records("train") == 2099
  dropped = opened.manifest["splits"]["train"]["dropped"]["records"]
  assert dropped == {"duplicate_key": {"count": 1, "first": ["p3.jpg"]}}
  assert opened.parse("train", 3).captions == [b"picture 3"]
  assert opened.parse("train", 2050).key == b"p2051.jpg"


def test_a_long_build_of_which_too_much_is_dropped_need_not_read_again(tmp_path, monkeypatch):
  monkeypatch.setattr(run, "_FEW", 1)
  folder = write_folder(tmp_path / "in", 1100, bad=range(0, 1100, 3))
  monkeypatch.setattr(run.tally, "check_missing", lambda *a: None)
  source = folder_source.source(folder)
  with pytest.raises(ValueError, match="What was read is kept in .*out.part"):
    build.build(source, tmp_path / "out", workers=0, say=toy_data.quiet)
  monkeypatch.setattr(block_lib, "write", lambda *a, **k: pytest.fail("read again"))
  build.build(
    folder_source.source(folder), tmp_path / "out", workers=0, allow_dropped=1, say=toy_data.quiet
  )
  assert dataset.open_dataset(tmp_path / "out").num_records("train") == 733


def test_an_error_of_a_later_command_does_not_undo_what_was_read(images, tmp_path, monkeypatch):
  """A cluster that does not answer, pictures that are not mounted."""
  monkeypatch.setattr(run, "_FEW", 1)
  out, options = tmp_path / "out", {"workers": 0, "shard_size": 900, "say": toy_data.quiet}
  perform, done = tasks.perform, []

  def failing(task, *arguments, **named):
    if len(done) == 2:
      raise failures.TransientError("gone")
    done.append(task)
    perform(task, *arguments, **named)

  monkeypatch.setattr(tasks, "perform", failing)
  source = folder_source.source(images)
  with pytest.raises(failures.TransientError):
    build.build(source, out, **options)
  monkeypatch.setattr(tasks, "perform", perform)
  with pytest.raises(ValueError, match="no cluster answers there.*is kept in"):
    build.build(source, out, **{**options, "ray_address": "localhost:1"})
  with monkeypatch.context() as patch, pytest.raises(ValueError, match="not there.*is kept in"):
    patch.setattr(run, "images_of", lambda *_: (_ for _ in ()).throw(ValueError("not there.")))
    build.build(source, out, **options)
  said = []
  build.build(source, out, **{**options, "say": said.append})
  assert any("2 of 4 blocks are there" in line for line in said)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "no locks")

  monkeypatch.setattr(locks.fcntl, "flock", refuse)
  said = []
  with locks.held(tmp_path / "out", said.append):
    assert len(said) == 1 and "without locks" in said[0]


def test_scenes_of_several_processes_are_those_of_one(tmp_path, monkeypatch):
  some = scenes_source.source(
    train=40, val=3, concepts=6, objects_per_class=1, image_size=32, names=""
  )
  monkeypatch.setattr(scenes_source, "BLOCK", 8)  # here alone: a worker gets its blocks as JSON
  for count in (0, 2):
    build.build(some, tmp_path / str(count), workers=count, say=toy_data.quiet)
  assert shards(tmp_path / "0")[0] == shards(tmp_path / "2")[0]


def test_a_fault_of_the_source_in_a_worker_is_its_line(images, tmp_path):
  source = folder_source.source(images)
  place = tasks.Place(tmp_path / "part")
  place.scratch.mkdir(parents=True)
  execute = workers.executor(source, place, workers=2)
  bad = [{"do": "block", "number": 0, "block": {"start": "x", "stop": None}, "share": 1.0}]
  with pytest.raises(ValueError, match="a worker of the build ended with code 1"):
    execute(iter(bad), toy_data.quiet)  # a block that is none: a fault of the program, not of data


field = st.text(alphabet='ab,"\n\r é', max_size=6)


@settings(max_examples=150)
@given(
  rows=st.lists(st.tuples(st.sampled_from(["1", "2", "x y"]), field), max_size=12),
  size=st.integers(1, 5),
  end=st.sampled_from(["\n", "\r\n"]),
)
def test_blocks_of_csv_are_its_rows(tmp_path_factory, rows, size, end):
  """Cut anywhere, they give the lines of the whole file; one image's stay together."""
  import csv

  path = tmp_path_factory.mktemp("csv") / "annotations.csv"
  with path.open("w", newline="") as file:
    writer = csv.writer(file, lineterminator=end)
    writer.writerow(["image", "caption"])
    writer.writerows(rows)
  blocks = list(folder_lines.blocks(path, size))
  read = [list(folder_lines.read(path, block=block)) for block in blocks]
  assert [line for lines in read for line in lines] == list(folder_lines.read(path))


@settings(max_examples=100)
@given(
  lines=st.lists(st.sampled_from(['{"image": "a"}', "", "  ", "nonsense", '{"b": "é\\u2028"}']),
                 max_size=12),
  size=st.integers(1, 4),
)  # fmt: skip
def test_blocks_of_lines_are_its_lines(tmp_path_factory, lines, size):
  path = tmp_path_factory.mktemp("jsonl") / "annotations.jsonl"
  path.write_text("\n".join(lines), encoding="utf-8")
  read = [
    line
    for block in folder_lines.blocks(path, size)
    for line in folder_lines.read(path, block=block)
  ]
  assert read == list(folder_lines.read(path))


def test_a_source_is_made_again_from_its_recipe(images, tmp_path):
  from grain_jax.data import sources

  for source in (
    folder_source.source(images, val_fraction=0.3, box_format="xyxy", tolerance=0.1),
    scenes_source.source(train=4, val=1, concepts=6, objects_per_class=1, names=""),
  ):
    again = sources.make(json.loads(json.dumps(source.recipe)))
    assert json.dumps(again.settings) == json.dumps(source.settings)
    assert list(again.blocks(tmp_path)) == list(source.blocks(tmp_path))
    ours, theirs = (
      [key(item) for item in list(base.iterate(which))[:50]] for which in (again, source)
    )
    assert ours == theirs


def key(item):
  split, record = item
  return split, record.key if hasattr(record, "key") else record["key"]
