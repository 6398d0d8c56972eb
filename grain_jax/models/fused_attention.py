"""cuDNN's fused attention: whether it takes a problem on this machine, and in which form.

What cuDNN takes differs by its version, JAX's version and the card, and no table of it stays true.
So each problem is tried once: forward and backward are traced, and compiled on the GPU, in small.
Lengths that are refused are padded. Nothing here decides what happens when cuDNN cannot be used.
What the towers do for it stands here too: tokens padded once, axes in their order in memory.

Dimensions: B batch, L tokens, H heads, D width of a head.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import layout
from jax.sharding import PartitionSpec

from grain_jax import failures

Array = jax.Array

# Lengths are padded to a multiple of the first of these with which the problem is taken.
MULTIPLES = (1, 2, 8, 64)
_ALIGNED = 8
_LEAST_CAPABILITY = 8.0  # Ampere; cuDNN has no fused attention for older cards
_BATCH_AXES, _HEAD_AXIS = ("data", "fsdp"), "tensor"


class Problem(NamedTuple):
  """Shapes and type of one call on one device."""

  query: tuple[int, ...]  # B, Lq, H, D
  key: tuple[int, ...]  # B, Lk, H, D
  mask: tuple[int, ...] | None
  dtype: str
  tokens: int | None = None  # of queries and keys; what follows them is padding


class ProbeResult(NamedTuple):
  """Whether cuDNN takes a problem, and in which padded form."""

  multiple: int  # to which lengths are padded; 0: not at all
  refusal: str  # what was said of the form without padding, one line; '' where it is taken


def platform() -> str:
  """Of the devices that the current program will run on."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else getattr(mesh, "abstract_device", None)
  found = getattr(device, "platform", None) or jax.default_backend()
  return "gpu" if found == "cuda" else found


def padded_length(length: int, dtype: Any) -> int:
  """To how many tokens a tower pads its own, once, for attention that is not masked.

  Matrix products of half precision on a GPU, cuDNN's attention too, want lengths that divide by 8.
  Queries, keys and values would each be padded and cut again at every call.
  """
  half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  return pad_to(length, _ALIGNED) if half and platform() == "gpu" else length


def unavailable() -> str:
  """Why no cuDNN is to be had where the current program will run; '' where it may be."""
  if (where := platform()) != "gpu":
    return f"{where.upper()} devices"
  local = [d for d in jax.local_devices() if d.platform in ("gpu", "cuda")]
  if not local:
    return "no GPU is here to ask"
  if "rocm" in local[0].client.platform_version.lower():
    return "AMD GPUs"
  capability = min(float(getattr(d, "compute_capability", "inf")) for d in local)
  if capability < _LEAST_CAPABILITY:
    return f"compute capability {capability}, below {_LEAST_CAPABILITY}"
  return ""


def pad_to(length: int, multiple: int) -> int:
  """The least multiple that is not below `length`."""
  return math.ceil(length / multiple) * multiple


def attend(
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  *,
  multiple: int,
  tokens: int | None = None,
) -> Array:
  """softmax(q k^T / sqrt(D)) v by cuDNN, with lengths padded to `multiple` and sliced back.

  Padding is told to cuDNN as sequence lengths, or, where there is a mask, within the mask.

  Args:
    query: [B, Lq, H, D].
    key: [B, Lk, H, D].
    value: [B, Lk, H, D].
    mask: bool [B or 1, H or 1, Lq, Lk], or None.
    multiple: of the padded lengths.
    tokens: of queries and keys, where padding follows them already; without a mask.

  Returns:
    [B, Lq, H, D]; where `tokens` is given, what follows them is meaningless.
  """
  lengths = query.shape[1], key.shape[1]
  extra = [pad_to(length, multiple) - length for length in lengths]
  options: dict[str, Any] = {}
  if any(extra) or tokens:
    query = jnp.pad(query, ((0, 0), (0, extra[0]), (0, 0), (0, 0)))
    key, value = (jnp.pad(x, ((0, 0), (0, extra[1]), (0, 0), (0, 0))) for x in (key, value))
    if mask is not None:
      mask = jnp.pad(mask, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1])))
    else:
      names = ("query_seq_lengths", "key_value_seq_lengths")
      for name, length in zip(names, (tokens, tokens) if tokens else lengths, strict=True):
        options[name] = jnp.full(len(query), length, jnp.int32)
  out = jax.nn.dot_product_attention(
    query, key, value, mask=mask, implementation="cudnn", **options
  )
  return out[:, : lengths[0]]


