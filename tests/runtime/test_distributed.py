"""Addresses, agreement, and real processes: that agree, that disagree, that end."""

import contextlib
import os
import subprocess
import sys
import types

import jax
import pytest
from numpy.testing import assert_allclose

from bench import kills
from grain_jax import failures
from grain_jax.runtime import addresses, distributed, metrics, watchdog

SRUN = {
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_NODELIST": "gpu[003-004]",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "1",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
  "CUDA_VISIBLE_DEVICES": "0,1",
}
POD = {
  "KUBERNETES_SERVICE_HOST": "10.0.0.1",
  "JOB_COMPLETION_INDEX": "1",
  "JAX_COORDINATOR_ADDRESS": "grain-worker-0-0.grain",
  "JAX_NUM_PROCESSES": "2",
}


def without(environ, *names):
  return {k: v for k, v in environ.items() if k not in names}


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("node001", "node001"),
    ("node001,host2", "node001"),
    ("node[001-015],host2", "node001"),
    ("node[001,007-015]", "node001"),
    ("gpu-a[3-4]b,x", "gpu-a3b"),
  ],
)
def test_first_host_of_a_slurm_list(nodes, first):
  """The forms that JAX's own SLURM detection names, and a suffix."""
  assert addresses.first_host(nodes) == first


def test_addresses_by_slurm_kubernetes_and_flags():
  # The port as jax._src.clusters.slurm_cluster has it: 4097 % 4096 + 61440.
  assert addresses.find(SRUN) == ("SLURM", "gpu003:61441", 4, 2, 1, 300.0)
  assert addresses.find({**SRUN, "CUDA_VISIBLE_DEVICES": "0"}).local_device is None
  assert addresses.find({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}).local_device is None
  assert addresses.find(POD)[:4] == ("Kubernetes", "grain-worker-0-0.grain:55527", 2, 1)
  given = addresses.find(SRUN, coordinator="h:1", num_processes=3, process_id=0)
  assert given[:4] == ("flags", "h:1", 3, 0)


