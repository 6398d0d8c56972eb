"""The terms of GRAIN, CLIP and CE-CLIP: each reads a batch and says what it adds (`objectives`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from grain_jax.objectives import boxes, captions, hard_negatives, regions
from grain_jax.objectives.shared import Pair, Shared

Array = jax.Array
State = dict[str, Array]
Result = tuple[dict[str, Pair], State]


class Term(NamedTuple):
  """A term of the objective."""

  loss: Callable[[Shared, State], Result]
  initial_state: Callable[[ml_collections.ConfigDict], State] = lambda config: {}


def caption(shared: Shared, state: State) -> Result:
  """CLIP's loss of images and captions; `hard_negative` has it where there are negatives."""
  if shared.num_negatives:
    return {}, state

  total, weight, *of_sources = _against_captions(shared, shared.output.image)
  parts = {"loss_caption": (total, weight)}
  return parts | shared.of_sources("loss_caption", of_sources), state


def _against_captions(shared: Shared, images: Array) -> tuple[Array, ...]:
  """CLIP's loss of embeddings of the images, f32 [B, E], and the captions; with those by source."""

  def loss(
    image: Array, text: Array, mask: Array, hashes: Array | None, groups: Array | None,
    **options: Any,
  ) -> Any:  # fmt: skip
    found = captions.caption_loss(
      image, text, mask=mask, text_hashes=hashes, groups=groups, **options
    )
    return found, ()

  found, _ = shared.over_shards(
    loss, images, shared.output.captions, shared.captioned, shared.masked_hashes("captions"),
    shared.groups,
  )  # fmt: skip
  return found


def auxiliary(shared: Shared, state: State) -> Result:
  """The caption's loss of the image's second embedding, where the model has one."""
  if not shared.output.auxiliary.shape[-1]:
    return {}, state
  return {"loss_auxiliary": _against_captions(shared, shared.output.auxiliary)[:2]}, state


def first_thresholds(config: ml_collections.ConfigDict) -> State:
  """Those of the rank at the start, `config.loss.rank_threshold_start`, one a slot."""
  slots = config.data.negatives
  return {"thresholds": jnp.full(slots, config.loss.rank_threshold_start)} if slots else {}


def hard_negative(shared: Shared, state: State) -> Result:
  """CE-CLIP's losses with false captions: contrast (as the caption's), intra-modal, rank."""
  if not shared.num_negatives:
    return {}, state
  w = shared.config.loss

  def loss(
    image: Array, text: Array, negatives: Array, valid: Array, mask: Array,
    hashes: Array | None, others: Array | None, groups: Array | None, thresholds: Array,
    **options: Any,
  ) -> Any:  # fmt: skip
    found = hard_negatives.hard_negative_loss(
      image, text, negatives, valid, thresholds=thresholds, imc=w.intra_form,
      threshold=w.rank_threshold, upper_bound=w.rank_upper_bound, mask_invalid=w.mask_invalid,
      mask=mask, text_hashes=hashes, negative_hashes=others, groups=groups, **options,
    )  # fmt: skip
    return (found.contrast, found.intra, found.rank, found.by_group), found.thresholds

  output = shared.output
  (contrast, intra, rank, of_sources), thresholds = shared.over_shards(
    loss, output.image, output.captions, output.negatives, shared.negatives_valid,
    shared.captioned, shared.masked_hashes("captions"), shared.masked_hashes("negatives"),
    shared.groups, agreed=(state["thresholds"],),
  )  # fmt: skip
  valid = jnp.sum(shared.negatives_valid, dtype=jnp.float32)
  asked = jnp.sum(shared.captioned, dtype=jnp.float32) * shared.num_negatives
  parts = {"loss_caption": contrast, "valid_negatives": (valid, asked)}
  parts |= shared.of_sources("loss_caption", of_sources)
  if w.intra:  # else it is not even computed
    parts["loss_intra"] = intra
  if w.rank:
    parts["loss_rank"] = rank
  for slot in range(shared.num_negatives):
    parts[f"rank_threshold_{slot}"] = (state["thresholds"][slot], jnp.ones(()))
  return parts, {"thresholds": thresholds}


def multi_positive(shared: Shared, state: State) -> Result:
  """Descriptions as further positives of the image (a control)."""
  if not shared.config.loss.multi_positive or not shared.num_regions:
    return {}, state
  pair = captions.multi_positive_loss(
    shared.output.image,
    shared.descriptions,
    logit_scale=shared.output.logit_scale,
    logit_bias=shared.logit_bias,
    mask=shared.described,
    text_hashes=shared.hashes("descriptions"),
    dtype=shared.dtype,
  )
  return {"loss_multi_positive": pair}, state


def box(shared: Shared, state: State) -> Result:
  """L1 and GIoU of the matched boxes, of every decoder layer that is trained on them."""
  w = shared.config.loss
  if not shared.has_queries or not (w.box or w.region):
    return {}, state
  predicted, true = shared.predicted_boxes, shared.true_boxes
  parts, total = {}, jnp.zeros(())
  for layer in range(predicted.shape[1]):
    matched = regions.take_queries(predicted[:, layer], shared.queries[:, layer])
    l1, giou, number = boxes.box_loss(matched, true, shared.regions)
    total += w.box_loss_scale * (l1 + giou)
    if layer == predicted.shape[1] - 1:
      overlap = jnp.where(shared.regions, boxes.iou(matched, true), 0.0)
      parts["iou"] = (jnp.sum(overlap), number)
      parts["loss_box_l1"], parts["loss_box_giou"] = (l1, number), (giou, number)
  return {**parts, "loss_box": (total, number)}, state


def region(shared: Shared, state: State) -> Result:
  """Each matched region query against all descriptions, and all regions' false descriptions."""
  w = shared.config.loss
  if not shared.has_queries or not (w.box or w.region):
    return {}, state

  def loss(
    found: Array, descriptions: Array, mask: Array, hashes: Array | None,
    false: Array, valid: Array, others: Array | None, groups: Array | None, **options: Any,
  ) -> Any:  # fmt: skip
    sums = regions.region_loss(
      found, descriptions, mask=mask, text_hashes=hashes,
      false=false, false_mask=valid, false_hashes=others, groups=groups, **options,
    )  # fmt: skip
    return sums, ()

  matched = regions.take_queries(shared.output.regions, shared.queries[:, -1])
  (total, correct, weight, *of_sources), _ = shared.over_shards(
    loss, matched, shared.descriptions, shared.described, shared.masked_hashes("descriptions"),
    shared.false_descriptions, shared.false_valid, shared.masked_hashes("region_negatives"),
    shared.groups, local=w.region_negatives == "local",
  )  # fmt: skip
  parts = {"loss_region": (total, weight), "region_accuracy": (correct, weight)}
  parts |= shared.of_sources("loss_region", of_sources)
  if shared.false_valid.shape[-1]:
    asked = jnp.sum(shared.described, dtype=jnp.float32) * shared.false_valid.shape[-1]
    parts["valid_region_negatives"] = (jnp.sum(shared.false_valid, dtype=jnp.float32), asked)
  return parts, state
