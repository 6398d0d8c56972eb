"""AdamW against torch.optim.AdamW; schedule and clamp against numbers worked by hand."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from grain_jax import trees
from grain_jax.models import grain, initial
from grain_jax.training import optim, steps

STEPS = 6


def model_params(config):
  return jax.eval_shape(lambda: initial.init_params(grain.build(config), config))


@pytest.fixture
def params(rng):
  """Names and ranks as in a model: stacked kernels 3-D, stacked biases and norms 2-D."""
  shapes = {
    "image_tower": {
      "blocks": {
        "fc1": {"kernel": (2, 4, 3), "bias": (2, 3)},
        "norm1": {"scale": (2, 4), "bias": (2, 4)},
      }
    },
    "text_tower": {"token_embedding": (5, 4)},
    "logit_scale": (),
  }
  return jax.tree.map(
    lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
  )


DECAYED = {"image_tower/blocks/fc1/kernel", "text_tower/token_embedding"}


def hand_schedule(o, step, warmup):
  if step < warmup:
    return o.lr_init + (o.lr - o.lr_init) * step / warmup
  part = (step - warmup) / (STEPS - warmup)
  return o.lr_end + (o.lr - o.lr_end) * 0.5 * (1 + np.cos(np.pi * part))


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_steps_equal_those_of_torch_adamw(tiny, params, rng, clip_norm):
  o = tiny.optimizer
  o.update(lr=0.05, lr_init=0.01, lr_end=0.002, warmup_steps=2, weight_decay=0.3, eps=1e-3)
  o.update(clip_norm=clip_norm, freeze=("text_tower",), lr_scale=(("norm1", 0.1),))
  gradients = [
    jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    for _ in range(STEPS)
  ]

  optimizer = optim.create(tiny, params, total_steps=STEPS, steps_per_epoch=1)
  ours, state = jax.tree.map(jnp.asarray, params), optimizer.init(params)
  for g in gradients:
    updates, state = optimizer.update(g, state, ours)
    ours = optax.apply_updates(ours, updates)

  theirs = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in trees.named_leaves(params)}
  groups = [
    {"params": [p], "name": n, "weight_decay": 0.3 if n in DECAYED else 0.0}
    for n, p in theirs.items()
  ]
  adamw = torch.optim.AdamW(groups, lr=1.0, betas=(o.b1, o.b2), eps=o.eps)
  for step, g in enumerate(gradients):
    for name, value in trees.named_leaves(g):
      theirs[name].grad = torch.tensor(value)
    if clip_norm:  # frozen gradients have no part in the norm
      trained = [p for n, p in theirs.items() if not n.startswith("text_tower")]
      torch.nn.utils.clip_grad_norm_(trained, clip_norm)
    for group in adamw.param_groups:
      factor = 0.0 if "text_tower" in group["name"] else 0.1 if "norm1" in group["name"] else 1.0
      group["lr"] = factor * hand_schedule(o, step, warmup=2)
    adamw.step()
  for name, value in trees.named_leaves(ours):
    assert_allclose(value, theirs[name].detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
  assert_array_equal(ours["text_tower"]["token_embedding"], params["text_tower"]["token_embedding"])


def test_schedule_at_points_worked_by_hand(tiny):
  tiny.optimizer.update(lr=1.0, lr_init=0.2, lr_end=0.1, warmup_steps=0, warmup_epochs=2.0)
  rate = optim.schedule(tiny, total_steps=110, steps_per_epoch=5)  # 10 steps of warm-up
  points = {0: 0.2, 5: 0.6, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}
  assert_allclose([rate(step) for step in points], list(points.values()), rtol=1e-5)


def test_no_warmup_starts_at_the_peak(tiny):
  tiny.optimizer.update(lr=1.0, lr_end=0.0, warmup_steps=0, warmup_epochs=0.0)
  rate = optim.schedule(tiny, total_steps=10, steps_per_epoch=5)
  assert_allclose([rate(0), rate(5), rate(10)], [1.0, 0.5, 0.0], atol=1e-6)


def test_a_warmup_that_is_left_open_is_an_error(tiny):
  tiny.optimizer.warmup_steps = -1
  with pytest.raises(ValueError, match="warmup_steps = -1 is left open: give a number"):
    optim.schedule(tiny, total_steps=10, steps_per_epoch=5)


def test_warmup_longer_than_the_run_is_an_error(tiny):
  tiny.optimizer.warmup_steps = 10
  with pytest.raises(ValueError, match="warm-up takes 10 steps of a run of 10"):
    optim.schedule(tiny, total_steps=10, steps_per_epoch=5)


def test_an_end_that_is_passed_already_is_said(tiny):
  tiny.optimizer.update(warmup_steps=1, start_step=20)
  with pytest.raises(ValueError, match="at step 20 already, and is to end at 10. Name a later"):
    optim.schedule(tiny, total_steps=10, steps_per_epoch=5)


def test_clean_mask_decays_no_norm_bias_or_scale_of_the_model(tiny):
  """By name: stacked biases and norm weights are 2-D, so the number of dimensions says nothing."""
  params = model_params(tiny)
  mask = dict(trees.named_leaves(optim.decay_mask(params, "clean")))
  shapes = {name: leaf.shape for name, leaf in trees.named_leaves(params)}
  assert any(name.endswith("/bias") and len(shape) == 2 for name, shape in shapes.items())
  for name, decays in mask.items():
    plain = name.endswith(("kernel", "embedding", "positions", "class_token"))
    assert decays == plain, name


def test_relative_positions_of_a_t5_are_a_bias(tiny):
  """OpenCLIP's rule, of CLIPpy: no decay where a name has 'bias' in it."""
  tiny.model.text.kind = "t5"
  for kind in ("clean", "published"):
    mask = dict(trees.named_leaves(optim.decay_mask(model_params(tiny), kind)))
    assert mask["text_tower/relative_bias"] is False and mask["text_tower/token_embedding"]


