"""The train step on one device and on eight, however sharded: the same loss and gradients."""

import functools
import re

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
from numpy.testing import assert_allclose
from stepping import LAYOUTS, assert_same, gradients_of_step, gradients_of_steps

from grain_jax import encoders, trees
from grain_jax.models import grain, initial
from grain_jax.objectives import boxes
from grain_jax.runtime import mesh as meshes
from grain_jax.training import optim, steps

BATCH = 16


@pytest.fixture
def config(tiny):
  tiny.batch_size = BATCH
  tiny.model.image.depth = tiny.model.text.depth = 1
  tiny.model.text.vocab_size = 400
  tiny.loss.aux_box_loss = True
  assert tiny.model.decoder.dropout == 0.1
  return tiny


@pytest.fixture
def batch(config, make_batch):
  """Two captions are equal, and one image has no region."""
  batch = make_batch(config, rng=np.random.default_rng(0))
  for name in ("tokens", "segments", "positions", "ends"):
    batch[name][1] = batch[name][9]
  batch["region_mask"][4] = batch["text_mask"][4, 1:] = False
  return batch


_KEPT = {}  # every test of this file begins with the same inputs


@pytest.fixture
def batches(batch, config, make_batch):
  """Of three steps."""
  return [batch, *(make_batch(config, rng=np.random.default_rng(i)) for i in (1, 2))]


@pytest.fixture
def one_device(config, batches):
  """Of the device matcher."""
  if "one" not in _KEPT:
    _KEPT["one"] = gradients_of_steps(config, batches, devices=1)
  return _KEPT["one"]


@pytest.mark.parametrize(
  ("devices", "layout", "solver"),
  [
    (1, "data=8", "host"),
    (8, "data=8", "host"),
    (8, "data=8", "device"),
    (8, "fsdp=8", "host"),
    (8, "tensor=2", "device"),
    (8, "fsdp=2,tensor=2", "host"),
  ],
)
def test_any_devices_and_either_matcher_give_the_losses_and_gradients_of_three_steps(
  config, batches, one_device, devices, layout, solver
):
  """With dropout on."""
  config.mesh.update(LAYOUTS[layout])
  config.loss.matcher = solver
  if layout != "data=8":  # so that something is sharded
    shardings = meshes.state_shardings(
      jax.eval_shape(lambda: steps.TrainState(0, drawn.params(config), ())),
      meshes.create(config), config.mesh.rules,
    )  # fmt: skip
    assert not all(s.is_fully_replicated for s in jax.tree.leaves(shardings.params))
  losses = [metrics["loss"][0] for metrics, _ in one_device]
  assert min(np.abs(np.diff(losses))) > 0.01 and one_device[0][0]["gradient_norm"][0] > 0.1
  found = gradients_of_steps(config, batches, devices=devices)
  for ours, theirs in zip(found, one_device, strict=True):
    assert_same(ours, theirs)


@pytest.mark.parametrize(
  ("devices", "layout", "num_microbatches"),
  [
    (1, "data=8", 4),
    (8, "data=8", 2),
    pytest.param(8, "tensor=2", 2, marks=pytest.mark.long),
  ],
)
def test_a_batch_encoded_in_microbatches_gives_the_gradient_of_the_full_batch(
  config, batch, devices, layout, num_microbatches
):
  """Without dropout, of which each microbatch draws its own."""
  config.model.decoder.dropout = 0.0
  config.loss.matcher = "device"
  if "whole" not in _KEPT:
    _KEPT["whole"] = gradients_of_step(config, batch, devices=1)
  config.mesh.update(LAYOUTS[layout])
  config.accumulate = num_microbatches
  assert_same(gradients_of_step(config, batch, devices=devices), _KEPT["whole"])


def test_logits_in_chunks_over_eight_devices_are_those_of_one(config, batch, one_device):
  config.loss.chunk = 5  # of 16 captions and 48 descriptions
  assert_same(gradients_of_step(config, batch, devices=8), one_device[0])


