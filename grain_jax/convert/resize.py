"""Position embeddings for another resolution."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from grain_jax import trees

# Parameters that have a position for each patch.
POSITIONS = ("image_tower/position_embedding", "query_decoder/memory_positions")


def position_embedding(embedding: np.ndarray, side: int) -> np.ndarray:
  """The class token's position, if any, and those of the patches on a grid of `side` x `side`.

  Bicubic with antialiasing: torch's `interpolate(mode='bicubic', antialias=True,
  align_corners=False)`, which OpenCLIP uses when it loads a checkpoint at another size.

  Args:
    embedding: [1 + patches, D], the class token's first; or [patches, D] of a tower without.
    side: patches along each side of the new grid.

  Returns:
    [1 + side^2, D]; or [side^2, D].
  """
  old = math.isqrt(len(embedding))
  others = len(embedding) - old**2  # 1 + a square is never a square
  first, grid = embedding[:others], embedding[others:]
  if old == side:
    return embedding
  grid = jax.image.resize(
    jnp.asarray(grid.reshape(old, old, -1)),
    (side, side, grid.shape[-1]),
    method="cubic",
    antialias=True,
    precision=jax.lax.Precision.HIGHEST,
  )
  return np.concatenate([first, np.asarray(grid).reshape(side * side, -1)])


def images(params: Any, config: ml_collections.ConfigDict, *, size: int) -> None:
  """Changes parameters and configuration, in place, to images of `size` x `size` pixels."""
  patch = config.model.image.patch
  if size < patch or size % patch:
    raise ValueError(f"--image_size={size} does not divide into patches of {patch} pixels.")
  named = dict(trees.named_leaves(params))
  for name in POSITIONS:
    if name in named:
      module, leaf = name.split("/")
      params[module][leaf] = position_embedding(named[name], size // patch)
  config.model.image.size = size
