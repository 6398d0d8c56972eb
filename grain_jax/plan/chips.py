"""What is known of each chip, the names of machines made of them, and the roofline."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping

from grain_jax.runtime import memory

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator, by its maker's figures."""

  name: str  # as JAX's users call it
  platform: str  # tpu | gpu | cpu
  peak_flops: float  # bfloat16, dense, FLOP/s
  memory_bytes: int  # of HBM, what is left to a program: by libtpu 0.0.42, by a run's GPU_FRACTION
  memory_bandwidth: float  # of HBM, bytes/s
  link_bandwidth: float  # out of the chip to its neighbours, all links, one direction, bytes/s
  node_size: int  # chips joined by these links; 0: all of them
  node_bandwidth: float  # out of a chip to other nodes, one direction, bytes/s; 0: no such way
  source: str

  def passes(self, dtype: str, precision: str) -> float:
    """Time of a matrix product over that of the same in bfloat16.

    Args:
      dtype: the wider of its operands' types.
      precision: JAX's: 'DEFAULT', 'HIGH' or 'HIGHEST'.
    """
    return _FLOAT32_PASSES[self.platform][precision] if dtype == "float32" else 1.0


# Products of float32. A TPU's matrix unit takes bfloat16: JAX rounds to it, or adds up 3 or 6
# products of parts (jax.lax.Precision). An H100 has TF32 at half of its rate, and 67 TFLOP/s of
# float32 beside 989 of bfloat16 (nvidia.com/en-us/data-center/h100).
_FLOAT32_PASSES = {
  "tpu": {"DEFAULT": 1.0, "HIGH": 3.0, "HIGHEST": 6.0},
  "gpu": {"DEFAULT": 2.0, "HIGH": 2.0, "HIGHEST": 989 / 67},
  "cpu": {"DEFAULT": 1.0, "HIGH": 1.0, "HIGHEST": 1.0},
}

_H100_BYTES = int(memory.GPU_FRACTION * 84_942_979_072)  # of what its driver tells of 80 GB

# The makers give the interconnect of a TPU in Gbit/s out of a chip, NVLink in both directions.
CHIPS: Mapping[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip(
      "v5e", "tpu", 197e12, int(15.75 * GIB), 819e9, 1600e9 / 8, 0, 0.0,
      "cloud.google.com/tpu/docs/v5e (197 TFLOP/s, 16 GB, 819 GB/s, 1,600 Gbit/s)",
    ),
    Chip(
      "v5p", "tpu", 459e12, int(95.74 * GIB), 2765e9, 4800e9 / 8, 0, 0.0,
      "cloud.google.com/tpu/docs/v5p (459 TFLOP/s, 95 GB, 2,765 GB/s, 4,800 Gbit/s)",
    ),
    Chip(
      "v6e", "tpu", 918e12, int(31.25 * GIB), 1638e9, 800e9 / 2, 0, 0.0,
      "cloud.google.com/tpu/docs/v6e (918 TFLOP/s, 32 GB, 1,638 GB/s, 800 GB/s both ways)",
    ),
    Chip(
      "h100", "gpu", 989e12, _H100_BYTES, 3350e9, 900e9 / 2, 8, 400e9 / 8,
      "nvidia.com/en-us/data-center/h100 (SXM: 989 TFLOP/s dense, 80 GB, 3.35 TB/s, NVLink "
      "900 GB/s both ways); one 400 Gbit/s adapter a GPU between nodes, as in a DGX H100",
    ),
    # A rehearsal on virtual devices of this machine: the figures are round ones of no machine.
    Chip("cpu", "cpu", 1e11, 64 * GB, 20e9, 10e9, 0, 0.0, "round figures, for rehearsals"),
  )
}  # fmt: skip

