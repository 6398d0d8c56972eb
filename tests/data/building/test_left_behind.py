"""What a killed build leaves behind: files of half a build, workers."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import toy_data

from grain_jax.data import build, dataset
from grain_jax.data.building import destination


def test_killed_while_it_makes_room_for_other_settings(tmp_path, monkeypatch):
  """What is left is a build of neither; of the first a folder was gone."""
  out, rmtree = tmp_path / "out", shutil.rmtree
  source = toy_data.source([toy_data.record(i) for i in range(12)])
  other = dataclasses.replace(source, settings={**source.settings, "other": 1})
  options = {"workers": 0, "shard_size": 4, "say": toy_data.quiet}
  with monkeypatch.context() as patch:  # killed when all is written
    patch.setattr(destination, "deliver", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      build.build(source, out, **options)

  def killed(path, *options, **more):
    rmtree(path, *options, **more)
    if path.parent.name == "out.part":
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
      build.build(other, out, **options)
  assert not (tmp_path / "out.part" / "plan.json").exists()
  build.build(source, out, **options)
  assert len(dataset.open_dataset(out)._splits["train"].paths) == 3


@pytest.mark.parametrize("left", ["all", "without the plan's shards", "half of a block"])
def test_killed_when_the_dataset_is_delivered(tmp_path, monkeypatch, left):
  """What lies beside it then is no reason that it can never be built again."""
  out, part = tmp_path / "out", tmp_path / "out.part"
  read, rmtree = toy_data.source([toy_data.record(i) for i in range(12)]), shutil.rmtree
  source = dataclasses.replace(
    read, blocks=lambda scratch: [{"n": i} for i in range(3)], read=lambda *_: read.read()
  )
  options = {"workers": 0, "shard_size": 4, "allow_dropped": 1, "say": toy_data.quiet}
  with monkeypatch.context() as patch:
    patch.setattr(destination, "deliver", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      build.build(source, out, **options)
  (part / "dataset").rename(out)  # and killed there, or a little later
  if left == "without the plan's shards":
    (part / "dataset").mkdir()
  elif left == "half of a block":
    (part / "blocks" / "000000" / "facts.json").unlink()
    (part / "blocks" / "000000" / "x").touch()
  before = sorted(path.name for path in out.iterdir())
  build.build(source, out, overwrite=True, **options)
  assert sorted(path.name for path in out.iterdir()) == before and not part.exists()
  assert dataset.open_dataset(out).num_records("train") == 12

  def killed(path, *args, **more):
    if path == part:
      raise KeyboardInterrupt
    rmtree(path, *args, **more)

  with monkeypatch.context() as patch:
    patch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
      build.build(source, out, overwrite=True, **options)
  assert dataset.open_dataset(out).num_records("train") == 12
  assert part.exists() and not (part / "plan.json").exists()  # and is no build any more
  build.build(source, out, overwrite=True, **options)
  assert not part.exists()


def test_a_worker_ends_with_the_build_in_the_midst_of_a_task(tmp_path):
  """Else it goes on to write where the next build does."""
  program = (
    "import sys, time\nfrom grain_jax.data import sources\n"
    "from grain_jax.data.building import tasks, worker\n"
    "sources.make = lambda recipe: None\n"
    "def perform(*task):\n  print('busy', flush=True)\n  time.sleep(60)\n"
    "tasks.perform = perform\nsys.exit(worker.main())\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", program, "{}", str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  process.stdin.write(b"{}\n")
  process.stdin.flush()
  assert process.stderr.readline() == b"busy\n"
  process.stdin.close()
  assert process.wait(timeout=30) == 0
  process.stderr.close()
