"""Region against description: each matched region query finds its own description."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grain_jax.objectives import captions, duplicates

Array = jax.Array


def take_queries(values: Array, queries: Array) -> Array:
  """Values of the matched queries: [B, Q, ...] and i32 [B, R] (-1: none) -> [B, R, ...]."""
  index = jnp.maximum(queries, 0).reshape(*queries.shape, *(1,) * (values.ndim - 2))
  return jnp.take_along_axis(values, index, axis=1)


def region_loss(
  regions: Array,
  descriptions: Array,
  *,
  logit_scale: Array,
  mask: Array,
  prints: Array | None = None,
  groups: int = 1,
) -> tuple[Array, Array, Array]:
  """CE over matched regions of s q D^T, D = all valid descriptions; region -> text only (GRAIN).

  Args:
    regions: f32 [B, R, E], embeddings of the matched queries, L2-normalised.
    descriptions: f32 [B, R, E], L2-normalised.
    logit_scale: [], ln s.
    mask: bool [B, R].
    prints: u32 [B, R, 2] or None: where given, equal descriptions are no negatives.
    groups: the batch is cut into so many equal parts, and negatives come from the region's own
      part only. 1 is the whole batch; the number of devices is the published code.

  Returns:
    (sum, correct, weight): the loss is sum / weight; correct counts the regions whose own
    description scores highest; weight is the number of regions.
  """
  shape = (groups, mask.size // groups)
  q, d = regions.reshape(*shape, -1), descriptions.reshape(*shape, -1)
  valid = mask.reshape(shape)
  logits = captions.similarity(q, d, logit_scale=logit_scale)
  own = jnp.diagonal(logits, axis1=-2, axis2=-1)
  allowed = jnp.broadcast_to(valid[:, None, :], logits.shape)
  if prints is not None:
    prints = prints.reshape(*shape, 2)
    allowed = allowed & ~duplicates.equal(prints, prints)
  allowed = allowed | jnp.eye(shape[1], dtype=bool)
  best = jnp.max(jnp.where(allowed, logits, captions.FORBIDDEN), axis=-1)
  correct = jnp.sum((own >= best) & valid, dtype=jnp.float32)
  total = captions.cross_entropy(logits, own, allowed, valid)
  return total, correct, jnp.sum(valid, dtype=jnp.float32)
