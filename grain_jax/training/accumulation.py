"""Gradient accumulation that equals the large batch, though every example is told from all.

The loss of a part of a batch is another loss: its negatives are fewer. So the parts are encoded
first, without a gradient; the loss of all of them gives the gradient of each embedding; and each
part is encoded again to carry that on to the parameters (Gao et al., "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup", RepL4NLP 2021).
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

# Where the examples stand in each field of the output; -1: one value for all parts.
_AXES = grain.Output(
  image=0, regions=0, boxes=1, captions=0, descriptions=0, negatives=0, logit_scale=-1
)


def value_and_grad(
  encode: Callable[..., grain.Output],
  objective: Callable[..., tuple[Array, Any]],
  *,
  parts: int,
  mesh: Mesh,
) -> Callable[..., tuple[tuple[Array, Any], Any]]:
  """Like `jax.value_and_grad(has_aux=True)` of objective(encode(params, batch, key), batch).

  Dropout differs from that of the batch encoded at once: each part draws its own.

  Args:
    encode: (params, batch, dropout key) -> output.
    objective: (output, batch) -> (loss, aux).
    parts: P, into which the examples of each device are cut; it must divide them.
    mesh: devices over which the batch is cut. Each part takes as many examples of each, so none
      moves.
  """
  shards = meshes.num_shards(mesh)

  def cut(x: Array, axis: int) -> Array:
    """[..., B, ...] -> [P, ..., B / P, ...]."""
    before, batch, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = x.reshape(*before, shards, parts, batch // (shards * parts), *after)
    x = jnp.moveaxis(x, axis + 1, 0)
    return _place(x.reshape(parts, *before, batch // parts, *after), axis + 1)

  def join(x: Array, axis: int) -> Array:
    """Inverse of `cut`."""
    if axis < 0:
      return x[0]
    before, some, after = x.shape[1 : axis + 1], x.shape[axis + 1], x.shape[axis + 2 :]
    x = jnp.moveaxis(x.reshape(parts, *before, shards, some // shards, *after), 0, axis + 1)
    return _place(x.reshape(*before, parts * some, *after), axis)

  def share(x: Array, axis: int) -> Array:
    """Of a gradient with respect to the output, what each part carries on."""
    return jnp.broadcast_to(x / parts, (parts, *x.shape)) if axis < 0 else cut(x, axis)

  def of(params: Any, batch: dict[str, Array], key: Array) -> tuple[tuple[Array, Any], Any]:
    pieces = {name: cut(x, 0) for name, x in batch.items()}
    keys = jax.random.split(key, parts)
    outputs = jax.lax.map(lambda xs: encode(params, *xs), (pieces, keys))
    output = jax.tree.map(join, outputs, _AXES)
    found, cotangents = jax.value_and_grad(objective, has_aux=True)(output, batch)

    def add(total: Any, xs: tuple[Any, Array, Any]) -> tuple[Any, None]:
      piece, key, cotangent = xs
      _, back = jax.vjp(lambda p: encode(p, piece, key), params)
      return jax.tree.map(jnp.add, total, back(cotangent)[0]), None

    shares = jax.tree.map(share, cotangents, _AXES)
    zeros = jax.tree.map(jnp.zeros_like, params)
    gradients, _ = jax.lax.scan(add, zeros, (pieces, keys, shares))
    return found, gradients

  return of


def _place(x: Array, axis: int) -> Array:
  """The examples along `axis` stay on the devices that hold them."""
  spec = PartitionSpec(*[None] * axis, meshes.BATCH_AXES)
  return jax.lax.with_sharding_constraint(x, spec)