@pytest.mark.parametrize(
  "environ",
  [
    {},
    {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    without(SRUN, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"),  # the batch script, salloc
    without(POD, "JOB_COMPLETION_INDEX"),
    without(POD, "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"),
    without(POD, "KUBERNETES_SERVICE_HOST"),
    {"TPU_WORKER_HOSTNAMES": "a,b"},  # no chips here
  ],
)
def test_one_process_where_nothing_says_several(environ):
  assert addresses.find(environ) is None


def test_a_tpu_slice_of_several_machines(monkeypatch):
  monkeypatch.setattr(addresses.glob, "glob", lambda pattern: ["/dev/accel0"])
  monkeypatch.setattr(addresses.importlib.util, "find_spec", lambda name: name == "libtpu")
  assert addresses.find({"TPU_WORKER_HOSTNAMES": "a,b"}) == addresses.Address("TPU")
  assert addresses.find({}) == addresses.Address("TPU")  # the metadata server says how many
  assert addresses.find({"TPU_WORKER_HOSTNAMES": "a"}) is None
  assert addresses.find({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"}) is None


@pytest.mark.parametrize(
  ("environ", "flags", "words"),
  [
    ({}, {"process_id": 1}, ["--coordinator_address and --num_processes must be given"]),
    ({}, {"coordinator": "h", "num_processes": 2, "process_id": 0}, ["=h is not HOST:PORT"]),
    ({}, {"coordinator": "h:1", "num_processes": 2, "process_id": 2}, ["process_id=2", "0 to 1"]),
    (without(POD, "JAX_NUM_PROCESSES"), {}, ["JAX_NUM_PROCESSES is not set"]),
    ({**SRUN, "SLURM_PROCID": "x"}, {}, ["SLURM_PROCID='x' is not a number"]),
    ({**SRUN, "SLURM_LOCALID": "2"}, {}, ["sees 2 GPUs"]),
  ],
)
def test_addresses_that_cannot_be(environ, flags, words):
  with pytest.raises(ValueError) as caught:
    addresses.find(environ, **flags)
  assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_processes_with_different_configs_end_with_one_line_each(scenes_dir, tmp_path):
  address = (f"--coordinator_address=127.0.0.1:{kills.free_port()}", "--num_processes=2")
  pair = [
    kills.start(
      scenes_dir, tmp_path, *address, f"--process_id={i}", f"--config.optimizer.lr=0.{i + 1}",
      name=f"p{i}-",
    )
    for i in range(2)
  ]  # fmt: skip
  assert [process.wait(120) for process in pair] == [1, 1]
  for i in range(2):
    said = (tmp_path / f"p{i}-err.txt").read_text().splitlines()
    assert [line for line in said if "config.optimizer.lr is 0.1 on process 0 and 0.2 on" in line]
    assert not [line for line in said if "Traceback" in line]
  assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  "axes", [{"data": 4, "fsdp": 2}, pytest.param({"tensor": 8}, marks=pytest.mark.long)]
)
def test_two_processes_of_four_devices_train_as_one_device_does(
  finished_run, scenes_dir, tmp_path, axes
):
  """Losses and gradient norms of three steps, with the host matcher and dropout on.

  Where the tensor axis spans both, they read the same batch and hold parts of each layer.
  """
  flags = ["--config.evals=()", *(f"--config.mesh.{axis}={n}" for axis, n in axes.items())]
  address = (f"--coordinator_address=127.0.0.1:{kills.free_port()}", "--num_processes=2")
  pair = [
    kills.start(
      scenes_dir, tmp_path, *address, f"--process_id={i}", *flags, "--config.steps=3",
      name=f"p{i}-", devices=4,
    )
    for i in range(2)
  ]  # fmt: skip
  codes = [process.wait(240) for process in pair]
  assert codes == [0, 0], (tmp_path / "p0-err.txt").read_text()[-2000:]

  def curves(workdir):
    lines = metrics.read_jsonl(workdir / "metrics.jsonl")
    names = ("train/loss", "train/loss_box", "train/loss_region", "train/gradient_norm")
    return [[line[name] for name in names] for line in lines if "train/loss" in line][:3]

  together, alone = curves(tmp_path), curves(finished_run)
  assert len(together) == 3
  assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize(
  ("error", "again"),
  [
    (jax.errors.JaxRuntimeError("INTERNAL: CUDA error: uncorrectable ECC error"), True),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: TPU worker is gone"), True),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes"), False),
    (jax.errors.JaxRuntimeError("INTERNAL: CpuCallback error calling callback: x"), False),
    (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), False),
    (ValueError("INTERNAL"), False),
  ],
)
def test_a_new_start_may_help_where_the_machine_failed(error, again, monkeypatch, capsys):
  assert distributed.is_runtime_failure(error) == again
  codes = []
  monkeypatch.setattr(distributed.os, "_exit", codes.append)
  with contextlib.nullcontext() if again else pytest.raises(type(error)):  # noqa: SIM117
    with distributed.session(None):
      raise error
  assert codes == [watchdog.RESTART] * again
  if again:
    assert capsys.readouterr().err.splitlines()[-1] == f"JaxRuntimeError: {error}"


@pytest.mark.parametrize(
  ("why", "kind"),
  [
    ("UNAVAILABLE: connection to the coordinator was lost", failures.TransientError),
    ("UNKNOWN: Failed to start RPC server: the port is taken", ValueError),
  ],
)
def test_processes_that_cannot_meet_for_a_while_are_started_again(monkeypatch, why, kind):
  def initialize(**_):
    raise RuntimeError(why)

  monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
  address = addresses.Address("flags", coordinator="a:1", num_processes=2, process_id=0)
  with pytest.raises(kind, match="cannot meet at a:1: U"):
    distributed._join(address)


def test_a_link_that_fails_while_processes_join_may_hold_the_next_time(monkeypatch, capsys):
  class Left(BaseException):
    pass

  def leave(code):
    raise Left(code)

  def join(_):
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo connectFullMesh failed")

  monkeypatch.setattr(distributed, "_join", join)
  monkeypatch.setattr(distributed, "_leave", leave)
  with pytest.raises(Left, match="75"), distributed.session(addresses.Address("flags")):
    pass
  assert capsys.readouterr().err.splitlines()[-1].endswith("Gloo connectFullMesh failed")


@pytest.mark.parametrize(
  ("end", "code"),
  [("raise preemption.Preempted(3)", 75), ("distributed._watchdog.end(130, 'interrupted')", 130)],
)
def test_copies_from_buckets_go_with_a_process_that_ends_at_once(tmp_path, end, code):
  program = (
    "from absl import flags\nfrom grain_jax import local_files\n"
    "from grain_jax.runtime import distributed, preemption\nflags.FLAGS(['x'])\n"
    "(local_files.temporary_folder() / 'weights.bin').write_bytes(b'x')\n"
    f"with distributed.session(None):\n  {end}\n"
  )
  environ = {**os.environ, "TMPDIR": str(tmp_path)}
  assert (
    subprocess.run([sys.executable, "-c", program], env=environ, timeout=100).returncode == code
  )
  assert list(tmp_path.iterdir()) == []