@pytest.mark.parametrize(
  ("devices", "layout", "num_microbatches", "contrast"),
  [
    (8, "data=8", 1, "softmax"),
    (8, "fsdp=2,tensor=2", 2, "softmax"),
    (8, "data=8", 2, "sigmoid"),
  ],
)
def test_hard_negatives_of_captions_and_regions_on_any_devices(
  config, make_batch, devices, layout, num_microbatches, contrast
):
  """Three steps whose thresholds each hands to the next; without dropout, for the microbatches."""
  config.model.decoder.dropout = 0.0
  config.data.update(negatives=4, negatives_per_region=2, row_length=120)
  config.loss.update(rank=0.2, intra=0.3, contrast=contrast)
  config.model.logit_bias = contrast == "sigmoid"
  batches = [make_batch(config, rng=np.random.default_rng(i)) for i in range(3)]
  if contrast not in _KEPT:
    _KEPT[contrast] = gradients_of_steps(config, batches, devices=1)
  config.mesh.update(LAYOUTS[layout])
  config.accumulate = num_microbatches
  found = gradients_of_steps(config, batches, devices=devices)
  for ours, theirs in zip(found, _KEPT[contrast], strict=True):
    assert_same(ours, theirs)
    assert np.abs(ours[1].get("logit_bias", 1.0)) > 1e-3
  thresholds = [[m[f"rank_threshold_{k}"][0] for k in range(4)] for m, _ in found]
  assert thresholds[0] == [0.0] * 4 and thresholds[1] != thresholds[2]
  for metrics, _ in found:
    assert metrics["loss_rank"][0] > 0 and metrics["loss_intra"][0] > 0
    assert 0 < metrics["valid_negatives"][0] < metrics["valid_negatives"][1]
    assert 0 < metrics["valid_region_negatives"][0] < metrics["valid_region_negatives"][1]


def test_the_same_patches_are_left_out_on_any_devices(config, batch):
  config.model.image.update(patch=8, patch_dropout=0.5)
  assert_same(
    gradients_of_step(config, batch, devices=8), gradients_of_step(config, batch, devices=1)
  )


def test_the_t5_tower_and_its_relative_positions_on_any_devices(config, batch):
  config.model.text.update(kind="t5", activation="relu")
  one = gradients_of_step(config, batch, devices=1)
  config.mesh.update(LAYOUTS["fsdp=2,tensor=2"])
  assert_same(gradients_of_step(config, batch, devices=8), one)


def test_dropout_differs_from_step_to_step(config, batch, one_device):
  """Else the comparison above would hold without any."""
  metrics, _ = gradients_of_step(config, batch, devices=1, updates_done=1)
  first = one_device[0][0]["loss"][0]
  assert abs(metrics["loss"][0] - first) > 1e-3 * first


@pytest.mark.parametrize("negatives", ["local", "global"])
def test_region_negatives_come_from_the_devices_own_part_or_from_all(config, batch, negatives):
  """Against the loss worked out part by part in NumPy and SciPy."""
  config.loss.region_negatives = negatives
  config.loss.mask_duplicates = False
  config.model.decoder.dropout = 0.0
  metrics, _ = gradients_of_step(config, batch, devices=8)

  model = grain.build(config)
  output = jax.jit(lambda p, b: model.apply({"params": p}, b, num_regions=3))(
    drawn.params(config), batch
  )
  cost = np.asarray(boxes.matching_cost(output.boxes[-1], batch["boxes"]))
  matched, described = [], []
  for i in range(BATCH):
    place = np.flatnonzero(batch["region_mask"][i])
    rows, queries = scipy.optimize.linear_sum_assignment(cost[i][:, place].T)
    matched.append(np.asarray(output.regions)[i, queries])
    described.append(np.asarray(output.descriptions)[i, place[rows]])
  total = 0.0
  size = BATCH // 8 if negatives == "local" else BATCH
  for start in range(0, BATCH, size):
    q = np.concatenate(matched[start : start + size])
    d = np.concatenate(described[start : start + size])
    logits = np.exp(float(output.logit_scale)) * (q @ d.T)
    total -= np.trace(scipy.special.log_softmax(logits, axis=1))
  assert_allclose(metrics["loss_region"], (total, batch["region_mask"].sum()), rtol=1e-4)


