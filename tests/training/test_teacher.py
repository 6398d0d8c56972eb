"""The frozen copy of a run: what it gives the step, on any devices, and how it goes on."""

import shutil
from unittest import mock

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stepping
from numpy.testing import assert_allclose

from bench import kills
from grain_jax import config as configs
from grain_jax import trees
from grain_jax.data import build, dataset, decoding, pipeline
from grain_jax.data.scenes import scenes
from grain_jax.data.sources import scenes as scenes_source
from grain_jax.models import grain
from grain_jax.runtime import mesh as meshes
from grain_jax.training import loop, steps, validation


@pytest.fixture
def config(tiny):
  """GRAIN+ and DeGLA at once, without dropout, which differs between microbatches."""
  tiny.batch_size = 16
  tiny.model.image.depth = tiny.model.text.depth = 1
  tiny.model.text.vocab_size = 400
  tiny.model.decoder.dropout = 0.0
  tiny.model.auxiliary_pool = "max"
  tiny.data.update(negatives=4, negatives_per_region=2, row_length=120)
  tiny.loss.update(anchor=1.28, anchor_teacher="ema", anchor_decay=0.5)
  tiny.loss.update(image_grounded=0.1, text_grounded=0.1)
  return tiny


@pytest.fixture
def batches(config, make_batch):
  return [make_batch(config, rng=np.random.default_rng(i)) for i in range(3)]


def test_on_any_devices_and_by_microbatches_it_is_the_same(config, batches):
  one = stepping.gradients_of_steps(config, batches, devices=1)
  config.mesh.update(stepping.LAYOUTS["fsdp=2,tensor=2"])
  config.accumulate = 2
  many = stepping.gradients_of_steps(config, batches, devices=8)
  for ours, theirs in zip(many, one, strict=True):
    stepping.assert_same(ours, theirs)
  distances = [metrics["loss_anchor"][0] for metrics, _ in one]
  assert distances[0] < 1e-9 < 1e-5 < distances[1]  # at the start it is the model itself
  assert all(metrics["loss_auxiliary"][0] > 1 for metrics, _ in one)


@pytest.mark.parametrize("kind", ["initial", "ema"])
def test_it_stays_or_is_the_mean_of_the_weights_and_no_example_moves_nothing(config, batches, kind):
  config.loss.anchor_teacher, config.method, config.data.negatives_per_region = kind, "clip", 0
  config.optimizer.update(lr=0.1)
  config.mesh.update(data=-1)
  batches = [{k: v for k, v in b.items()} for b in batches]
  for batch in batches:
    batch["region_negative_mask"] = batch["region_negative_mask"][..., :0]
    for name in ("ends", "text_mask"):
      batch[name] = batch[name][:, : 1 + 3 + 4]
  nothing = {name: np.zeros_like(value) for name, value in batches[0].items()}
  mesh = meshes.create(config, jax.devices()[:1])
  model = grain.build(config)
  init, _, shardings, optimizer = steps.create_state(
    model, config, mesh, total_steps=10, steps_per_epoch=5
  )
  step = steps.make_train_step(model, config, mesh, optimizer, shardings)
  with jax.set_mesh(mesh):
    states, state = [], init()
    for batch in (batches[0], nothing, batches[1]):
      states.append(jax.tree.map(np.array, state))
      state, _ = step(state, meshes.to_global(batch, mesh))
    states.append(jax.tree.map(np.array, state))
  mean = states[0].params
  for before, after in zip(states, states[1:], strict=False):
    moved = int(after.step) != 2
    if moved and kind == "ema":
      mean = jax.tree.map(lambda m, p: 0.5 * m + 0.5 * p, mean, after.params)
    for (name, got), (_, want), (_, old) in zip(
      *(trees.named_leaves(t) for t in (after.teacher, mean, before.teacher)), strict=True
    ):
      assert_allclose(got, want, rtol=1e-6, atol=1e-7, err_msg=name)
      assert moved or (got == old).all()
  assert not jnp.array_equal(states[0].params["text_tower"]["token_embedding"],
                             states[1].params["text_tower"]["token_embedding"])  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Scenes with false texts; not to be written to."""
  out = tmp_path_factory.mktemp("teacher") / "data"
  some = scenes.SceneSettings(
    negatives=True, train=24, val=2, concepts=12, objects_per_class=1, image_size=32
  )
  build.build(scenes_source.source(some), out, workers=1)
  return str(out)


@pytest.fixture
def validated(config, data):
  """`validated(state)` of DeGLA with CE-CLIP's rank, on the two validation scenes of `data`."""
  config.model.text.vocab_size = 49408
  config.update(method="clip", batch_size=2)
  config.data.update(dir=data, max_regions=0, negatives_per_region=0, threads=1)
  config.loss.update(anchor_teacher="initial", rank=0.2)
  config.validation.batches = 1
  mesh = meshes.create(config, jax.devices()[:1], batches=("batch_size",))

  def validate(state):
    model, opened = grain.build(config), dataset.open_dataset(data)
    with jax.set_mesh(mesh):
      return validation.Validation(config, model, mesh, opened)(state, lambda: None)

  return validate


