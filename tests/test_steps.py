"""The train step on one device, on eight, and cut in other ways: the same loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
from numpy.testing import assert_allclose

from grain_jax import mesh as meshes
from grain_jax import steps, trees
from grain_jax.models import grain
from grain_jax.objectives import boxes

BATCH = 16

# Compiles in a quarter of the time.
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

# An 'optimiser' that keeps the gradients as its state and leaves the parameters alone.
KEEP_GRADIENTS = optax.GradientTransformation(
  init=lambda params: jax.tree.map(jnp.zeros_like, params),
  update=lambda gradients, state, params=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
)


@pytest.fixture
def config(tiny):
  tiny.batch_size = BATCH
  tiny.model.image.depth = tiny.model.text.depth = 1
  tiny.model.text.vocab_size = 400
  tiny.loss.aux_box_loss = True
  assert tiny.model.decoder.dropout == 0.1
  return tiny


def make_params(config):
  """Random numbers in the shapes of the model: its own initialisation takes long to compile."""
  rng = np.random.default_rng(1)

  def draw(name, leaf):
    value = 0.2 * rng.normal(size=leaf.shape) + (1.0 if name.endswith("scale") else 0.0)
    return jnp.asarray(value, leaf.dtype)

  model = grain.build(config)
  return trees.map_with_name(draw, jax.eval_shape(lambda: steps.init_params(model, config)))


def gradients_of_step(config, batch, *, devices, updates_done=0):
  """(metrics as pairs of floats, gradients by name) of the real train step on so many devices."""
  mesh = meshes.create(config, jax.devices()[:devices])
  params = make_params(config)
  state = steps.TrainState(jnp.int32(updates_done), params, KEEP_GRADIENTS.init(params))
  shardings = meshes.state_shardings(state, mesh, config.mesh.rules)
  with jax.set_mesh(mesh):
    state, batch = jax.device_put(state, shardings), meshes.to_global(batch, mesh)
    train_step = steps.make_train_step(grain.build(config), config, mesh, KEEP_GRADIENTS, shardings)
    train_step = train_step.lower(state, batch).compile(compiler_options=FAST)
    state, metrics = train_step(state, batch)
    assert int(state.step) == updates_done + 1
    metrics = {k: (float(s), float(w)) for k, (s, w) in metrics.items()}
    return metrics, {k: np.asarray(v) for k, v in trees.named_leaves(state.opt_state)}


def assert_same(ours, theirs):
  """Loss parts to 1e-5; each gradient to 1e-5 of the largest of its parameter."""
  (metrics, gradients), (their_metrics, their_gradients) = ours, theirs
  assert metrics.keys() == their_metrics.keys()
  for name in metrics:
    assert_allclose(metrics[name], their_metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
  norm = their_metrics["gradient_norm"][0]
  for name, value in their_gradients.items():
    # Some are 0 but for rounding: a key's bias cannot change a softmax.
    scale = max(np.abs(value).max(), 1e-2 * norm)
    assert_allclose(gradients[name] / scale, value / scale, atol=1e-5, err_msg=name)


CUTS = {
  "data=8": {},
  "fsdp=8": {
    "fsdp": 8,
    "rules": (("mlp/fc1/kernel$", (None, None, "fsdp")), ("token_embedding", ("fsdp",))),
  },
  "tensor=2": {
    "tensor": 2,
    "rules": (
      ("attention/(query|key|value)/kernel$", (None, None, "tensor")),
      ("attention/out/kernel$", (None, "tensor")),
    ),
  },
}


@pytest.fixture
def batch(config, make_batch):
  """Two captions are equal, and one image has no region."""
  batch = make_batch(config, rng=np.random.default_rng(0))
  for name in ("tokens", "segments", "positions", "ends"):
    batch[name][1] = batch[name][9]
  batch["region_mask"][4] = batch["text_mask"][4, 1:] = False
  return batch


_KEPT = {}


@pytest.fixture
def one_device(config, batch):
  """Of the device matcher; made once, as every test of this file begins with the same inputs."""
  if not _KEPT:
    _KEPT["one"] = gradients_of_step(config, batch, devices=1)
  return _KEPT["one"]


@pytest.mark.parametrize(
  ("devices", "cut", "solver"),
  [
    (1, "data=8", "host"),
    (8, "data=8", "host"),
    (8, "data=8", "device"),
    (8, "fsdp=8", "host"),
    (8, "tensor=2", "device"),
  ],
)
def test_any_devices_and_either_matcher_give_one_loss_and_gradient(
  config, batch, one_device, devices, cut, solver
):
  """With dropout on."""
  config.mesh.update(CUTS[cut])
  config.loss.matcher = solver
  assert one_device[0]["gradient_norm"][0] > 0.1
  assert_same(gradients_of_step(config, batch, devices=devices), one_device)


def test_dropout_differs_from_step_to_step(config, batch, one_device):
  """Else the comparison above would hold without any."""
  metrics, _ = gradients_of_step(config, batch, devices=1, updates_done=1)
  change = metrics["loss"][0] - one_device[0]["loss"][0]
  assert abs(change) > 1e-3 * one_device[0]["loss"][0]


@pytest.mark.parametrize("negatives", ["local", "global"])
def test_region_negatives_come_from_the_devices_own_part_or_from_all(config, batch, negatives):
  """Against the loss worked out part by part in NumPy and SciPy."""
  config.loss.region_negatives = negatives
  config.loss.mask_duplicates = False
  config.model.decoder.dropout = 0.0
  metrics, _ = gradients_of_step(config, batch, devices=8)

  model = grain.build(config)
  output = jax.jit(lambda p, b: model.apply({"params": p}, b, num_regions=3))(
    make_params(config), batch
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
  metrics, gradients = gradients_of_step(config, batch, devices=8)
  assert metrics["loss_region"] == metrics["loss_box"] == (0.0, 0.0)
  assert metrics["nonfinite"] == (0.0, 1.0) and metrics["loss"][0] > 0.1
  assert all(np.isfinite(g).all() for g in gradients.values())
  assert not gradients["box_head/fc0/kernel"].any()

  batch["example_mask"][:] = False
  metrics, gradients = gradients_of_step(config, batch, devices=8)
  assert metrics["loss"] == (0.0, 1.0) and metrics["bad_examples"] == (BATCH, 1.0)
  assert not any(g.any() for g in gradients.values())


def test_a_loss_that_is_not_finite_is_counted(config, batch):
  batch["boxes"][batch["region_mask"]] = np.nan
  metrics, _ = gradients_of_step(config, batch, devices=1)
  assert metrics["nonfinite"] == (1.0, 1.0)


def test_encoders_give_what_the_model_gives_whole_on_every_device(config, batch):
  model, params = grain.build(config), make_params(config)
  mesh = meshes.create(config)
  output = jax.jit(lambda p, b: model.apply({"params": p}, b, num_regions=3))(params, batch)
  with jax.set_mesh(mesh):
    encode, b = steps.make_encoders(model, mesh), meshes.to_global(batch, mesh)
    image = encode["image"](params, b["image"])
    regions, last_boxes = encode["regions"](params, b["image"])
    text = encode["text"](params, b["tokens"], b["segments"], b["positions"], b["ends"])
  assert image.is_fully_replicated and image.shape == (BATCH, config.model.embed_dim)
  assert_allclose(image, output.image, atol=1e-5)
  assert_allclose(regions, output.regions, atol=1e-5)
  assert_allclose(last_boxes, output.boxes[-1], atol=1e-5)
  assert_allclose(text[:, 0], output.captions, atol=1e-5)
  assert_allclose(text[:, 1:], output.descriptions, atol=1e-5)