def test_what_jax_reads_first_is_set_before_processes_join(tmp_path, monkeypatch):
  """On GPUs the flag counts only if it is there when the backend starts, which joining does."""
  seen = {}

  def join(address):
    seen["flags"] = os.environ["XLA_FLAGS"]
    seen["cache"] = jax.config.jax_compilation_cache_dir
    seen["shortest"] = jax.config.jax_persistent_cache_min_compile_time_secs
    raise InterruptedError

  from grain_jax import main

  values = dict(deterministic=True, compile_cache=str(tmp_path), watchdog_seconds=0.0)
  monkeypatch.setenv("XLA_FLAGS", "--own")
  monkeypatch.setattr(distributed, "_join", join)
  monkeypatch.setattr(addresses, "from_flags", lambda: addresses.Address("flags"))
  monkeypatch.setattr(main, "_CONFIG", types.SimpleNamespace(value=types.SimpleNamespace(**values)))
  monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update(names[1], 1.0)  # JAX's own
  try:
    with pytest.raises(InterruptedError):
      main.main()
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
  assert seen == {
    "flags": "--own --xla_gpu_deterministic_ops=true", "cache": str(tmp_path), "shortest": 0.1,
  }  # fmt: skip


INTERLEAVED = """
import sys
import jax
import numpy as np
from absl import flags
from grain_jax.runtime import addresses, distributed, watchdog
from grain_jax.runtime import mesh as meshes

class Busy(watchdog.Watchdog):
  def _sleep(self):
    pass

flags.FLAGS(sys.argv[:1])
distributed.Watchdog = Busy
with distributed.session(addresses.Address("flags", sys.argv[1], 2, int(sys.argv[2]))):
  a, b, c, d = jax.devices()  # two of each process
  mesh = jax.sharding.Mesh(np.array([a, c, d, b]).reshape(4, 1, 1), meshes.AXES)
  parts, number = meshes.process_batch_shards(mesh.devices, jax.process_index())
  assert number == 4 and parts == ((0, 3), (1, 2))[jax.process_index()]
  local = np.concatenate([np.arange(2 * part, 2 * part + 2) for part in parts])
  for shard in meshes.to_global({"x": local}, mesh)["x"].addressable_shards:
    assert shard.data.tolist() == list(range(8))[shard.index[0]], (shard.index, shard.data)
"""


def test_the_global_order_holds_where_the_parts_of_processes_interleave():
  """As on TPUs, where the mesh follows the links between the chips.

  Their watchdogs look without a pause, which once aborted processes that had ended well.
  """
  address = f"127.0.0.1:{kills.free_port()}"
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": str(kills.ROOT),
  }
  pair = [
    subprocess.Popen([sys.executable, "-c", INTERLEAVED, address, str(i)], env=env)
    for i in range(2)
  ]
  assert [process.wait(120) for process in pair] == [0, 0]


def test_wrong_flags_answer_at_once():
  command = [sys.executable, "-m", "grain_jax.main", "--config=configs/quickstart.py"]
  done = subprocess.run(
    [*command, "--workdir=/nowhere", "--num_processes=2"],
    cwd=kills.ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert "--coordinator_address and --process_id must be given" in done.stderr


def test_one_process_needs_no_store():
  assert distributed.gather("x", "a") == ["a"] and distributed.broadcast("x", "b") == "b"
  distributed.check_equal("configuration", {"a": 1})
  assert (distributed.process_index(), distributed.process_count()) == (0, 1)


@pytest.mark.parametrize(
  ("asked", "want"),
  [
    ("cuda", "cuda,cpu"),
    ("tpu", "tpu,cpu"),
    ("cpu", "cpu"),
    ("cuda,cpu", "cuda,cpu"),
    (None, None),
  ],
)
def test_a_cpu_backend_stays_beside_the_accelerators(asked, want):
  """Callbacks to the host hand their arrays to it; it comes last, so it is not the default."""
  before = jax.config.jax_platforms
  try:
    jax.config.update("jax_platforms", asked)
    distributed.keep_cpu_backend()
    assert jax.config.jax_platforms == want
  finally:
    jax.config.update("jax_platforms", before)
