"""The softmax of a contrastive loss in little memory: candidates in chunks, features gathered once.

Each device has the rows of its own examples and contrasts them with the candidates of all devices.
Of the logits, [rows, candidates] in float32, only one chunk of candidates exists at a time; the
backward pass rematerialises it.
"""

from __future__ import annotations

import functools
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


def product_dtype(precision: str, platform: str) -> jax.typing.DTypeLike:
  """Type of the embeddings in the products of a loss, `config.loss.precision` on a platform.

  Sums are float32 always. On accelerators bfloat16 is a pass of the matrix unit where float32 is
  six on a TPU, and float32 leaves a GPU's tensor cores unused.
  """
  if precision == "auto":
    precision = "float32" if platform == "cpu" else "bfloat16"
  return jnp.dtype(precision)


def _product(subscripts: str, a: Array, b: Array) -> Array:
  """Einsum of two arrays of one type, float32 out: half precision in one pass, float32 exactly."""
  exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.einsum(subscripts, a, b, precision=exact, preferred_element_type=jnp.float32)


@jax.custom_vjp
def inner_products(rows: Array, candidates: Array) -> Array:
  """Inner products f32 [N, M] of rows f32 [N, E] and candidates [M, E], in the candidates' type.

  Rows, and the gradient of the products for its own two products, are rounded to that type; all
  sums are float32.
  """
  return _inner_products(rows, candidates)[0]


def _inner_products(rows: Array, candidates: Array) -> tuple[Array, tuple[Array, Array]]:
  rows = rows.astype(candidates.dtype)
  return _product("ne,me->nm", rows, candidates), (rows, candidates)


def _inner_products_backward(
  residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  rows, candidates = residuals
  gradient = gradient.astype(candidates.dtype)
  of_candidates = _product("nm,ne->me", gradient, rows).astype(candidates.dtype)
  return _product("nm,me->ne", gradient, candidates), of_candidates


inner_products.defvjp(_inner_products, _inner_products_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_embeddings(local: Array, dtype: jax.typing.DTypeLike, axes: tuple[str, ...]) -> Array:
  """Embeddings f32 [M, E] of all devices, [devices * M, E] in `dtype`, in which they travel.

  Their gradient is summed over the devices in float32. Within `shard_map` if there are axes.
  """
  return gather(local.astype(dtype), axes)


def _gather_embeddings(
  local: Array, dtype: jax.typing.DTypeLike, axes: tuple[str, ...]
) -> tuple[Array, None]:
  return gather_embeddings(local, dtype, axes), None


def _gather_embeddings_backward(
  dtype: jax.typing.DTypeLike, axes: tuple[str, ...], residuals: None, gradient: Array
) -> tuple[Array]:
  del dtype, residuals
  gradient = gradient.astype(jnp.float32)
  return (jax.lax.psum_scatter(gradient, axes, tiled=True) if axes else gradient,)


gather_embeddings.defvjp(_gather_embeddings, _gather_embeddings_backward)


def gather(local: Any, axes: tuple[str, ...]) -> Any:
  """Arrays of all devices, one device's after the other's; within `shard_map` if there are axes."""
  if not axes:
    return local
  return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), local)


