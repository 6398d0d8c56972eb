"""Terms that keep a model near a frozen copy of itself, and texts near their own captions (DeGLA).

DeGLA (arXiv 2504.16801) fine-tunes CLIP on false captions and holds on to what it could before by
the distance of its embeddings to those of a teacher: here the weights at the start, or a mean of
the weights since. Two contrasts set each example against its own false captions alone.

The published code adds the distances up over a batch of 256, weight 0.005: 1.28 of the mean here.
Its text-grounded loss pairs a caption with other images' false captions (their order in the mask is
another than in the batch); here they are its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grain_jax.objectives.shared import Pair, Shared

Array = jax.Array

_TEXT_SCALE = 10.0  # of the text-grounded logits, as published


def anchor(shared: Shared, state: dict[str, Array]) -> tuple[dict[str, Pair], dict[str, Array]]:
  """Squared distance of the images', captions' and false captions' embeddings to the teacher's."""
  if shared.teacher is None or not shared.config.loss.anchor:
    return {}, state
  ours, theirs = shared.output, shared.teacher
  total = jnp.zeros(())
  for found, kept, mask in (
    (ours.image, theirs.image, shared.captioned),
    (ours.captions, theirs.captions, shared.captioned),
    (ours.negatives, theirs.negatives, shared.negatives_valid),
  ):
    distance = jnp.sum((found - kept) ** 2, axis=-1)
    total += jnp.sum(jnp.where(mask, distance, 0.0))
  return {"loss_anchor": (total, _number(shared))}, state


def grounded(shared: Shared, state: dict[str, Array]) -> tuple[dict[str, Pair], dict[str, Array]]:
  """An image, and a caption, against the example's own false captions.

  Of image i -log softmax of [s I_i.T_i ; s I_i.n_ik for all k] at the first; of its caption that of
  [10 T_i.T'_i ; 10 T_i.n_ik], T' the teacher's. An example without a valid one counts as 0.
  """
  w, output, parts = shared.config.loss, shared.output, {}
  if not shared.num_negatives:
    return {}, state
  if w.image_grounded:
    scale = jnp.exp(output.logit_scale)
    loss = _own(shared, output.image, output.captions, scale)
    parts["loss_image_grounded"] = (loss, _number(shared))
  if w.text_grounded and shared.teacher is not None:
    loss = _own(shared, output.captions, shared.teacher.captions, _TEXT_SCALE)
    parts["loss_text_grounded"] = (loss, _number(shared))
  return parts, state


def _number(shared: Shared) -> Array:
  return jnp.sum(shared.captioned, dtype=jnp.float32)


def _own(shared: Shared, rows: Array, right: Array, scale: Array | float) -> Array:
  """Sum over captioned rows [B, E] of -log softmax of `right` [B, E] among the own negatives."""
  positive = scale * jnp.sum(rows * right, axis=-1)
  against = scale * jnp.einsum("be,bke->bk", rows, shared.output.negatives)
  margin = jnp.where(shared.negatives_valid, against - positive[:, None], -jnp.inf)
  margin = jnp.concatenate([jnp.zeros_like(positive)[:, None], margin], axis=1)
  return jnp.sum(jnp.where(shared.captioned, jax.nn.logsumexp(margin, axis=1), 0.0))
