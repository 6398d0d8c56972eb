"""What a step computes again: chosen by memory, once, and kept; beside what was measured."""

import pytest

from grain_jax import config as configs
from grain_jax.runtime import mesh as meshes
from grain_jax.training import rematerialization, sizing

GB = 1e9


def cc12m(**changes):
  config = configs.resolve(configs.load("configs/cc12m.py"))
  config.update(changes)
  return config


# Peak memory of a step on an H200, GB: bench/results/train_step_gpu/h200_kernels.jsonl.
@pytest.mark.parametrize(
  ("remat", "images", "measured"),
  (("none", 256, 26.9), ("none", 512, 51.1), ("none", 768, 75.2), ("elementwise", 1024, 59.8)),
)
def test_the_estimate_is_what_a_gpu_took(remat, images, measured):
  config = cc12m()
  total = rematerialization.state_bytes(config, shards=1)
  total += images * rematerialization.kept_bytes(config, remat)
  assert total / GB == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(
  ("platform", "memory", "batch", "want"),
  (
    ("gpu", 80e9, 256, ("none", -1)),
    ("gpu", 80e9, 512, ("none", -1)),
    ("gpu", 80e9, 1024, ("elementwise", -1)),
    ("gpu", 80e9, 2048, ("block", -1)),
    ("gpu", 24e9, 256, ("elementwise", -1)),
    ("tpu", 16.9e9, 64, ("elementwise", 1)),
    ("tpu", 16.9e9, 768, ("block", 1)),
    ("cpu", None, 8, ("none", 1)),
    ("cpu", None, 256, ("block", 1)),
  ),
)
def test_the_fastest_that_fits(platform, memory, batch, want):
  config = cc12m(batch_size=batch)
  found = rematerialization.choose(config, platform=platform, memory=memory, devices=1)
  assert found == want
  config.update(batch_size=8 * batch)  # of eight devices each has as many
  assert rematerialization.choose(config, platform=platform, memory=memory, devices=8) == want


def test_what_is_given_stays():
  config = cc12m(batch_size=256)
  config.model.remat, config.model.unroll = "block", 1
  found = rematerialization.choose(config, platform="gpu", memory=80e9, devices=1)
  assert found == ("block", 1)


def test_too_little_memory_for_one_image_is_a_line():
  want = (
    r"a GPU device has 2\.0 GB for a program, too little for this model and one image \(about 3\."
    r"\d GB\)\. Take a smaller model .config\.model., share it .*free the device\.$"
  )
  with pytest.raises(ValueError, match=want):
    rematerialization.choose(cc12m(), platform="gpu", memory=2e9, devices=1)


def test_state_is_cut_by_the_axis_that_takes_what_is_left():
  """The layout of `mesh.fsdp=-1` is that of its number."""
  config = cc12m(batch_size=16)
  config.mesh.data = 1
  least = rematerialization.state_bytes(config, shards=16)
  memory = 2 * (least + 4 * rematerialization.kept_bytes(config, "block"))
  for fsdp in (16, -1):
    config.mesh.fsdp = fsdp
    found = rematerialization.choose(config, platform="gpu", memory=memory, devices=16)
    assert found == ("none", -1)
  # Of 32 devices 16 share a batch where each two hold a part of the heads.
  config.mesh.update(data=1, fsdp=16, tensor=2)
  assert meshes.batch_shards(config, 32) == 16
  found = rematerialization.choose(config, platform="gpu", memory=memory, devices=16)
  assert found == ("none", -1)
  config.mesh.update(data=2, fsdp=8, tensor=-1)
  assert meshes.batch_shards(config, 32) == 16


def test_frozen_towers_have_no_gradients_and_no_moments():
  """By hand: 85.8 M parameters of the ViT, four bytes each instead of sixteen."""
  config = cc12m()
  whole = rematerialization.state_bytes(config, shards=2)
  config.optimizer.freeze = ("^image_tower/",)
  saved = 2 * (whole - rematerialization.state_bytes(config, shards=2)) / 12
  assert saved == pytest.approx(85.8e6, rel=0.01)


def test_a_run_that_goes_on_keeps_what_was_chosen(tmp_path):
  """On a machine with less memory too: another program would be another order of sums."""
  config = cc12m(batch_size=256)
  begun = sizing.choose(config, records=10**6, devices=1, platform="gpu", memory=80e9)
  assert (begun.model.remat, begun.model.unroll) == ("none", -1)
  line = sizing.describe(config, begun, records=10**6)
  assert "model.remat none; model.unroll -1" in line
  (tmp_path / "config.json").write_text(configs.to_json(begun))
  kept = sizing.keep(config, tmp_path)
  assert (kept.model.remat, kept.model.unroll) == ("none", -1)
  again = sizing.choose(kept, records=10**6, devices=1, platform="gpu", memory=20e9)
  assert (again.model.remat, again.model.unroll) == ("none", -1)
