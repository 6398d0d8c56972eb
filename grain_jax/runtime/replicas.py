"""Restoring on several processes: one replica of an array is read, the devices' links spread it.

Orbax has this as `SingleReplicaArrayHandler`, in one call that reads and sums over the replicas. It
is not used: where the read fails, the other processes would stand in the sum for good; a sum of
floats loses -0.0 and subnormal numbers, so that a run would not go on bit for bit; and no process
may hold devices of two replicas, as it does wherever it has several and only the batch is sharded.
Here the read ends on its own, and what is summed are bits, of one non-zero term.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# A replicated array is written in slices, one by each replica, where a slice has so many bytes at
# least. Orbax's default is none, and each slice of each array is a program that is compiled.
_MIN_REPLICA_SLICE_BYTES = 1 << 20

# Bytes a device that are spread at a time: a program each. It needs three times as many.
_CHUNK_BYTES = 1 << 28

# Integers in which the bits of an array are summed; collectives of GPUs have none of 16 bits.
_SUMS = {1: jnp.uint8, 2: jnp.uint32, 4: jnp.uint32, 8: jnp.uint64}
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def _axes(leaf: Any) -> tuple[str, ...]:
  """Axes of its mesh along which an array is replicated."""
  named = {name for entry in leaf.sharding.spec for name in _names(entry)}
  sizes = leaf.sharding.mesh.shape
  return tuple(axis for axis, size in sizes.items() if size > 1 and axis not in named)


def _names(entry: Any) -> tuple[str, ...]:
  return entry if isinstance(entry, tuple) else (entry,)


@functools.cache
def _first_replica(mesh: Mesh, replicated: tuple[str, ...]) -> Mesh:
  """The devices of a mesh that hold the first replica along some axes."""
  first = tuple(slice(0, 1) if axis in replicated else slice(None) for axis in mesh.axis_names)
  return Mesh(mesh.devices[first], mesh.axis_names, axis_types=mesh.axis_types)


@functools.cache
def _processes(mesh: Mesh) -> frozenset[int]:
  return frozenset(device.process_index for device in mesh.devices.flat)


def _has_bits(dtype: Any) -> bool:
  return dtype.itemsize in _SUMS and any(
    jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)
  )


def is_spread(leaf: Any) -> bool:
  """Whether some processes need not read an array: they hold replicas of what others read.

  The same on all processes.

  Args:
    leaf: ShapeDtypeStruct with the sharding that the array is to have.
  """
  if not isinstance(getattr(leaf, "sharding", None), NamedSharding) or not _has_bits(leaf.dtype):
    return False
  mesh = leaf.sharding.mesh
  return _processes(_first_replica(mesh, _axes(leaf))) < _processes(mesh)


def why_not(abstract: Any) -> str:
  """Why every process reads arrays of a tree that others hold as well; '' if none does."""
  leaves = jax.tree.leaves(abstract)
  apart = [x for x in leaves if not isinstance(getattr(x, "sharding", None), NamedSharding)]
  odd = [x for x in leaves if not _has_bits(x.dtype)]
  reasons = []
  if apart:
    reasons.append(f"{len(apart)} of {len(leaves)} arrays are on no mesh")
  if odd:
    reasons.append(f"{len(odd)} of {len(leaves)} arrays are of {odd[0].dtype}")
  return " and ".join(reasons)


def to_read(abstract: Any, process: int) -> Any:
  """What a process reads: its part of the first replica; PLACEHOLDER where it has none.

  Args:
    abstract: tree of ShapeDtypeStructs with shardings.
    process: its index.
  """

  def of(leaf: Any) -> Any:
    if not is_spread(leaf):
      return leaf
    first = _first_replica(leaf.sharding.mesh, _axes(leaf))
    if process not in _processes(first):
      return ocp.PLACEHOLDER
    sharding = NamedSharding(first, leaf.sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(of, abstract)


def spread(read: Any, abstract: Any) -> Any:
  """The arrays of `abstract` from what each process has read as `to_read` said; all must call it.

  Args:
    read: tree of arrays and PLACEHOLDERs; its arrays are given up.
    abstract: tree of ShapeDtypeStructs with shardings.
  """
  wanted, structure = jax.tree.flatten(abstract)
  arrays = structure.flatten_up_to(read)
  for chunk in _chunks(wanted):
    terms, shardings = [], []
    for i in chunk:
      terms.append(_to_term(arrays[i], wanted[i]))
      shardings.append(wanted[i].sharding)
    with jax.set_mesh(shardings[0].mesh):
      whole = jax.jit(_sum_bits, out_shardings=shardings)(terms)
    jax.block_until_ready(whole)  # one program at a time: CPUs hang with more
    for i, array in zip(chunk, whole, strict=True):
      if arrays[i] is not ocp.PLACEHOLDER:
        arrays[i].delete()  # its memory is needed
      arrays[i] = array
  return structure.unflatten(arrays)


def _chunks(leaves: list[Any]) -> Iterator[list[int]]:
  """Indices of the arrays to spread, in groups of one mesh and some bytes."""
  chunk: list[int] = []
  total = 0
  for i, leaf in enumerate(leaves):
    if not is_spread(leaf):
      continue
    size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    mesh = leaf.sharding.mesh
    if chunk and (total + size > _CHUNK_BYTES or mesh != leaves[chunk[0]].sharding.mesh):
      yield chunk
      chunk, total = [], 0
    chunk.append(i)
    total += size
  if chunk:
    yield chunk


def _to_term(array: Any, leaf: Any) -> jax.Array:
  """[replicas, ...], sharded along the first axis: what was read, zeros on all other devices."""
  mesh, replicated = leaf.sharding.mesh, _axes(leaf)
  count = math.prod(mesh.shape[axis] for axis in replicated)
  sharding = NamedSharding(mesh, PartitionSpec(replicated, *leaf.sharding.spec))
  held = {} if array is ocp.PLACEHOLDER else {s.device: s.data for s in array.addressable_shards}
  shape = (1, *leaf.sharding.shard_shape(leaf.shape))
  buffers = []
  for device in sharding.addressable_devices:
    with jax.set_mesh(Mesh(np.array([device]), ("one",))):  # not the one around the caller
      if device in held:
        buffers.append(jnp.reshape(held[device], shape))
      else:
        buffers.append(jnp.zeros(shape, leaf.dtype, device=device))
  return jax.make_array_from_single_device_arrays((count, *leaf.shape), sharding, buffers)


def _sum_bits(terms: list[jax.Array]) -> list[jax.Array]:
  return [_sum_of(term) for term in terms]


def _sum_of(term: jax.Array) -> jax.Array:
  """[replicas, ...] -> [...], where one replica at most is not zero, bit for bit."""
  if term.dtype == jnp.bool_:
    return jnp.any(term, axis=0)
  size = term.dtype.itemsize
  bits = jax.lax.bitcast_convert_type(term, _BITS[size])
  total = jnp.sum(bits, axis=0, dtype=_SUMS[size]).astype(_BITS[size])
  return jax.lax.bitcast_convert_type(total, term.dtype)


def handlers() -> ocp.type_handlers.TypeHandlerRegistry:
  """How the leaves of a state are written."""
  kinds = ocp.type_handlers
  arrays = kinds.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_REPLICA_SLICE_BYTES)
  scalars = kinds.ScalarHandler()
  return kinds.create_type_handler_registry(
    (jax.Array, arrays),
    (np.ndarray, kinds.NumpyHandler()),
    *((kind, scalars) for kind in (int, float, np.number)),
  )
