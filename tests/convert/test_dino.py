"""DINO's image tower: the original .pth, bare or full, and a ViTModel of `transformers`."""

import argparse
import json
import logging
import types

import jax
import numpy as np
import pytest
import stock_models as stock
import torch
import transformers
from numpy.testing import assert_allclose
from torch import nn

import grain_jax
from grain_jax import config as configs
from grain_jax import embed, evaluate, export, trees
from grain_jax.convert import convert, start, towers, weights
from grain_jax.models import grain, initial


class Dino(stock.TimmVision):
  """The backbone: `TimmVision` without QK-norm; width 128, two heads of 64, eps 1e-6."""

  def __init__(self):
    super().__init__()
    for block in self.blocks:
      block.attn.q_norm = block.attn.k_norm = nn.Identity()


@pytest.fixture(scope="module")
def dino():
  return stock.randomize(Dino())


def vit(eps=1e-12):
  """Embeddings of a scale at which an eps of 1e-6 would show."""
  config = transformers.ViTConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
    image_size=24, patch_size=8, layer_norm_eps=eps,
  )  # fmt: skip
  return stock.randomize(transformers.ViTModel(config, add_pooling_layer=False))


def save(path, state):
  torch.save(state, path)
  return path


def imported(path, out):
  convert.convert("dino", str(path), out=str(out))
  config, params, step = weights.open_part(out, "image")
  assert step is None and towers.find(out) == "image"
  return config, trees.map_with_name(lambda name, x: np.asarray(x), params)


def test_the_folder_of_the_tower_embeds_images(dino, tmp_path, rng):
  """As `load` gives it: the class token, and the patches, L2-normalised."""
  imported(save(tmp_path / "dino.pth", dino.state_dict()), tmp_path / "run")
  model, image = grain_jax.load(tmp_path / "run"), stock.images(rng, 24)
  want = dino(stock.pixels(model.config, image)).detach()
  stock.assert_close(model.encode_image(image), stock.unit(want[:, 0]))
  stock.assert_close(
    model.encode_patches(image).reshape(len(image), 9, -1), stock.unit(want[:, 1:])
  )


def tokens(config, params, image):
  """All tokens after the final LayerNorm, of the tower's parameters alone."""
  params = {**params, "logit_scale": np.float32(0)}  # which flax asks for
  return stock.ours(config, params, "encode_tokens", image)


def test_the_pth_gives_the_tokens_of_the_backbone(dino, tmp_path, rng):
  """Class token and patches; ImageNet's pixels, a center crop, heads of 64, eps 1e-6."""
  path = save(tmp_path / "dino.pth", dino.state_dict())
  config, params = imported(path, tmp_path / "run")
  image = stock.images(rng, 24)
  want = dino(stock.pixels(config, image)).detach().numpy()
  stock.assert_close(tokens(config, params, image), want)
  assert list(params) == ["image_tower"]
  assert config.model.image.heads == 2 and config.model.image.norm_eps == 1e-6
  assert_allclose(config.model.image.mean, transformers.image_utils.IMAGENET_DEFAULT_MEAN)
  assert_allclose(config.model.image.std, transformers.image_utils.IMAGENET_DEFAULT_STD)
  assert config.data.eval_resize == "center_crop"


def test_a_full_checkpoint_gives_the_teacher_and_says_what_it_leaves_out(dino, tmp_path, caplog):
  """As DINO's training saves it: wrapped, with heads, flags and optimiser beside it."""
  head = {"head.mlp.0.weight": torch.ones(4, 128), "head.last_layer.weight_g": torch.ones(4, 1)}
  teacher = {f"backbone.{k}": v for k, v in dino.state_dict().items()} | head
  student = {f"module.{k}": v + 1.0 for k, v in teacher.items()}
  full = {
    "student": student, "teacher": teacher, "optimizer": {"state": {}}, "epoch": 100,
    "args": argparse.Namespace(arch="vit_base"),
  }  # fmt: skip
  bare = imported(save(tmp_path / "bare.pth", dino.state_dict()), tmp_path / "bare")
  with caplog.at_level(logging.WARNING):
    got = imported(save(tmp_path / "full.pth", full), tmp_path / "full")
  assert "2 arrays" in caplog.text and "head.last_layer.weight_g" in caplog.text
  stock.assert_equal_trees(got[1], bare[1])
  del full["teacher"]
  of_student = imported(save(tmp_path / "student.pth", full), tmp_path / "student")
  norm = np.asarray(of_student[1]["image_tower"]["norm"]["scale"])
  assert_allclose(norm, bare[1]["image_tower"]["norm"]["scale"] + 1.0)


@pytest.mark.parametrize("form", ["disk", "memory", "prefixed"])
def test_a_vit_model_gives_the_tokens_of_transformers(tmp_path, rng, form):
  """All tokens after the final norm, from the names on disk and those of transformers 5."""
  model, folder = vit(), tmp_path / "hf"
  if form == "prefixed":
    full = transformers.ViTForImageClassification(model.config)
    full.vit.load_state_dict(model.state_dict())
    full.save_pretrained(folder)
  else:
    model.save_pretrained(folder)
  if form == "memory":
    (folder / "model.safetensors").unlink()
    save(folder / "pytorch_model.bin", model.state_dict())
  config, params = imported(folder, tmp_path / "run")
  image = stock.images(rng, 24)
  want = model(stock.pixels(config, image)).last_hidden_state.detach().numpy()
  stock.assert_close(tokens(config, params, image), want)
  assert config.model.image.norm_eps == 1e-12 and config.model.image.heads == 3


