"""CE-CLIP's losses, gradients and thresholds against plain torch, written from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal

from grain_jax.objectives import hard_negatives

B, K, E = 8, 4, 16


def embeddings(rng, *shape):
  x = rng.normal(size=(*shape, E)).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(rng):
  """Negatives near their captions; every kind is valid for some, and one of them is not."""
  captions = embeddings(rng, B)
  image = captions + 0.5 * embeddings(rng, B)
  negatives = captions[:, None] + 0.4 * embeddings(rng, B, K)
  image, negatives = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image, negatives))
  valid = rng.random((B, K)) < 0.7
  valid[0], valid[1] = True, False
  return image, captions, negatives, valid


def reference(image, captions, negatives, valid, scale, thresholds, *, imc, threshold, published):
  """(contrast, intra, rank) as means, and the next thresholds."""
  logits = scale * image @ captions.T
  columns = torch.cat([logits, scale * image @ negatives.reshape(-1, E).T], dim=1)
  texts = scale * captions @ negatives.reshape(-1, E).T
  if not published:
    out = ~valid.reshape(-1)
    columns[:, B:] = columns[:, B:].masked_fill(out, -torch.inf)
    texts = texts.masked_fill(out, -torch.inf)
  target = torch.arange(B)
  contrast = (F.cross_entropy(columns, target) + F.cross_entropy(logits.T, target)) / 2
  right = logits.diag()[:, None]
  against = scale * torch.einsum("be,bke->bk", image, negatives)
  rank = (torch.relu(against - right + thresholds) * valid).mean()
  if imc == "image_text_positive":
    intra = F.cross_entropy(torch.cat([right, texts], dim=1), torch.zeros(B, dtype=torch.long))
  else:
    intra = torch.logsumexp(texts, dim=1).mean()
  with torch.no_grad():
    if threshold == "mean":
      new = right.mean() - (against * valid).sum(0) / valid.sum(0)
    elif threshold == "max":
      new = (right - against).masked_fill(~valid, -torch.inf).max(0).values / 5
    new = thresholds if threshold == "fixed" else new.clamp(0, 10)
  return contrast, intra, rank, new


@pytest.mark.parametrize("imc", hard_negatives.IMC)
@pytest.mark.parametrize("threshold", hard_negatives.THRESHOLDS)
@pytest.mark.parametrize("published", [False, True])
def test_three_steps_are_torchs(rng, imc, threshold, published):
  """Losses, their gradients, and thresholds that each step hands to the next."""
  steps = [make(rng) for _ in range(3)]
  ours = jnp.full(K, 2.0) if threshold == "fixed" else jnp.zeros(K)
  theirs = torch.tensor(np.asarray(ours))

  def total(image, captions, negatives, logit_scale, valid, thresholds):
    losses = hard_negatives.hard_negative_loss(
      image, captions, negatives, valid, logit_scale=logit_scale, thresholds=thresholds,
      imc=imc, threshold=threshold, mask_invalid=not published,
    )  # fmt: skip
    parts = [total / weight for total, weight in (losses.contrast, losses.intra, losses.rank)]
    return parts[0] + 0.3 * parts[1] + 0.2 * parts[2], (parts, losses.thresholds)

  for image, captions, negatives, valid in steps:
    arguments = (image, captions, negatives, np.float32(2.5))
    tensors = [torch.tensor(x, requires_grad=True) for x in arguments]
    contrast, intra, rank, new = reference(
      *tensors[:3], torch.tensor(valid), tensors[3].exp(), theirs,
      imc=imc, threshold=threshold, published=published,
    )  # fmt: skip
    (contrast + 0.3 * intra + 0.2 * rank).backward()
    (value, (parts, ours_next)), gradients = jax.value_and_grad(
      total, argnums=(0, 1, 2, 3), has_aux=True
    )(*map(jnp.asarray, arguments), jnp.asarray(valid), ours)
    for got, want in zip(parts, (contrast, intra, rank), strict=True):
      assert_allclose(got, want.item(), rtol=1e-5, atol=1e-6)
    for got, tensor in zip(gradients, tensors, strict=True):
      assert_allclose(got, tensor.grad, rtol=1e-4, atol=1e-6)
    assert_allclose(ours_next, new, rtol=1e-5, atol=1e-6)
    ours, theirs = ours_next, new
  assert threshold == "fixed" or np.all(np.asarray(ours) > 0.1)


def losses_of(image, captions, negatives, valid, **options):
  options = {"logit_scale": jnp.float32(2.0), "thresholds": jnp.full(K, 0.5)} | options
  return hard_negatives.hard_negative_loss(
    *map(jnp.asarray, (image, captions, negatives, valid)), **options
  )


@pytest.mark.parametrize("imc", hard_negatives.IMC)
def test_eight_devices_are_one(rng, imc):
  x = make(rng)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  cut, all_of_it = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

  def sums(axes, image, captions, negatives, valid):
    losses = losses_of(image, captions, negatives, valid, imc=imc, axes=axes, chunk=5)
    pairs = (losses.contrast, losses.intra, losses.rank)
    return (jax.lax.psum(pairs, axes) if axes else pairs), losses.thresholds

  over = jax.shard_map(
    lambda *x: sums(("data",), *x), mesh=mesh, in_specs=cut, out_specs=(all_of_it, all_of_it)
  )

  def value(function):
    def add_up(*arrays):
      (contrast, intra, rank), thresholds = function(*arrays, jnp.asarray(x[3]))
      return contrast[0] + intra[0] + rank[0], ((contrast, intra, rank), thresholds)

    return jax.jit(jax.value_and_grad(add_up, argnums=(0, 1, 2), has_aux=True))(*x[:3])

  with jax.set_mesh(mesh):
    got = value(over)
  want = value(lambda *arrays: sums((), *arrays))
  jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("imc", hard_negatives.IMC)
@pytest.mark.parametrize("threshold", hard_negatives.THRESHOLDS)
def test_a_batch_without_a_valid_negative_is_clip_and_keeps_its_thresholds(rng, imc, threshold):
  image, captions, negatives, valid = make(rng)
  negatives[:] = 0  # as absent texts are
  options = {"imc": imc, "threshold": threshold}

  def total(image, captions, negatives):
    losses = losses_of(image, captions, negatives, np.zeros_like(valid), **options)
    return losses.contrast[0] + losses.intra[0] + losses.rank[0], losses

  (_, losses), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(
    *map(jnp.asarray, (image, captions, negatives))
  )
  logits = torch.tensor(np.exp(2.0) * image @ captions.T)
  target = torch.arange(B)
  want = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
  assert_allclose(losses.contrast[0] / losses.contrast[1], want.item(), rtol=1e-5)
  assert float(losses.intra[0]) == float(losses.rank[0]) == 0.0
  assert_allclose(losses.thresholds, 0.5)
  assert all(np.isfinite(g).all() for g in gradients) and not np.any(gradients[2])


def test_examples_that_do_not_count_are_as_if_they_were_not_there(rng):
  image, captions, negatives, valid = make(rng)
  mask = np.array([True] * 5 + [False] * 3)
  got = losses_of(image, captions, negatives, valid, mask=jnp.asarray(mask), threshold="max")
  want = losses_of(image[:5], captions[:5], negatives[:5], valid[:5], threshold="max")
  jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), got, want)


@pytest.mark.parametrize("imc", hard_negatives.IMC)
def test_the_sources_contrasts_add_up_to_that_of_all(rng, imc):
  groups = jnp.asarray(np.eye(2, dtype=np.float32)[[0, 1] * (B // 2)])
  mask = jnp.asarray(np.arange(B) > 0)
  losses = losses_of(*make(rng), imc=imc, mask=mask, groups=groups)
  sums, weights = losses.by_group
  assert_allclose(jnp.sum(sums), losses.contrast[0], rtol=1e-5)
  assert_array_equal(weights, [B // 2 - 1, B // 2])


def test_a_negative_that_is_another_images_caption_is_none_of_that_image(rng):
  """Image 1's caption is image 0's negative 2: right for image 1, wrong for image 0 alone."""
  image, captions, negatives, valid = make(rng)
  valid[:] = True
  negatives[0, 2] = captions[1]
  hashes = np.arange(2 * B, dtype=np.uint32).reshape(B, 2)
  others = np.arange(1000, 1000 + 2 * B * K, dtype=np.uint32).reshape(B, K, 2)
  others[0, 2] = hashes[1]
  got = losses_of(
    image, captions, negatives, valid,
    text_hashes=jnp.asarray(hashes), negative_hashes=jnp.asarray(others),
  )  # fmt: skip
  logits = np.exp(2.0) * image @ np.concatenate([captions, negatives.reshape(-1, E)]).T
  logits[1, B + 2] = -np.inf
  to_text = F.cross_entropy(torch.tensor(logits), torch.arange(B), reduction="sum").item()
  to_image = F.cross_entropy(
    torch.tensor(np.exp(2.0) * captions @ image.T), torch.arange(B), reduction="sum"
  ).item()
  assert_allclose(got.contrast[0], (to_text + to_image) / 2, rtol=1e-5)


def test_what_is_unknown_is_one_line(rng):
  for options in ({"imc": "x"}, {"threshold": "y"}):
    with pytest.raises(ValueError, match="is unknown. Choose one of"):
      losses_of(*make(rng), **options)
