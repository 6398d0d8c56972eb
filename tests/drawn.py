"""Random parameters for tests: a model's own initialisation takes seconds to compile."""

import jax
import numpy as np

from grain_jax import trees
from grain_jax.models import grain, initial


def params(config, *, seed=1):
  """NumPy arrays in the shapes of the model, small; scales of norms are near 1."""
  rng = np.random.default_rng(seed)

  def draw(name, leaf):
    value = 0.2 * rng.normal(size=leaf.shape) + (1.0 if name.endswith("scale") else 0.0)
    return value.astype(leaf.dtype)

  model = grain.build(config)
  return trees.map_with_name(draw, jax.eval_shape(lambda: initial.init_params(model, config)))
