"""The objectives of a batch: match once, weigh, add up (GRAIN, arXiv 2412.04429, sec. 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import PartitionSpec

from grain_jax.models import grain
from grain_jax.objectives import boxes, captions, duplicates, matching, regions

Array = jax.Array


@flax.struct.dataclass
class Losses:
  """The loss to minimise, and its parts as (sum, weight) pairs."""

  total: Array  # []
  parts: dict[str, tuple[Array, Array]]  # {metric name: (sum, weight)}, each []


def mean(pair: tuple[Array, Array]) -> Array:
  """sum / weight, and 0 where the weight is 0."""
  return pair[0] / jnp.maximum(pair[1], 1.0)


def _over_devices(
  loss: Callable[..., tuple[Array, ...]],
  a: Array,
  b: Array,
  logit_scale: Array,
  mask: Array,
  prints: Array | None,
  *,
  batch_axes: tuple[str, ...],
  chunk: int,
  local: bool = False,
) -> tuple[Array, ...]:
  """A contrastive loss whose rows each device takes for its own examples; sums over all.

  Args:
    loss: `captions.caption_loss` or `regions.region_loss`.
    a: embeddings of one side.
    b: embeddings of the other.
    logit_scale: [], ln s.
    mask: which of them count.
    prints: fingerprints of the texts, or None.
    batch_axes: mesh axes that cut the batch; none: one device has it all.
    chunk: columns of the logits at a time.
    local: negatives from the device's own examples alone.
  """
  if not batch_axes:
    return loss(a, b, logit_scale=logit_scale, mask=mask, prints=prints, chunk=chunk)

  def own(a: Array, b: Array, logit_scale: Array, mask: Array, prints: Any) -> tuple[Array, ...]:
    axes = () if local else batch_axes
    sums = loss(a, b, logit_scale=logit_scale, mask=mask, prints=prints, axes=axes, chunk=chunk)
    return jax.lax.psum(sums, batch_axes)

  cut, whole = PartitionSpec(batch_axes), PartitionSpec()
  over = jax.shard_map(own, in_specs=(cut, cut, whole, cut, cut), out_specs=whole)
  return over(a, b, logit_scale, mask, prints)


def total_loss(
  output: grain.Output,
  batch: dict[str, Array],
  config: ml_collections.ConfigDict,
  *,
  batch_axes: tuple[str, ...] = (),
) -> Losses:
  """w_caption L_caption + w_box L_box + w_region L_region.

  Args:
    output: of the model, for this batch.
    batch: device batch (`schema.BATCH`).
    config: `config.loss` gives weights and choices.
    batch_axes: mesh axes that cut the batch, under `jax.set_mesh`; none: it is not cut.
  """
  w = config.loss
  num_regions = batch["boxes"].shape[1]
  example = batch["example_mask"]
  prints = duplicates.fingerprints(
    batch["tokens"], batch["segments"], batch["positions"], num_texts=batch["ends"].shape[1]
  )
  caption_mask = example & batch["text_mask"][:, 0]
  parts = {
    "loss_caption": _over_devices(
      captions.caption_loss, output.image, output.captions, output.logit_scale, caption_mask,
      prints[:, 0] if w.mask_duplicates else None,
      batch_axes=batch_axes, chunk=w.chunk,
    )
  }  # fmt: skip
  total = w.caption * mean(parts["loss_caption"])

  region_mask = batch["region_mask"] & example[:, None]
  described = region_mask & batch["text_mask"][:, 1 : 1 + num_regions]
  descriptions, true_boxes = output.descriptions, batch["boxes"]
  region_prints = prints[:, 1 : 1 + num_regions]
  if w.permute_regions:  # a control: boxes and descriptions of another image
    region_mask, described, descriptions, true_boxes, region_prints = (
      jnp.roll(x, 1, axis=0)
      for x in (region_mask, described, descriptions, true_boxes, region_prints)
    )
  if w.multi_positive and num_regions:
    parts["loss_multi_positive"] = captions.multi_positive_loss(
      output.image,
      descriptions,
      logit_scale=output.logit_scale,
      mask=described,
      prints=region_prints,
    )
    total += w.multi_positive * mean(parts["loss_multi_positive"])

  if output.boxes.shape[0] and num_regions and (w.box or w.region):
    predicted = jnp.moveaxis(output.boxes, 0, 1)  # [B, layers, Q, 4], the sharded axis first
    if not w.aux_box_loss:
      predicted = predicted[:, -1:]
    cost = boxes.matching_cost(
      predicted, true_boxes[:, None], l1_cost=w.box_l1_cost, giou_cost=w.box_giou_cost
    )
    mask = jnp.broadcast_to(region_mask[:, None], (*cost.shape[:2], num_regions))
    queries = matching.solve(cost, mask, solver=w.matcher, batch_axes=batch_axes)
    box_total = jnp.zeros(())
    for layer in range(predicted.shape[1]):
      matched = regions.take_queries(predicted[:, layer], queries[:, layer])
      l1, giou, number = boxes.box_loss(matched, true_boxes, region_mask)
      box_total += w.box_loss_scale * (l1 + giou)
      if layer == predicted.shape[1] - 1:
        overlap = jnp.where(region_mask, boxes.iou(matched, true_boxes), 0.0)
        parts["iou"] = (jnp.sum(overlap), number)
        parts["loss_box_l1"], parts["loss_box_giou"] = (l1, number), (giou, number)
    parts["loss_box"] = (box_total, number)
    region_total, correct, weight = _over_devices(
      regions.region_loss, regions.take_queries(output.regions, queries[:, -1]), descriptions,
      output.logit_scale, described, region_prints if w.mask_duplicates else None,
      batch_axes=batch_axes, chunk=w.chunk, local=w.region_negatives == "local",
    )  # fmt: skip
    parts["loss_region"] = (region_total, weight)
    parts["region_accuracy"] = (correct, weight)
    total += w.box * mean(parts["loss_box"]) + w.region * mean(parts["loss_region"])
  one = jnp.ones(())
  parts["loss"] = (total, one)
  parts["dropped_texts"] = (
    jnp.sum(batch["region_mask"] & ~batch["text_mask"][:, 1 : 1 + num_regions], dtype=jnp.float32),
    one,
  )
  # As long as the context: cut to it, but for the few texts of exactly that length.
  last = jnp.take_along_axis(batch["positions"], batch["ends"], axis=1) + 1
  full = (last >= config.model.text.context) & batch["text_mask"]
  parts["truncated_texts"] = (jnp.sum(full, dtype=jnp.float32), one)
  parts["bad_examples"] = (jnp.sum(~example, dtype=jnp.float32), one)
  return Losses(total=total, parts=parts)
