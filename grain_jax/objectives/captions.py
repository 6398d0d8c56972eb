"""Image against text: the symmetric contrastive loss of CLIP, and its several-positives form."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grain_jax.objectives import duplicates

Array = jax.Array

# Stands for minus infinity where a softmax must not look; finite, so that no NaN can arise.
FORBIDDEN = -1e9


def similarity(a: Array, b: Array, *, logit_scale: Array) -> Array:
  """exp(logit_scale) a b^T in float32: [..., N, E], [..., M, E] -> [..., N, M]."""
  product = jnp.einsum("...ne,...me->...nm", a, b, precision=jax.lax.Precision.HIGHEST)
  return jnp.exp(logit_scale) * product


def cross_entropy(logits: Array, own: Array, allowed: Array, mask: Array) -> Array:
  """Sum over rows of -log softmax at the row's own entry.

  Args:
    logits: f32 [..., N, M].
    own: f32 [..., N], each row's logit at its target.
    allowed: bool [..., N, M]; false where an entry is no negative of the row.
    mask: bool [..., N], rows that count.

  Returns:
    []. The target itself is always in the denominator.
  """
  logits = jnp.where(allowed, logits, FORBIDDEN)
  return jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - own, 0.0))


def caption_loss(
  image: Array,
  text: Array,
  *,
  logit_scale: Array,
  mask: Array,
  same: Array | None = None,
) -> tuple[Array, Array]:
  """1/2 [CE(s I T^T) + CE(s T I^T)] over the global batch (Radford et al., 2021; GRAIN eq. 1).

  Args:
    image: f32 [B, E], L2-normalised.
    text: f32 [B, E], L2-normalised.
    logit_scale: [], ln s.
    mask: bool [B]; examples that do not count are no negatives either.
    same: bool [B, B] or None: pairs of equal captions, which are no negatives of each other.

  Returns:
    (sum, weight): the loss is sum / weight, weight the number of examples.
  """
  logits = similarity(image, text, logit_scale=logit_scale)
  own = jnp.diagonal(logits)
  allowed = jnp.broadcast_to(mask, logits.shape)
  if same is not None:  # symmetric, so it serves both directions
    allowed = allowed & ~same
  allowed = allowed | jnp.eye(image.shape[0], dtype=bool)
  total = cross_entropy(logits, own, allowed, mask) + cross_entropy(logits.T, own, allowed, mask)
  return total / 2, jnp.sum(mask, dtype=jnp.float32)


def multi_positive_loss(
  image: Array,
  descriptions: Array,
  *,
  logit_scale: Array,
  mask: Array,
  prints: Array,
) -> tuple[Array, Array]:
  """Descriptions as further positives of the global embedding, symmetric like `caption_loss`.

  Each description is told from those of other images by its image, and its image from other
  images by it; an equal description of another image is no negative, nor is that image.

  Args:
    image: f32 [B, E], L2-normalised.
    descriptions: f32 [B, R, E], L2-normalised.
    logit_scale: [], ln s.
    mask: bool [B, R].
    prints: u32 [B, R, 2], `duplicates.fingerprints` of the descriptions.

  Returns:
    (sum, weight): weight the number of descriptions.
  """
  batch, regions = mask.shape
  flat, valid = descriptions.reshape(batch * regions, -1), mask.reshape(-1)
  owner = jnp.repeat(jnp.arange(batch), regions)
  logits = similarity(flat, image, logit_scale=logit_scale)  # [B R, B]
  own = jnp.take_along_axis(logits, owner[:, None], axis=1)[:, 0]
  same = duplicates.equal(prints.reshape(-1, 2), prints.reshape(-1, 2)) & valid[None, :]
  mine = owner[:, None] == owner[None, :]
  # To image: images that hold the same description are no negatives.
  shares = jnp.any(same.reshape(-1, batch, regions), axis=-1)
  images = jnp.any(mask, axis=1)
  to_image = cross_entropy(
    logits, own, (images[None, :] & ~shares) | (owner[:, None] == jnp.arange(batch)), valid
  )
  # To text: the row of a description is its image's logits over all descriptions.
  rows = logits.T[owner]  # [B R, B R]
  allowed = (valid[None, :] & ~same & ~mine) | jnp.eye(batch * regions, dtype=bool)
  to_text = cross_entropy(rows, own, allowed, valid)
  return (to_image + to_text) / 2, jnp.sum(valid, dtype=jnp.float32)
