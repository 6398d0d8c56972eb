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
from grain_jax.objectives import boxes, captions, contrastive, duplicates, matching, regions

Array = jax.Array


@flax.struct.dataclass
class Losses:
  """The loss to minimise, and its parts as (sum, weight) pairs."""

  total: Array  # []
  parts: dict[str, tuple[Array, Array]]  # {metric name: (sum, weight)}, each []


def mean(pair: tuple[Array, Array]) -> Array:
  """sum / weight, and 0 where the weight is 0."""
  return pair[0] / jnp.maximum(pair[1], 1.0)


def _sharded_loss(
  loss: Callable[..., tuple[Array, ...]],
  a: Array,
  b: Array,
  logit_scale: Array,
  mask: Array,
  text_hashes: Array | None,
  *,
  batch_axes: tuple[str, ...],
  local: bool = False,
  **options: Any,
) -> tuple[Array, ...]:
  """A contrastive loss whose rows are sharded with the batch; the sums over all devices.

  Args:
    loss: `captions.caption_loss` or `regions.region_loss`.
    a: embeddings of one modality.
    b: embeddings of the other.
    logit_scale: [], ln s.
    mask: which of them count.
    text_hashes: of `duplicates.hash_texts`, or None.
    batch_axes: mesh axes that shard the batch; none: it is not sharded.
    local: negatives from the device's own examples alone.
    **options: of the loss.
  """
  if not batch_axes:
    return loss(a, b, logit_scale=logit_scale, mask=mask, text_hashes=text_hashes, **options)

  def local_loss(
    a: Array, b: Array, logit_scale: Array, mask: Array, text_hashes: Any
  ) -> tuple[Array, ...]:
    axes = () if local else batch_axes
    sums = loss(
      a, b, logit_scale=logit_scale, mask=mask, text_hashes=text_hashes, axes=axes, **options
    )
    return jax.lax.psum(sums, batch_axes)

  sharded, replicated = PartitionSpec(batch_axes), PartitionSpec()
  loss_over_shards = jax.shard_map(
    local_loss, in_specs=(sharded, sharded, replicated, sharded, sharded), out_specs=replicated
  )
  return loss_over_shards(a, b, logit_scale, mask, text_hashes)


def total_loss(
  output: grain.Output,
  batch: dict[str, Array],
  config: ml_collections.ConfigDict,
  *,
  batch_axes: tuple[str, ...] = (),
  platform: str = "cpu",
) -> Losses:
  """w_caption L_caption + w_box L_box + w_region L_region.

  Args:
    output: of the model, for this batch.
    batch: device batch (`schema.BATCH`).
    config: `config.loss` gives weights and choices.
    batch_axes: mesh axes that shard the batch, under `jax.set_mesh`; none: it is not sharded.
    platform: of the devices, for `config.loss.precision`.
  """
  w = config.loss
  dtype = contrastive.product_dtype(w.precision, platform)
  num_regions = batch["boxes"].shape[1]
  example = batch["example_mask"]
  text_hashes = duplicates.hash_texts(
    batch["tokens"], batch["segments"], batch["positions"], num_texts=batch["ends"].shape[1]
  )
  caption_mask = example & batch["text_mask"][:, 0]
  parts = {
    "loss_caption": _sharded_loss(
      captions.caption_loss, output.image, output.captions, output.logit_scale, caption_mask,
      text_hashes[:, 0] if w.mask_duplicates else None,
      batch_axes=batch_axes, chunk=w.chunk, dtype=dtype,
    )
  }  # fmt: skip
  total = w.caption * mean(parts["loss_caption"])

  region_mask = batch["region_mask"] & example[:, None]
  described = region_mask & batch["text_mask"][:, 1 : 1 + num_regions]
  descriptions, true_boxes = output.descriptions, batch["boxes"]
  region_hashes = text_hashes[:, 1 : 1 + num_regions]
  if w.permute_regions:  # a control: boxes and descriptions of another image
    region_mask, described, descriptions, true_boxes, region_hashes = (
      jnp.roll(x, 1, axis=0)
      for x in (region_mask, described, descriptions, true_boxes, region_hashes)
    )
  if w.multi_positive and num_regions:
    parts["loss_multi_positive"] = captions.multi_positive_loss(
      output.image,
      descriptions,
      logit_scale=output.logit_scale,
      mask=described,
      text_hashes=region_hashes,
      dtype=dtype,
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
    region_total, correct, weight = _sharded_loss(
      regions.region_loss, regions.take_queries(output.regions, queries[:, -1]), descriptions,
      output.logit_scale, described, region_hashes if w.mask_duplicates else None,
      batch_axes=batch_axes, chunk=w.chunk, dtype=dtype, local=w.region_negatives == "local",
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
  # As long as the context: truncated, but for the few texts of exactly that length.
  last = jnp.take_along_axis(batch["positions"], batch["ends"], axis=1) + 1
  full = (last >= config.model.text.context) & batch["text_mask"]
  parts["truncated_texts"] = (jnp.sum(full, dtype=jnp.float32), one)
  parts["bad_examples"] = (jnp.sum(~example, dtype=jnp.float32), one)
  return Losses(total=total, parts=parts)
