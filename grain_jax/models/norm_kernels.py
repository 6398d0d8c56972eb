"""LayerNorm as two Pallas kernels for NVIDIA's GPUs: each array is read once and written once.

XLA makes of a LayerNorm two passes forward, and backward one for the input's gradient and one for
those of scale and bias, at a third to a half of the memory's speed. Here a program takes some rows
at a time through registers, and adds up the gradients of scale and bias over all of its rows.

Dimensions: N rows, D width, G programs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec

from grain_jax.models import fused_attention

Array = jax.Array

_WIDEST = 3072  # rows that fit a program's registers
_PROGRAMS = 1056  # of the backward pass: 8 for each of an H100's multiprocessors
_CHUNKS = 12  # powers of two that a row is made of, at most
_WARPS = 4


def rows_at_once(rows: int, width: int) -> int:
  """Rows that a program takes at a time; 0: these shapes are not for the kernels."""
  chunk = width & -width
  if chunk < 16 or width // chunk > _CHUNKS or width > _WIDEST or rows * width >= 2**31:
    return 0
  count = _rows_of(width)
  return count if rows % count == 0 else 0


def _rows_of(width: int) -> int:
  """Rows that fill a program's registers, as measured on an H200 for widths of 64, 512 and 768."""
  elements = 6144 if width >= 256 else 1536
  return 1 << ((elements // width).bit_length() - 1)


def _chunks(width: int) -> list[Any]:
  chunk = width & -width
  return [pl.ds(i, chunk) for i in range(0, width, chunk)]


def _forward_kernel(*refs: Any, epsilon: float, adds: bool) -> None:
  if adds:
    x_ref, branch_ref, branch_bias_ref, scale_ref, bias_ref, y_ref, *stats, total_ref = refs
  else:
    x_ref, scale_ref, bias_ref, y_ref, *stats = refs
  mean_ref, inverse_ref = stats
  width = x_ref.shape[-1]
  parts = []
  for columns in _chunks(width):
    x = x_ref[:, columns].astype(jnp.float32)
    if adds:
      branch = branch_ref[:, columns].astype(jnp.float32)
      branch += branch_bias_ref[columns].astype(jnp.float32)[None]
      total = (x + branch).astype(total_ref.dtype)
      total_ref[:, columns] = total
      x = total.astype(jnp.float32)
    parts.append(x)
  mean = sum(jnp.sum(x, axis=1) for x in parts) / width
  parts = [x - mean[:, None] for x in parts]
  inverse = jax.lax.rsqrt(sum(jnp.sum(x * x, axis=1) for x in parts) / width + epsilon)
  mean_ref[...], inverse_ref[...] = mean, inverse
  for columns, x in zip(_chunks(width), parts, strict=True):
    y = x * inverse[:, None] * scale_ref[columns][None] + bias_ref[columns][None]
    y_ref[:, columns] = y.astype(y_ref.dtype)


def _backward_kernel(*refs: Any, rows: int, blocks: int, steps: int, kept: bool) -> None:
  x_ref, mean_ref, inverse_ref, scale_ref, gradient_ref, *refs = refs
  through_ref = refs.pop(0) if kept else None
  out_ref, *sum_refs = refs
  width = x_ref.shape[-1]
  chunks = _chunks(width)
  size = width // len(chunks)

  def body(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
    here = pl.ds(step * rows, rows)
    mean, inverse = mean_ref[here][:, None], inverse_ref[here][:, None]
    normals, inners, sums = [], [], list(sums)
    for i, columns in enumerate(chunks):
      gradient = gradient_ref[here, columns].astype(jnp.float32)
      normal = (x_ref[here, columns].astype(jnp.float32) - mean) * inverse
      sums[i] += gradient * normal
      sums[len(chunks) + i] += gradient
      normals.append(normal)
      inners.append(gradient * scale_ref[columns][None])
    offset = sum(jnp.sum(inner, axis=1) for inner in inners) / width
    slope = sum(
      jnp.sum(inner * normal, axis=1) for inner, normal in zip(inners, normals, strict=True)
    )
    offset, slope = offset[:, None], slope[:, None] / width
    for i, columns in enumerate(chunks):
      out = inverse * (inners[i] - offset - normals[i] * slope)
      if kept:
        out += through_ref[here, columns].astype(jnp.float32)
      if len(sum_refs) == 3:
        sums[2 * len(chunks) + i] += out
      out_ref[here, columns] = out.astype(out_ref.dtype)
    return tuple(sums)

  start = (jnp.zeros((rows, size), jnp.float32),) * (len(chunks) * len(sum_refs))
  count = jnp.minimum(steps, blocks - pl.program_id(0) * steps)
  sums = jax.lax.fori_loop(0, count, body, start)
  for i, ref in enumerate(sum_refs):
    for columns, part in zip(chunks, sums[i * len(chunks) :], strict=False):
      ref[0, columns] = jnp.sum(part, axis=0)


def _call(kernel: Callable, **options: Any) -> Callable:
  """pallas_call for a GPU, or interpreted in tests."""
  if interpret():
    return pl.pallas_call(kernel, interpret=True, **options)
  return pl.pallas_call(
    kernel, compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1), **options
  )


def interpret() -> bool:
  """Whether kernels are interpreted instead of compiled; tests replace it."""
  return False


def forward(
  x: Array, added: tuple[Array, Array] | None, scale: Array, bias: Array, *, epsilon: float
) -> tuple[Array, Array, Array, Array]:
  """LayerNorm of the rows of x, or of x + (branch + branch bias).

  Args:
    x: [N, D].
    added: (branch [N, D], its bias [D]) or None.
    scale: [D], float32.
    bias: [D], float32.
    epsilon: added to the variance.

  Returns:
    The result in x's dtype, mean and inverse deviation of each row, float32 [N], and what was
    normalised, rounded to x's dtype: x itself without `added`.
  """
  rows, width = x.shape
  count = rows_at_once(rows, width)
  matrix, vector = (
    pl.BlockSpec((count, width), lambda i: (i, 0)),
    pl.BlockSpec((count,), lambda i: i),
  )
  whole = pl.BlockSpec((width,), lambda i: 0)
  like, row = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)
  inputs = (x, scale, bias) if added is None else (x, *added, scale, bias)
  out = _call(
    functools.partial(_forward_kernel, epsilon=epsilon, adds=added is not None),
    grid=(rows // count,),
    in_specs=[matrix if a.ndim == 2 else whole for a in inputs],
    out_specs=[matrix, vector, vector] + [matrix] * (added is not None),
    out_shape=[like, row, row] + [like] * (added is not None),
    name="layer_norm_forward",
  )(*inputs)
  return tuple(out) if added is not None else (*out, x)


def backward(
  x: Array,
  mean: Array,
  inverse: Array,
  scale: Array,
  gradient: Array,
  through: Array | None,
  *,
  added: bool,
) -> tuple[Array, ...]:
  """Gradients of `forward`.

  Args:
    x: [N, D], what was normalised.
    mean: [N], float32.
    inverse: [N], float32.
    scale: [D], float32.
    gradient: [N, D], of the result.
    through: [N, D], gradient of what was normalised by its other use, or None.
    added: a branch was added.

  Returns:
    The gradient of what was normalised, [N, D], and sums of rows, float32 [G, D]: parts of the
    gradients of scale and bias and, with `added`, of the branch's bias.
  """
  rows, width = x.shape
  count = rows_at_once(rows, width)
  blocks = rows // count
  steps = math.ceil(blocks / _PROGRAMS)
  programs = math.ceil(blocks / steps)
  matrix = pl.BlockSpec((count * steps, width), lambda i: (i, 0))
  vector = pl.BlockSpec((count * steps,), lambda i: i)
  whole, partial = pl.BlockSpec((width,), lambda i: 0), pl.BlockSpec((1, width), lambda i: (i, 0))
  sums = 3 if added else 2
  inputs = (x, mean, inverse, scale, gradient) + (() if through is None else (through,))
  return _call(
    functools.partial(
      _backward_kernel, rows=count, blocks=blocks, steps=steps, kept=through is not None
    ),
    grid=(programs,),
    in_specs=[matrix, vector, vector, whole, matrix] + [matrix] * (through is not None),
    out_specs=[matrix] + [partial] * sums,
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      *[jax.ShapeDtypeStruct((programs, width), jnp.float32)] * sums,
    ],
    name="layer_norm_backward",
  )(*inputs)


_chosen: contextvars.ContextVar[str] = contextvars.ContextVar("norm", default="auto")
_refusals: dict[tuple[int, str], str] = {}


@contextlib.contextmanager
def chosen(norm: str) -> Iterator[None]:
  """Around a model's trace: config.model.norm, of which 'xla' takes no kernels."""
  token = _chosen.set(norm)
  try:
    yield
  finally:
    _chosen.reset(token)


def _specs(x: Array) -> tuple[PartitionSpec, tuple[str, ...]] | None:
  """How x [B, ..., D] or [B, L, H, D] lies on the mesh, and by which axes; None: not evenly."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return PartitionSpec(), ()
  batch = tuple(a for a in ("data", "fsdp") if a in mesh.axis_names)
  head = ("tensor",) if x.ndim == 4 and "tensor" in mesh.axis_names else ()
  shards = math.prod(mesh.shape[a] for a in batch), math.prod(mesh.shape[a] for a in head)
  if x.shape[0] % shards[0] or (head and x.shape[2] % shards[1]):
    return None
  return PartitionSpec(batch or None, None, *head), batch + head


def usable(x: Array, dtype: Any) -> bool:
  """Whether LayerNorm of x [B, ..., D], returned in `dtype`, is computed by the kernels."""
  norm = _chosen.get()
  if x.ndim < 3 or norm == "xla" or x.dtype != dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
    return False
  if interpret():
    return rows_at_once(x.size // x.shape[-1], x.shape[-1]) > 0
  if norm == "auto" and fused_attention.unavailable():
    return False
  specs = _specs(x)
  if specs is None:
    return False
  mesh = jax.sharding.get_abstract_mesh()
  shards = math.prod(mesh.shape[a] for a in specs[1])
  if not rows_at_once(x.size // x.shape[-1] // shards, x.shape[-1]):
    return False
  return norm == "pallas" or not _refusal(x.shape[-1], jnp.dtype(dtype).name)


def implementations() -> dict[str, str]:
  """{'LayerNorm of 768 bfloat16': 'Pallas' or 'XLA'} of what was tried here so far."""
  return {
    f"LayerNorm of {width} {dtype}": "XLA" if refusal else "Pallas"
    for (width, dtype), refusal in sorted(_refusals.items())
  }


def _refusal(width: int, dtype: str) -> str:
  """What this machine's compiler says of kernels for this width, once a process; '': nothing."""
  if (width, dtype) not in _refusals:
    _refusals[width, dtype] = fused_attention.refusal_of(functools.partial(_trace, width, dtype))
    if why := _refusals[width, dtype]:
      logging.warning(
        "LayerNorm of %d %s goes by XLA: its kernels are refused: %s", width, dtype, why
      )
  return _refusals[width, dtype]


def _trace(width: int, dtype: str) -> Any:
  """Both kernels, on few rows, traced."""
  count = _rows_of(width)
  x = jax.ShapeDtypeStruct((2 * count, width), dtype)
  vector = jax.ShapeDtypeStruct((width,), jnp.float32)

  def both(x: Array, scale: Array) -> Any:
    y, mean, inverse, total = forward(x, (x, scale), scale, scale, epsilon=1e-6)
    return y, backward(total, mean, inverse, scale, y, y, added=True)

  return jax.jit(both).trace(x, vector)


def _on_shards(function: Callable, x: Array, inputs: tuple, outputs: str) -> tuple:
  """Calls `function` on the rows of each device's shard.

  Args:
    function: of arrays [N, D], [N] and [D].
    x: [B, ..., D], whose rows the others' are.
    inputs: arrays [B, ..., D], [B, ...], [D] or None.
    outputs: a letter each: 'm' [N, D], 'r' [N], 's' sums [G, D].
  """
  spec, axes = _specs(x)
  lead, width = x.shape[:-1], x.shape[-1]

  def local(*arrays: Array | None) -> tuple:
    flat = []
    shape = None
    for a in arrays:
      if a is not None and a.ndim == len(lead) + 1:
        shape = a.shape[:-1]
        a = a.reshape(-1, width)
      elif a is not None and a.ndim == len(lead) and a.ndim > 1:
        a = a.reshape(-1)
      flat.append(a)
    found = function(*flat)
    shapes = {"m": (*shape, width), "r": shape}
    return tuple(
      a.reshape(shapes[kind]) if kind in shapes else a
      for a, kind in zip(found, outputs, strict=True)
    )

  if not axes:
    return local(*inputs)
  by_rank = {len(lead) + 1: spec, len(lead): spec, 1: PartitionSpec()}
  in_specs = tuple(None if a is None else by_rank[a.ndim] for a in inputs)
  out_specs = tuple(PartitionSpec(axes) if kind == "s" else spec for kind in outputs)
  return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def layer_norm(
  epsilon: float, keep: bool, x: Array, added: tuple[Array, Array] | None, scale: Array, bias: Array
) -> tuple[Array | None, Array]:
  """LayerNorm of x, or of x + (branch + branch bias), by the kernels.

  Args:
    epsilon: added to the variance.
    keep: what is normalised is a result too, so that the gradient of its other use comes by here.
    x: [B, ..., D], at least two axes before D.
    added: (branch [B, ..., D], its bias [D]) or None; with `keep`.
    scale: [D], float32.
    bias: [D], float32.

  Returns:
    What was normalised (None without `keep`) and the result, both [B, ..., D].
  """
  return _layer_norm_forward(epsilon, keep, x, added, scale, bias)[0]


def _layer_norm_forward(
  epsilon: float, keep: bool, x: Array, added: tuple[Array, Array] | None, scale: Array, bias: Array
) -> tuple[tuple[Array | None, Array], tuple]:
  def local(x: Array, branch: Array | None, branch_bias: Array | None, *norm: Array) -> tuple:
    pair = None if branch is None else (branch, branch_bias)
    return forward(x, pair, *norm, epsilon=epsilon)

  branch, branch_bias = (None, None) if added is None else added
  y, mean, inverse, total = _on_shards(local, x, (x, branch, branch_bias, scale, bias), "mrrm")
  return (total if keep else None, y), (total, mean, inverse, scale, bias, branch_bias)


def _layer_norm_backward(
  epsilon: float, keep: bool, residuals: tuple, gradients: tuple[Array | None, Array]
) -> tuple:
  total, mean, inverse, scale, bias, branch_bias = residuals
  through, gradient = gradients
  added = branch_bias is not None
  out, *sums = _on_shards(
    functools.partial(backward, added=added),
    total,
    (total, mean, inverse, scale, gradient, through if keep else None),
    "mss" + "s" * added,
  )
  sums = [jnp.sum(part, axis=0) for part in sums]
  branch = (out, sums[2].astype(branch_bias.dtype)) if added else None
  return out, branch, sums[0].astype(scale.dtype), sums[1].astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
