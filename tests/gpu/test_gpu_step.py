"""The train step on a GPU: against the CPU, both matchers, 20 steps and a restart, determinism."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import grain_jax
from grain_jax import trees
from grain_jax.models import grain
from grain_jax.objectives import matching
from grain_jax.runtime import mesh as meshes
from grain_jax.training import steps

ROOT = pathlib.Path(__file__).parents[2]


def start(config, device):
  """(state, step function, its mesh, abstract state) on one device."""
  mesh = meshes.create(config, [device])
  model = grain.build(config)
  init, abstract, shardings, optimizer = steps.create_state(
    model, config, mesh, total_steps=100, steps_per_epoch=10
  )
  with jax.set_mesh(mesh):
    return init(), steps.make_train_step(model, config, mesh, optimizer, shardings), mesh, abstract


def advance(state, step, mesh, batch, times):
  with jax.set_mesh(mesh):
    batch = meshes.to_global(dict(batch), mesh)
    losses = []
    for _ in range(times):
      state, metrics = step(state, batch)
      losses.append(metrics["loss"][0])
  return state, [float(loss) for loss in losses]


def loss_and_gradients(config, device, params, batch):
  mesh = meshes.create(config, [device])
  model = grain.build(config)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, meshes.replicated(mesh))
    function = jax.jit(
      jax.value_and_grad(
        lambda p, b: steps.loss_function(p, b, jax.random.key(0), model=model, config=config),
        has_aux=True,
      )
    )
    (loss, _), gradients = function(params, meshes.to_global(dict(batch), mesh))
    return float(loss), {n: np.asarray(g) for n, g in trees.named_leaves(gradients)}


def test_loss_and_gradients_in_bfloat16_are_near_float32_on_the_cpu(gpu, narrow, synthetic):
  changes = {"model.decoder.dropout": 0.0, "loss.matcher": "device"}
  half = narrow("cc12m", changes=changes)
  whole = narrow("cc12m", changes={**changes, "model.dtype": "float32"})
  batch = synthetic(half)
  cpu = jax.devices("cpu")[0]
  state, *_ = start(whole, cpu)
  params = jax.tree.map(np.asarray, state.params)
  loss, got = loss_and_gradients(half, gpu, params, batch)
  want_loss, want = loss_and_gradients(whole, cpu, params, batch)
  assert_allclose(loss, want_loss, rtol=2e-2)
  everything = [np.concatenate([x[n].ravel() for n in want]) for x in (got, want)]
  norms = [np.linalg.norm(x) for x in everything]
  assert everything[0] @ everything[1] / (norms[0] * norms[1]) > 0.99
  assert_allclose(norms[0], norms[1], rtol=5e-2)


def test_both_matchers_choose_alike(gpu, narrow, synthetic, rng):
  cost = rng.normal(size=(64, 5, 5)).astype(np.float32)
  cost[rng.random(cost.shape) < 0.02] = np.nan
  mask = rng.random((64, 5)) < 0.7
  found = [
    np.asarray(jax.jit(lambda c, m, s=s: matching.solve(c, m, solver=s))(cost, mask))
    for s in matching.SOLVERS
  ]
  clean = np.asarray(matching.clean_cost(jnp.asarray(cost), jnp.asarray(mask)))
  images, regions = np.nonzero(mask)
  totals = [clean[images, x[images, regions], regions].sum() for x in found]
  assert_allclose(totals[0], totals[1], rtol=1e-6)
  ends = []
  for solver in matching.SOLVERS:
    config = narrow("cc12m", changes={"loss.matcher": solver})
    state, step, mesh, _ = start(config, gpu)
    ends.append(advance(state, step, mesh, synthetic(config), 3)[1])
  assert_allclose(ends[0], ends[1], rtol=2e-2)


@pytest.mark.parametrize("recipe", ["cc12m", "clip_cc12m"])
def test_a_recipes_state_is_saved_and_goes_on(gpu, narrow, synthetic, recipe, tmp_path):
  pytest.importorskip("orbax.checkpoint")
  from grain_jax.runtime import checkpoint

  config = narrow(recipe)
  config.loss.matcher = "device"
  batch = (
    synthetic(config)
    if config.data.max_regions
    else synthetic(narrow("cc12m", changes={"data.row_length": 128}))
  )
  if not config.data.max_regions:  # the caption alone
    batch = {k: v[:, : config.data.row_length] if k in TOKENS else v for k, v in batch.items()}
    batch["segments"] = np.where(batch["segments"] == 1, 1, 0).astype(np.int32)
    batch["ends"], batch["text_mask"] = batch["ends"][:, :1], batch["text_mask"][:, :1]
    batch["boxes"], batch["region_mask"] = batch["boxes"][:, :0], batch["region_mask"][:, :0]
  state, step, mesh, abstract = start(config, gpu)
  state, losses = advance(state, step, mesh, batch, 20)
  assert np.isfinite(losses).all() and losses[-1] < losses[0]
  checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1)
  checkpoints.save(20, state, {"step": 20})
  checkpoints.wait()
  want = jax.tree.map(np.asarray, state)
  with jax.set_mesh(mesh):
    restored, _ = checkpoints.restore(abstract)
  jax.tree.map(assert_array_equal, jax.tree.map(np.asarray, restored), want)
  assert np.isfinite(advance(restored, step, mesh, batch, 2)[1]).all()
  checkpoints.close()


TOKENS = ("tokens", "segments", "positions")


def test_an_exported_model_is_loaded_and_encodes(gpu, narrow, rng, tmp_path):
  from grain_jax.convert import native

  found = {}
  for dtype in ("bfloat16", "float32"):
    # By name: where the model is read nothing may depend on the machine that trained it.
    config = narrow("cc12m", changes={"model.dtype": dtype, "model.attention": "cudnn"})
    reading = narrow("cc12m", changes={"model.dtype": dtype})
    params = jax.tree.map(np.asarray, start(reading, gpu)[0].params)
    native.save(tmp_path / dtype, config=config, params=params, step=1)
    model = grain_jax.load(tmp_path / dtype)
    images = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    found[dtype] = [
      model.encode_image(images),
      model.encode_text(["a red apple", "two dogs on a sofa, seen from above"]),
      model.encode_patches(images[:2]).reshape(-1, 64),
    ]
  for half, whole in zip(*found.values(), strict=True):
    assert half.shape == whole.shape and np.isfinite(half).all()
    assert (half * whole).sum(-1).min() > 0.99


SCRIPT = """
import hashlib, json, sys
import jax, numpy as np
from bench import train_step_sides as sides
from grain_jax import config as configs
from grain_jax.runtime import distributed
config = configs.from_json(sys.stdin.read())
distributed.prepare(config)
sys.path.insert(0, "tests/gpu")
from test_gpu_step import advance, start
state, step, mesh, _ = start(config, jax.devices()[0])
state, losses = advance(state, step, mesh, sides.host_batch(config), 5)
digest = hashlib.sha256()
for leaf in jax.tree.leaves(state.params):
  digest.update(np.asarray(leaf).tobytes())
print(json.dumps([jax.default_backend(), losses, digest.hexdigest()]))
"""


def in_a_process(config, **environment):
  env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
  env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process holds most of the memory
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT], input=json.dumps(config.to_dict()), capture_output=True,
    text=True, cwd=ROOT, env=env,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_deterministic_is_equal_bit_for_bit(narrow):
  config = narrow("cc12m", changes={"deterministic": True})
  assert in_a_process(config) == in_a_process(config)


def test_the_host_matcher_works_where_jax_is_told_to_use_the_gpu_alone(narrow, rehearsal):
  config = narrow("cc12m")
  assert config.loss.matcher == "host"
  backend, losses, _ = in_a_process(config, JAX_PLATFORMS="cpu" if rehearsal else "cuda")
  assert backend == ("cpu" if rehearsal else "gpu") and np.isfinite(losses).all()


def test_tensorflow_takes_no_memory_of_the_gpu():
  pytest.importorskip("tensorflow")
  from grain_jax.data.host_tensorflow import tf

  assert tf.config.get_visible_devices("GPU") == []
