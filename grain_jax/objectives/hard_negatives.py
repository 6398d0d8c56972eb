"""Hard-negative captions: contrast, rank and text against text (CE-CLIP, arXiv 2306.08832).

Each image has a caption and K captions that are wrong about it in one thing, one slot a kind. With
K = 1, no rank and no text against text it is NegCLIP (Yuksekgonul et al., ICLR 2023).
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from grain_jax.objectives import contrastive

Array = jax.Array
Pair = tuple[Array, Array]  # (sum, weight), each []

IMC = ("image_text_positive", "text_only")
THRESHOLDS = ("mean", "max", "fixed")


@flax.struct.dataclass
class HardNegativeLoss:
  """The three losses as (sum, weight) pairs, and the thresholds of the next step."""

  contrast: Pair  # image-text contrast whose texts include the negatives
  intra: Pair  # intra-modal contrast of captions and negatives
  rank: Pair  # cross-modal rank
  by_group: tuple[Array, ...]  # sum and weight of the contrast of each, [G]; () without any
  thresholds: Array  # f32 [K], in units of logits, without gradient


def hard_negative_loss(
  image: Array,
  captions: Array,
  negatives: Array,
  valid: Array,
  *,
  logit_scale: Array,
  logit_bias: Array | None = None,
  thresholds: Array,
  imc: str = "image_text_positive",
  threshold: str = "mean",
  upper_bound: float = 10.0,
  mask_invalid: bool = True,
  mask: Array | None = None,
  text_hashes: Array | None = None,
  negative_hashes: Array | None = None,
  axes: tuple[str, ...] = (),
  chunk: int = 0,
  dtype: jax.typing.DTypeLike = jnp.float32,
  groups: Array | None = None,
) -> HardNegativeLoss:
  """The losses of CE-CLIP, with s = exp(logit_scale), v the valid negatives and n their texts.

      contrast: 1/2 [CE(s I [T; n]^T) + CE(s T I^T)]; with `logit_bias` SigLIP's loss of I and
                [T; n] instead (`contrastive.sigmoid`)
      intra:    'image_text_positive': -log softmax of [s I_i.T_i ; s T_i.n_j for all j] at the
                first; 'text_only': log sum_j exp(s T_i.n_j)
      rank:     mean over i and k of v_ik relu(s I_i.n_ik - s I_i.T_i + threshold_k)

  The thresholds are those of the step before. Theirs after it, by `threshold`: 'mean' of
  s I_i.T_i over i, less the mean of s I_i.n_ik over its valid i; 'max' over valid i of
  s I_i.T_i - s I_i.n_ik, divided by 5; clipped to [0, upper_bound]; 'fixed' leaves them. A kind
  without a valid negative in the batch keeps its threshold.

  Args:
    image: f32 [B, E], L2-normalised.
    captions: f32 [B, E], L2-normalised.
    negatives: f32 [B, K, E], L2-normalised where valid.
    valid: bool [B, K].
    logit_scale: [], ln s.
    logit_bias: [], of SigLIP's loss; None: softmax. Intra has softmax always.
    thresholds: f32 [K], in units of logits.
    imc: one of IMC.
    threshold: one of THRESHOLDS.
    upper_bound: of the thresholds.
    mask_invalid: negatives that are not valid are no negatives of contrast and intra either; the
      published code lets them count there, with the texts that they have in its data. A slot
      without a text counts then by whatever stands in `negatives`.
    mask: bool [B]; examples that do not count, nor as negatives. None: all count.
    text_hashes: u32 [B, 2] of the captions (`duplicates.hash_texts`), or None: where given, equal
      texts are no negatives of each other.
    negative_hashes: u32 [B, K, 2], likewise.
    axes: within `shard_map`, the mesh axes that shard the batch: negatives come from all shards,
      and thresholds agree.
    chunk: candidates at a time; 0: all.
    dtype: of the products: `contrastive.product_dtype`.
    groups: f32 [B, G], as of `captions.caption_loss`.

  Returns:
    Sums over this device's examples. The weight of rank counts all pairs of an example and a slot,
    valid or not, as published.
  """
  size, slots, width = negatives.shape
  mask = jnp.ones(size, bool) if mask is None else mask
  valid = valid & mask[:, None]
  counted = valid if mask_invalid else jnp.broadcast_to(mask[:, None], valid.shape)
  options = {"logit_scale": logit_scale, "axes": axes, "chunk": chunk, "dtype": dtype}
  images = contrastive.Candidates(image, mask, text_hashes)
  texts = contrastive.Candidates(captions, mask, text_hashes)
  wrong = contrastive.Candidates(
    negatives.reshape(-1, width),
    counted.reshape(-1),
    None if negative_hashes is None else negative_hashes.reshape(-1, 2),
  )
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), texts, wrong)
  if logit_bias is None:
    to_text = contrastive.cross_entropy(images, both, **options)
    to_image = contrastive.cross_entropy(texts, images, **options)
    contrast = (to_text.loss + to_image.loss) / 2
    each = (to_text.each + to_image.each) / 2
  else:
    pairs = contrastive.sigmoid(images, both, logit_bias=logit_bias, **options)
    contrast, each = pairs.loss, pairs.each
  number = jnp.sum(mask, dtype=jnp.float32)

  scale = jnp.exp(logit_scale)
  right = scale * jnp.sum(image * captions, axis=-1)  # [B]
  against = scale * jnp.einsum("be,bke->bk", image, negatives)
  margin = against - right[:, None] + jax.lax.stop_gradient(thresholds)
  rank = jnp.sum(jnp.where(valid, jax.nn.relu(margin), 0.0))

  if imc == "image_text_positive":
    intra = contrastive.cross_entropy(texts, wrong, target=right, **options).loss
  elif imc == "text_only":
    log_sums = contrastive.log_sum_exp(texts, wrong, **options)
    counts = mask & (log_sums > contrastive.MASKED_LOGIT / 2)
    intra = jnp.sum(jnp.where(counts, log_sums, 0.0))
  else:
    raise ValueError(f"imc = {imc!r} is unknown. Choose one of {', '.join(IMC)}.")
  return HardNegativeLoss(
    contrast=(contrast, number),
    intra=(intra, number),
    rank=(rank, number * slots),
    by_group=contrastive.by_group(groups, each, mask),
    thresholds=_thresholds(
      right, against, mask, valid, thresholds, kind=threshold, upper_bound=upper_bound, axes=axes
    ),
  )


def _thresholds(
  right: Array,
  against: Array,
  mask: Array,
  valid: Array,
  old: Array,
  *,
  kind: str,
  upper_bound: float,
  axes: tuple[str, ...],
) -> Array:
  """The thresholds of the next step, f32 [K]; the same on all devices."""
  if kind not in THRESHOLDS:
    raise ValueError(f"threshold = {kind!r} is unknown. Choose one of {', '.join(THRESHOLDS)}.")
  if kind == "fixed":
    return old
  right, against, old = jax.lax.stop_gradient((right, against, old))

  def total(x: Array) -> Array:
    return jax.lax.psum(x, axes) if axes else x

  number = total(jnp.sum(valid, axis=0, dtype=jnp.float32))  # [K]
  if kind == "mean":
    examples = total(jnp.sum(mask, dtype=jnp.float32))
    mean_right = total(jnp.sum(jnp.where(mask, right, 0.0))) / jnp.maximum(examples, 1.0)
    sums = total(jnp.sum(jnp.where(valid, against, 0.0), axis=0))
    new = mean_right - sums / jnp.maximum(number, 1.0)
  else:
    largest = jnp.max(jnp.where(valid, right[:, None] - against, -jnp.inf), axis=0)
    largest = jax.lax.pmax(largest, axes) if axes else largest
    new = jnp.where(number > 0, largest, 0.0) / 5
  return jnp.where(number > 0, jnp.clip(new, 0.0, upper_bound), old)
