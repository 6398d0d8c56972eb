"""Contrastive losses in little memory, softmax or sigmoid: candidates in chunks, gathered once.

Each device has the rows of its own examples and contrasts them with the candidates of all devices.
Of the logits, [rows, candidates] in float32, only one chunk of candidates exists at a time; the
backward pass rematerialises it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grain_jax.objectives import duplicates

Array = jax.Array
Carry = tuple[Array, Array]  # what is summed up and the largest negative logit, [N] each

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
  """Sums over the valid rows, each [], and the losses of all rows."""

  loss: Array  # of -log softmax at the row's positive, or of -log sigmoid of its pairs
  correct: Array  # rows whose positive scores highest
  rows: Array
  each: Array  # f32 [N], the loss of each row; 0 of those that are not valid


def by_group(groups: Array | None, each: Array, valid: Array) -> tuple[Array, ...]:
  """(sum, weight) of each group, [G], of losses and validity [B, ...]; () without groups [B, G]."""
  if groups is None:
    return ()
  axes = tuple(range(1, each.ndim))
  weights = jnp.sum(valid.astype(jnp.float32), axis=axes)
  return jnp.sum(each, axis=axes) @ groups, weights @ groups


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
    target = _positive_logits(rows, candidates, logit_scale)
  start = (target, _no_negative(target))
  normalizer, best = _over_negatives(
    rows, candidates, start, _add_log_sum_exp, logit_scale=logit_scale, positives_among=not apart,
    axes=axes, chunk=chunk, dtype=dtype,
  )  # fmt: skip
  return _sum_rows(rows, normalizer - target, target, best)


def sigmoid(
  rows: Candidates,
  candidates: Candidates,
  *,
  logit_scale: Array,
  logit_bias: Array,
  axes: tuple[str, ...] = (),
  chunk: int = 0,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> LossSums:
  """-log sigmoid(z (s a.b + bias)) summed over each row's pairs: z = 1 for its positive, else -1.

  Divided by the number of rows it is SigLIP's loss (Zhai et al., ICCV 2023, eq. 1), which is the
  same from images to texts as from texts to images: it is counted once.

  Args:
    rows: as of `cross_entropy`, like all that is not named here.
    candidates: likewise; those that are no negatives of a row add nothing to it.
    logit_scale: [], ln s.
    logit_bias: [].
    axes: within `shard_map`, the mesh axes whose devices' candidates are contrasted.
    chunk: candidates at a time; 0 or as many as there are: all at once.
    dtype: of the products: `product_dtype`.

  Returns:
    LossSums over this device's rows; those that are not valid add nothing.
  """
  target = _positive_logits(rows, candidates, logit_scale)
  start = (jax.nn.softplus(-target - logit_bias), _no_negative(target))

  def add_pairs(carry: Carry, logits: Array) -> Carry:
    loss, best = carry
    pairs = jax.nn.softplus(logits + logit_bias)  # 0 at `MASKED_LOGIT`, and so is its gradient
    return loss + jnp.sum(pairs, axis=-1), _larger(best, logits)

  loss, best = _over_negatives(
    rows, candidates, start, add_pairs, logit_scale=logit_scale, positives_among=True,
    axes=axes, chunk=chunk, dtype=dtype,
  )  # fmt: skip
  return _sum_rows(rows, loss, target, best)


def _positive_logits(rows: Candidates, candidates: Candidates, logit_scale: Array) -> Array:
  """s a.b of each row and its positive, the candidate of its number, f32 [N]."""
  positives = candidates.embeddings[: rows.valid.shape[0]]
  return jnp.exp(logit_scale) * jnp.sum(rows.embeddings * positives, axis=-1)


def _no_negative(target: Array) -> Array:
  """The largest negative logit of rows that have met none."""
  return jnp.minimum(jax.lax.stop_gradient(target), MASKED_LOGIT)


def _sum_rows(rows: Candidates, losses: Array, target: Array, best: Array) -> LossSums:
  each = jnp.where(rows.valid, losses, 0.0)
  return LossSums(
    each=each,
    loss=jnp.sum(each),
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
    rows, candidates, (nothing, nothing), _add_log_sum_exp, logit_scale=logit_scale,
    positives_among=False, axes=axes, chunk=chunk, dtype=dtype,
  )[0]  # fmt: skip


def _larger(best: Array, logits: Array) -> Array:
  return jnp.maximum(best, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))


def _add_log_sum_exp(carry: Carry, logits: Array) -> Carry:
  """Adds logits [N, chunk] to the log-sum-exp and to the largest negative."""
  normalizer, best = carry
  normalizer = jnp.logaddexp(normalizer, jax.nn.logsumexp(logits, axis=-1))
  return normalizer, _larger(best, logits)


def _over_negatives(
  rows: Candidates,
  candidates: Candidates,
  start: Carry,
  add: Callable[[Carry, Array], Carry],
  *,
  logit_scale: Array,
  positives_among: bool,
  axes: tuple[str, ...],
  chunk: int,
  dtype: jax.typing.DTypeLike,
) -> Carry:
  """Each row's logits over its negatives, reduced by `add` from `start` on, [N] each.

  `add` gets the logits [N, chunk] of one chunk of candidates after the other, `MASKED_LOGIT` where
  one is no negative of the row.
  """
  num_rows, num_local = rows.valid.shape[0], candidates.valid.shape[0]
  offset = jax.lax.axis_index(axes) * num_local if axes else 0
  embeddings = gather_embeddings(candidates.embeddings, jnp.dtype(dtype), axes)
  valid, text_hashes = gather((candidates.valid, candidates.text_hashes), axes)
  candidates = Candidates(embeddings, valid, text_hashes)

  def accumulate_chunk(
    carry: Carry, chunk_and_start: tuple[Candidates, Array]
  ) -> tuple[Carry, None]:
    candidates, first = chunk_and_start
    logits = jnp.exp(logit_scale) * inner_products(rows.embeddings, candidates.embeddings)
    negative = jnp.broadcast_to(candidates.valid, logits.shape)
    if positives_among:
      position = first + jnp.arange(candidates.valid.shape[0])
      negative &= position != offset + jnp.arange(num_rows)[:, None]
    if rows.text_hashes is not None:
      negative &= ~duplicates.pairwise_equal(rows.text_hashes, candidates.text_hashes)
    return add(carry, jnp.where(negative, logits, MASKED_LOGIT)), None

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
