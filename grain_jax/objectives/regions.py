"""Region to text: each matched region query is contrasted with all descriptions."""

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
  logit_bias: Array | None = None,
  mask: Array,
  text_hashes: Array | None = None,
  axes: tuple[str, ...] = (),
  chunk: int = 0,
  dtype: jax.typing.DTypeLike = jnp.float32,
  false: Array | None = None,
  false_mask: Array | None = None,
  false_hashes: Array | None = None,
  groups: Array | None = None,
) -> tuple[Array, ...]:
  """CE over matched regions of s q D^T, D = all valid descriptions; region -> text only (GRAIN).

  False descriptions of regions are further columns, for every region. With `logit_bias` SigLIP's
  loss instead: `contrastive.sigmoid`.

  Args:
    regions: f32 [B, R, E], embeddings of the matched queries, L2-normalised.
    descriptions: f32 [B, R, E], L2-normalised.
    logit_scale: [], ln s.
    logit_bias: [], of SigLIP's loss; None: softmax.
    mask: bool [B, R].
    text_hashes: u32 [B, R, 2] or None: where given, equal descriptions are no negatives.
    axes: within `shard_map`, the mesh axes that shard the batch: negatives come from all shards.
      Without them they come from this device's shard alone, as in the published code.
    chunk: candidates at a time; 0: all.
    dtype: of the products: `contrastive.product_dtype`.
    false: f32 [B, R, N, E], false descriptions of each region, L2-normalised, or None.
    false_mask: bool [B, R, N], where there are some.
    false_hashes: u32 [B, R, N, 2] of their texts, where `text_hashes` are given.
    groups: f32 [B, G], as of `captions.caption_loss`.

  Returns:
    (sum, correct, weight): the loss is sum / weight; correct counts the regions whose own
    description scores highest; weight is the number of regions (of this device). With groups
    also the sum and the weight of each, [G].
  """
  width, valid = regions.shape[-1], mask.reshape(-1)
  text_hashes = None if text_hashes is None else text_hashes.reshape(-1, 2)
  texts = contrastive.Candidates(descriptions.reshape(-1, width), valid, text_hashes)
  if false is not None and false.size:
    wrong = contrastive.Candidates(
      false.reshape(-1, width),
      false_mask.reshape(-1),
      None if text_hashes is None else false_hashes.reshape(-1, 2),
    )
    texts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), texts, wrong)
  rows = contrastive.Candidates(regions.reshape(-1, width), valid, text_hashes)
  options = {"logit_scale": logit_scale, "axes": axes, "chunk": chunk, "dtype": dtype}
  if logit_bias is None:
    sums = contrastive.cross_entropy(rows, texts, **options)
  else:
    sums = contrastive.sigmoid(rows, texts, logit_bias=logit_bias, **options)
  found = contrastive.by_group(groups, sums.each.reshape(mask.shape), mask)
  return sums.loss, sums.correct, sums.rows, *found
