"""The real train step on so many devices, its gradients kept: for tests of what it computes."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.testing import assert_allclose

from grain_jax import objectives, trees
from grain_jax.models import grain
from grain_jax.runtime import mesh as meshes
from grain_jax.training import steps

# Compiles in a quarter of the time.
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

# Plain descent that keeps the gradients as its state. (Adam's would not do for a comparison: it
# divides a gradient by its own size, so that one which is 0 but for rounding becomes a whole step.)
KEEP_GRADIENTS = optax.GradientTransformation(
  init=lambda params: jax.tree.map(jnp.zeros_like, params),
  update=lambda gradients, state, params=None: (
    jax.tree.map(lambda g: -0.02 * g, gradients),
    gradients,
  ),
)


def gradients_of_step(config, batch, *, devices, updates_done=0):
  """(metrics as pairs of floats, gradients by name) of the real train step on so many devices."""
  return gradients_of_steps(config, [batch], devices=devices, updates_done=updates_done)[0]


def gradients_of_steps(config, batches, *, devices, updates_done=0):
  """The same of one step after the other, each on its own batch, the parameters moving."""
  mesh = meshes.create(config, jax.devices()[:devices])
  params = jax.tree.map(jnp.asarray, drawn.params(config))
  terms = objectives.initial_state(config)
  teacher = jax.tree.map(jnp.copy, params) if objectives.needs_teacher(config) else None
  state = steps.TrainState(
    jnp.int32(updates_done), params, KEEP_GRADIENTS.init(params), terms=terms, teacher=teacher
  )
  shardings = meshes.state_shardings(state, mesh, config.mesh.rules)
  with jax.set_mesh(mesh):
    state = jax.device_put(state, shardings)
    batches = [meshes.to_global(batch, mesh) for batch in batches]
    train_step = steps.make_train_step(grain.build(config), config, mesh, KEEP_GRADIENTS, shardings)
    found, compiled = [], {}
    for batch in batches:
      usable = bool(np.asarray(batch["example_mask"]).any())
      if usable not in compiled:
        program = train_step if usable else train_step.guarded
        compiled[usable] = program.lower(state, batch).compile(compiler_options=FAST)
      state, metrics = compiled[usable](state, batch)
      metrics = {k: (float(s), float(w)) for k, (s, w) in metrics.items()}
      found.append((metrics, {k: np.asarray(v) for k, v in trees.named_leaves(state.opt_state)}))
    assert int(state.step) == updates_done + len(batches)
    return found


def assert_same(ours, theirs):
  """Loss parts to 1e-5; each gradient to 1e-5 of the largest of its parameter."""
  (metrics, gradients), (their_metrics, their_gradients) = ours, theirs
  assert metrics.keys() == their_metrics.keys()
  for name in metrics:
    want = their_metrics[name]
    assert_allclose(metrics[name], want, rtol=1e-5, atol=1e-6, equal_nan=False, err_msg=name)
  norm = their_metrics["gradient_norm"][0]
  for name, value in their_gradients.items():
    # Some are 0 but for rounding: a key's bias cannot change a softmax.
    scale = max(np.abs(value).max(), 1e-2 * norm)
    got = gradients[name] / scale
    assert_allclose(got, value / scale, atol=1e-5, equal_nan=False, err_msg=name)


LAYOUTS = {
  "data=8": {},
  "fsdp=8": {"fsdp": 8},
  "tensor=2": {"tensor": 2},
  "fsdp=2,tensor=2": {"fsdp": 2, "tensor": 2},
}