@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_has_the_losses_of_the_step_with_its_teacher_and_thresholds(
  config, data, validated, accumulate
):
  """The objective of the same two scenes by hand, the teacher other weights, thresholds at 6."""
  config.accumulate = accumulate
  state = steps.TrainState(
    0, drawn.params(config), None, terms={"hard_negatives": {"thresholds": np.full(4, 6.0, "f4")}}
  ).replace(teacher=drawn.params(config, seed=2))
  got = validated(state)
  config.data.split = "val"
  batches = pipeline.train_batches(data, config)
  batch = jax.tree.map(jnp.asarray, next(batches))
  batches.close()
  encode = jax.jit(lambda params: steps.encode_frozen(params, batch, model=grain.build(config)))
  _, (want, _) = steps.objective(
    encode(state.params), batch, config=config, terms=state.terms, teacher=encode(state.teacher)
  )
  for name in ("loss", "loss_caption", "loss_rank", "loss_anchor", "loss_text_grounded"):
    mean = want[name][0] / want[name][1]
    assert_allclose(got[f"validation/{name}"], mean, rtol=1e-5, err_msg=name)
  assert got["validation/loss_anchor"] > 0.01 and got["validation/loss_rank"] > 3


def test_bad_records_of_a_validation_are_counted_and_end_nothing(
  config, validated, monkeypatch, caplog
):
  monkeypatch.setattr(decoding, "decode", mock.Mock(side_effect=ValueError("corrupt image")))
  config.data.update(max_bad_in_a_row=1, max_bad_fraction=0.0, min_bad=1)
  state = steps.TrainState(0, drawn.params(config), None, teacher=drawn.params(config, seed=2))
  got = validated(state)
  assert (got["validation/bad_examples"], got["validation/examples"]) == (2, 0)
  assert "validation/loss" not in got
  assert "2 records of split 'val' are bad" in caplog.text


@pytest.mark.long
def test_a_run_that_goes_on_keeps_its_teacher(data, tmp_path, capsys):
  """Bit for bit what the run comes to that is never stopped."""
  c = configs.load(f"configs/quickstart.py:{kills.TINY}")
  c.loss.matcher = "device"  # whose program is found in the cache by the second run
  c.data.update(dir=data, negatives=4, negatives_per_region=1, row_length=60)
  c.update(steps=6, save_every=3, evals=())
  c.loss.update(anchor=1.0, image_grounded=0.1, text_grounded=0.1, rank=0.2)
  c.model.auxiliary_pool = "max"
  whole, again = tmp_path / "whole", tmp_path / "again"
  loop.train(c, str(whole))
  said = capsys.readouterr().out
  assert said.count("false captions and descriptions do not fit rows of 60 tokens") == 1
  assert "random weights are nothing" in said
  assert "anchor 0." in said and "auxiliary " in said
  shutil.copytree(whole, again)
  shutil.rmtree(again / "checkpoints" / "6")
  middle = kills.final_state(again)
  loop.train(c, str(again))
  assert "step 3 of 6" in capsys.readouterr().out
  last = kills.final_state(whole)
  assert kills.differences(kills.final_state(again), last) == []
  teacher = [name for name in last if name.startswith("teacher")]
  assert len(teacher) > 20
  assert all((last[name] == middle[name]).all() for name in teacher)
  moved = [name.replace("teacher", "params", 1) for name in teacher]
  assert any((last[name] != middle[name]).any() for name in moved)
