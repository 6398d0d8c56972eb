"""Gradient accumulation that equals the large batch, though every example is contrasted with all.

The loss of a microbatch is another loss: its negatives are fewer. So the microbatches are encoded
first, without a gradient; the loss of all of them gives the gradient of each embedding; and
each microbatch is encoded again to carry that on to the parameters (Gao et al., "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from grain_jax.models import grain
from grain_jax.runtime import mesh as meshes

Array = jax.Array

# The batch axis of each field of the output; -1: one value for all microbatches.
_AXES = grain.Output(
  image=0,
  regions=0,
  boxes=1,
  captions=0,
  descriptions=0,
  negatives=0,
  region_negatives=0,
  auxiliary=0,
  logit_scale=-1,
  logit_bias=-1,
)


def encode_all(
  encode: Callable[..., grain.Output],
  batch: dict[str, Array],
  key: Array,
  *,
  num_microbatches: int,
  mesh: Mesh,
) -> grain.Output:
  """The output of encode(batch, key) for a whole batch, a microbatch at a time; no gradient."""
  split, merge = _microbatches(num_microbatches, meshes.num_shards(mesh))
  microbatches = {name: split(x, 0) for name, x in batch.items()}
  keys = jax.random.split(key, num_microbatches)
  outputs = jax.lax.map(lambda xs: encode(*xs), (microbatches, keys))
  return jax.tree.map(merge, outputs, _AXES)


def value_and_grad(
  encode: Callable[..., grain.Output],
  objective: Callable[..., tuple[Array, Any]],
  *,
  num_microbatches: int,
  mesh: Mesh,
) -> Callable[..., tuple[tuple[Array, Any], Any]]:
  """Like `jax.value_and_grad(has_aux=True)` of objective(encode(params, batch, key), batch).

  Dropout differs from that of the batch encoded at once: each microbatch draws its own.

  Args:
    encode: (params, batch, dropout key) -> output.
    objective: (output, batch) -> (loss, aux).
    num_microbatches: M; it must divide the examples of each device.
    mesh: devices over which the batch is sharded. A microbatch takes as many examples of each
      shard, so none moves.
  """
  split_microbatches, merge_microbatches = _microbatches(num_microbatches, meshes.num_shards(mesh))

  def microbatch_cotangent(x: Array, axis: int) -> Array:
    """The cotangent of each microbatch's output, of a cotangent of the whole output."""
    return (
      jnp.broadcast_to(x / num_microbatches, (num_microbatches, *x.shape))
      if axis < 0
      else split_microbatches(x, axis)
    )

  def value_and_grad_fn(
    params: Any, batch: dict[str, Array], key: Array
  ) -> tuple[tuple[Array, Any], Any]:
    microbatches = {name: split_microbatches(x, 0) for name, x in batch.items()}
    keys = jax.random.split(key, num_microbatches)
    outputs = jax.lax.map(lambda xs: encode(params, *xs), (microbatches, keys))
    output = jax.tree.map(merge_microbatches, outputs, _AXES)
    loss_and_aux, cotangents = jax.value_and_grad(objective, has_aux=True)(output, batch)

    def accumulate(gradient: Any, xs: tuple[Any, Array, Any]) -> tuple[Any, None]:
      microbatch, key, cotangent = xs
      _, vjp_fn = jax.vjp(lambda p: encode(p, microbatch, key), params)
      return jax.tree.map(jnp.add, gradient, vjp_fn(cotangent)[0]), None

    microbatch_cotangents = jax.tree.map(microbatch_cotangent, cotangents, _AXES)
    zeros = jax.tree.map(jnp.zeros_like, params)
    gradients, _ = jax.lax.scan(accumulate, zeros, (microbatches, keys, microbatch_cotangents))
    return loss_and_aux, gradients

  return value_and_grad_fn


def _microbatches(number: int, shards: int) -> tuple[Any, Any]:
  """(split, merge) of arrays and their batch axis, for a batch in so many shards."""

  def split(x: Array, axis: int) -> Array:
    """[..., B, ...] -> [M, ..., B / M, ...]."""
    before, batch, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = x.reshape(*before, shards, number, batch // (shards * number), *after)
    x = jnp.moveaxis(x, axis + 1, 0)
    return _constrain_batch_axis(x.reshape(number, *before, batch // number, *after), axis + 1)

  def merge(x: Array, axis: int) -> Array:
    """Inverse of `split`; axis -1: one value for all microbatches."""
    if axis < 0:
      return x[0]
    before, size, after = x.shape[1 : axis + 1], x.shape[axis + 1], x.shape[axis + 2 :]
    x = jnp.moveaxis(x.reshape(number, *before, shards, size // shards, *after), 0, axis + 1)
    return _constrain_batch_axis(x.reshape(*before, number * size, *after), axis)

  return split, merge


def _constrain_batch_axis(x: Array, axis: int) -> Array:
  """Shards `axis` over the batch axes of the mesh, as the batch itself is."""
  spec = PartitionSpec(*[None] * axis, meshes.BATCH_AXES)
  return jax.lax.with_sharding_constraint(x, spec)
