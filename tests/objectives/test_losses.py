import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal

from grain_jax.objectives import captions, duplicates, regions


def unit(rng, *shape):
  x = rng.normal(size=shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def torch_clip(image, text, scale):
  logits = scale.exp() * image @ text.T
  target = torch.arange(len(image))
  return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def test_caption_loss_and_gradients_are_plain_torch_on_the_valid_rows(rng):
  image, text = unit(rng, 10, 16), unit(rng, 10, 16)
  mask = rng.random(10) < 0.7

  def loss(image, text, scale):
    total, weight = captions.caption_loss(image, text, logit_scale=scale, mask=jnp.asarray(mask))
    return total / weight

  value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(
    jnp.asarray(image), jnp.asarray(text), jnp.float32(2.0)
  )
  leaves = [torch.tensor(x, requires_grad=True) for x in (image, text, np.float32(2.0))]
  want = torch_clip(leaves[0][mask], leaves[1][mask], leaves[2])
  want.backward()
  assert_allclose(value, want.item(), rtol=1e-5)
  for got, leaf in zip(gradients, leaves, strict=True):
    assert_allclose(got, leaf.grad, rtol=1e-4, atol=1e-6)


def test_equal_captions_are_no_negatives_of_each_other(rng):
  image, text = unit(rng, 4, 8), unit(rng, 4, 8)
  text[2] = text[0]
  same = np.zeros((4, 4), bool)
  same[0, 2] = same[2, 0] = True
  same |= np.eye(4, dtype=bool)
  text_hashes = np.array([[5, 1], [6, 1], [5, 1], [5, 2]], np.uint32)
  total, _ = captions.caption_loss(
    jnp.asarray(image), jnp.asarray(text), logit_scale=jnp.float32(1.0), mask=jnp.ones(4, bool),
    text_hashes=jnp.asarray(text_hashes),
  )  # fmt: skip
  logits = np.exp(1.0) * image @ text.T
  want = 0.0
  for i in range(4):
    rows = [j for j in range(4) if j == i or not same[i, j]]
    want += np.log(np.exp(logits[i, rows]).sum()) - logits[i, i]
    want += np.log(np.exp(logits[rows, i]).sum()) - logits[i, i]
  assert_allclose(total, want / 2, rtol=1e-5)


def test_no_valid_example_gives_zero_and_no_nan(rng):
  image, text = jnp.asarray(unit(rng, 3, 8)), jnp.asarray(unit(rng, 3, 8))
  loss = lambda i: captions.caption_loss(  # noqa: E731
    i, text, logit_scale=jnp.float32(4.0), mask=jnp.zeros(3, bool)
  )[0]
  value, gradient = jax.value_and_grad(loss)(image)
  assert value == 0 and not np.asarray(gradient).any()


def test_region_loss_is_cross_entropy_over_the_valid_descriptions(rng):
  q, d, mask = unit(rng, 4, 3, 8), unit(rng, 4, 3, 8), rng.random((4, 3)) < 0.7
  total, correct, weight = regions.region_loss(
    jnp.asarray(q), jnp.asarray(d), logit_scale=jnp.float32(1.5), mask=jnp.asarray(mask)
  )
  x, y = torch.tensor(q[mask]), torch.tensor(d[mask])
  logits = np.exp(1.5) * x @ y.T
  want = F.cross_entropy(logits, torch.arange(len(x)), reduction="sum").item()
  right = (logits.argmax(-1) == torch.arange(len(x))).sum().item()
  assert_allclose(total, want, rtol=1e-5)
  assert (correct, weight) == (right, mask.sum())


def test_region_loss_masks_equal_descriptions(rng):
  q, d = unit(rng, 1, 3, 8), unit(rng, 1, 3, 8)
  text_hashes = np.array([[[1, 1], [2, 2], [1, 1]]], np.uint32)
  total, _, _ = regions.region_loss(
    jnp.asarray(q), jnp.asarray(d), logit_scale=jnp.float32(1.0), mask=jnp.ones((1, 3), bool),
    text_hashes=jnp.asarray(text_hashes),
  )  # fmt: skip
  logits = np.exp(1.0) * q[0] @ d[0].T
  rows = [[0, 1], [0, 1, 2], [1, 2]]
  want = sum(np.log(np.exp(logits[i, rows[i]]).sum()) - logits[i, i] for i in range(3))
  assert_allclose(total, want, rtol=1e-5)


def test_multi_positive_loss_by_loops(rng):
  image, text = unit(rng, 3, 8), unit(rng, 3, 2, 8)
  mask = np.array([[1, 1], [1, 0], [1, 1]], bool)
  names = np.array([["a", "b"], ["a", "x"], ["c", "d"]])
  text_hashes = np.vectorize(ord)(names).astype(np.uint32)[..., None].repeat(2, -1)
  total, weight = captions.multi_positive_loss(
    jnp.asarray(image), jnp.asarray(text), logit_scale=jnp.float32(1.0), mask=jnp.asarray(mask),
    text_hashes=jnp.asarray(text_hashes),
  )  # fmt: skip
  valid = [(i, r) for i in range(3) for r in range(2) if mask[i, r]]
  score = lambda i, j, r: np.exp(1.0) * image[i] @ text[j, r]  # noqa: E731
  want = 0.0
  for i, r in valid:
    texts = [(j, s) for j, s in valid if (j, s) == (i, r) or (
      j != i and names[j, s] != names[i, r])]  # fmt: skip
    want += np.log(sum(np.exp(score(i, j, s)) for j, s in texts)) - score(i, i, r)
    others = [
      j for j in range(3)
      if j == i or not any(names[j, s] == names[i, r] and mask[j, s] for s in range(2))
    ]  # fmt: skip
    want += np.log(sum(np.exp(score(j, i, r)) for j in others)) - score(i, i, r)
  assert_allclose(total, want / 2, rtol=1e-5)
  assert weight == len(valid)


def test_text_hashes_are_equal_for_equal_texts_alone():
  texts = [[5, 6, 7], [5, 6, 7], [7, 6, 5], [5, 6], [5, 6, 8]]
  tokens = np.concatenate([*texts, [0, 0]])[None].astype(np.int32)
  segments = np.concatenate([np.full(len(t), i + 1) for i, t in enumerate(texts)] + [[0, 0]])
  positions = np.concatenate([np.arange(len(t)) for t in texts] + [[0, 0]])
  text_hashes = duplicates.hash_texts(
    jnp.asarray(tokens), jnp.asarray(segments)[None], jnp.asarray(positions)[None], num_texts=5
  )[0]
  want = [[a == b for b in texts] for a in texts]
  assert_array_equal(duplicates.pairwise_equal(text_hashes, text_hashes), want)
