"""Image against text: the symmetric contrastive loss of CLIP, and its several-positives form."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grain_jax.objectives import contrastive, duplicates

Array = jax.Array


def caption_loss(
  image: Array,
  text: Array,
  *,
  logit_scale: Array,
  logit_bias: Array | None = None,
  mask: Array,
  text_hashes: Array | None = None,
  axes: tuple[str, ...] = (),
  chunk: int = 0,
  dtype: jax.typing.DTypeLike = jnp.float32,
  groups: Array | None = None,
) -> tuple[Array, ...]:
  """1/2 [CE(s I T^T) + CE(s T I^T)] over the global batch (Radford et al., 2021; GRAIN eq. 1).

  With `logit_bias` SigLIP's loss instead: `contrastive.sigmoid`.

  Args:
    image: f32 [B, E], L2-normalised.
    text: f32 [B, E], L2-normalised.
    logit_scale: [], ln s.
    logit_bias: [], of SigLIP's loss; None: softmax.
    mask: bool [B]; examples that do not count are no negatives either.
    text_hashes: u32 [B, 2] or None: where given, equal captions are no negatives of each other.
    axes: within `shard_map`, the mesh axes that shard the batch; negatives come from all shards.
    chunk: candidates at a time; 0: all.
    dtype: of the products: `contrastive.product_dtype`.
    groups: f32 [B, G], 1 where an example is of a group: its sums are asked for too.

  Returns:
    (sum, weight): the loss is sum / weight, weight the number of examples (of this device). With
    groups also the sum and the weight of each, [G].
  """
  images = contrastive.Candidates(image, mask, text_hashes)
  texts = contrastive.Candidates(text, mask, text_hashes)
  if logit_bias is not None:
    sums = contrastive.sigmoid(
      images, texts, logit_scale=logit_scale, logit_bias=logit_bias,
      axes=axes, chunk=chunk, dtype=dtype,
    )  # fmt: skip
    return sums.loss, sums.rows, *contrastive.by_group(groups, sums.each, mask)
  total, each = jnp.zeros(()), jnp.zeros(mask.shape)
  for rows, candidates in ((images, texts), (texts, images)):
    sums = contrastive.cross_entropy(
      rows, candidates, logit_scale=logit_scale, axes=axes, chunk=chunk, dtype=dtype
    )
    total += sums.loss / 2
    each += sums.each / 2
  return total, sums.rows, *contrastive.by_group(groups, each, mask)


def multi_positive_loss(
  image: Array,
  descriptions: Array,
  *,
  logit_scale: Array,
  logit_bias: Array | None = None,
  mask: Array,
  text_hashes: Array,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Array, Array]:
  """Descriptions as further positives of the global embedding, symmetric like `caption_loss`.

  Each description is contrasted with those of other images, and its image with other images; an
  equal description of another image is no negative, nor is that image. The logits are not
  chunked: this is a control for small runs.

  Args:
    image: f32 [B, E], L2-normalised.
    descriptions: f32 [B, R, E], L2-normalised.
    logit_scale: [], ln s.
    logit_bias: [], of SigLIP's loss of these pairs; None: softmax.
    mask: bool [B, R].
    text_hashes: u32 [B, R, 2], `duplicates.hash_texts` of the descriptions.
    dtype: of the products: `contrastive.product_dtype`.

  Returns:
    (sum, weight): weight the number of descriptions.
  """
  batch, regions = mask.shape
  flat, valid = descriptions.reshape(batch * regions, -1), mask.reshape(-1)
  owner = jnp.repeat(jnp.arange(batch), regions)
  logits = jnp.exp(logit_scale) * contrastive.inner_products(
    flat, contrastive.gather_embeddings(image, dtype, ())
  )  # [B R, B]
  positive = jnp.take_along_axis(logits, owner[:, None], axis=1)[:, 0]
  same = (
    duplicates.pairwise_equal(text_hashes.reshape(-1, 2), text_hashes.reshape(-1, 2))
    & valid[None, :]
  )
  same_image = owner[:, None] == owner[None, :]
  # To image: images that hold the same description are no negatives.
  images_with_text = jnp.any(same.reshape(-1, batch, regions), axis=-1)
  images = jnp.any(mask, axis=1)
  others = images[None, :] & ~images_with_text
  if logit_bias is not None:
    against = jnp.where(others, logits + logit_bias, contrastive.MASKED_LOGIT)
    each = jax.nn.softplus(-positive - logit_bias) + jnp.sum(jax.nn.softplus(against), axis=-1)
    return jnp.sum(jnp.where(valid, each, 0.0)), jnp.sum(valid, dtype=jnp.float32)
  own = owner[:, None] == jnp.arange(batch)
  to_image = _cross_entropy(logits, positive, others | own, valid)
  # To text: the row of a description is its image's logits over all descriptions.
  rows = logits.T[owner]  # [B R, B R]
  allowed = (valid[None, :] & ~same & ~same_image) | jnp.eye(batch * regions, dtype=bool)
  to_text = _cross_entropy(rows, positive, allowed, valid)
  return (to_image + to_text) / 2, jnp.sum(valid, dtype=jnp.float32)


def _cross_entropy(logits: Array, positive: Array, allowed: Array, mask: Array) -> Array:
  """Sum over the rows in `mask` of -log softmax at the positive; `allowed` includes it."""
  logits = jnp.where(allowed, logits, contrastive.MASKED_LOGIT)
  return jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - positive, 0.0))
