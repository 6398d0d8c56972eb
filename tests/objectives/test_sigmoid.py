"""SigLIP's loss (Zhai et al., ICCV 2023, eq. 1) against torch, transformers, and in shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from numpy.testing import assert_allclose

from grain_jax import config as configs
from grain_jax import trees
from grain_jax.models import grain, initial
from grain_jax.objectives import captions, hard_negatives, regions
from grain_jax.training import optim

B, R, N, E = 8, 2, 3, 16
SCALE, BIAS = np.float32(np.log(10)), np.float32(-1.5)


def embeddings(rng, *shape):
  x = rng.normal(size=(*shape, E)).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def hashes(rng, *shape, kinds=5):
  """u32 [..., 2] of texts of which some are equal."""
  return rng.integers(0, kinds, (*shape, 1)).astype(np.uint32).repeat(2, -1)


def torch_loss(rows, columns, scale, bias, *, positive, kept):
  """Sum over the kept pairs of -log sigmoid(z (s a.b + bias)), z = 1 for `positive`, else -1."""
  logits = scale.exp() * rows @ columns.T + bias
  z = torch.where(torch.tensor(positive), 1.0, -1.0)
  return -(F.logsigmoid(z * logits) * torch.tensor(kept)).sum()


def kept_pairs(row_mask, column_mask, row_hashes, column_hashes):
  """(positive, kept) [rows, columns]: column i is row i's; equal texts of others do not count."""
  positive = np.eye(len(row_mask), len(column_mask), dtype=bool)
  equal = (row_hashes[:, None] == column_hashes).all(-1)
  return positive, row_mask[:, None] & (positive | (column_mask & ~equal))


def check(ours, theirs, arrays):
  """Value and gradients of the arrays, the scale and the bias."""
  arguments = (*arrays, SCALE, BIAS)
  value, gradients = jax.value_and_grad(ours, argnums=tuple(range(len(arguments))))(*arguments)
  tensors = [torch.tensor(x, requires_grad=True) for x in arguments]
  want = theirs(*tensors)
  want.backward()
  assert_allclose(value, want.item(), rtol=1e-5)
  for got, tensor in zip(gradients, tensors, strict=True):
    assert np.abs(tensor.grad.numpy()).max() > 1e-3
    assert_allclose(got, tensor.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 3, 8])
@pytest.mark.parametrize("named", [True, False])
def test_captions_are_the_formula(rng, chunk, named):
  """Divided by the examples that count; both directions are one matrix, counted once."""
  image, text, names = embeddings(rng, B), embeddings(rng, B), hashes(rng, B)
  mask = np.arange(B) != 3
  unlike = np.arange(B, dtype=np.uint32)[:, None].repeat(2, 1)
  positive, kept = kept_pairs(mask, mask, *[names if named else unlike] * 2)
  assert kept.sum() < mask.sum() ** 2 or not named

  def ours(image, text, scale, bias):
    total, weight = captions.caption_loss(
      image, text, logit_scale=scale, logit_bias=bias, mask=jnp.asarray(mask),
      text_hashes=jnp.asarray(names) if named else None, chunk=chunk,
    )  # fmt: skip
    return total / weight

  def theirs(image, text, scale, bias):
    return torch_loss(image, text, scale, bias, positive=positive, kept=kept) / mask.sum()

  check(ours, theirs, (image, text))


@pytest.mark.parametrize("chunk", [0, 7])
def test_regions_are_the_formula_with_false_descriptions(rng, chunk):
  found, texts, false = embeddings(rng, B, R), embeddings(rng, B, R), embeddings(rng, B, R, N)
  mask, false_mask = rng.random((B, R)) < 0.8, rng.random((B, R, N)) < 0.7
  names, others = hashes(rng, B, R, kinds=9), hashes(rng, B, R, N, kinds=9)
  positive, kept = kept_pairs(
    mask.ravel(), np.concatenate([mask.ravel(), false_mask.ravel()]),
    names.reshape(-1, 2), np.concatenate([names.reshape(-1, 2), others.reshape(-1, 2)]),
  )  # fmt: skip

  def ours(found, texts, false, scale, bias):
    return regions.region_loss(
      found, texts, logit_scale=scale, logit_bias=bias, mask=jnp.asarray(mask),
      text_hashes=jnp.asarray(names), false=false, false_mask=jnp.asarray(false_mask),
      false_hashes=jnp.asarray(others), chunk=chunk,
    )[0]  # fmt: skip

  def theirs(found, texts, false, scale, bias):
    columns = torch.cat([texts.reshape(-1, E), false.reshape(-1, E)])
    return torch_loss(found.reshape(-1, E), columns, scale, bias, positive=positive, kept=kept)

  check(ours, theirs, (found, texts, false))


def test_hard_negatives_are_further_columns(rng):
  image, text, wrong = embeddings(rng, B), embeddings(rng, B), embeddings(rng, B, N)
  valid, everyone = rng.random((B, N)) < 0.7, np.ones(B, bool)
  unlike = np.arange(B * (1 + N), dtype=np.uint32)[:, None].repeat(2, 1)
  positive, kept = kept_pairs(
    everyone, np.concatenate([everyone, valid.ravel()]), unlike[:B], unlike
  )

  def ours(image, text, wrong, scale, bias):
    return hard_negatives.hard_negative_loss(
      image, text, wrong, jnp.asarray(valid), logit_scale=scale, logit_bias=bias,
      thresholds=jnp.zeros(N),
    ).contrast[0]  # fmt: skip

  def theirs(image, text, wrong, scale, bias):
    columns = torch.cat([text, wrong.reshape(-1, E)])
    return torch_loss(image, columns, scale, bias, positive=positive, kept=kept)

  check(ours, theirs, (image, text, wrong))


