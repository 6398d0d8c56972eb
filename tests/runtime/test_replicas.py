"""Restoring on several real processes: what each of them reads, and what comes of it."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench import kills
from grain_jax.runtime import mesh as meshes
from grain_jax.runtime import replicas

RESTORE = r"""
import errno, itertools, pathlib, sys
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec as P
from grain_jax import failures
from grain_jax.runtime import addresses, checkpoint, distributed, replicas
from grain_jax.runtime import mesh as meshes

flags.FLAGS(sys.argv[:1])
address, folder = sys.argv[1], pathlib.Path(sys.argv[2])
count, index, *shape = map(int, sys.argv[3:])
checkpoint.WAITS = (0.1, 0.1)
replicas._CHUNK_BYTES = 1 << 20  # more than one program

odd = np.array([-0.0, 1e-42, np.nan, -np.inf], np.float32)
odd.view(np.uint32)[2] = 0xFFC01234  # a NaN with a payload
random = np.random.default_rng(0)
values = {
  "replicated": (random.normal(size=(1 << 21,)).astype(np.float32), P()),  # 8 MiB
  "sharded": (random.normal(size=(1 << 18, 4)).astype(np.float32), P("fsdp")),  # 4 MiB
  "odd": (odd, P()),
  "odd_sharded": (np.tile(odd, (4, 1)), P(None, "fsdp")),
  "half": (np.float32([[-0.0, 1e-40], [2.5, np.nan]] * 2).astype(jnp.bfloat16), P("fsdp")),
  "scalar": (np.int32(-7), P()),
  "mask": (np.array([True, False, True]), P()),
  "bytes": (np.arange(256, dtype=np.uint8), P("fsdp")),
}


def read_bytes():
  return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def agree():
  distributed.broadcast("test", "")


def restore(checkpoints, abstract, step):
  state, meta = checkpoints.restore(abstract)
  assert meta == {"step": step}, meta
  for name, array in state.items():
    assert array.sharding == abstract[name].sharding and array.dtype == abstract[name].dtype
    for shard in array.addressable_shards:
      found, wanted = np.asarray(shard.data), values[name][0][shard.index]
      assert found.tobytes() == np.ascontiguousarray(wanted).tobytes(), name


def failing(times):
  calls = itertools.count()

  def stale(*arguments, **named):
    if next(calls) < times:
      raise OSError(errno.ESTALE, "Stale file handle")
    return read(*arguments, **named)

  ocp.PyTreeCheckpointHandler.restore = stale if index == 0 else read


with distributed.session(addresses.Address("flags", address, count, index)):
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), meshes.AXES)
  shardings = {name: NamedSharding(mesh, spec) for name, (_, spec) in values.items()}
  state = {
    name: jax.make_array_from_callback(np.shape(v), shardings[name], lambda i, v=v: v[i])
    for name, (v, _) in values.items()
  }
  abstract = {
    n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[n]) for n, x in state.items()
  }
  checkpoints = checkpoint.Checkpoints(folder)
  for step in (1, 2):
    checkpoints.save(step, state, {"step": step})
  checkpoints.wait()

  with jax.set_mesh(mesh):
    before = read_bytes()
    restore(checkpoints, abstract, 2)
    print(f"read {read_bytes() - before} bytes")

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=here)
    assert int(checkpoints.restore(abstract | {"scalar": scalar})[0]["scalar"]) == -7

    read = ocp.PyTreeCheckpointHandler.restore
    failing(1)
    restore(checkpoints, abstract, 2)
    failing(1000)
    try:
      checkpoints.restore(abstract)
    except failures.TransientError as error:
      print(error)
    ocp.PyTreeCheckpointHandler.restore = read

    if index == 0:
      for file in (folder / "2" / "state").rglob("*"):
        if file.is_file():
          file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    agree()
    restore(checkpoints, abstract, 1)
    try:
      checkpoints.restore(abstract | {"other": abstract["odd"]}, step=1)
    except ValueError as error:
      print(error)
"""


@pytest.mark.parametrize(
  ("count", "shape", "shares"),
  [
    (2, (2, 2, 1), (1, 0)),  # a replica a process
    (2, (4, 1, 1), (1, 0)),  # two replicas a process
    (2, (1, 4, 1), (5 / 6, 1 / 6)),  # each its half of what is sharded
    (4, (2, 4, 1), (5 / 6, 1 / 6, 0, 0)),  # the first replica on two processes
  ],
)
def test_one_replica_is_read_and_all_have_it_bit_for_bit(tmp_path, count, shape, shares):
  """12 MiB; what fails on the one that reads is told to the others, which wait for nothing."""
  address = f"127.0.0.1:{kills.free_port()}"
  env = os.environ | {
    "PYTHONPATH": str(kills.ROOT), "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }  # fmt: skip
  group = [
    subprocess.Popen(
      [sys.executable, "-c", RESTORE, address, tmp_path, str(count), str(i), *map(str, shape)],
      env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(count)
  ]  # fmt: skip
  said = [process.communicate(timeout=200) for process in group]
  assert [process.returncode for process in group] == [0] * count, said
  for (out, err), share in zip(said, shares, strict=True):
    (number,) = re.findall(r"read (\d+) bytes", out)
    assert int(number) / (12 << 20) == pytest.approx(share, abs=0.1)
    assert re.search("checkpoint 2 cannot be read .*Stale file handle.* may be whole", out)
    assert "checkpoint 2 in" in err and "is passed over" in err
    assert "every process reads for itself: 1 of 8 arrays are on no mesh" in err
    assert "is of another model: it has no 'other' [4]" in out


def test_why_every_process_reads_for_itself():
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8, 1, 1), meshes.AXES)
  on_mesh = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, P()))
  alone = jax.ShapeDtypeStruct((4,), jnp.float32)
  key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=NamedSharding(mesh, P()))
  assert replicas.why_not({"a": on_mesh}) == ""
  assert replicas.why_not({"a": on_mesh, "b": alone}) == "1 of 2 arrays are on no mesh"
  assert replicas.why_not([key, on_mesh, on_mesh]) == "1 of 3 arrays are of key<fry>"
