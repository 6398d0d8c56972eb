"""Frozen parameters: no gradient, no moments, no part in norms, no backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_steps
from numpy.testing import assert_allclose

from grain_jax import flops as counter
from grain_jax import trees
from grain_jax.models import grain, initial
from grain_jax.runtime import mesh as meshes
from grain_jax.training import optim, steps

config, batch = test_steps.config, test_steps.batch  # fixtures


@pytest.mark.parametrize("accumulate", [1, 2])
def test_frozen_towers_cost_no_backward_pass(tiny, accumulate):
  """FLOPs fall to the forward passes, and to what is trained; the step changes nothing frozen."""
  tiny.accumulate = accumulate
  mesh = meshes.create(tiny, jax.devices()[:1])

  def count(freeze):
    tiny.optimizer.freeze = freeze
    model = grain.build(tiny, unroll=-1)
    _, state, shardings, optimizer = steps.create_state(
      model, tiny, mesh, total_steps=10, steps_per_epoch=2
    )
    with jax.set_mesh(mesh):
      step = steps.make_train_step(model, tiny, mesh, optimizer, shardings)
      jaxpr = step.trace(state, initial.dummy_batch(tiny, tiny.batch_size)).jaxpr
    flops = counter.count(jaxpr.jaxpr)
    towers = sum(n for path, n in flops.items() if "_tower" in path)
    return towers, sum(flops.values()) - towers

  (towers, rest), (frozen, rest_of_frozen) = count(()), count(("^(image|text)_tower/",))
  forward = 1 + (accumulate > 1)  # with microbatches each is encoded twice
  assert towers > 2.9 * frozen / forward
  # The patch embedding has no gradient of the image, and attention computes its logits again.
  assert frozen < 0.36 * forward * towers
  assert rest_of_frozen <= rest


def test_a_frozen_tower_stays_bit_for_bit_and_the_rest_learns_as_before(config, batch):
  free, _ = test_steps.gradients_of_step(config, batch, devices=1)
  config.optimizer.freeze = ("^text_tower/",)
  with pytest.raises(ValueError, match="matches no parameter"):
    config.optimizer.freeze = ("^text_towers/",)
    test_steps.gradients_of_step(config, batch, devices=1)
  config.optimizer.freeze = ("^text_tower/",)
  metrics, gradients = test_steps.gradients_of_step(config, batch, devices=1)
  assert metrics["loss"] == free["loss"]
  assert metrics["gradient_norm"][0] < free["gradient_norm"][0]
  assert not any(g.any() for n, g in gradients.items() if n.startswith("text_tower/"))
  total = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
  assert_allclose(metrics["gradient_norm"][0], total, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_have_no_moments(tiny, name):
  tiny.optimizer.update(name=name, freeze=("^(image|text)_tower/",), warmup_steps=1)
  params = jax.eval_shape(lambda: initial.init_params(grain.build(tiny), tiny))
  state = optim.create(tiny, params, total_steps=10, steps_per_epoch=2).init(
    jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
  )
  sizes = {n: x.size for n, x in trees.named_leaves(params)}
  rest = {n: size for n, size in sizes.items() if "_tower/" not in n}
  moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
  matrices = sum(size for n, size in rest.items() if n.endswith("/kernel"))
  vectors = sum(rest.values()) - 1  # without the logit scale, a scalar as the counts are
  # Muon keeps one moment of a matrix, and three coefficients.
  assert moments == 2 * vectors - (matrices - 3 if name == "muon" else 0)
