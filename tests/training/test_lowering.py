"""Every recipe's train step, lowered for CUDA on a machine without a GPU.

What it cannot show: the host matcher, which JAX lowers only beside a GPU, and all that comes after
lowering; tests/gpu does.
"""

import re

import jax
import pytest
from test_golden_configs import NAMES, RECIPES

from grain_jax import config as configs
from grain_jax.models import attention, fused_attention, grain, initial
from grain_jax.runtime import mesh as meshes
from grain_jax.training import sizing, steps


@pytest.fixture
def cuda(monkeypatch):
  """cuDNN 9.10 as far as tracing and lowering ask for it."""
  from jax._src.cudnn import fused_attention_stablehlo as private  # no public way without a GPU

  monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(fused_attention, "unavailable", lambda: "")
  monkeypatch.setattr(fused_attention, "platform", lambda: "gpu")
  lower = lambda traced: traced.lower(lowering_platforms=("cuda",))  # noqa: E731
  monkeypatch.setattr(fused_attention, "compile_probe", lower)
  yield
  fused_attention._probe.cache_clear()
  attention._implementations.clear()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_step_is_lowered_for_cuda(name, cuda):
  config = configs.load(str(RECIPES / f"{name}.py"))
  config.batch_size = 16 * config.accumulate
  config.mesh.update(data=2, fsdp=2, tensor=1)
  config.loss.matcher = "device"
  config = sizing.choose(configs.resolve(config), records=10_000, devices=4, platform="gpu")
  configs.check(config)
  mesh = meshes.create(config, jax.devices()[:4], batches=("batch_size",))
  model = grain.build(config)
  with jax.set_mesh(mesh):
    _, state, shardings, optimizer = steps.create_state(
      model, config, mesh, total_steps=100_000, steps_per_epoch=1_000
    )
    step = steps.make_train_step(model, config, mesh, optimizer, shardings)
    traced = step.trace(state, initial.dummy_batch(config, config.batch_size))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # What the partitioner does not know stands in programs of a device's part alone, 16 / 4 images:
  # before anything else it would gather whole activations.
  pinned = re.findall(r"custom_call @LayoutConstraint\(.*-> tensor<(\d+)x", text)
  assert pinned and set(pinned) == {"4"}
  calls = set(re.findall(r"__cudnn\$fmha\w*", text))
  if config.model.dtype == "float32":
    assert not calls and attention.implementations()["image tower"] == "XLA (float32)"
  else:
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= calls
    tokens = 1 + (config.model.image.size // config.model.image.patch) ** 2
    whole = fused_attention.pad_to(tokens, 8)
    padded = f"{tokens} padded to {whole}" if whole > tokens else f"{tokens}"
    assert attention.implementations()["image tower"] == f"cuDNN, {padded} tokens"
