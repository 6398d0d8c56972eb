"""Where the processes of a run find each other: flags, SLURM, Kubernetes, or a TPU's metadata.

Nothing is guessed: a laptop, a login node, a single SLURM task or a lone pod is one process.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from absl import flags

PORT = 55527  # where nothing else says one

_COORDINATOR = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of process 0, where several processes meet; by default what SLURM, Kubernetes or the "
  "TPU says, else there is one process.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Processes of the run; likewise by default."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this is, from 0; likewise by default."
)
_START_SECONDS = flags.DEFINE_float(
  "start_seconds", 300.0, "Longest wait for all processes to come, in seconds.", lower_bound=1.0
)


class Address(NamedTuple):
  """How a process joins the others; without a coordinator JAX asks the TPU's metadata."""

  source: str  # 'flags', 'SLURM', 'Kubernetes' or 'TPU'
  coordinator: str | None = None  # HOST:PORT of process 0
  num_processes: int | None = None
  process_id: int | None = None
  local_device: int | None = None  # GPU of a process that shares its machine; None: all devices
  start_seconds: float = 300.0  # longest wait for the others


def from_flags() -> Address | None:
  """The address by the flags, else by the environment; None for one process."""
  address = find(
    os.environ,
    coordinator=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
  )
  return address and address._replace(start_seconds=_START_SECONDS.value)


def find(
  environ: Mapping[str, str],
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Address | None:
  """The address of this process, or None where the run has one process.

  Args:
    environ: environment variables.
    coordinator: --coordinator_address.
    num_processes: --num_processes.
    process_id: --process_id.

  Raises:
    ValueError: flags or variables that are incomplete or contradict each other; one line.
  """
  given = {
    "--coordinator_address": coordinator,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  if any(value is not None for value in given.values()):
    missing = [name for name, value in given.items() if value is None]
    if missing:
      raise ValueError(
        f"{' and '.join(missing)} must be given too: several processes need {', '.join(given)}."
      )
    address = Address("flags", coordinator, num_processes, process_id)
    return _checked(address, "--coordinator_address", "--num_processes", "--process_id")
  return _slurm(environ) or _kubernetes(environ) or _tpu(environ)


def _checked(address: Address, where: str, count: str, index: str) -> Address:
  """`address`, or one line about the first of its parts that cannot be."""
  host, _, port = (address.coordinator or "").rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(f"{where}={address.coordinator} is not HOST:PORT, such as 10.0.0.1:{PORT}.")
  if address.num_processes < 1:
    raise ValueError(f"{count}={address.num_processes} must be at least 1.")
  if not 0 <= address.process_id < address.num_processes:
    raise ValueError(
      f"{index}={address.process_id} is not one of {address.num_processes} processes "
      f"(0 to {address.num_processes - 1})."
    )
  return address


def _number(environ: Mapping[str, str], name: str) -> int:
  try:
    return int(environ[name])
  except ValueError as error:
    raise ValueError(f"environment: {name}={environ[name]!r} is not a number.") from error


def _slurm(environ: Mapping[str, str]) -> Address | None:
  """Tasks of one `srun`; the batch script itself and a single task are no group of processes."""
  names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
  if any(name not in environ for name in names):
    return None
  tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
  if tasks < 2:
    return None
  # As JAX does: the job's number picks a port, so that two jobs on a node do not meet.
  port = environ.get("JAX_COORDINATOR_PORT", str(_number(environ, "SLURM_JOB_ID") % 4096 + 61440))
  address = Address(
    "SLURM",
    f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
    tasks,
    _number(environ, "SLURM_PROCID"),
    _local_gpu(environ),
  )
  return _checked(address, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


def first_host(nodes: str) -> str:
  """First name of a SLURM list: 'gpu[003-007,9],x1' -> 'gpu003'."""
  match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", nodes)
  if match is None:
    raise ValueError(f"environment: SLURM_STEP_NODELIST={nodes!r} names no node.")
  return "".join(part or "" for part in match.groups())


def _local_gpu(environ: Mapping[str, str]) -> int | None:
  """The task's own GPU where it sees those of its neighbours too."""
  visible = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
  neighbours = re.findall(r"\d+(?=\(|,|$)", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
  if len(visible) < 2 or max(map(int, neighbours), default=1) < 2 or "SLURM_LOCALID" not in environ:
    return None
  local = _number(environ, "SLURM_LOCALID")
  if local >= len(visible):
    raise ValueError(
      f"SLURM_LOCALID={local}, but the task sees {len(visible)} GPUs (CUDA_VISIBLE_DEVICES). "
      "Start one task a GPU, or one a node."
    )
  return local


def _kubernetes(environ: Mapping[str, str]) -> Address | None:
  """Pods of an indexed Job (a JobSet's too); the manifest states the coordinator and the number.

  Kubernetes sets JOB_COMPLETION_INDEX; launch/k8s_jobset.yaml the other two.
  """
  if "KUBERNETES_SERVICE_HOST" not in environ or "JOB_COMPLETION_INDEX" not in environ:
    return None
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")
  missing = [name for name in names if not environ.get(name)]
  if len(missing) == 2:  # a lone pod, or TPUs, whose metadata say all
    return None
  if missing:
    raise ValueError(
      f"environment: {missing[0]} is not set, but {(set(names) - set(missing)).pop()} is. "
      "launch/k8s_jobset.yaml sets both."
    )
  coordinator = environ["JAX_COORDINATOR_ADDRESS"]
  address = Address(
    "Kubernetes",
    coordinator if ":" in coordinator else f"{coordinator}:{PORT}",
    _number(environ, "JAX_NUM_PROCESSES"),
    _number(environ, "JOB_COMPLETION_INDEX"),
  )
  return _checked(address, *names, "JOB_COMPLETION_INDEX")


def _tpu(environ: Mapping[str, str]) -> Address | None:
  """A worker of a TPU slice: its chips are there, and libtpu; JAX then reads the metadata."""
  if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
    return None
  workers = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
  slices = environ.get("MEGASCALE_NUM_SLICES", "1")
  if workers and "," not in workers and slices in ("", "1"):
    return None  # a slice of one machine
  if not workers and environ.get("TPU_SKIP_MDS_QUERY"):
    return None
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  if not chips or importlib.util.find_spec("libtpu") is None:
    return None
  return Address("TPU")
