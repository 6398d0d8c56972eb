"""The real train step, compiled ahead of time for a machine that need not be there."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from grain_jax.models import grain, initial
from grain_jax.plan.chips import Machine
from grain_jax.runtime import mesh as meshes
from grain_jax.training import steps

# In an environment of its own: JAX would take these for attached devices.
_REQUIREMENTS = (
  "python -m venv .venv-plan && .venv-plan/bin/python -m pip install -r requirements-plan.txt (an "
  "environment of its own: JAX takes them for devices), or where there is no such file: python -m "
  f"pip install libtpu jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
)
_GIB = 2**30

# The part of XLA's description of an H100 SXM that its compiler asks for (Apache-2.0,
# github.com/openxla/xla, xla/backends/gpu/target_config/specs/h100_sxm.txtpb).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # nor is the package that it would be in
    return False


def _tpu_devices(machine: Machine) -> list[jax.Device]:
  if not _is_installed("libtpu"):
    raise ValueError(f"--topology={machine.name}: TPU plans need libtpu. Run: {_REQUIREMENTS}")
  from jax.experimental import topologies

  return list(topologies.get_topology_desc(machine.name, platform="tpu").devices)


def _gpu_devices(machine: Machine) -> list[jax.Device]:
  """Compile-only H100s; the one place that relies on what the CUDA plugin takes (jax 0.10.2).

  Raises:
    ValueError: the CUDA plugin is missing, or takes something else by now.
  """
  if not (_is_installed("jax_cuda12_plugin") and _is_installed("jax_plugins.xla_cuda12")):
    raise ValueError(
      f"--topology={machine.name}: GPU plans need jax-cuda12-plugin and jax-cuda12-pjrt. "
      f"Run: {_REQUIREMENTS}"
    )
  from jax.experimental import topologies

  nodes = max(machine.num_chips // machine.chip.node_size, 1)
  shape = f"1x{nodes}x{machine.num_chips // nodes}"
  try:
    found = topologies.get_topology_desc("h100", "cuda", target_config=_H100, topology=shape)
  except (NotImplementedError, TypeError, jax.errors.JaxRuntimeError) as error:
    raise ValueError(
      f"--topology={machine.name}: the CUDA plugin of jax {jax.__version__} does not describe a "
      f"GPU that is not there ({error}). Use jax 0.10.2."
    ) from error
  return list(found.devices)


def _cpu_devices(machine: Machine) -> list[jax.Device]:
  devices = jax.devices("cpu")
  if len(devices) < machine.num_chips:
    raise ValueError(
      f"--topology={machine.name}: JAX has {len(devices)} CPU devices. Set XLA_FLAGS="
      f"--xla_force_host_platform_device_count={machine.num_chips} before it starts."
    )
  return list(devices[: machine.num_chips])


def devices(machine: Machine) -> list[jax.Device]:
  """Devices of the machine, to compile for; those of a CPU alone can run anything.

  Raises:
    ValueError: what it takes to compile for them is not installed; one line.
  """
  find = {"tpu": _tpu_devices, "gpu": _gpu_devices, "cpu": _cpu_devices}
  return find[machine.chip.platform](machine)


@dataclasses.dataclass(frozen=True)
class Traced:
  """A train step as JAX sees it, for a mesh."""

  traced: Any  # jax.stages.Traced
  state: steps.TrainState  # ShapeDtypeStructs with shardings
  batch: dict[str, jax.ShapeDtypeStruct]
  mesh: jax.sharding.Mesh

  @property
  def jaxpr(self) -> Any:
    return self.traced.jaxpr.jaxpr


def trace(config: ml_collections.ConfigDict, devices: list[jax.Device]) -> Traced:
  """The train step of a resolved configuration on these devices.

  Raises:
    ValueError: mesh, batch or sharding rules do not go with them.
  """
  mesh = meshes.create(config, devices)
  model = grain.build(config)
  _, state, shardings, optimizer = steps.create_state(
    model, config, mesh, total_steps=100_000, steps_per_epoch=1_000
  )
  sharding = meshes.batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    for name, x in initial.dummy_batch(config, config.batch_size).items()
  }
  with jax.set_mesh(mesh):
    step = steps.make_train_step(model, config, mesh, optimizer, shardings)
    return Traced(step.trace(state, batch), state, batch, mesh)


def _shard_bytes(tree: Any) -> int:
  """Bytes of a tree of ShapeDtypeStructs on one chip."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a program."""

  fits: bool  # the compiler took it; whether the chip is large enough is the caller's question
  memory: dict[str, int]  # bytes per chip by kind, and 'total'
  seconds: float  # of compilation, by the clock
  cpu_seconds: float  # of compilation, of all cores
  text: str  # HLO; empty where it does not fit
  xla_flops: float  # XLA's counts of a chip, loops once; 0 where it gives none
  xla_bytes: float


def _memory(traced: Traced, stats: Any) -> dict[str, int]:
  """Bytes per chip by kind; `stats` is XLA's, or the bytes that a refused program wanted in all.

  On TPUs XLA's peak is the truth, by which the compiler refuses too: its temporaries hold donated
  arguments a second time. Elsewhere it gives no such peak, and the kinds add up to a bound.
  """
  kinds = {
    "parameters": _shard_bytes(traced.state.params),
    "optimizer": _shard_bytes(traced.state.opt_state),
    "parameter_mean": _shard_bytes(traced.state.ema),
    "teacher": _shard_bytes(traced.state.teacher),
    "batch": _shard_bytes(traced.batch),
  }
  held = sum(kinds.values())
  if isinstance(stats, int):
    kinds["temporaries"] = max(stats - held, 0)
  else:
    kinds["padding"] = max(stats.argument_size_in_bytes - held, 0)
    if traced.mesh.devices.flat[0].platform == "tpu" and stats.peak_memory_in_bytes:
      kinds["temporaries"] = stats.peak_memory_in_bytes - held - kinds["padding"]
    else:
      kinds["temporaries"] = stats.temp_size_in_bytes
      kinds["results"] = stats.output_size_in_bytes - stats.alias_size_in_bytes
    kinds["code"] = stats.generated_code_size_in_bytes
  kinds = {kind: int(size) for kind, size in kinds.items() if size > 0}
  return kinds | {"total": sum(kinds.values())}


def _bytes_wanted(message: str) -> int | None:
  """Bytes that a TPU compiler's refusal says it would need; None: it refused for another reason.

  It speaks of temporaries and means the arguments too.
  """
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  found = re.search(r"temporaries \(([\d.]+)([KMG])\)|Used ([\d.]+)([KMG])", message)
  if not found:
    return None
  size, unit = found.group(1) or found.group(3), found.group(2) or found.group(4)
  return int(float(size) * {"K": 2**10, "M": 2**20, "G": _GIB}[unit])


def compile(traced: Traced) -> Compiled:  # noqa: A001
  """Compiles for the mesh's devices; a program too large for them comes back with `fits` false."""
  with jax.set_mesh(traced.mesh):
    lowered = traced.traced.lower()
    began, cpu = time.monotonic(), time.process_time()
    try:
      done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      wanted = _bytes_wanted(str(error))
      if wanted is None:
        raise
      spent = time.monotonic() - began, time.process_time() - cpu
      return Compiled(False, _memory(traced, wanted), *spent, "", 0.0, 0.0)
    spent = time.monotonic() - began, time.process_time() - cpu
  cost = done.cost_analysis() or {}
  return Compiled(
    True,
    _memory(traced, done.memory_analysis()),
    *spent,
    done.as_text(),
    float(cost.get("flops", 0.0)),
    float(cost.get("bytes accessed", 0.0)),
  )
