"""configs/clippy_cc12m.py from a DINO and a Sentence-T5 in small, at another image size too."""

import drawn
import jax
import numpy as np
import pieces
import pytest
import stock_models as stock
import torch
from numpy.testing import assert_allclose, assert_array_equal
from test_clippy import Trunk
from test_start import torch_resized
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import grain_jax
from grain_jax import config as configs
from grain_jax import tokenizing, trees
from grain_jax.convert import convert, start
from grain_jax.models import grain, t5
from grain_jax.training import loop


@pytest.fixture(scope="module")
def trunk():
  return stock.randomize(Trunk())


@pytest.fixture(scope="module")
def folders(trunk, tmp_path_factory):
  """(image, text) as the recipe's docstring has them made."""
  root = tmp_path_factory.mktemp("weights")
  torch.save(trunk.state_dict(), root / "dino.pth")
  convert.convert("dino", str(root / "dino.pth"), out=str(root / "dino-b16"))
  pieces.save_sentence_t5(root / "st5", context=256, outputs=128)
  convert.convert("sentence_t5", str(root / "st5"), out=str(root / "sentence-t5"))
  return str(root / "dino-b16"), str(root / "sentence-t5")


def recipe(folders, **keys):
  config = configs.load("configs/clippy_cc12m.py")
  for key, value in keys.items():
    configs.set_key(config, key.replace("__", "."), value)
  config.init.update(image=folders[0], text=folders[1])
  return config


@pytest.mark.parametrize("size", [24, 48])
def test_towers_are_adopted_and_pixels_and_context_kept(folders, trunk, tmp_path, size):
  config = configs.resolve(
    start.adopt(recipe(folders, model__image__size=size), tmp_path / "run", say=print)
  )
  configs.check(config)
  model = config.model
  assert_allclose(model.image.mean, OPENAI_CLIP_MEAN)
  assert_allclose(model.image.std, OPENAI_CLIP_STD)
  assert (model.text.context, config.data.row_length, model.image.size) == (77, 77, size)
  assert (model.image.width, model.image.heads, model.text.width, model.embed_dim) == (
    128, 2, 32, 128,
  )  # fmt: skip
  fresh = jax.device_put(drawn.params(config))
  got = dict(trees.named_leaves(start.start_from(config, fresh, say=print)))
  assert not any(name.startswith("image_projection") for name in got)
  theirs = trunk.pos_embed[0].detach().numpy()
  assert_allclose(
    got["image_tower/position_embedding"], torch_resized(theirs, size // 8), atol=1e-5
  )
  weight = trunk.blocks[1].mlp.fc1.weight.detach().numpy().T
  assert_array_equal(got["image_tower/blocks/mlp/fc1/kernel"][1], weight)


@pytest.mark.parametrize("key", ["model.image.mean", "model.text.context"])
def test_what_is_not_kept_is_adopted_or_named(folders, tmp_path, key):
  config = recipe(folders, model__image__size=24)
  config.init.keep = tuple(k for k in config.init.keep if k != key)
  adopted = configs.resolve(start.adopt(config, tmp_path / "run", say=print))
  before, after = (dict(configs.flatten(c))[key] for c in (config, adopted))
  assert before != after
  configs.set_key(adopted, key, before)
  with pytest.raises(ValueError, match=f"config.{key} is .* there and .* here"):
    start.start_from(adopted, jax.device_put(drawn.params(adopted)))


def test_a_key_that_goes_with_the_weights_is_not_kept(tiny):
  tiny.init.keep = ("model.image.mean", "model.image.width")
  with pytest.raises(ValueError, match=r"^config.init.keep: model.image.width goes with") as error:
    configs.check(tiny)
  assert "\n" not in str(error.value)


@pytest.mark.slow
def test_it_trains_at_twice_the_size_with_most_patches_left_out(folders, scenes_dir, tmp_path):
  config = recipe(
    folders, model__image__size=48, model__image__patch_dropout=0.8, batch_size=8, steps=3,
    data__dir=str(scenes_dir), eval_batch_size=8, evals=("zero_shot", "segmentation"),
  )  # fmt: skip
  config.optimizer.warmup_steps = 1
  results = loop.train(config, str(tmp_path / "run"))
  assert 0 <= results["segmentation/miou"] <= 1
  model = grain_jax.load(tmp_path / "run")
  image = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
  tokens = model.apply({"params": model.params}, image, method="encode_tokens")
  want = np.asarray(grain.normalize(tokens.max(axis=1)))
  assert_allclose(model.encode_image(image), want, atol=1e-5)
  assert model.encode_patches(image).shape == (2, 6, 6, 128)


def test_runlocal_asks_for_no_file_and_is_a_small_max_pooled_t5():
  config = configs.resolve(configs.load("configs/clippy_cc12m.py:runlocal"))
  configs.check(config)
  assert start.chosen(config) == {} and not config.model.text.tokenizer
  assert tokenizing.make(config).vocabulary_size == config.model.text.vocab_size
  model = grain.build(config)
  assert isinstance(model.text_tower, t5.T5Encoder)
  assert (model.pool, model.projects_images, model.embed_dim) == ("max", False, 128)