def test_published_mask_adds_the_decoders_norms_and_attention_input_biases(tiny):
  """torch names: norm{1,2,3}.weight, norm.weight, pre_norm.weight, in_proj_bias are decayed."""
  params = model_params(tiny)
  clean, published = (
    dict(trees.named_leaves(optim.decay_mask(params, kind))) for kind in ("clean", "published")
  )
  more = {name for name in published if published[name] and not clean[name]}
  attention = {
    f"query_decoder/layers/{kind}_attention/{part}/bias"
    for kind in ("self", "cross")
    for part in ("query", "key", "value")
  }
  norms = {f"query_decoder/layers/norm{i}/scale" for i in (1, 2, 3)}
  norms |= {"query_decoder/norm/scale", "query_decoder/input_norm/scale"}
  assert more == attention | norms
  assert not {name for name in clean if clean[name] and not published[name]}


@pytest.mark.parametrize("key", ["freeze", "lr_scale"])
def test_a_rule_that_matches_no_parameter_is_an_error(tiny, params, key):
  tiny.optimizer[key] = ("nothing/",) if key == "freeze" else (("nothing/", 0.1),)
  with pytest.raises(ValueError, match=f"config.optimizer.{key}: 'nothing/' matches no parameter"):
    optim.create(tiny, params, total_steps=10, steps_per_epoch=1)


@pytest.mark.parametrize(("before", "after"), [(-1.0, 0.0), (3.0, 3.0), (9.0, 4.6052)])
def test_logit_scale_is_clamped(before, after):
  params = {"logit_scale": jnp.array(before), "other": jnp.array(9.0)}
  clamped = optim.clamp_logit_scale(params, 4.6052)
  assert_allclose(clamped["logit_scale"], after)
  assert_allclose(clamped["other"], 9.0)


def test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adamw(tiny, rng):
  """First step, where the momentum is the gradient: U V^T of the singular value decomposition."""
  shapes = {
    "tower": {"fc": {"kernel": (3, 8, 5), "bias": (3, 5)}, "out": {"kernel": (4, 6)}},
    "token_embedding": (5, 4),
  }
  params, gradient = (
    jax.tree.map(
      lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )
    for _ in range(2)
  )
  o = tiny.optimizer
  o.update(lr=0.5, warmup_steps=0, warmup_epochs=0.0, weight_decay=0.1, muon_rms=0.3)
  steps_of = {}
  for o.name in ("adamw", "muon"):
    optimizer = optim.create(tiny, params, total_steps=STEPS, steps_per_epoch=1)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    steps_of[o.name] = dict(trees.named_leaves(updates))
  muon, weights = steps_of["muon"], dict(trees.named_leaves(params))
  for name, value in trees.named_leaves(gradient):
    if not name.endswith("kernel"):
      assert_allclose(muon[name], steps_of["adamw"][name], rtol=1e-6, err_msg=name)
      continue
    directions = muon[name] / -0.5 - 0.1 * weights[name]
    for matrix, direction in zip(
      value.reshape(-1, *value.shape[-2:]),
      np.reshape(directions, (-1, *value.shape[-2:])) / (0.3 * max(value.shape[-2:]) ** 0.5),
      strict=True,
    ):
      u, _, vt = np.linalg.svd(matrix, full_matrices=False)
      aligned = u.T @ direction @ vt.T
      # Newton-Schulz with Muon's coefficients brings singular values near 1, not to 1.
      assert np.all((np.diag(aligned) > 0.6) & (np.diag(aligned) < 1.3)), np.diag(aligned)
      assert_allclose(aligned, np.diag(np.diag(aligned)), atol=1e-4)


def test_muon_sums_in_another_order_when_sharded_but_stays_the_same_step(tiny, make_batch):
  """Losses of four steps on eight devices and on one, of both towers alone."""
  from grain_jax.runtime import mesh as meshes

  tiny.optimizer.name, tiny.method, tiny.model.text.vocab_size = "muon", "clip", 400
  losses = []
  for devices in (1, 8):
    mesh = meshes.create(tiny, devices=jax.devices()[:devices])
    model = grain.build(tiny)
    *_, shardings, optimizer = steps.create_state(
      model, tiny, mesh, total_steps=10, steps_per_epoch=2
    )
    params = drawn.params(tiny)
    state = steps.TrainState(np.int32(0), params, optimizer.init(params))
    with jax.set_mesh(mesh):
      state = jax.device_put(state, shardings)
      step = steps.make_train_step(model, tiny, mesh, optimizer, shardings)
      values = []
      for i in range(4):
        batch = make_batch(tiny, rng=np.random.default_rng(i))
        state, metrics = step(state, meshes.to_global(batch, mesh))
        values.append(float(metrics["loss"][0] / metrics["loss"][1]))
    losses.append(values)
  assert losses[0][0] != losses[0][3]
  assert_allclose(losses[0], losses[1], rtol=1e-4)
