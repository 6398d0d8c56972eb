"""The softmax of a contrastive loss in little memory: columns in chunks, features gathered once.

Each device has the rows of its own examples and the columns of all. Of the logits, [rows, columns]
in float32, only one chunk of columns exists at a time; the backward pass computes it again.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grain_jax.objectives import duplicates

Array = jax.Array

# Stands for minus infinity where a softmax must not look; finite, so that no NaN can arise.
FORBIDDEN = -1e9


@flax.struct.dataclass
class Side:
  """Embeddings of one side of a contrastive loss, and what is known of each."""

  embeddings: Array  # f32 [N, E], L2-normalised
  valid: Array  # bool [N]; others are no negatives
  prints: Array | None = None  # u32 [N, 2] or None; see `duplicates`


@flax.struct.dataclass
class Sums:
  """Sums over the rows that count; each []."""

  loss: Array  # of -log softmax at the row's own column
  correct: Array  # rows whose own column scores highest
  rows: Array


def similarity(a: Array, b: Array, *, logit_scale: Array) -> Array:
  """exp(logit_scale) a b^T in float32: [..., N, E], [..., M, E] -> [..., N, M]."""
  product = jnp.einsum("...ne,...me->...nm", a, b, precision=jax.lax.Precision.HIGHEST)
  return jnp.exp(logit_scale) * product


def gather(side: Side, axes: tuple[str, ...]) -> tuple[Side, Array | int]:
  """All devices' examples in order, and where this device's own begin; within `shard_map`.

  Args:
    side: this device's examples.
    axes: mesh axes over which the examples are cut; none leaves them as they are.
  """
  if not axes:
    return side, 0
  whole = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), side)
  return whole, jax.lax.axis_index(axes) * side.valid.shape[0]


def cross_entropy(
  rows: Side,
  own: Array,
  columns: Side,
  *,
  logit_scale: Array,
  first: Array | int = 0,
  chunk: int = 0,
) -> Sums:
  """-log softmax of each row at its own column, summed; a row is told from all valid columns.

  Args:
    rows: N of them; `rows.prints` are those of their own columns.
    own: f32 [N, E], embeddings of the rows' own columns.
    columns: M of them. One with the print of a row's own column is no negative of that row.
    logit_scale: [], ln s.
    first: row i's own column is the column first + i.
    chunk: columns at a time; 0 or at least M: all at once.

  Returns:
    Sums; rows that are not valid add nothing.
  """
  index = jnp.arange(rows.valid.shape[0])
  target = jnp.exp(logit_scale) * jnp.sum(rows.embeddings * own, axis=-1)

  def add(carry: tuple[Array, Array], part: tuple[Side, Array]) -> tuple[tuple[Array, Array], None]:
    """One chunk of columns more in log-sum-exp and largest negative."""
    normalizer, best = carry
    part, start = part
    logits = similarity(rows.embeddings, part.embeddings, logit_scale=logit_scale)
    place = start + jnp.arange(part.valid.shape[0])
    negative = part.valid & (place != first + index[:, None])
    if rows.prints is not None:
      negative &= ~duplicates.equal(rows.prints, part.prints)
    logits = jnp.where(negative, logits, FORBIDDEN)
    normalizer = jnp.logaddexp(normalizer, jax.nn.logsumexp(logits, axis=-1))
    best = jnp.maximum(best, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    return (normalizer, best), None

  carry = (target, jnp.minimum(jax.lax.stop_gradient(target), FORBIDDEN))
  total = columns.valid.shape[0]
  if not 0 < chunk < total:
    (normalizer, best), _ = add(carry, (columns, jnp.zeros((), jnp.int32)))
  else:
    parts = -(-total // chunk)

    def cut(x: Array) -> Array:
      padded = jnp.pad(x, [(0, parts * chunk - total), *[(0, 0)] * (x.ndim - 1)])
      return padded.reshape(parts, chunk, *x.shape[1:])

    starts = jnp.arange(parts) * chunk
    body: Any = jax.checkpoint(add, prevent_cse=False)
    (normalizer, best), _ = jax.lax.scan(body, carry, (jax.tree.map(cut, columns), starts))
  return Sums(
    loss=jnp.sum(jnp.where(rows.valid, normalizer - target, 0.0)),
    correct=jnp.sum((target >= best) & rows.valid, dtype=jnp.float32),
    rows=jnp.sum(rows.valid, dtype=jnp.float32),
  )
