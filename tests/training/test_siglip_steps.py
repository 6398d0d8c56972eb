"""Train steps on SigLIP's towers and losses, on one device and on eight."""

import numpy as np
import pytest
import test_steps

from grain_jax import config as configs


@pytest.fixture
def config(tiny):
  tiny.batch_size = test_steps.BATCH
  tiny.model.image.update(class_token=False, activation="gelu_tanh", depth=1)
  tiny.model.text.update(kind="siglip", activation="gelu_tanh", vocab_size=400, depth=1)
  tiny.model.update(logit_bias=True)
  tiny.loss.contrast = "sigmoid"
  return tiny


@pytest.mark.parametrize(
  ("method", "pool", "layout"),
  [
    ("clip", "map", "fsdp=2,tensor=2"),
    ("grain", "default", "data=8"),
    ("grain", "map", "data=8"),
  ],
)
def test_a_step_on_eight_devices_is_that_on_one(config, make_batch, method, pool, layout):
  config.method, config.model.pool = method, pool
  if method == "clip":
    config.data.max_regions = 0
    config.model.image.update(patch=8, patch_dropout=0.5)
  config.model.decoder.memory_positions = method == "grain"
  configs.check(config)
  batch = make_batch(config)
  one = test_steps.gradients_of_step(config, batch, devices=1)
  config.mesh.update(test_steps.LAYOUTS[layout])
  test_steps.assert_same(test_steps.gradients_of_step(config, batch, devices=8), one)
  metrics, gradients = one
  assert np.isfinite(metrics["loss"][0])
  assert all(np.isfinite(g).all() for g in gradients.values())
  moved = ["text_projection/bias", "image_tower/position_embedding"]
  moved += ["pooling/probe"] if pool == "map" else ["query_decoder/memory_positions"]
  assert all(np.abs(gradients[name]).max() > 0 for name in moved)


@pytest.mark.parametrize("method", ["clip", "grain"])
def test_half_precision_steps_are_near(config, make_batch, method):
  config.method, config.model.pool = method, "map"
  config.data.max_regions = 0 if method == "clip" else 3
  config.model.decoder.dropout = 0.0
  batch = make_batch(config)
  exact, _ = test_steps.gradients_of_step(config, batch, devices=1)
  config.model.dtype = "bfloat16"
  found, gradients = test_steps.gradients_of_step(config, batch, devices=1)
  assert abs(found["loss"][0] / exact["loss"][0] - 1) < 0.05
  assert all(g.dtype == np.float32 and np.isfinite(g).all() for g in gradients.values())