def _shard_shape(shape: tuple[int, ...], spec: PartitionSpec) -> tuple[int, ...]:
  """The shape of a shard under the current mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  sizes = []
  for size, axes in zip(shape, (*spec, *[None] * len(shape)), strict=False):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    sizes.append(size // math.prod(mesh.shape[a] for a in axes))
  return tuple(sizes)


def partition_specs(query: Array, mask: Array | None) -> tuple[PartitionSpec, PartitionSpec] | None:
  """PartitionSpecs of [B, L, H, D] and the mask on the current mesh; None: it does not divide."""
  mesh = jax.sharding.get_abstract_mesh()
  batch = tuple(a for a in _BATCH_AXES if a in mesh.axis_names)
  head = _HEAD_AXIS if _HEAD_AXIS in mesh.axis_names else None
  shards = math.prod(mesh.shape[a] for a in batch), mesh.shape[head] if head else 1
  if query.shape[0] % shards[0] or query.shape[2] % shards[1]:
    return None
  mask_spec = [None] * 4
  if mask is not None:
    mask_spec[:2] = [batch if mask.shape[0] > 1 else None, head if mask.shape[1] > 1 else None]
  return PartitionSpec(batch or None, None, head), PartitionSpec(*mask_spec)


@jax.custom_vjp
def pin_layout(x: Array) -> Array:
  """Fixes the order of an array's axes in a GPU's memory: as they are written.

  Else the compiler lets the batch run fastest, which suits one sum over it, and turns activations
  around for the matrix products of every block. Each device does it with its own part: for the
  partitioner the constraint is a call that it does not know, before which it gathers whole arrays.

  The gradient is pinned likewise; that of `shard_map` would add up what devices along the mesh's
  other axes hold alike.

  Args:
    x: [B, L, D], or of heads [B, L, H, D]; one that the mesh does not divide stays as it is.
  """
  return _pin_layout(x)


pin_layout.defvjp(lambda x: (_pin_layout(x), None), lambda kept, gradient: (_pin_layout(gradient),))


def _pin_layout(x: Array) -> Array:
  if platform() != "gpu":
    return x

  def pin(x: Array) -> Array:
    return layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return pin(x)
  by_heads = jax.ShapeDtypeStruct(x.shape if x.ndim == 4 else (*x.shape[:2], 0, 0), x.dtype)
  specs = partition_specs(by_heads, None)
  if specs is None:
    return x
  spec = specs[0] if x.ndim == 4 else PartitionSpec(specs[0][0])
  return jax.shard_map(pin, in_specs=spec, out_specs=spec, check_vma=False)(x)


def attend_sharded(
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  *,
  multiple: int,
  tokens: int | None = None,
) -> Array:
  """`attend` on each device's shard of batch and heads, which is what was probed."""
  function = functools.partial(attend, multiple=multiple, tokens=tokens)
  mesh, specs = jax.sharding.get_abstract_mesh(), partition_specs(query, mask)
  if mesh.empty or mesh.size == 1 or mesh.manual_axes or specs is None:
    return function(query, key, value, mask)
  rows, mask_spec = specs
  return jax.shard_map(
    function,
    in_specs=(rows, rows, rows, None if mask is None else mask_spec),
    out_specs=rows,
    check_vma=False,
  )(query, key, value, mask)


def probe(query: Array, key: Array, mask: Array | None, tokens: int | None = None) -> ProbeResult:
  """Whether cuDNN compiles this problem here; each problem is compiled once in a process."""
  mesh, specs = jax.sharding.get_abstract_mesh(), partition_specs(query, mask)
  if specs is None:
    return ProbeResult(0, "batch or heads do not divide by the devices")
  shapes = [query.shape, key.shape, None if mask is None else mask.shape]
  if not (mesh.empty or mesh.size == 1 or mesh.manual_axes):
    shapes = [
      None if shape is None else _shard_shape(shape, spec)
      for shape, spec in zip(shapes, (specs[0], specs[0], specs[1]), strict=True)
    ]
  return _probe(Problem(*shapes, jnp.dtype(query.dtype).name, tokens))


@functools.cache
def _probe(problem: Problem) -> ProbeResult:
  refusal = ""
  seen = set()
  for multiple in MULTIPLES:
    lengths = tuple(pad_to(shape[1], multiple) for shape in (problem.query, problem.key))
    if lengths in seen:
      continue
    seen.add(lengths)
    said = _refusal(problem, multiple)
    if not said:
      return ProbeResult(multiple, refusal)
    refusal = refusal or said
  return ProbeResult(0, refusal)


def _refusal(problem: Problem, multiple: int) -> str:
  """What is said of the problem in this form, in one line; '' where it compiles."""

  def gradients(query, key, value, gradient, *mask):
    function = functools.partial(
      attend, mask=mask[0] if mask else None, multiple=multiple, tokens=problem.tokens
    )
    out, vjp_fn = jax.vjp(function, query, key, value)
    return out, vjp_fn(gradient)

  query, key = (jax.ShapeDtypeStruct(s, problem.dtype) for s in (problem.query, problem.key))
  inputs = [query, key, key, query]
  if problem.mask is not None:
    inputs.append(jax.ShapeDtypeStruct(problem.mask, jnp.bool_))
  return refusal_of(lambda: jax.jit(gradients).trace(*inputs))


def _is_passing(error: Exception) -> bool:
  """Whether an error is of this moment (memory, storage, a time-out) and no answer to a probe.

  XLA calls a kernel's lack of shared memory exhausted too, which is an answer.
  """
  text = str(error)
  memory = "RESOURCE_EXHAUSTED" in text and "shared memory" not in text.lower()
  return memory or isinstance(error, MemoryError) or failures.is_transient(error)


def refusal_of(trace: Callable[[], Any]) -> str:
  """What is said of a program when it is traced and compiled here, in one line; '': nothing.

  Raises:
    Exception: what failed for the moment; no answer, which another process may not get.
  """
  refusals: list[str] = []
  passing: list[Exception] = []

  def attempt() -> None:
    try:
      compile_probe(trace())
    except Exception as error:  # whatever it is, it would end the run: it becomes the reason
      if _is_passing(error):
        passing.append(error)
        return
      lines = str(error).strip().splitlines() or [type(error).__name__]
      refusals.append(lines[0][:200].rstrip("."))

  # In a thread of its own: JAX keeps the mesh and the trace that this call stands in by thread.
  thread = threading.Thread(target=attempt, name="attention probe")
  thread.start()
  thread.join()
  if passing:
    raise passing[0]
  return refusals[0] if refusals else ""


def compile_probe(traced: Any) -> None:
  """Compiles a traced function for this process's first device."""
  traced.lower().compile()
