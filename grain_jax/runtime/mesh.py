"""The device mesh, where each array lives on it, and host batch -> global batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grain_jax import trees

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the batch is sharded over both


def create(
  config: ml_collections.ConfigDict,
  devices: list[jax.Device] | None = None,
  *,
  batches: tuple[str, ...] = ("batch_size", "eval_batch_size"),
) -> Mesh:
  """The mesh of `config.mesh` over all devices of all processes.

  Args:
    config: whole configuration.
    devices: others than all.
    batches: keys of the batches that will be sharded over it; whoever only evaluates has no use
      for `batch_size`.

  Raises:
    ValueError: the axes do not multiply to the number of devices, a batch does not divide, or the
      slices of a TPU do not go with the axes.
  """
  devices = jax.devices() if devices is None else devices
  sizes = shape(config, len(devices))
  shards = sizes[0] * sizes[1]
  for key in batches:
    if config[key] % shards:
      below = max(config[key] // shards, 1) * shards
      raise ValueError(
        f"config.{key} = {config[key]} does not divide by the {shards} devices along the data and "
        f"fsdp axes. Try {below} or {below + shards}."
      )
  if "batch_size" in batches and config.batch_size % (shards * config.accumulate):
    raise ValueError(
      f"config.accumulate = {config.accumulate} does not divide the {config.batch_size // shards} "
      f"examples a device of config.batch_size = {config.batch_size}."
    )
  return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shape(config: ml_collections.ConfigDict, devices: int) -> tuple[int, int, int]:
  """Sizes of the axes of `config.mesh` over a number of devices, -1 taking what is left.

  Raises:
    ValueError: they do not multiply to it; one line.
  """
  sizes = _sizes(config, devices)
  if sizes is None:
    asked = ", ".join(f"{axis}={config.mesh[axis]}" for axis in AXES)
    raise ValueError(
      f"config.mesh ({asked}) does not multiply to the {devices} devices there are. "
      "Set one axis to -1 to let it take what is left."
    )
  return sizes


def fits(config: ml_collections.ConfigDict, devices: int) -> bool:
  """Whether the axes of `config.mesh` multiply to a number of devices."""
  return _sizes(config, devices) is not None


def _sizes(config: ml_collections.ConfigDict, devices: int) -> tuple[int, int, int] | None:
  sizes = [config.mesh[axis] for axis in AXES]
  known = math.prod(s for s in sizes if s > 0)
  if sizes.count(-1) == 1 and devices % known == 0:
    sizes[sizes.index(-1)] = devices // known
  return None if -1 in sizes or math.prod(sizes) != devices else tuple(sizes)


def batch_shards(config: ml_collections.ConfigDict, devices: int) -> int:
  """How many of the devices share a batch, along data and fsdp; at least 1."""
  mesh = config.mesh
  if mesh.tensor < 0:  # it takes what these leave
    return max(mesh.data, 1) * max(mesh.fsdp, 1)
  return max(devices // max(mesh.tensor, 1), 1)


def arrange(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices [data, fsdp, tensor] by the links between them, the fastest for the last axis.

  On TPUs by `mesh_utils`, which knows their torus: a physical axis is split where the shape asks
  for it, and slices, which only the data center's network joins, follow each other along data.
  Elsewhere they keep the order of their numbers, GPUs node by node.

  Args:
    shape: sizes of the axes; they multiply to the number of devices.
    devices: all of one kind.

  Raises:
    ValueError: slices of different sizes, or data and fsdp do not divide by their number.
  """
  slices: dict[int, list[jax.Device]] = {}
  for device in devices:
    slices.setdefault(_slice(device), []).append(device)
  if devices[0].platform != "tpu":
    if devices[0].platform == "gpu":
      devices = sorted(devices, key=lambda device: (_slice(device), device.id))
    return _array(devices).reshape(shape)
  across = _between_slices(shape, [len(members) for members in slices.values()])
  within = tuple(size // parts for size, parts in zip(shape, across, strict=True))
  blocks = np.stack([_torus(within, slices[index]) for index in sorted(slices)])
  return blocks.reshape(across + within).transpose(0, 3, 1, 4, 2, 5).reshape(shape)


def _slice(device: jax.Device) -> int:
  """Number of the slice; JAX names it only where there are several."""
  return getattr(device, "slice_index", None) or 0


def _array(devices: Sequence[jax.Device]) -> np.ndarray:
  array = np.empty(len(devices), object)
  array[:] = devices
  return array


def _between_slices(shape: tuple[int, int, int], sizes: Sequence[int]) -> tuple[int, int, int]:
  """Parts into which each axis is cut by the slices of `sizes` devices: data first, then fsdp."""
  data, fsdp, _ = shape
  count = len(sizes)
  asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
  if len(set(sizes)) > 1:
    raise ValueError(
      f"the {count} slices have {', '.join(map(str, sizes))} devices: config.mesh ({asked}) needs "
      "slices of one size. Start the run on such slices."
    )
  along_data = math.gcd(data, count)
  along_fsdp = count // along_data
  if fsdp % along_fsdp:
    raise ValueError(
      f"config.mesh ({asked}): neither data nor fsdp divides by the {count} slices, and tensor "
      f"does not go over the network between them. Make data a multiple of {count}."
    )
  if along_fsdp > 1 and jax.process_index() == 0:
    logging.warning(
      "config.mesh (%s): data does not divide by the %d slices, so fsdp goes over the network "
      "between them, which is slower than the links within. Make data a multiple of %d.",
      asked, count, count,
    )  # fmt: skip
  return along_data, along_fsdp, 1


def _torus(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
  """The devices of one TPU slice, by the links between its chips."""
  try:
    # Neighbours along a physical axis that is split stay neighbours along the last logical axis.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  except (ValueError, NotImplementedError, AssertionError, TypeError) as error:
    # It factors sizes such as 28 wrongly, and refuses slices with holes and chips of two devices.
    logging.warning(
      "the mesh %s goes by the coordinates of the %d chips alone, and its links may be slower: JAX "
      "finds no better one (%s).",
      "x".join(map(str, shape)), len(devices), " ".join(str(error).split())[:120],
    )  # fmt: skip
  by_place = sorted(devices, key=lambda device: (*device.coords, device.core_on_chip))
  return _array(by_place).reshape(shape)


def num_shards(mesh: Mesh) -> int:
  """Shards of the batch."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def process_batch_shards(devices: np.ndarray, process: int) -> tuple[tuple[int, ...], int]:
  """Which shards of the batch a process reads: (their indices, ascending; the number of shards).

  A shard is what one position along data and fsdp holds. The shards of a process need not be
  contiguous: on a TPU the mesh follows the links between chips. Processes that differ along the
  tensor axis alone read the same shards.

  Args:
    devices: of the mesh, [data, fsdp, tensor].
    process: index of the process.

  Raises:
    ValueError: the shards of two processes overlap without being the same.
  """
  rows = devices.reshape(-1, devices.shape[-1])
  shards_of: dict[int, list[int]] = {}
  for row, row_devices in enumerate(rows):
    for owner in {device.process_index for device in row_devices}:
      shards_of.setdefault(owner, []).append(row)
  distinct = {tuple(shards) for shards in shards_of.values()}
  if sum(map(len, distinct)) != len(rows):
    raise ValueError(
      f"config.mesh.tensor = {devices.shape[-1]} cuts the {len(shards_of)} processes unevenly: "
      "some share a part of the batch only partly. Make tensor a multiple or a divisor of the "
      "devices of a process."
    )
  return tuple(shards_of[process]), len(rows)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading dimension over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A full copy on each device."""
  return NamedSharding(mesh, PartitionSpec())


def param_shardings(params: Any, mesh: Mesh, rules: Any) -> Any:
  """A sharding for each parameter, by `config.mesh.rules`.

  Args:
    params: arrays or ShapeDtypeStructs.
    mesh: the mesh.
    rules: (regex, partition) pairs; a partition names a mesh axis or None for each dimension.
  """
  return _shardings(params, params, mesh, rules)


def state_shardings(state: Any, mesh: Mesh, rules: Any) -> Any:
  """A sharding for each leaf of a train state, by `config.mesh.rules`.

  What carries a parameter's name at the end of its own (optimiser moments, the running mean) is
  sharded with it; the rest is replicated.

  Args:
    state: TrainState of arrays or ShapeDtypeStructs.
    mesh: the mesh.
    rules: as of `param_shardings`.
  """
  return _shardings(state, state.params, mesh, rules)


def _shardings(tree: Any, params: Any, mesh: Mesh, rules: Any) -> Any:
  """NamedShardings of the leaves, by the rules whose regexes match the names of parameters."""
  partitions = [tuple(partition) for _, partition in rules]
  numbered = [(pattern, number) for number, (pattern, _) in enumerate(rules)]
  chosen = trees.match(params, numbered, -1, what="config.mesh.rules")
  by_name = {name: partitions[n] if n >= 0 else () for name, n in trees.named_leaves(chosen)}

  def spec_of(name: str) -> tuple[Any, ...]:
    parts = name.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))  # the longest first
    return next((by_name[end] for end in ends if end in by_name), ())

  def named_sharding(name: str, leaf: Any) -> NamedSharding:
    spec = () if leaf.ndim == 0 else spec_of(name)
    where = f"config.mesh.rules: partition {spec}"
    if len(spec) > leaf.ndim:
      raise ValueError(
        f"{where} has more dimensions than a parameter of shape {list(leaf.shape)} that it "
        f"matches, {name!r}."
      )
    for size, axes in zip(leaf.shape, spec, strict=False):
      axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
      unknown = [axis for axis in axes if axis not in AXES]
      if unknown:
        raise ValueError(f"{where} names {unknown[0]!r}, which is none of {', '.join(AXES)}.")
      shards = math.prod(mesh.shape[axis] for axis in axes)
      if size % shards:
        raise ValueError(
          f"{where} cuts {size} of {name!r} {list(leaf.shape)} into {shards} parts, which does not "
          "divide. Cut another dimension, or change config.mesh."
        )
    return NamedSharding(mesh, PartitionSpec(*spec))

  return trees.map_with_name(named_sharding, tree)


def to_host(array: Any) -> np.ndarray:
  """All of an array, wherever its shards are.

  Where other processes hold some of them it is gathered over their links: all must call it then.
  """
  if not isinstance(array, jax.Array) or array.is_fully_addressable:
    return np.asarray(array)
  if array.is_fully_replicated:
    return np.asarray(array.addressable_data(0))
  with jax.set_mesh(array.sharding.mesh):  # not the one around the caller
    return multihost_utils.process_allgather(array, tiled=True)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Copies of all arrays on each device of `mesh`; as of `to_host`, all processes must call it."""
  sharding = replicated(mesh)

  def copy(leaf: Any) -> jax.Array:
    value = to_host(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

  def is_near(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable

  if not mesh.is_multi_process and all(map(is_near, jax.tree.leaves(tree))):
    return jax.device_put(tree, sharding)
  return jax.tree.map(copy, tree)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's shards of a batch, in their order -> global arrays sharded over the mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()
  }
