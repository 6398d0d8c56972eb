"""The published run at its full size, as far as a machine without accelerators goes."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, time
import jax
from grain_jax import config as configs, trees
from grain_jax.models import grain, initial
from grain_jax.runtime import mesh as meshes
from grain_jax.training import steps

began = time.monotonic()
config = configs.resolve(configs.load("configs/cc12m.py"))
mesh = meshes.create(config)
model = grain.build(config)
_, state, shardings, optimizer = steps.create_state(
  model, config, mesh, total_steps=200_000, steps_per_epoch=5_000
)
batch = {
  name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.batch_sharding(mesh))
  for name, x in initial.dummy_batch(config, config.batch_size).items()
}
with jax.set_mesh(mesh):
  lowered = steps.make_train_step(model, config, mesh, optimizer, shardings).lower(state, batch)
print(json.dumps({
  "seconds": time.monotonic() - began,
  "devices": mesh.size,
  "images": batch["image"].shape,
  "parameters": trees.count(state.params),
  "matcher": "xla_ffi_python_cpu_callback" in lowered.as_text(),
}))
"""


@pytest.mark.slow
def test_full_size_step_lowers_on_16_devices_in_a_minute():
  """ViT-B/16, batch 2,048, host matcher; 175.9 M parameters, the published without dead ones."""
  flags = "--xla_force_host_platform_device_count=16"
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["devices"] == 16 and found["images"] == [2048, 224, 224, 3]
  assert round(found["parameters"] / 1e6, 1) == 175.9
  assert found["matcher"], "the host matcher is part of the program"
  assert found["seconds"] < 60
