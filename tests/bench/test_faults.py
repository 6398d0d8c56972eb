"""Two real processes: preempted, one killed, and gone on with as one; storage that is lost."""

import os
import shutil
import signal
import time

import pytest

from bench import faults, kills, several
from grain_jax.convert import weights
from grain_jax.failures import EXIT_RESTART as RESTART
from grain_jax.training import loop as train


@pytest.fixture
def scenarios(scenes_dir, tmp_path):
  (tmp_path / "scenes").symlink_to(scenes_dir)
  return faults.Faults(tmp_path, kills=0, seed=0)


@pytest.mark.long
def test_two_processes_stop_and_one_goes_on(scenarios, tmp_path):
  """The same losses as one process that nothing disturbed, so the same order of samples."""
  whole, run = tmp_path / "whole", tmp_path / "run"
  pair = several.start_pair(scenarios.data, run)
  several.wait_for_step(4, run, *pair)
  pair[1].send_signal(signal.SIGTERM)
  assert several.end(pair) == [RESTART, RESTART], several.said(run)
  (stopped,) = kills.saved_steps(run)[-1:]
  assert f"checkpoint {stopped} is saved" in several.said(run, "p0-")
  assert max(several.losses(run)) == stopped < 12  # saved at the very step at which both stopped

  pair = several.start_pair(scenarios.data, run)
  several.wait_for_step(stopped + 1, run, *pair)
  pair[1].kill()
  began = time.monotonic()
  assert several.end(pair) == [RESTART, -signal.SIGKILL], several.said(run)
  assert time.monotonic() - began < 90
  assert "process 1 of 2" in several.said(run, "p0-") and "is lost" in several.said(run, "p0-")

  kills.finish(kills.start(scenarios.data, run, *several.PAIR), run)
  train.train(weights.load_run(str(run))[0], str(whole))
  assert list(several.losses(run)) == list(range(1, 13))
  assert several.losses(run) == pytest.approx(several.losses(whole), rel=1e-4)


# `grain_jax.main` that waits less for lost storage.
_IMPATIENT = """
from grain_jax import cli, failures, main

failures.RETRY_DELAYS = (0.1, 0.1)
cli.run(main.main)
"""


@pytest.mark.long
def test_storage_lost_by_one_of_two_ends_both_with_its_line(scenarios, tmp_path):
  data, run = shutil.copytree(scenarios.data, tmp_path / "copy"), tmp_path / "run"
  pair = several.start_several(
    scenarios.data, run, 2, "--config.data.prefetch=1", last=("-c", _IMPATIENT), last_data=data
  )
  several.wait_for_step(3, run, *pair)
  for shard in data.glob("*train*array_record*"):
    os.truncate(shard, shard.stat().st_size // 3)
  assert several.end(pair) == [RESTART, RESTART], several.said(run)
  for i in (0, 1):
    said = several.said(run, f"p{i}-")
    assert f"{data}/" in said and "cannot be read" in said and "Traceback" not in said
  assert max(several.losses(run)) < 12 and kills.saved_steps(run)
  assert all(loss > 0 for loss in several.losses(run).values())


def test_what_the_scenarios_look_at(tmp_path):
  assert several.lines(tmp_path) == 0
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert several.lines(tmp_path) == 2
  (tmp_path / "p0-err.txt").write_text("a\n")
  (tmp_path / "p1-err.txt").write_text("b\n")
  assert (several.said(tmp_path), several.said(tmp_path, "p1-")) == ("a\nb\n", "b\n")
  assert several.find_line("x\na lost b\nlost", "lost") == "a lost b"


def test_an_overwritten_shard_is_whole_again(scenarios, scenes_dir, tmp_path):
  data = shutil.copytree(scenes_dir, tmp_path / "copy")
  before = {p: p.read_bytes() for p in data.rglob("*array_record*")}
  with scenarios._overwritten_shard(data):
    changed = [p for p, content in before.items() if p.read_bytes() != content]
    assert len(changed) == 1 and "train" in changed[0].name
    assert changed[0].stat().st_size == len(before[changed[0]])
  assert {p: p.read_bytes() for p in before} == before