def test_nothing_becomes_nan_without_regions_or_without_examples(config, batch):
  config.loss.aux_box_loss = False
  batch["region_mask"][:] = batch["text_mask"][:, 1:] = False
  nothing = batch | {"example_mask": np.zeros_like(batch["example_mask"])}
  found = gradients_of_steps(config, [batch, nothing], devices=8)
  metrics, gradients = found[0]
  assert metrics["loss_region"] == metrics["loss_box"] == (0.0, 0.0)
  assert metrics["nonfinite"] == (0.0, 1.0) and metrics["loss"][0] > 0.1
  assert all(np.isfinite(g).all() for g in gradients.values())
  assert not gradients["box_head/fc0/kernel"].any()

  metrics, kept = found[1]
  assert metrics["loss"] == (0.0, 0.0) and metrics["bad_examples"] == (BATCH, 1.0)
  assert metrics["gradient_norm"] == (0.0, 0.0) and metrics["nonfinite"] == (0.0, 1.0)
  assert metrics["skipped_updates"] == (1.0, 1.0)
  for name, gradient in gradients.items():  # the state of this optimiser
    np.testing.assert_array_equal(kept[name], gradient)


@pytest.mark.parametrize(
  "devices, mesh_sizes, accumulate, optimizer",
  [
    pytest.param(1, {}, 1, "adamw", marks=pytest.mark.long),
    (8, dict(fsdp=4, tensor=2), 1, "muon"),
    (4, dict(fsdp=2), 2, "adamw"),
  ],
)
def test_a_step_without_a_usable_example_changes_the_step_alone(
  tiny, make_batch, devices, mesh_sizes, accumulate, optimizer
):
  """Bit for bit: no decay, no moment, no count of the schedule moves, nor the mean."""
  tiny.method, tiny.model.text.vocab_size, tiny.accumulate = "clip", 400, accumulate
  tiny.mesh.update(data=-1, **mesh_sizes)
  tiny.optimizer.update(lr=0.1, ema_decay=0.5, name=optimizer)
  mesh = meshes.create(tiny, devices=jax.devices()[:devices])
  good = make_batch(tiny)
  bad = {name: np.zeros_like(value) for name, value in good.items()}
  half = good | {"example_mask": np.arange(tiny.batch_size) < 1}  # of one device alone
  init, _, shardings, optimizer = steps.create_state(
    grain.build(tiny), tiny, mesh, total_steps=10, steps_per_epoch=5
  )
  step = steps.make_train_step(grain.build(tiny), tiny, mesh, optimizer, shardings)
  with jax.set_mesh(mesh):
    states, skipped, state = [], [], init()
    for batch in (good, bad, half, bad):
      states.append(jax.tree.map(np.array, state))
      state, metrics = step(state, meshes.to_global(batch, mesh))
      skipped.append(float(metrics["skipped_updates"][0]))
    states.append(jax.tree.map(np.array, state))
  assert skipped == [0, 1, 0, 1]
  assert [int(s.step) for s in states] == [0, 1, 2, 3, 4]
  assert [optim.updates_done(s.opt_state) for s in states] == [0, 1, 1, 2, 2]
  for before, after in ((1, 2), (3, 4)):
    for name, value in trees.named_leaves(states[before].replace(step=0)):
      now = dict(trees.named_leaves(states[after].replace(step=0)))[name]
      np.testing.assert_array_equal(now, value, err_msg=name)
  for before, after in ((0, 1), (2, 3)):  # one example on one device is a step
    same = jax.tree.map(lambda a, b: (a == b).all(), states[before].params, states[after].params)
    assert not all(jax.tree.leaves(same))


def test_a_loss_that_is_not_finite_is_counted(config, batch):
  batch["boxes"][batch["region_mask"]] = np.nan
  metrics, _ = gradients_of_step(config, batch, devices=1)
  assert metrics["nonfinite"] == (1.0, 1.0)


