"""What a machine's devices cannot do, in one line: a GPU or TPU that JAX does not see, memory."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import subprocess
from collections.abc import Iterator

import jax

from grain_jax import failures

_BFLOAT16 = 8.0  # compute capability from which NVIDIA's GPUs have it (Ampere)
_DEV = pathlib.Path("/dev")  # nvidia0, nvidia1, ...: a container may have been given any of them
_SMI = ("nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader")

# What makes a program smaller.
TRAINING = (
  "Set config.model.remat=block, a smaller batch_size or a larger config.accumulate, or "
  "config.mesh.fsdp on several devices."
)
ENCODING = "Set a smaller --batch_size (config.eval_batch_size in a run's own evaluations)."


def check_found() -> None:
  """That a machine with an NVIDIA GPU or a TPU does not work on its CPU unasked.

  JAX goes on with the CPU where its wheels do not fit the driver, lack CUDA or libtpu, or where
  another process has the TPU.

  Raises:
    ValueError: one line with the reason that JAX had.
    TransientError: another process has the TPU; one line.
  """
  if "cpu" in _asked().split(",") or jax.default_backend() != "cpu":
    return
  nodes, chips = sorted(_DEV.glob("nvidia[0-9]*")), _tpu_chips()
  if nodes:
    has, names, lacks = f"an NVIDIA GPU ({nodes[0]})", ("cuda", "gpu"), "its wheels have no CUDA"
    advice = (
      "Install requirements-gpu.txt with the CUDA that the driver has (nvidia-smi says which)"
    )
  elif chips:
    has, names, lacks = f"a TPU ({chips} chips)", ("tpu",), "libtpu is not installed"
    advice = "Install requirements-tpu.txt, end what else uses the TPU"
  else:
    return
  why = " ".join(_backend_error(*names).split())[:300].rstrip(".") or lacks
  kind = failures.TransientError if "already in use" in why else ValueError
  raise kind(
    f"this machine has {has}, but JAX uses the CPU: {why}. {advice}, or set JAX_PLATFORMS=cpu to "
    "use the CPU."
  )


def _tpu_chips() -> int:
  """TPU chips on this machine's bus, whether JAX can use them or not; 0 where it does not count."""
  from jax._src import hardware_utils

  count = getattr(hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (0, None))
  return count()[0]


def _asked() -> str:
  """The platforms that JAX was told to take, 'cuda,cpu'; '' where it chooses."""
  return jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", "")


def _backend_error(*names: str) -> str:
  """Why JAX has none of these backends; '' where it does not say."""
  from jax._src import xla_bridge

  errors = getattr(xla_bridge, "_backend_errors", {})
  return next((str(errors[name]) for name in names if name in errors), "")


def has_bfloat16(device: jax.Device) -> bool:
  """Whether the device computes in bfloat16 rather than in float32 with roundings."""
  return float(getattr(device, "compute_capability", None) or "inf") >= _BFLOAT16


def check_dtype(dtype: str) -> None:
  """That the devices have what `config.model.dtype` asks of them.

  Raises:
    ValueError: bfloat16 on an older GPU; one line.
  """
  device = jax.local_devices()[0]
  if dtype != "bfloat16" or has_bfloat16(device):
    return
  raise ValueError(
    f"config.model.dtype = 'bfloat16', but {device.device_kind} (compute capability "
    f"{device.compute_capability}) has none: set config.model.dtype=float32, or take a GPU of "
    f"compute capability {_BFLOAT16:g} or more."
  )


@contextlib.contextmanager
def explaining(advice: str) -> Iterator[None]:
  """What is raised within is `explained`."""
  try:
    yield
  except RuntimeError as error:
    if (known := explained(error, advice)) is error:
      raise
    raise known from error


def explained(error: Exception, advice: str) -> Exception:
  """The error, or what a user can do about a device without memory for the program, in one line.

  Another process that keeps a GPU's memory, as JAX does from its start, is named.

  Args:
    error: anything.
    advice: TRAINING or ENCODING.
  """
  text = " ".join(str(error).split())
  if not isinstance(error, jax.errors.JaxRuntimeError) or not re.search(
    r"RESOURCE_EXHAUSTED|(?i:out of memory)", text
  ):
    return error
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    return error
  limit = (device.memory_stats() or {}).get("bytes_limit")
  has = f", which has {limit / 1e9:.1f} GB for this process" if limit else ""
  others = _other_processes()
  taken = f" Other processes are on the GPUs: {others}." if others else ""
  return ValueError(
    f"the program does not fit the memory of {device.device_kind}{has} ({text[:200].rstrip('.')})."
    f"{taken} {advice}"
  )


def _other_processes() -> str:
  """'python (pid 12, 3000 MiB)' of each other process on these GPUs, as nvidia-smi says."""
  try:
    done = subprocess.run(_SMI, capture_output=True, text=True, timeout=10, check=False)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  rows = [[cell.strip() for cell in row.split(",")] for row in done.stdout.splitlines()]
  named = [
    f"{pathlib.PurePath(row[1]).name} (pid {row[0]}, {row[2]})"
    for row in rows
    if len(row) == 3 and row[0] != str(os.getpid())
  ]
  return ", ".join(named)
