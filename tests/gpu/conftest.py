"""Tests that need a GPU: `pytest tests/gpu`. Elsewhere they are skipped, and counted so.

GRAIN_JAX_REHEARSE=1 runs them on what there is: it shows that the tests themselves work.
"""

import os

import jax
import numpy as np
import pytest

from bench import train_step_sides as sides
from grain_jax import config as configs

REHEARSAL = os.environ.get("GRAIN_JAX_REHEARSE") == "1"


@pytest.fixture(autouse=True, scope="session")
def gpu():
  """The first GPU."""
  device = jax.devices()[0]
  if device.platform != "gpu" and not REHEARSAL:
    pytest.skip(f"no GPU: JAX has {device.platform} devices")
  return device


@pytest.fixture(scope="session")
def rehearsal():
  """Whether there is no GPU and the tests are only tried out."""
  return jax.default_backend() != "gpu"


@pytest.fixture(scope="session")
def narrow():
  """`narrow(recipe, batch=8, **changes)` -> a recipe, narrow, with all of its tokens."""

  def make(recipe, *, batch=8, changes=()):
    c = configs.load(f"configs/{recipe}.py")
    c.model.embed_dim = 64
    c.model.image.update(width=128, depth=2, heads=2)
    c.model.text.update(width=128, depth=2, heads=2)
    c.model.decoder.update(width=128, depth=2, heads=2, mlp_dim=256)
    c.batch_size = c.eval_batch_size = batch
    c.optimizer.warmup_steps = 2
    c.mesh.update(data=1, fsdp=1, tensor=1)
    for key, value in dict(changes).items():
      configs.set_key(c, key, value)
    c = configs.resolve(c)
    configs.check(c)
    return c

  return make


@pytest.fixture(scope="session")
def synthetic():
  """`synthetic(config)` -> a random host batch."""

  def make(config):
    batch = sides.host_batch(config)
    assert all(np.isfinite(x).all() for x in batch.values())
    return batch

  return make
