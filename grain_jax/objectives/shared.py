"""What the terms of an objective share: settings, masks, text hashes, the matching; each once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import PartitionSpec

from grain_jax import schema
from grain_jax.models import grain
from grain_jax.objectives import boxes, contrastive, duplicates, matching

Array = jax.Array
Pair = tuple[Array, Array]  # (sum, weight), each []


class Shared:
  """A batch, the model's output for it, and what several terms read of them.

  Attributes:
    config: whole, resolved configuration.
    batch: device batch (`schema.BATCH`).
    output: of the model.
    teacher: output of a frozen model for the same batch, or None.
    batch_axes: mesh axes that shard the batch, under `jax.set_mesh`; none: it is not sharded.
    captioned: bool [B], examples whose caption counts.
    regions: bool [B, R]; described: bool [B, R], those whose description is there too.
    descriptions, true_boxes: of the regions; with config.loss.permute_regions another image's.
  """

  def __init__(
    self,
    output: grain.Output,
    batch: dict[str, Array],
    config: ml_collections.ConfigDict,
    *,
    batch_axes: tuple[str, ...] = (),
    platform: str = "cpu",
    teacher: grain.Output | None = None,
  ):
    self.config, self.batch, self.output, self.teacher = config, batch, output, teacher
    self.batch_axes = batch_axes
    self.dtype = contrastive.product_dtype(config.loss.precision, platform)
    self.num_regions = batch["boxes"].shape[1]
    self.num_negatives = batch["negative_kind"].shape[1]
    example = batch["example_mask"]
    self.captioned = example & batch["text_mask"][:, 0]
    texts = 1 + self.num_regions
    self.regions = batch["region_mask"] & example[:, None]
    self.described = self.regions & batch["text_mask"][:, 1:texts]
    self.negatives_valid = batch["text_mask"][:, texts : texts + self.num_negatives]
    self.negatives_valid = self.negatives_valid & self.captioned[:, None]
    self.false_valid = batch["region_negative_mask"] & self.regions[..., None]
    self.descriptions, self.true_boxes = output.descriptions, batch["boxes"]
    self.false_descriptions = output.region_negatives
    self._order = jnp.arange(len(example))
    if config.loss.permute_regions:  # a control: boxes and descriptions of another image
      self._order = jnp.roll(self._order, 1)
      self.regions, self.described, self.false_valid, self.descriptions, self.true_boxes = (
        jnp.roll(x, 1, axis=0)
        for x in (
          self.regions, self.described, self.false_valid, self.descriptions, self.true_boxes,
        )
      )  # fmt: skip
      self.false_descriptions = jnp.roll(self.false_descriptions, 1, axis=0)

  @functools.cached_property
  def groups(self) -> Array | None:
    """f32 [B, S], 1 where an example is of a source; None where there is no mixture of them."""
    if schema.SOURCE not in self.batch:
      return None
    return jax.nn.one_hot(self.batch[schema.SOURCE], len(self.config.data.sources))

  def of_sources(self, name: str, found: tuple[Array, ...]) -> dict[str, Pair]:
    """{'source/SOURCE/NAME': (sum, weight)} of the sums and weights of the groups, or nothing."""
    if not found:
      return {}
    names = schema.source_names(self.config.data.sources)
    sums, weights = found
    return {f"source/{s}/{name}": (sums[i], weights[i]) for i, s in enumerate(names)}

  @property
  def logit_bias(self) -> Array | None:
    """That of the output where the contrast is sigmoid; None: softmax."""
    return self.output.logit_bias if self.config.loss.contrast == "sigmoid" else None

  @functools.cached_property
  def _hashes(self) -> Array:
    batch = self.batch
    return duplicates.hash_texts(
      batch["tokens"], batch["segments"], batch["positions"], num_texts=batch["ends"].shape[1]
    )

  def hashes(self, what: str) -> Array:
    """u32 [B, ..., 2] of 'captions', 'descriptions', 'negatives' or 'region_negatives'."""
    first, second = 1 + self.num_regions, 1 + self.num_regions + self.num_negatives
    if what == "captions":
      return self._hashes[:, 0]
    if what == "negatives":
      return self._hashes[:, first:second]
    found = self._hashes[:, 1:first] if what == "descriptions" else self._hashes[:, second:]
    if what == "region_negatives":
      found = found.reshape(*self.false_valid.shape, 2)
    return jnp.roll(found, 1, axis=0) if self.config.loss.permute_regions else found

  def masked_hashes(self, what: str) -> Array | None:
    """`hashes` where equal texts are no negatives of each other, else None."""
    return self.hashes(what) if self.config.loss.mask_duplicates else None

  @functools.cached_property
  def predicted_boxes(self) -> Array:
    """[B, layers, Q, 4] of the decoder's layers that are trained on boxes, the last one last."""
    predicted = jnp.moveaxis(self.output.boxes, 0, 1)  # the sharded axis first
    return predicted if self.config.loss.aux_box_loss else predicted[:, -1:]

  @functools.cached_property
  def queries(self) -> Array:
    """i32 [B, layers, R]: the query that each region is matched with; -1: none."""
    w = self.config.loss
    cost = boxes.matching_cost(
      self.predicted_boxes, self.true_boxes[:, None],
      l1_cost=w.box_l1_cost, giou_cost=w.box_giou_cost,
    )  # fmt: skip
    mask = jnp.broadcast_to(self.regions[:, None], (*cost.shape[:2], self.num_regions))
    return matching.solve(cost, mask, solver=w.matcher, batch_axes=self.batch_axes)

  @property
  def has_queries(self) -> bool:
    """Whether there is anything to match."""
    return bool(self.output.boxes.shape[0] and self.num_regions)

  def over_shards(
    self,
    loss: Callable[..., Any],
    *arrays: Any,
    agreed: Any = (),
    local: bool = False,
    **options: Any,
  ) -> Any:
    """A contrastive loss whose rows are sharded with the batch; its sums over all devices.

    Args:
      loss: (*arrays, *agreed, logit_scale=, logit_bias=, axes=, chunk=, dtype=, **options) ->
        (sums, others); of others, which agree on all devices, nothing is summed.
      *arrays: sharded with the batch; None stays None.
      agreed: arrays that are the same on all devices.
      local: negatives from the device's own examples alone.
      **options: of the loss.
    """
    options = {"chunk": self.config.loss.chunk, "dtype": self.dtype} | options
    logits = {"logit_scale": self.output.logit_scale, "logit_bias": self.logit_bias}
    if not self.batch_axes:
      return loss(*arrays, *agreed, axes=(), **logits, **options)

    def local_loss(arrays: Any, agreed: Any, logits: Any) -> Any:
      axes = () if local else self.batch_axes
      sums, others = loss(*arrays, *agreed, axes=axes, **logits, **options)
      return jax.lax.psum(sums, self.batch_axes), others

    sharded, replicated = PartitionSpec(self.batch_axes), PartitionSpec()
    over = jax.shard_map(
      local_loss, in_specs=(sharded, replicated, replicated), out_specs=replicated
    )
    return over(arrays, agreed, logits)