_SHAPES_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SHAPES_3D = (
  "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip
SHAPES: Mapping[str, tuple[str, ...]] = {
  "v5e": _SHAPES_2D,
  "v5p": _SHAPES_3D,
  "v6e": _SHAPES_2D,
}
_NODES = (1, 2, 4, 8)  # GPUs of a part of a node; above 8 whole nodes


@dataclasses.dataclass(frozen=True)
class Machine:
  """So many chips of a kind, wired in a shape."""

  name: str  # as given: v5e:4x4, h100:16
  chip: Chip
  num_chips: int
  shape: str  # 4x4, 2x2x4; the number of chips of a GPU machine

  def node(self, chip: int) -> int:
    """Which node the chip of this index is in."""
    return chip // self.chip.node_size if self.chip.node_size else 0


def known() -> str:
  """All topologies that `parse` takes, in a line."""
  tpus = (f"{name}:{'|'.join(shapes)}" for name, shapes in SHAPES.items())
  return "; ".join([*tpus, "h100:1|2|4|8 or a multiple of 8", "cpu:N (a rehearsal)"])


def parse(topology: str) -> Machine:
  """The machine of a name such as v5e:4x4 or h100:16.

  Raises:
    ValueError: there is no such machine; the line lists those there are.
  """
  name, _, shape = topology.partition(":")
  count = int(shape) if re.fullmatch("[0-9]{1,5}", shape) else 0
  if name in SHAPES and shape in SHAPES[name]:
    return Machine(topology, CHIPS[name], math.prod(map(int, shape.split("x"))), shape)
  if name == "h100" and (count in _NODES or (count and count % 8 == 0)):
    return Machine(topology, CHIPS[name], count, shape)
  if name == "cpu" and count:
    return Machine(topology, CHIPS[name], count, shape)
  raise ValueError(f"--topology={topology} is unknown. Known are: {known()}.")


def environment(machine: Machine) -> dict[str, str]:
  """Variables that JAX must find when it starts, for a plan of this machine."""
  found = {"JAX_PLATFORMS": "cpu"}  # whatever is attached here is left alone
  found["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # the time of compilation is part of the answer
  flags = [os.environ.get("XLA_FLAGS", "")]
  if machine.chip.platform == "tpu":
    found |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    found["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is touched: plans may run side by side
    kind = {"v5e": "v5litepod"}.get(machine.chip.name, machine.chip.name)
    cores = 2 if machine.chip.name == "v5p" else 1  # Google names these by their cores
    found["TPU_ACCELERATOR_TYPE"] = f"{kind}-{machine.num_chips * cores}"
  elif machine.chip.platform == "gpu":
    # Large programs fail without the second where no GPU is there to tune tiles on.
    flags += ["--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"]
  else:
    flags.append(f"--xla_force_host_platform_device_count={machine.num_chips}")
  return found | {"XLA_FLAGS": " ".join(flags).strip()}


# Bytes that a chip of a ring of n sends for a payload, as a multiple of (n - 1) / n of it.
_RING = {
  "all-reduce": 2.0,  # payload: the array
  "all-gather": 1.0,  # payload: the gathered array
  "reduce-scatter": 1.0,  # payload: the array before
  "all-to-all": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange among groups of chips, as often as a step runs it."""

  kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute, ...
  payload: int  # bytes of the whole array of a group (`_RING`)
  group: tuple[int, ...]  # chips of one of the groups
  times: int = 1
  name: str = ""  # path of names in the model

  @property
  def sent(self) -> float:
    """Bytes that a chip sends in a step, by the ring algorithm."""
    n = len(self.group)
    if n <= 1:
      return 0.0
    factor = _RING.get(self.kind)
    return self.times * self.payload * (1.0 if factor is None else factor * (n - 1) / n)

  def seconds(self, machine: Machine) -> float:
    """Least time a step spends in it.

    Among nodes each chip carries its share of what leaves the node, while the links within the
    node carry the rest; the slower of the two counts.
    """
    chip = machine.chip
    inside = self.sent / chip.link_bandwidth
    nodes = len({machine.node(i) for i in self.group})
    if nodes == 1:
      return inside
    local = len(self.group) / nodes
    factor = _RING.get(self.kind, 1.0)
    across = self.times * factor * self.payload / local * (nodes - 1) / nodes
    return max(inside, across / chip.node_bandwidth)


def roofline(
  machine: Machine, *, pass_flops: float, memory_bytes: float, collectives: Iterable[Collective]
) -> dict[str, float]:
  """Seconds that a step needs of each resource of a chip, were it used at its peak.

  Args:
    machine: the machine.
    pass_flops: executed by a chip in a step, each product as often as `Chip.passes` says.
    memory_bytes: read and written in its memory.
    collectives: exchanges of a step.

  Returns:
    {'arithmetic', 'memory', 'interconnect'}. They overlap at best: the largest bounds the step.
  """
  return {
    "arithmetic": pass_flops / machine.chip.peak_flops,
    "memory": memory_bytes / machine.chip.memory_bandwidth,
    "interconnect": sum(c.seconds(machine) for c in collectives),
  }
