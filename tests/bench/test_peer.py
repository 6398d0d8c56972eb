"""The PyTorch peer computes what grain_jax computes: losses, gradients, updates, in both forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from bench import train_step_sides as sides
from bench.peers import grain_torch, weights
from grain_jax import config as configs
from grain_jax import trees
from grain_jax.models import grain, initial
from grain_jax.runtime import mesh as meshes
from grain_jax.training import optim, steps

FORMS = ("padded", "trimmed")
UPDATES = 3  # in the warm-up, at the peak, on the cosine

# A shift of all keys does not move a softmax; the first decoder layer, whose input is 0, attends to
# equal values.
NO_GRADIENT = {
  "image_tower.blocks.0.attention.key_norm.bias",
  "image_tower.blocks.1.attention.key_norm.bias",
  "query_decoder.layers.0.norm1.weight",
  "query_decoder.layers.0.self_attention.joint.bias",
  "query_decoder.layers.0.self_attention.joint.weight",
}

# Compiles in a quarter of the time.
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@pytest.fixture
def config(tiny):
  tiny.model.text.vocab_size = 400
  tiny.model.decoder.dropout = 0.0
  # Far from the peak of the softmax and above its bound, so that the clamp shows.
  tiny.model.logit_scale_init, tiny.model.logit_scale_max = 1.2, 1.0
  # A large eps, as the sign of a gradient that is 0 but for rounding would decide an update; and
  # a strong decay, so that a parameter in the wrong group shows.
  tiny.optimizer.update(lr=1e-2, lr_init=5e-3, lr_end=1e-3, eps=1e-3, weight_decay=0.5)
  return tiny


@pytest.fixture
def batch(config, make_batch):
  """Some regions are missing; two images have the same caption and descriptions."""
  batch = make_batch(config)
  for name in ("tokens", "segments", "positions", "ends", "text_mask", "region_mask"):
    batch[name][5] = batch[name][2]
  assert 0 < batch["region_mask"].sum() < batch["region_mask"].size
  assert batch["region_mask"][2].any()
  return batch


def random_params(config):
  """Every parameter random, so that none can be forgotten."""
  rng = np.random.default_rng(1)

  def draw(name, leaf):
    if name == "logit_scale":
      return jnp.float32(config.model.logit_scale_init)
    return jnp.asarray(0.2 * rng.normal(size=leaf.shape) + name.endswith("scale"), leaf.dtype)

  model = grain.build(config)
  return trees.map_with_name(draw, jax.eval_shape(lambda: initial.init_params(model, config)))


def to_peer(tree, config):
  named = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(tree)}
  return weights.from_grain_jax(named, config)


def trainer_of(params, config):
  trainer = grain_torch.Trainer(config, total_steps=4, warmup_steps=1)
  trainer.model.load_state_dict(to_peer(params, config), strict=True)
  return trainer


def test_losses_and_all_gradients_are_equal(config, batch):
  params = random_params(config)
  loss = functools.partial(steps.loss_function, model=grain.build(config), config=config)
  compute = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch, jax.random.key(0))
  (_, (ours, _)), gradients = compute.compile(compiler_options=FAST)(
    params, batch, jax.random.key(0)
  )
  want = to_peer(gradients, config)
  norm = np.sqrt(sum(float((g**2).sum()) for g in want.values()))
  for form in FORMS:
    trainer = trainer_of(params, config)
    got = grain_torch.losses(trainer.model, sides.peer_batch(batch, config, form=form), config)
    got["loss"].backward()
    for name, value in got.items():
      total, weight = ours[name]
      assert_allclose(value.item(), total / weight, rtol=1e-5, err_msg=f"{form} {name}")
    found = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert found.keys() == want.keys()
    for name, g in want.items():
      scale = max(float(g.abs().max()), 1e-2 * norm)
      assert_allclose(found[name] / scale, g / scale, atol=1e-4, rtol=0, err_msg=f"{form} {name}")
  assert {name for name, g in want.items() if g.abs().max() < 1e-5 * norm} == NO_GRADIENT


def test_updates_are_equal(config, batch):
  params = random_params(config)
  optimizer = optim.create(config, params, total_steps=4, steps_per_epoch=1)
  trainers = {form: trainer_of(params, config) for form in FORMS}
  mesh = meshes.create(config, jax.devices()[:1])
  state = steps.TrainState(jnp.int32(0), params, optimizer.init(params))
  shardings = meshes.state_shardings(state, mesh, config.mesh.rules)
  with jax.set_mesh(mesh):
    step = steps.make_train_step(grain.build(config), config, mesh, optimizer, shardings)
    device_batch = meshes.to_global(batch, mesh)
    step = step.lower(state, device_batch).compile(compiler_options=FAST)
    for _ in range(UPDATES):
      state, metrics = step(state, device_batch)
  want, before = to_peer(state.params, config), trainers["padded"].model.state_dict()
  before = {name: value.clone() for name, value in before.items()}
  for form, trainer in trainers.items():
    for _ in range(UPDATES):
      loss = trainer.step(sides.peer_batch(batch, config, form=form))["loss"]
    assert_allclose(loss.item(), metrics["loss"][0], rtol=1e-4)
    for name, value in trainer.model.state_dict().items():
      assert_allclose(value, want[name], atol=2e-5, rtol=0, err_msg=f"{form} {name}")
      moved = (before[name] - value).abs().max()
      assert moved > 2e-3 or name in NO_GRADIENT, name
    assert trainer.model.logit_scale.item() <= config.model.logit_scale_max  # began above


def test_learning_rate_is_that_of_the_schedule(config):
  config.optimizer.warmup_steps = 10
  schedule = optim.schedule(config, total_steps=40, steps_per_epoch=1)
  trainer = grain_torch.Trainer(config, total_steps=40, warmup_steps=10)
  for step in (0, 1, 9, 10, 11, 25, 39, 40, 50):
    assert_allclose(trainer.learning_rate(step), schedule(step), rtol=1e-5)


def test_dropout_works_in_training_alone(config, batch):
  config.model.decoder.dropout = 0.1
  model = trainer_of(random_params(config), config).model
  theirs = sides.peer_batch(batch, config, form="trimmed")
  model.train()
  a, b = (model(theirs) for _ in range(2))
  assert not torch.equal(a.boxes, b.boxes) and torch.equal(a.captions, b.captions)
  dropping = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
  attention = [m.dropout for m in model.query_decoder.modules() if hasattr(m, "joint")]
  assert dropping == [0.1] * 2 * config.model.decoder.depth
  assert attention == [0.1] * 2 * config.model.decoder.depth
  model.eval()
  a, b = (model(theirs) for _ in range(2))
  assert torch.equal(a.boxes, b.boxes)


def test_it_has_our_parameters_at_full_size():
  config = configs.resolve(configs.load("configs/cc12m.py"))
  ours = jax.eval_shape(lambda: initial.init_params(grain.build(config), config))
  with torch.device("meta"):
    model = grain_torch.GrainTorch(config)
  assert sum(p.numel() for p in model.parameters()) == trees.count(ours)
