"""Fresh parameters of a model, and the shapes of the batches that it takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from grain_jax import schema
from grain_jax.models import grain

# Of what a configuration and a seed start from: another number, another start. 1 had zero biases
# throughout and cut the image tower's normal distribution at two deviations (0.88 of its std).
VERSION = 2


def dummy_batch(config: ml_collections.ConfigDict, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a global batch of `batch` images."""
  shapes = schema.batch_shapes(
    batch=batch,
    image_size=config.model.image.size,
    row_length=config.data.row_length,
    regions=config.data.max_regions,
    negatives=config.data.negatives,
    region_negatives=config.data.negatives_per_region,
    sources=len(config.data.sources),
  )
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def init_params(model: grain.Grain, config: ml_collections.ConfigDict) -> Any:
  """Fresh parameters; a function of `config.seed` alone."""
  batch = {k: jnp.zeros(v.shape, v.dtype) for k, v in dummy_batch(config, 1).items()}
  variables = model.init(jax.random.key(config.seed), batch, num_regions=config.data.max_regions)
  return variables["params"]