def test_encoders_give_what_the_model_gives_whole_on_every_device(config, batch):
  model, params = grain.build(config), drawn.params(config)
  mesh = meshes.create(config)
  output = jax.jit(lambda p, b: model.apply({"params": p}, b, num_regions=3))(params, batch)
  with jax.set_mesh(mesh):
    encode, b = encoders.make_jitted(model, mesh), meshes.to_global(batch, mesh)
    image = encode["image"](params, b["image"])
    regions, last_boxes = encode["regions"](params, b["image"])
    text = encode["text"](params, b["tokens"], b["segments"], b["positions"], b["ends"])
  assert image.is_fully_replicated and image.shape == (BATCH, config.model.embed_dim)
  assert_allclose(image, output.image, atol=1e-5)
  assert_allclose(regions, output.regions, atol=1e-5)
  assert_allclose(last_boxes, output.boxes[-1], atol=1e-5)
  assert_allclose(text[:, 0], output.captions, atol=1e-5)
  assert_allclose(text[:, 1:], output.descriptions, atol=1e-5)


def test_ema_is_the_weighted_mean_of_the_parameters_so_far(tiny, make_batch, monkeypatch):
  """After two steps: d^2 p0 + d (1 - d) p1 + (1 - d) p2, and the run itself is the same.

  A state traces the model's init once, which is a second or more of each start.
  """
  traced, init_params = [], initial.init_params
  monkeypatch.setattr(initial, "init_params", lambda *x: (traced.append(1), init_params(*x))[1])
  tiny.method, tiny.model.text.vocab_size = "clip", 400
  mesh = meshes.create(tiny, devices=jax.devices()[:1])
  batch = meshes.to_global(make_batch(tiny), mesh)
  model, runs = grain.build(tiny), []
  tiny.optimizer.update(lr=0.1, warmup_steps=0, warmup_epochs=0.0)
  for tiny.optimizer.ema_decay in (0.0, 0.75):
    init, _, shardings, optimizer = steps.create_state(
      model, tiny, mesh, total_steps=10, steps_per_epoch=2
    )
    step = steps.make_train_step(model, tiny, mesh, optimizer, shardings)
    with jax.set_mesh(mesh):
      state, seen = init(), []
      for _ in range(3):
        seen.append(jax.tree.map(np.array, state.params))
        last = state.eval_params if state.ema is None else jax.tree.map(np.array, state.ema)
        state, _ = step(state, batch)
    runs.append(seen)
  assert len(traced) == len(runs)
  for a, b in zip(jax.tree.leaves(runs[0]), jax.tree.leaves(runs[1]), strict=True):
    np.testing.assert_array_equal(a, b)
  want = jax.tree.map(lambda a, b, c: 0.5625 * a + 0.1875 * b + 0.25 * c, *runs[1])
  for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_in_half_the_bits_and_keeps_the_rest_in_float32(tiny, make_batch):
  """Parameters, moments, embeddings, losses and gradients stay float32; the loss is near."""
  batch = jax.tree.map(jnp.asarray, make_batch(tiny))
  tiny.model.image.depth = tiny.model.text.depth = tiny.model.decoder.depth = 1
  tiny.model.text.vocab_size = 400
  tiny.model.decoder.dropout = 0.0
  found, halves, params = {}, {}, drawn.params(tiny)
  for tiny.model.dtype in ("float32", "bfloat16"):
    model = grain.build(tiny)
    born = jax.eval_shape(lambda model=model: initial.init_params(model, tiny))
    assert {x.dtype for x in jax.tree.leaves(born)} == {jnp.dtype("float32")}
    apply = functools.partial(model.apply, num_regions=tiny.data.max_regions)
    output = jax.eval_shape(apply, {"params": params}, batch)
    assert {x.dtype for x in jax.tree.leaves(output)} == {jnp.dtype("float32")}
    loss = lambda p, model=model: steps.loss_function(  # noqa: E731
      p, batch, jax.random.key(0), model=model, config=tiny
    )[0]
    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    found[tiny.model.dtype] = traced.lower().compile()(params)
    products = re.findall(r"(\w+)\[[^\n]*= dot_general", str(traced.jaxpr))
    halves[tiny.model.dtype] = products.count("bf16") / len(products)
  # The scores of attention and the losses are products in float32.
  assert halves["float32"] == 0 and halves["bfloat16"] > 0.6
  (want, full), (got, half) = found["float32"], found["bfloat16"]
  assert got.dtype == jnp.float32 and want != got
  assert_allclose(got, want, rtol=2e-2)
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("float32")}
  norms = [float(optax.tree.norm(g)) for g in (full, half)]
  assert_allclose(*norms, rtol=5e-2)
