"""Region against description: each matched region query finds its own description."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grain_jax.objectives import contrastive

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
  axes: tuple[str, ...] = (),
  chunk: int = 0,
) -> tuple[Array, Array, Array]:
  """CE over matched regions of s q D^T, D = all valid descriptions; region -> text only (GRAIN).

  Args:
    regions: f32 [B, R, E], embeddings of the matched queries, L2-normalised.
    descriptions: f32 [B, R, E], L2-normalised.
    logit_scale: [], ln s.
    mask: bool [B, R].
    prints: u32 [B, R, 2] or None: where given, equal descriptions are no negatives.
    axes: within `shard_map`, the mesh axes that cut the batch: negatives come from all of it.
      Without them they come from this device's part alone, as in the published code.
    chunk: columns of the logits at a time; 0: all.

  Returns:
    (sum, correct, weight): the loss is sum / weight; correct counts the regions whose own
    description scores highest; weight is the number of regions (of this device).
  """
  width, valid = regions.shape[-1], mask.reshape(-1)
  prints = None if prints is None else prints.reshape(-1, 2)
  texts = contrastive.Side(descriptions.reshape(-1, width), valid, prints)
  whole, first = contrastive.gather(texts, axes)
  rows = contrastive.Side(regions.reshape(-1, width), valid, prints)
  sums = contrastive.cross_entropy(
    rows, texts.embeddings, whole, logit_scale=logit_scale, first=first, chunk=chunk
  )
  return sums.loss, sums.correct, sums.rows
