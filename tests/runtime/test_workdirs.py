"""One run a workdir, one workdir for all processes, and one that takes a checkpoint."""

import errno
import json
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

from grain_jax import failures
from grain_jax.runtime import checkpoint, distributed, workdirs

HOLD = """
import pathlib, sys, time
from grain_jax.runtime import workdirs

with workdirs.hold(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def test_a_second_run_is_told_who_holds_it(holder, tmp_path, monkeypatch):
  monkeypatch.setattr(workdirs, "LOCK_SECONDS", 0.2)
  with pytest.raises(ValueError, match=f"is held by process {holder.pid} on .*, since 20") as error:
    workdirs.hold(tmp_path).__enter__()
  assert "\n" not in str(error.value) and not failures.restart_helps(error.value)


def test_a_dead_run_holds_nothing_and_one_that_ends_is_waited_for(holder, tmp_path):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == holder.pid  # left behind
  with workdirs.hold(tmp_path):
    assert json.loads((tmp_path / ".lock.json").read_text())["pid"] != holder.pid
  assert not (tmp_path / ".lock.json").exists()
  with workdirs.hold(tmp_path):
    pass


def test_a_damaged_note_of_the_holder_is_no_obstacle(holder, tmp_path, monkeypatch):
  (tmp_path / ".lock.json").write_text("{")
  monkeypatch.setattr(workdirs, "LOCK_SECONDS", 0.1)
  with pytest.raises(ValueError, match="is held by another run"):
    workdirs.hold(tmp_path).__enter__()


def as_one_of_two(monkeypatch, index, answers):
  """This process is one of two; `answers` are the other's in `gather`."""
  monkeypatch.setattr(distributed, "process_count", lambda: 2)
  monkeypatch.setattr(distributed, "process_index", lambda: index)
  answers = iter(answers)

  def gather(name, value, **options):
    own, other = value, next(answers)
    return [own, other] if index == 0 else [other, own]

  monkeypatch.setattr(distributed, "gather", gather)
  monkeypatch.setattr(distributed, "broadcast", lambda name, value: gather(name, value)[0])


def test_a_process_that_does_not_see_the_folder_is_named(monkeypatch, tmp_path):
  as_one_of_two(monkeypatch, 0, ["", "", "False"])
  with pytest.raises(ValueError, match="process 1 of 2 does not see within 1 s"):
    workdirs.prove_shared(tmp_path, seconds=1.0)
  assert list(tmp_path.iterdir()) == []


def test_a_listing_that_lags_is_waited_for(monkeypatch, tmp_path):
  """A network file system may remember for a while that a file was not there."""
  as_one_of_two(monkeypatch, 1, [".shared-x", "", "True"])
  monkeypatch.setattr(
    workdirs.time, "sleep", lambda s: (tmp_path / ".shared-x").write_text(".shared-x")
  )
  workdirs.prove_shared(tmp_path, seconds=1.0)


@pytest.mark.parametrize(
  ("number", "kind"), [(errno.ENOSPC, failures.TransientError), (errno.EACCES, ValueError)]
)
def test_a_workdir_that_takes_no_checkpoint_is_said_with_the_right_code(tmp_path, number, kind):
  def save():
    raise checkpoint.SaveError("checkpoint 0 could not be written") from OSError(number, "x")

  with pytest.raises(kind, match="takes no checkpoint: checkpoint 0 could not be written") as error:
    workdirs.prove_saving(tmp_path, save)
  assert failures.restart_helps(error.value) == (kind is failures.TransientError)


def test_the_probe_leaves_nothing_nor_minds_what_a_killed_start_left(tmp_path):
  killed = checkpoint.Checkpoints(tmp_path / ".probe")
  killed.save(0, {"w": jnp.arange(4.0)}, {"step": 0})
  killed.close()
  workdirs.save_probe(tmp_path, {"w": jnp.arange(4.0)})
  assert list(tmp_path.iterdir()) == []


def test_a_file_in_a_lock_s_stead_is_named_and_not_waited_for_in_vain(tmp_path, monkeypatch):
  """Without flock, as of Lustre mounted without it, the file of a dead process stays."""

  def timed_out(*_, **__):
    raise workdirs.filelock.Timeout("x")

  monkeypatch.setattr(workdirs.filelock.FileLock, "acquire", timed_out)
  for content, named in (("", False), ("1\nvm\n", True)):
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(ValueError, match="is held by") as error, workdirs.hold(tmp_path):
      pass
    assert (f"If it is gone, remove {tmp_path / '.lock'}" in str(error.value)) == named


@pytest.mark.parametrize("name", ["annotations.csv", "manifest.json", "a.JPG", "00000.tar"])
def test_a_folder_of_data_is_no_workdir(tmp_path, name):
  folder = tmp_path / "pets"
  workdirs.make(folder)
  (folder / "log.txt").touch()
  workdirs.make(folder)
  (folder / name).touch()
  with pytest.raises(ValueError, match=f"pets holds {name}: a run would write"):
    workdirs.make(folder)
  (folder / "config.json").touch()  # a run is there
  workdirs.make(folder)


def test_what_cannot_be_a_folder_is_one_line(tmp_path):
  (tmp_path / "file").touch()
  for place in (tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/x")):
    with pytest.raises(ValueError, match=f"^--workdir={place} cannot be a run's folder: ") as error:
      workdirs.make(place)
    assert "\n" not in str(error.value)