def test_descriptions_as_further_positives(rng):
  """Each description against all images but those that hold its text, and its own."""
  image, texts = embeddings(rng, B), embeddings(rng, B, R)
  mask, names = rng.random((B, R)) < 0.8, hashes(rng, B, R, kinds=9)
  owner = np.repeat(np.arange(B), R)
  positive = owner[:, None] == np.arange(B)
  same = (names.reshape(-1, 1, 2) == names.reshape(1, -1, 2)).all(-1) & mask.ravel()
  holds = same.reshape(-1, B, R).any(-1)
  kept = mask.reshape(-1, 1) & (positive | (mask.any(1) & ~holds))

  def ours(image, texts, scale, bias):
    return captions.multi_positive_loss(
      image, texts, logit_scale=scale, logit_bias=bias, mask=jnp.asarray(mask),
      text_hashes=jnp.asarray(names),
    )[0]  # fmt: skip

  def theirs(image, texts, scale, bias):
    return torch_loss(texts.reshape(-1, E), image, scale, bias, positive=positive, kept=kept)

  check(ours, theirs, (image, texts))


def test_it_is_the_loss_of_transformers_siglip(rng):
  """Of a SiglipModel of random weights, and its own embeddings."""
  tower = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
  }  # fmt: skip
  config = transformers.SiglipConfig(
    text_config=tower | {"vocab_size": 50, "max_position_embeddings": 6, "projection_size": 32},
    vision_config=tower | {"image_size": 16, "patch_size": 8},
  )
  torch.manual_seed(0)
  model = transformers.SiglipModel(config).eval()
  with torch.no_grad():
    model.logit_scale.fill_(np.log(10))
    model.logit_bias.fill_(-10.0)
    out = model(
      input_ids=torch.tensor(rng.integers(0, 50, (5, 6))),
      pixel_values=torch.tensor(rng.normal(size=(5, 3, 16, 16)), dtype=torch.float32),
      return_loss=True,
    )
  total, weight = captions.caption_loss(
    jnp.asarray(out.image_embeds), jnp.asarray(out.text_embeds), mask=jnp.ones(5, bool),
    logit_scale=jnp.float32(np.log(10)), logit_bias=jnp.float32(-10.0),
  )  # fmt: skip
  assert_allclose(total / weight, out.loss, rtol=1e-5)


def test_a_batch_of_no_examples_is_no_loss_and_no_nan(rng):
  def loss(image, bias):
    return captions.caption_loss(
      image, image, logit_scale=SCALE, logit_bias=bias, mask=jnp.zeros(B, bool)
    )[0]

  value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(embeddings(rng, B), BIAS)
  assert value == 0 and all(np.all(np.asarray(g) == 0) for g in gradients)


@pytest.mark.parametrize("chunk", [0, 5])
def test_eight_devices_are_one(rng, chunk):
  """Captions, regions with false descriptions and hard negatives, with all gradients."""
  arrays = embeddings(rng, B), embeddings(rng, B, R), embeddings(rng, B, R, N)
  fixed = (
    rng.random((B, R)) < 0.8, rng.random((B, R, N)) < 0.7, hashes(rng, B, R, kinds=9),
    hashes(rng, B, R, N, kinds=9),
  )  # fmt: skip

  def sums(image, texts, false, mask, false_mask, names, others, scale, bias, axes):
    options = {"logit_scale": scale, "logit_bias": bias, "axes": axes, "chunk": chunk}
    first, _ = captions.caption_loss(
      image, texts[:, 0], mask=mask[:, 0], text_hashes=names[:, 0], **options
    )
    second = regions.region_loss(
      jnp.stack([image] * R, 1), texts, mask=mask, text_hashes=names, false=false,
      false_mask=false_mask, false_hashes=others, **options,
    )[0]  # fmt: skip
    third = hard_negatives.hard_negative_loss(
      image, texts[:, 1], false[:, 1], false_mask[:, 1], thresholds=jnp.zeros(N), **options
    ).contrast[0]
    total = first + 2 * second + 3 * third
    return jax.lax.psum(total, axes) if axes else total

  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  cut, all_of_it = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
  over = jax.shard_map(
    lambda *x: sums(*x, axes=("data",)), mesh=mesh, in_specs=(*[cut] * 7, all_of_it, all_of_it),
    out_specs=all_of_it,
  )  # fmt: skip
  arguments = (*arrays, *fixed, SCALE, BIAS)
  which = (0, 1, 2, 7, 8)
  got = jax.jit(jax.value_and_grad(over, argnums=which))(*arguments)
  want = jax.value_and_grad(lambda *x: sums(*x, axes=()), argnums=which)(*arguments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_bias_is_a_parameter_where_it_is_asked_for(tiny):
  """Without it there is no sigmoid contrast, in one line; with it no weight decay touches it."""
  tiny.loss.contrast = "sigmoid"
  with pytest.raises(ValueError, match=r"^config\.loss\.contrast .*config\.model\.logit_bias=True"):
    configs.check(tiny)
  names = dict(trees.named_leaves(jax.eval_shape(lambda: fresh(tiny))))
  assert "logit_bias" not in names
  tiny.model.logit_bias = True
  configs.check(tiny)
  params = jax.jit(lambda: fresh(tiny))()
  assert params["logit_bias"] == -10.0
  assert not optim.decay_mask(params, "clean")["logit_bias"]


def fresh(config):
  return initial.init_params(grain.build(config), config)