def cross_entropy(
  rows: Candidates,
  candidates: Candidates,
  *,
  logit_scale: Array,
  target: Array | None = None,
  axes: tuple[str, ...] = (),
  chunk: int = 0,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> LossSums:
  """-log softmax of each row at its positive, summed; all valid candidates are contrasted with it.

  Args:
    rows: N of them, of this device; `rows.text_hashes` are those of their positives.
    candidates: M of this device, at least N; the positive of row i is candidate i. One of any
      device with the text hash of a row's positive is no negative of that row.
    logit_scale: [], ln s.
    target: f32 [N], logits of the rows' positives, where these are none of the candidates.
    axes: within `shard_map`, the mesh axes whose devices' candidates are contrasted.
    chunk: candidates at a time; 0 or as many as there are: all at once.
    dtype: of the products: `product_dtype`.

  Returns:
    LossSums over this device's rows; those that are not valid add nothing.
  """
  apart = target is not None
  if target is None:
    positives = candidates.embeddings[: rows.valid.shape[0]]
    target = jnp.exp(logit_scale) * jnp.sum(rows.embeddings * positives, axis=-1)
  start = (target, jnp.minimum(jax.lax.stop_gradient(target), MASKED_LOGIT))
  normalizer, best = _over_negatives(
    rows, candidates, start, logit_scale=logit_scale, positives_among=not apart,
    axes=axes, chunk=chunk, dtype=dtype,
  )  # fmt: skip
  return LossSums(
    loss=jnp.sum(jnp.where(rows.valid, normalizer - target, 0.0)),
    correct=jnp.sum((target >= best) & rows.valid, dtype=jnp.float32),
    rows=jnp.sum(rows.valid, dtype=jnp.float32),
  )


def log_sum_exp(
  rows: Candidates,
  candidates: Candidates,
  *,
  logit_scale: Array,
  axes: tuple[str, ...] = (),
  chunk: int = 0,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Array:
  """log sum of exp(s a.b) of each row over all valid candidates, f32 [N]; arguments as above.

  `MASKED_LOGIT` or less where no candidate is valid.
  """
  nothing = jnp.full_like(rows.embeddings[:, 0], MASKED_LOGIT, jnp.float32)
  return _over_negatives(
    rows, candidates, (nothing, nothing), logit_scale=logit_scale, positives_among=False,
    axes=axes, chunk=chunk, dtype=dtype,
  )[0]  # fmt: skip


def _over_negatives(
  rows: Candidates,
  candidates: Candidates,
  start: tuple[Array, Array],
  *,
  logit_scale: Array,
  positives_among: bool,
  axes: tuple[str, ...],
  chunk: int,
  dtype: jax.typing.DTypeLike,
) -> tuple[Array, Array]:
  """(log-sum-exp, largest) of each row's logits over its negatives, from `start` on, [N] each."""
  num_rows, num_local = rows.valid.shape[0], candidates.valid.shape[0]
  offset = jax.lax.axis_index(axes) * num_local if axes else 0
  embeddings = gather_embeddings(candidates.embeddings, jnp.dtype(dtype), axes)
  valid, text_hashes = gather((candidates.valid, candidates.text_hashes), axes)
  candidates = Candidates(embeddings, valid, text_hashes)

  def accumulate_chunk(
    carry: tuple[Array, Array], chunk_and_start: tuple[Candidates, Array]
  ) -> tuple[tuple[Array, Array], None]:
    """Adds one chunk of candidates to the log-sum-exp and to the largest negative."""
    normalizer, best = carry
    candidates, first = chunk_and_start
    logits = jnp.exp(logit_scale) * inner_products(rows.embeddings, candidates.embeddings)
    negative = jnp.broadcast_to(candidates.valid, logits.shape)
    if positives_among:
      position = first + jnp.arange(candidates.valid.shape[0])
      negative &= position != offset + jnp.arange(num_rows)[:, None]
    if rows.text_hashes is not None:
      negative &= ~duplicates.pairwise_equal(rows.text_hashes, candidates.text_hashes)
    logits = jnp.where(negative, logits, MASKED_LOGIT)
    normalizer = jnp.logaddexp(normalizer, jax.nn.logsumexp(logits, axis=-1))
    best = jnp.maximum(best, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    return (normalizer, best), None

  total = candidates.valid.shape[0]
  if not 0 < chunk < total:
    return accumulate_chunk(start, (candidates, jnp.zeros((), jnp.int32)))[0]
  num_chunks = -(-total // chunk)

  def split_chunks(x: Array) -> Array:
    padded = jnp.pad(x, [(0, num_chunks * chunk - total), *[(0, 0)] * (x.ndim - 1)])
    return padded.reshape(num_chunks, chunk, *x.shape[1:])

  firsts = jnp.arange(num_chunks) * chunk
  body: Any = jax.checkpoint(accumulate_chunk, prevent_cse=False)
  return jax.lax.scan(body, start, (jax.tree.map(split_chunks, candidates), firsts))[0]
