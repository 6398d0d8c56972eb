"""How much of the machine a run uses: model FLOPs against the peak, and memory."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import ml_collections

from grain_jax import flops, objectives
from grain_jax.models import attention, grain, initial
from grain_jax.training import optim, steps

# Peak of dense bfloat16 matrix products of one device, in FLOP/s, by what `device_kind` begins
# with (the makers' data sheets); the first that fits holds.
PEAK_FLOPS = {
  "TPU v3": 61.5e12,  # a device is one of a chip's two cores
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA GH200": 989e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA L40": 181e12,
  "NVIDIA L4": 121e12,
}
_GIB = 2**30


def peak_flops(kind: str) -> float:
  """Peak of a `jax.Device.device_kind` in FLOP/s; 0 where it is not known (a CPU)."""
  return next((peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)), 0.0)


def model_flops(config: ml_collections.ConfigDict) -> float:
  """FLOPs that a step of training needs for one image, by its own matrix products.

  Of the loss and its gradient as they are trained: with the patches that are left, without what
  only frozen parameters would need, with a teacher's forward pass. What is computed again to save
  memory is left out, and the optimiser's own products are. Padding of the packed texts counts, as
  it is computed. Nothing is compiled; GRAIN at ViT-B/16 takes 1.3 s of CPU time.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  # A fused kernel would count as nothing; a scan is traced once for all layers.
  config.model.update(attention="xla", norm="xla", remat="none", unroll=1)
  config.loss.chunk = 0
  model = grain.build(config)
  params = jax.eval_shape(lambda: initial.init_params(model, config))
  teacher = params if objectives.needs_teacher(config) else None
  leaves, structure = jax.tree.flatten(params)
  frozen = jax.tree.leaves(optim.frozen_mask(config, params))
  held = [leaf if fixed else None for leaf, fixed in zip(leaves, frozen, strict=True)]
  trained = [None if fixed else leaf for leaf, fixed in zip(leaves, frozen, strict=True)]

  def loss(trained: list[Any], held: list[Any], teacher: Any, batch: steps.Batch) -> jax.Array:
    both = [a if b is None else b for a, b in zip(trained, held, strict=True)]
    taught = None if teacher is None else steps.encode_frozen(teacher, batch, model=model)
    value, _ = steps.loss_function(
      structure.unflatten(both),
      batch,
      jax.random.key(0),
      model=model,
      config=config,
      teacher=taught,
    )
    return value

  batch = initial.dummy_batch(config, config.batch_size)
  traced = jax.make_jaxpr(jax.value_and_grad(loss))(trained, held, teacher, batch)
  counts = flops.count(traced.jaxpr).items()
  once = sum(n for path, n in counts if attention.RECOMPUTED_SCOPE not in path)
  return once / config.batch_size


class Utilization:
  """MFU of a run, from samples a second."""

  def __init__(self, config: ml_collections.ConfigDict, devices: int):
    """Counts the model; `devices` is their number over all processes."""
    self._peak = devices * (config.peak_flops or peak_flops(jax.devices()[0].device_kind))
    self._flops = model_flops(config) if self._peak else 0.0

  def metrics(self, samples_per_second: float) -> dict[str, float]:
    """{'train/mfu': fraction of the peak} where the peak is known, else {}."""
    if not self._peak:
      return {}
    return {"train/mfu": samples_per_second * self._flops / self._peak}


def memory() -> dict[str, float]:
  """{'train/..._memory_gib'}: the fullest device's peak where it tells, and this process's own."""
  result = {}
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
  if peaks:
    result["train/device_memory_gib"] = max(peaks) / _GIB
  status = pathlib.Path("/proc/self/status")
  if status.is_file():  # Linux
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    result["train/host_memory_gib"] = int(lines["VmRSS"].split()[0]) * 1024 / _GIB
  return result