def test_how_a_vit_processor_sees_an_image(tmp_path):
  """As facebook/dino-vitb16 has it: one number is a square, to which images are squashed."""
  vit().save_pretrained(tmp_path / "hf")
  processor = {
    "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3,
    "size": 24,
  }  # fmt: skip
  (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(processor))
  config, _ = imported(tmp_path / "hf", tmp_path / "run")
  assert config.data.eval_resize == "squash" and config.model.image.interpolation == "bicubic"
  transformers.ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(
    tmp_path / "hf"
  )
  config, _ = imported(tmp_path / "hf", tmp_path / "run2")
  assert config.model.image.mean == (0.5, 0.5, 0.5)
  assert config.model.image.interpolation == "bilinear"


def test_a_run_starts_from_the_tower_in_its_shape(dino, tmp_path):
  """By config.init.image, at another image size too; what is no part of the tower stays fresh."""
  path = save(tmp_path / "dino.pth", dino.state_dict())
  _, theirs = imported(path, tmp_path / "dino")
  config = configs.load("configs/clip_cc12m.py:runlocal")
  config.init.update(image=str(tmp_path / "dino"), adopt=True)
  config.model.image.size = 0
  said = []
  config = configs.resolve(start.adopt(config, tmp_path / "run", say=said.append))
  configs.check(config)
  assert config.model.image.size == 24 and "image.qk_norm False" in said[0]
  fresh = jax.device_put(initial.init_params(grain.build(config), config))
  got = start.start_from(config, fresh, say=said.append)
  stock.assert_equal_trees(got["image_tower"], theirs["image_tower"])
  stock.assert_equal_trees(got["text_tower"], fresh["text_tower"])


def test_out_and_in_again_is_bit_equal(dino, tmp_path):
  path = save(tmp_path / "dino.pth", dino.state_dict())
  config, params = imported(path, tmp_path / "run")
  export.export(str(tmp_path / "run"), format="safetensors", out=str(tmp_path / "out"))
  convert.convert("safetensors", str(tmp_path / "out"), out=str(tmp_path / "again"))
  for folder in ("out", "again"):
    again, params_again, _ = weights.open_part(tmp_path / folder, "image")
    stock.assert_equal_trees(params, trees.map_with_name(lambda n, x: np.asarray(x), params_again))
    assert again.to_dict() == config.to_dict()


def test_a_tower_alone_is_no_model(dino, tmp_path):
  """What asks for a whole model, or for another tower, ends in a line that says what it is for."""
  path = save(tmp_path / "dino.pth", dino.state_dict())
  imported(path, tmp_path / "run")
  folder = str(tmp_path / "run")
  out, words = tmp_path / "out", tmp_path / "words.txt"
  words.write_text("a dog\n")
  flags = types.SimpleNamespace(
    checkpoint=folder, step=None, images=None, texts=str(words), out=str(tmp_path / "out.npz"),
    overwrite=False, labels="", regions=False, batch_size=None,
  )  # fmt: skip
  for call in (
    lambda: grain_jax.load(folder).encode_text("a dog"),
    lambda: grain_jax.load(folder).encode_token_ids([[1]], [[1]]),
    lambda: evaluate.evaluate(folder),
    lambda: export.export(folder, format="hf_clip", out=str(out)),
    lambda: embed._main(flags),
    lambda: weights.read_config(folder, "text"),
  ):
    stock.fails_in_one_line(call, out, folder, "image tower", "alone", "config.init.image")


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model_type": "dinov2"}, ["'dinov2'", "'vit'"]),
    ({"hidden_act": "relu"}, ["'relu'", "gelu"]),
    ({"qkv_bias": False}, ["qkv_bias"]),
    ({"num_hidden_layers": 3}, ["lacks", "encoder.layer.2"]),
  ],
)
def test_a_config_that_does_not_fit(tmp_path, changes, words):
  vit().save_pretrained(tmp_path / "hf")
  file = tmp_path / "hf" / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  call = lambda: convert.convert("dino", str(tmp_path / "hf"), out=str(tmp_path / "run"))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "run", *words)


def test_other_files_are_none_of_dino(tmp_path, dino):
  state = dino.state_dict()
  lacking = {k: v for k, v in state.items() if k != "norm.bias"}
  save(tmp_path / "a.pth", lacking)
  save(tmp_path / "b.pth", state | {"blocks.0.extra": torch.ones(3)})
  save(tmp_path / "c.pth", {"conv1.weight": torch.ones(3)})
  for name, words in (("a", ["lacks norm.bias"]), ("b", ["blocks.0.extra"]), ("c", ["DINO"])):
    call = lambda name=name: convert.convert(  # noqa: E731
      "dino", str(tmp_path / f"{name}.pth"), out=str(tmp_path / "run")
    )
    stock.fails_in_one_line(call, tmp_path / "run", *words)
