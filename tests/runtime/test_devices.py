"""What a machine's devices cannot do, in one line."""

import contextlib
import types

import jax
import pytest

from grain_jax import embed, evaluate, failures
from grain_jax.evals.inputs import attempts
from grain_jax.runtime import devices
from grain_jax.training import sizing


def gpu(capability="8.0", limit=int(80e9)):
  return types.SimpleNamespace(
    platform="gpu", device_kind="Tesla V100", compute_capability=capability,
    memory_stats=lambda: {"bytes_limit": limit},
  )  # fmt: skip


def test_a_gpu_that_jax_does_not_see_ends_the_run(tmp_path, monkeypatch):
  node = tmp_path / "nvidia3"  # a container that was given one of four
  (tmp_path / "nvidiactl").touch()
  monkeypatch.setattr(devices, "_DEV", tmp_path)
  monkeypatch.setattr(devices, "_asked", lambda: "")
  monkeypatch.setattr(devices, "_backend_error", lambda *_: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH.\nx")
  devices.check_found()  # there is none
  node.touch()
  with pytest.raises(ValueError) as found:
    devices.check_found()
  assert "\n" not in str(found.value)
  assert "has an NVIDIA GPU" in str(found.value) and "DRIVER_MISMATCH. x" in str(found.value)
  assert "JAX_PLATFORMS=cpu" in str(found.value)
  monkeypatch.setattr(devices, "_asked", lambda: "cuda,cpu")
  devices.check_found()  # asked for
  monkeypatch.undo()
  monkeypatch.setattr(devices, "_DEV", tmp_path)
  devices.check_found()  # these tests have JAX_PLATFORMS=cpu


@pytest.mark.parametrize(
  ("why", "kind", "said"),
  [
    ("", ValueError, "libtpu is not installed"),
    ("ABORTED: The TPU is already in use by process with pid 7.", failures.TransientError, "pid 7"),
  ],
)
def test_a_tpu_that_jax_does_not_see_ends_the_run(tmp_path, monkeypatch, why, kind, said):
  """JAX goes on with the CPU, and a pod's hosts would each train alone."""
  monkeypatch.setattr(devices, "_DEV", tmp_path)
  monkeypatch.setattr(devices, "_asked", lambda: "")
  monkeypatch.setattr(devices, "_backend_error", lambda *_: why)
  devices.check_found()  # there is none
  monkeypatch.setattr(devices, "_tpu_chips", lambda: 4)
  with pytest.raises(kind, match=rf"has a TPU \(4 chips\), but JAX uses the CPU: .*{said}"):
    devices.check_found()


def test_bfloat16_on_an_older_gpu(monkeypatch):
  monkeypatch.setattr(jax, "local_devices", lambda: [gpu("7.0")])
  with pytest.raises(
    ValueError, match=r"Tesla V100 \(compute capability 7.0\) has none: set config"
  ):
    devices.check_dtype("bfloat16")
  devices.check_dtype("float32")
  monkeypatch.setattr(jax, "local_devices", lambda: [gpu("9.0")])
  devices.check_dtype("bfloat16")


@pytest.mark.parametrize(("capability", "dtype"), (("7.0", "float32"), ("9.0", "bfloat16")))
def test_auto_takes_what_the_gpu_has(tiny, capability, dtype):
  tiny.model.dtype, tiny.model.remat = "auto", "auto"
  chosen = sizing.choose(
    tiny, records=1000, devices=1, platform="gpu", memory=int(16e9),
    bfloat16=devices.has_bfloat16(gpu(capability)),
  )  # fmt: skip
  assert (chosen.model.dtype, chosen.model.remat) == (dtype, "none")


def test_a_full_gpu_is_a_line_that_names_who_fills_it(monkeypatch):
  monkeypatch.setattr(jax, "local_devices", lambda: [gpu(limit=int(3e9))])
  monkeypatch.setattr(devices, "_SMI", ("echo", "77, /usr/bin/python3, 70000 MiB\n1, Xorg, 4 MiB"))
  error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to\nallocate")
  known = devices.explained(error, devices.TRAINING)
  line = str(known)
  assert isinstance(known, ValueError) and "\n" not in line
  assert "Tesla V100, which has 3.0 GB for this process" in line
  assert "python3 (pid 77, 70000 MiB), Xorg (pid 1, 4 MiB)" in line and "remat=block" in line
  monkeypatch.setattr(devices, "_SMI", ("no-such-program",))
  assert "Other processes" not in str(devices.explained(error, devices.TRAINING))
  with pytest.raises(ValueError, match=r"--batch_size \(c"), devices.explaining(devices.ENCODING):
    raise error
  told = []
  attempts.Attempts(told.append)("retrieval", lambda: raise_(error))
  assert len(told) == 1 and devices.ENCODING in told[0]
  for other in (jax.errors.JaxRuntimeError("INTERNAL: a link is down"), RuntimeError("no room")):
    assert devices.explained(other, devices.TRAINING) is other
    with pytest.raises(type(other), match=str(other)), devices.explaining(devices.TRAINING):
      raise other


def raise_(error):
  raise error


@pytest.mark.parametrize("command", [evaluate, embed])
def test_commands_that_encode_say_it_too(monkeypatch, command):
  monkeypatch.setattr(jax, "local_devices", lambda: [gpu()])
  monkeypatch.setattr(command.addresses, "from_flags", lambda: None)
  monkeypatch.setattr(command.distributed, "session", lambda address: contextlib.nullcontext())
  error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
  monkeypatch.setattr(command, "_main", lambda flag: raise_(error))
  with pytest.raises(ValueError, match="--batch_size"):
    command.main()
