"""A run whose batches worker processes make learns the same, and ends as it should without one."""

import os
import signal

import psutil
import pytest

from grain_jax import failures
from grain_jax.runtime import metrics
from grain_jax.training import loop as train

CLOCK = ("samples_per_second", "data_wait", "host_memory", "shard_opens", "mfu")


def losses(workdir):
  return [
    {k: v for k, v in line.items() if not any(word in k for word in CLOCK)}
    for line in metrics.read_jsonl(workdir / "metrics.jsonl")
  ]


def workers():
  return [p for p in psutil.Process().children() if "feeding.worker" in " ".join(p.cmdline())]


@pytest.fixture
def config(tiny, scenes_dir):
  tiny.method, tiny.evals, tiny.steps, tiny.log_every = "clip", (), 6, 1
  tiny.data.update(dir=str(scenes_dir), resize="crop", flip=True)
  tiny.model.text.depth = tiny.model.image.depth = 1
  return tiny


@pytest.mark.slow
def test_a_run_with_workers_is_the_run_with_threads(config, tmp_path):
  for number in (0, 2):
    config.data.workers = number
    train.train(config, str(tmp_path / str(number)))
  ours, theirs = losses(tmp_path / "2"), losses(tmp_path / "0")
  assert len(ours) == len(theirs) == 6
  for a, b in zip(ours, theirs, strict=True):
    assert a == b
  assert not workers()


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_leaves_none(config, tmp_path, monkeypatch):
  read = metrics.Progress.line

  def kill(self, step, *rest):
    if step == 3:
      os.kill(workers()[0].pid, signal.SIGKILL)
    return read(self, step, *rest)

  monkeypatch.setattr(metrics.Progress, "line", kill)
  config.data.workers, config.steps = 2, 400
  with pytest.raises(failures.TransientError, match="worker . of the input .*killed by SIGKILL"):
    train.train(config, str(tmp_path))
  assert not workers()
