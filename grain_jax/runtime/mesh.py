"""The device mesh, where each array lives on it, and host batch -> global batch."""

from __future__ import annotations

import math
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grain_jax import trees

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the batch is cut over both


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
    batches: keys of the batches that will be cut over it; whoever only evaluates has no use for
      `batch_size`.

  Raises:
    ValueError: the axes do not multiply to the number of devices, or a batch does not divide.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.mesh[axis] for axis in AXES]
  known = math.prod(s for s in sizes if s > 0)
  if sizes.count(-1) == 1 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if -1 in sizes or math.prod(sizes) != len(devices):
    asked = ", ".join(f"{axis}={config.mesh[axis]}" for axis in AXES)
    raise ValueError(
      f"config.mesh ({asked}) does not multiply to the {len(devices)} devices there are. "
      "Set one axis to -1 to let it take what is left."
    )
  parts = sizes[0] * sizes[1]
  for key in batches:
    if config[key] % parts:
      below = max(config[key] // parts, 1) * parts
      raise ValueError(
        f"config.{key} = {config[key]} does not divide by the {parts} devices along the data and "
        f"fsdp axes. Try {below} or {below + parts}."
      )
  if "batch_size" in batches and config.batch_size % (parts * config.accumulate):
    raise ValueError(
      f"config.accumulate = {config.accumulate} does not divide the {config.batch_size // parts} "
      f"examples a device of config.batch_size = {config.batch_size}."
    )
  shape = dict(zip(AXES, sizes, strict=True))
  return jax.make_mesh(
    tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
  )


def num_shards(mesh: Mesh) -> int:
  """Parts into which the batch is cut."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_share(devices: np.ndarray, process: int) -> tuple[tuple[int, ...], int]:
  """Which parts of the batch a process reads: (their numbers, ascending; how many parts there are).

  A part is what one place along data and fsdp holds. The parts of a process need not lie together:
  on a TPU the mesh follows the links between chips. Processes that only hold other parts of the
  parameters (the tensor axis) read the same parts.

  Args:
    devices: of the mesh, [data, fsdp, tensor].
    process: index of the process.

  Raises:
    ValueError: the parts of two processes overlap without being the same.
  """
  rows = devices.reshape(-1, devices.shape[-1])
  of: dict[int, list[int]] = {}
  for row, row_devices in enumerate(rows):
    for owner in {device.process_index for device in row_devices}:
      of.setdefault(owner, []).append(row)
  parts = {tuple(part) for part in of.values()}
  if sum(map(len, parts)) != len(rows):
    raise ValueError(
      f"config.mesh.tensor = {devices.shape[-1]} cuts the {len(of)} processes unevenly: some share "
      "a part of the batch only partly. Make tensor a multiple or a divisor of the devices of a "
      "process."
    )
  return tuple(of[process]), len(rows)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading dimension over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on each device."""
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
  sharded with it; the rest is whole everywhere.

  Args:
    state: TrainState of arrays or ShapeDtypeStructs.
    mesh: the mesh.
    rules: as of `param_shardings`.
  """
  return _shardings(state, state.params, mesh, rules)


def _shardings(tree: Any, params: Any, mesh: Mesh, rules: Any) -> Any:
  """Of the leaves of a tree, by the rules whose regexes fit the names of parameters."""
  partitions = [tuple(partition) for _, partition in rules]
  numbered = [(pattern, number) for number, (pattern, _) in enumerate(rules)]
  chosen = trees.match(params, numbered, -1, what="config.mesh.rules")
  by_name = {name: partitions[n] if n >= 0 else () for name, n in trees.named_leaves(chosen)}

  def spec_of(name: str) -> tuple[Any, ...]:
    parts = name.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))  # the longest first
    return next((by_name[end] for end in ends if end in by_name), ())

  def place(name: str, leaf: Any) -> NamedSharding:
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
      parts = math.prod(mesh.shape[axis] for axis in axes)
      if size % parts:
        raise ValueError(
          f"{where} cuts {size} of {name!r} {list(leaf.shape)} into {parts} parts, which does not "
          "divide. Cut another dimension, or change config.mesh."
        )
    return NamedSharding(mesh, PartitionSpec(*spec))

  return trees.map_with_name(place, tree)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's parts of a batch, in their order -> global arrays sharded over the mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()
  }
