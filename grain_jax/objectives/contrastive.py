"""The softmax of a contrastive loss in little memory: candidates in chunks, features gathered once.

Each device has the rows of its own examples and contrasts them with the candidates of all devices.
Of the logits, [rows, candidates] in float32, only one chunk of candidates exists at a time; the
backward pass rematerialises it.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grain_jax.objectives import duplicates

Array = jax.Array

# Logit of a masked candidate; finite, so that no NaN can arise.
MASKED_LOGIT = -1e9


@flax.struct.dataclass
class Candidates:
  """Embeddings of one modality: rows of a contrastive loss, or what they are contrasted with."""

  embeddings: Array  # f32 [N, E], L2-normalised
  valid: Array  # bool [N]; others are no negatives
  text_hashes: Array | None = None  # u32 [N, 2] or None; see `duplicates`


@flax.struct.dataclass
class LossSums:
  """Sums over the valid rows; each []."""

  loss: Array  # of -log softmax at the row's positive
  correct: Array  # rows whose positive scores highest
  rows: Array


def similarity(a: Array, b: Array, *, logit_scale: Array) -> Array:
  """exp(logit_scale) a b^T in float32: [..., N, E], [..., M, E] -> [..., N, M]."""
  product = jnp.einsum("...ne,...me->...nm", a, b, precision=jax.lax.Precision.HIGHEST)
  return jnp.exp(logit_scale) * product


def gather(local: Candidates, axes: tuple[str, ...]) -> tuple[Candidates, Array | int]:
  """All-gathers the candidates; with the offset of the local ones. Within `shard_map`.

  Args:
    local: this device's examples.
    axes: mesh axes over which the examples are sharded; none leaves them as they are.
  """
  if not axes:
    return local, 0
  gathered = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), local)
  return gathered, jax.lax.axis_index(axes) * local.valid.shape[0]


def cross_entropy(
  rows: Candidates,
  positives: Array,
  candidates: Candidates,
  *,
  logit_scale: Array,
  offset: Array | int = 0,
  chunk: int = 0,
) -> LossSums:
  """-log softmax of each row at its positive, summed; all valid candidates are contrasted with it.

  Args:
    rows: N of them; `rows.text_hashes` are those of their positives.
    positives: f32 [N, E], embeddings of the rows' positives.
    candidates: M of them. One with the text hash of a row's positive is no negative of that row.
    logit_scale: [], ln s.
    offset: the positive of row i is candidate offset + i.
    chunk: candidates at a time; 0 or at least M: all at once.

  Returns:
    LossSums; rows that are not valid add nothing.
  """
  index = jnp.arange(rows.valid.shape[0])
  target = jnp.exp(logit_scale) * jnp.sum(rows.embeddings * positives, axis=-1)

  def accumulate_chunk(
    carry: tuple[Array, Array], chunk_and_start: tuple[Candidates, Array]
  ) -> tuple[tuple[Array, Array], None]:
    """Adds one chunk of candidates to the log-sum-exp and to the largest negative."""
    normalizer, best = carry
    candidates, start = chunk_and_start
    logits = similarity(rows.embeddings, candidates.embeddings, logit_scale=logit_scale)
    position = start + jnp.arange(candidates.valid.shape[0])
    negative = candidates.valid & (position != offset + index[:, None])
    if rows.text_hashes is not None:
      negative &= ~duplicates.pairwise_equal(rows.text_hashes, candidates.text_hashes)
    logits = jnp.where(negative, logits, MASKED_LOGIT)
    normalizer = jnp.logaddexp(normalizer, jax.nn.logsumexp(logits, axis=-1))
    best = jnp.maximum(best, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    return (normalizer, best), None

  carry = (target, jnp.minimum(jax.lax.stop_gradient(target), MASKED_LOGIT))
  total = candidates.valid.shape[0]
  if not 0 < chunk < total:
    (normalizer, best), _ = accumulate_chunk(carry, (candidates, jnp.zeros((), jnp.int32)))
  else:
    num_chunks = -(-total // chunk)

    def split_chunks(x: Array) -> Array:
      padded = jnp.pad(x, [(0, num_chunks * chunk - total), *[(0, 0)] * (x.ndim - 1)])
      return padded.reshape(num_chunks, chunk, *x.shape[1:])

    starts = jnp.arange(num_chunks) * chunk
    body: Any = jax.checkpoint(accumulate_chunk, prevent_cse=False)
    (normalizer, best), _ = jax.lax.scan(
      body, carry, (jax.tree.map(split_chunks, candidates), starts)
    )
  return LossSums(
    loss=jnp.sum(jnp.where(rows.valid, normalizer - target, 0.0)),
    correct=jnp.sum((target >= best) & rows.valid, dtype=jnp.float32),
    rows=jnp.sum(rows.valid, dtype=jnp.float32),
  )
