"""A run that goes on otherwise than it began: by asking for it, and never else."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import kills
from grain_jax import config as configs
from grain_jax import trees
from grain_jax.training import continuation, optim
from grain_jax.training import loop as train


def test_schedule_starts_anew_where_the_run_goes_on(tiny):
  """By hand: 4 steps up from what it had to the new rate, then half a cosine to the new end."""
  tiny.optimizer.update(
    lr=2.0, lr_end=0.5, lr_init=9.0, warmup_steps=4, start_step=100, start_lr=0.25
  )
  rate = optim.schedule(tiny, total_steps=124, steps_per_epoch=10)
  assert [float(rate(s)) for s in (90, 100, 102, 104)] == [0.25, 0.25, 1.125, 2.0]
  assert float(rate(114)) == pytest.approx(0.5 + 1.5 / 2) and float(rate(124)) == 0.5
  assert float(rate(jnp.int32(102))) == 1.125  # as the step sees it
  with pytest.raises(ValueError, match="takes 4 steps of a run of 3 after step 100"):
    optim.schedule(tiny, total_steps=103, steps_per_epoch=10)


def test_steps_that_changed_nothing_do_not_move_the_new_schedule(tiny):
  """The optimiser has counted 95 of 100 steps: the schedule starts where it is."""
  tiny.optimizer.update(lr=2.0, lr_end=0.5, warmup_steps=4, start_step=100, start_lr=0.25)
  tiny.optimizer.start_skipped = 5
  rate = optim.schedule(tiny, total_steps=124, steps_per_epoch=10)
  assert [float(rate(s)) for s in (90, 95, 97, 99)] == [0.25, 0.25, 1.125, 2.0]
  assert float(rate(119)) == 0.5


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("began", "now"), [(0.0, 0.5), (0.5, 0.0), (0.5, 0.25)])
def test_clipping_that_is_switched_finds_the_state_of_the_moments(tiny, name, began, now):
  params = {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
  gradients = {"layer": {"kernel": jnp.full((3, 2), 3.0), "bias": jnp.array([4.0, -2.0])}}
  tiny.optimizer.update(name=name, eps=1e-3, clip_norm=began, warmup_steps=0, warmup_epochs=0.0)

  def create():
    return optim.create(tiny, params, total_steps=9, steps_per_epoch=1)

  first = create().init(params)
  names = [path for path, _ in trees.named_leaves(first)]
  tiny.optimizer.clip_norm = now
  fresh = create()
  want, _ = fresh.update(gradients, fresh.init(params), params)
  tiny.optimizer.start_clip_norm = began
  switched = create()
  got, after = switched.update(gradients, first, params)
  assert [path for path, _ in trees.named_leaves(after)] == names
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def newest(monkeypatch, **meta):
  monkeypatch.setattr(
    continuation.checkpoint, "Checkpoints",
    lambda *_, **__: SimpleNamespace(
      close=lambda: None, read_newest_meta=lambda: {"learning_rate": 0.25, **meta}
    ),
  )  # fmt: skip


def test_what_the_optimiser_needs_to_go_on_is_kept(tiny, tmp_path, monkeypatch):
  def go_on(config, *keys):
    (tmp_path / "config.json").write_text(configs.to_json(tiny))
    return continuation.continue_as(config, tmp_path, keys, say=lambda line: None)

  asked = tiny.copy_and_resolve_references()
  asked.optimizer.update(clip_norm=0.5, lr=0.125)
  newest(monkeypatch, step=0)
  with pytest.raises(ValueError, match="holds no checkpoint of a step after 0. Use a new workdir"):
    go_on(asked, "optimizer.clip_norm", "optimizer.lr")
  newest(monkeypatch, step=8, skipped=3)
  got = go_on(asked, "optimizer.clip_norm", "optimizer.lr").optimizer
  assert (got.start_step, got.start_skipped, got.start_clip_norm) == (8, 3, 0.0)
  tiny.optimizer.update(got)
  asked.optimizer.clip_norm = 2.0
  newest(monkeypatch, step=9)
  got = go_on(asked, "optimizer.clip_norm").optimizer
  assert (got.start_step, got.start_skipped, got.start_clip_norm) == (9, 0, 0.0)


@pytest.mark.parametrize(
  ("key", "words"),
  [
    ("optimizer.rl", "Did you mean optimizer.lr?"),
    ("model.image.depth", "start a new run: --config.init.model=WORKDIR"),
  ],
)
def test_what_cannot_change_is_one_line(key, words):
  with pytest.raises(ValueError, match="cannot go on with another") as error:
    continuation.check_keys(["steps", key])
  assert words in str(error.value) and "\n" not in str(error.value)


def test_a_run_that_has_begun_keeps_how_it_started(tiny, tmp_path):
  tiny.model.decoder.init = "per_matrix"
  tiny.optimizer.update(start_step=7, start_lr=0.5)
  (tmp_path / "config.json").write_text(configs.to_json(tiny))
  asked = configs.from_json(configs.to_json(tiny))
  asked.model.decoder.init = "torch"
  asked.optimizer.update(start_step=0, start_lr=0.0)
  got = continuation.continue_as(asked, tmp_path, [], say=print)
  assert got.to_dict() == tiny.to_dict()


def test_other_data_at_the_old_place_is_a_change_too(tiny, tmp_path, monkeypatch):
  (tmp_path / "config.json").write_text(configs.to_json(tiny))
  monkeypatch.setattr(
    continuation.mixture, "open_training",
    lambda config: SimpleNamespace(fingerprint=lambda split: "b" * 20),
  )  # fmt: skip

  def newest(data):
    monkeypatch.setattr(
      continuation.checkpoint, "Checkpoints",
      lambda *_, **__: SimpleNamespace(
        close=lambda: None,
        read_newest_meta=lambda: {"step": 7, "data": data, "learning_rate": 0.25},
      ),
    )  # fmt: skip

  newest("b" * 20)
  said = []
  same = continuation.continue_as(tiny, tmp_path, ["data.dir"], say=said.append)
  assert same.to_dict() == tiny.to_dict() and not said
  newest("a" * 20)
  got = continuation.continue_as(tiny, tmp_path, ["data.dir"], say=said.append)
  assert (got.optimizer.start_step, got.optimizer.start_lr) == (7, 0.25)
  assert "(aaaaaaaaaaaa)" in said[0] and "the same (bbbbbbbbbbbb)" in said[0]
  asked_nothing = continuation.continue_as(tiny, tmp_path, [], say=said.append)
  assert asked_nothing.optimizer.start_step == 0 and len(said) == 1


def test_where_the_newest_checkpoint_is_lost_its_schedule_does_not_go_on(
  tiny, tmp_path, monkeypatch
):
  tiny.optimizer.update(start_step=8, start_lr=0.5)
  (tmp_path / "config.json").write_text(configs.to_json(tiny))
  continuation.check_step(tiny, 8, tmp_path)
  with pytest.raises(ValueError, match="starts at step 8.* is of step 4.*--continue_as again"):
    continuation.check_step(tiny, 4, tmp_path)
  monkeypatch.setattr(
    continuation.checkpoint, "Checkpoints",
    lambda *_, **__: SimpleNamespace(
      close=lambda: None, read_newest_meta=lambda: {"step": 4, "learning_rate": 0.25}
    ),
  )  # fmt: skip
  said = []
  got = continuation.continue_as(tiny, tmp_path, ["steps"], say=said.append)
  assert (got.optimizer.start_step, got.optimizer.start_lr) == (4, 0.25)
  assert "optimizer.start_step 8 -> 4" in said[0]
  continuation.check_step(got, 4, tmp_path)


def read(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_a_run_is_made_longer_and_goes_on_after_a_crash(scenes_dir, tmp_path, monkeypatch):
  def config(**changes):
    c = configs.load(f"configs/quickstart.py:{kills.TINY}")
    c.loss.matcher = "device"  # whose program is found in the cache by the second run
    c.data.dir = str(scenes_dir)
    c.evals = ()
    c.log_every, c.save_every = 1, 4
    for key, value in ({"steps": 8, "optimizer.warmup_steps": 2} | changes).items():
      configs.set_key(c, key.replace("__", "."), value)
    return c

  run, straight = tmp_path / "run", tmp_path / "straight"
  train.train(config(), str(run))
  with pytest.raises(ValueError, match="config.steps was 8 and is 16.*add --continue_as=steps"):
    train.train(config(steps=16), str(run))
  with pytest.raises(ValueError, match="optimizer.lr was .* add --continue_as=optimizer.lr"):
    train.train(config(steps=16, **{"optimizer.lr": 1e-4}), str(run), continue_as=["steps"])
  longer = config(steps=16, **{"optimizer.lr": 1e-3})
  with pytest.raises(ValueError, match="there is no run in"):
    train.train(longer, str(straight), continue_as=["steps"])

  class Crash(Exception):
    pass

  def crash(*_, **__):
    raise Crash

  keys = ["steps", "optimizer.lr"]
  with monkeypatch.context() as patch:  # after config.json is written, before any new step
    patch.setattr(train, "_loop", crash)
    with pytest.raises(Crash):
      train.train(longer, str(run), continue_as=keys)
  train.train(longer, str(run), continue_as=keys)
  lines = read(run)
  assert [line["step"] for line in lines] == list(range(1, 17))
  rates = [line["train/learning_rate"] for line in lines]
  end = config().optimizer.lr_end
  # The rate of the update to step s is that of s - 1: at step 8 it was the first schedule's end.
  np.testing.assert_allclose(rates[8:11], [end, (end + 1e-3) / 2, 1e-3], rtol=1e-5)
  assert rates[-1] < 2e-4
  held = configs.read(run / "config.json")
  assert (held.optimizer.start_step, held.steps) == (8, 16)
  train.train(longer, str(run))  # finished: nothing to do, with or without the flag
  assert len(read(run)) == 16
