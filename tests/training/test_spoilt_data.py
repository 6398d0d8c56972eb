"""A run whose data go bad under way: it ends, says why, and its last good checkpoint stays."""

import json
import os
import shutil

import numpy as np
import pytest

from grain_jax import failures
from grain_jax.data import examples
from grain_jax.runtime import checkpoint, metrics
from grain_jax.training import loop as train

SAVED = 3  # the first checkpoint, after which the data go bad


@pytest.fixture
def run(tiny, scenes_dir, tmp_path, monkeypatch):
  """`run(spoil)` trains; `spoil(path)` is done to the largest training shard after a checkpoint."""
  data = shutil.copytree(scenes_dir, tmp_path / "scenes")
  monkeypatch.setattr(failures, "RETRY_DELAYS", (0.0, 0.01))
  tiny.method, tiny.evals, tiny.steps = "clip", (), 60
  tiny.save_every, tiny.log_every, tiny.keep_checkpoints = SAVED, 1, 2
  tiny.data.update(dir=str(data), prefetch=1, threads=1)
  tiny.model.text.depth = tiny.model.image.depth = 1
  save = checkpoint.Checkpoints.save

  def start(spoil):
    def save_and_spoil(self, step, *arguments):
      save(self, step, *arguments)
      if step == SAVED:
        spoil(max(data.glob("*train*array_record-*"), key=lambda p: p.stat().st_size))

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_and_spoil)
    train.train(tiny, str(tmp_path / "run"))

  start.workdir = tmp_path / "run"
  return start


def assert_last_good_checkpoint_stays(workdir):
  lines = metrics.read_jsonl(workdir / "metrics.jsonl")
  assert lines[-1]["step"] < 60
  assert not any(line["train/skipped_updates"] for line in lines)
  saved = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
  assert saved and saved[-1] <= lines[-1]["step"] + 1
  return lines


def test_a_shard_cut_short_ends_the_run_as_lost_storage(run):
  def cut(shard):
    os.truncate(shard, shard.stat().st_size // 3)

  with pytest.raises(failures.TransientError, match="record .* cannot be read: the shard has") as e:
    run(cut)
  assert "\n" not in str(e.value)
  lines = assert_last_good_checkpoint_stays(run.workdir)
  assert not any(line["train/bad_examples"] for line in lines)


def test_a_shard_full_of_damage_ends_the_run_as_bad_records(run, capsys):
  def damage(shard):
    """More than half of the records, in place; array_record keeps its index at the end.

    Its time stays, as where a disk rots: a shard that was written to is noticed as such.
    """
    times = shard.stat()
    with shard.open("r+b") as file:
      file.write(np.random.default_rng(0).bytes(times.st_size // 3))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))

  with pytest.raises(
    examples.BadRecord, match=r"bad.*the last one is .*array_record.*, record \d+"
  ):
    run(damage)
  lines = assert_last_good_checkpoint_stays(run.workdir)
  said = capsys.readouterr().out
  assert any(f"{line['train/bad_examples']:.0f} bad record" in said for line in lines[-3:])


def test_what_is_told_of_skipped_steps_is_what_was_done(tiny, scenes_dir, tmp_path, monkeypatch):
  """Rates by hand: a warm-up of 4 updates from 0 to 1; steps 2, 3 and 5 have no usable image."""
  tiny.update(method="clip", evals=(), steps=6, save_every=5, log_every=1)
  tiny.optimizer.update(lr=1.0, lr_init=0.0, warmup_steps=4)
  tiny.data.update(dir=str(scenes_dir), threads=1)
  tiny.model.text.depth = tiny.model.image.depth = 1
  make = train.pipeline.train_batches

  class Batches:
    def __init__(self, *arguments, start_step=0, **options):
      self._batches, self._step = make(*arguments, start_step=start_step, **options), start_step

    def __next__(self):
      self._step += 1
      batch = next(self._batches)
      return batch | {"example_mask": batch["example_mask"] & (self._step not in (2, 3, 5))}

    def __getattr__(self, name):
      return getattr(self._batches, name)

  monkeypatch.setattr(train.pipeline, "train_batches", Batches)
  train.train(tiny, str(tmp_path / "run"))
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  train.train(tiny, str(tmp_path / "run"))  # goes on from step 5
  lines = metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl")
  rates = {line["step"]: line["train/learning_rate"] for line in lines}
  assert rates == {1: 0, 2: 0, 3: 0, 4: 0.25, 5: 0.25, 6: 0.5}
  told = [line["step"] for line in lines if "train/loss" in line and "train/gradient_norm" in line]
  assert told == [1, 4, 6]
  kept = tmp_path / "run" / "checkpoints" / "5" / "meta" / "metadata"
  assert json.loads(kept.read_text())["learning_rate"] == 0.5
