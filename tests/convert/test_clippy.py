"""The image tower of CLIPpy's checkpoints: timm's names under 'visual.trunk', beside a T5."""

import logging

import numpy as np
import pytest
import stock_models as stock
import torch
from numpy.testing import assert_allclose
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from grain_jax.convert import convert, weights


class Trunk(stock.TimmVision):
  """timm's vit_base_patch16_224_dino in small: no QK-norm, GELU, eps 1e-6, two heads of 64."""

  def __init__(self):
    super().__init__()
    for block in self.blocks:
      block.attn.q_norm = block.attn.k_norm = nn.Identity()


TEXT = {  # both names of the tower, by the version of sentence-transformers
  "old": "text.0.auto_model.encoder.final_layer_norm.weight",
  "new": "text.0.model.encoder.final_layer_norm.weight",
}


@pytest.fixture(scope="module")
def trunk():
  return stock.randomize(Trunk())


def state_of(trunk, text="old"):
  state = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items()}
  others = {TEXT[text]: torch.ones(8), "text.2.linear.weight": torch.ones(8, 8)}
  return state | others | {"logit_scale": torch.tensor(4.0)}


@pytest.mark.parametrize("text", ["old", "new"])
@pytest.mark.parametrize("form", ["bare", "wrapped"])
def test_all_tokens_are_those_of_the_trunk(trunk, tmp_path, rng, caplog, text, form):
  state, path = state_of(trunk, text), tmp_path / "clippy_5k.pt"
  if form == "wrapped":
    wrapped = {f"module.{key}": value for key, value in state.items()}
    state = {"epoch": 1, "name": "clippy", "state_dict": wrapped, "optimizer": {}}
  torch.save(state, path)
  with caplog.at_level(logging.WARNING):
    convert.convert("clippy", str(path), out=str(tmp_path / "run"))
  assert "3 arrays" in caplog.text and TEXT[text] in caplog.text
  config, params, _ = weights.open_part(tmp_path / "run", "image")
  assert list(params) == ["image_tower"]
  assert_allclose(config.model.image.mean, OPENAI_CLIP_MEAN)
  assert_allclose(config.model.image.std, OPENAI_CLIP_STD)
  image = stock.images(rng, 24)
  want = trunk(stock.pixels(config, image)).detach().numpy()
  params = {**params, "logit_scale": np.float32(0)}  # which flax asks for
  stock.assert_close(stock.ours(config, params, "encode_tokens", image), want)


@pytest.mark.parametrize(
  ("source", "changes", "words"),
  [
    ("clippy", {"visual.head.proj.weight": torch.ones(3)}, ["unknown visual.head.proj.weight"]),
    ("clippy", {"visual.trunk.norm.bias": None}, ["lacks visual.trunk.norm.bias"]),
    ("clippy", {"visual.trunk.pos_embed": None}, ["CLIPpy", "visual.trunk.pos_embed"]),
    ("open_clip", {}, ["visual.trunk", "--from=clippy"]),
  ],
)
def test_other_weights_are_one_line(trunk, tmp_path, source, changes, words):
  state = {k: v for k, v in (state_of(trunk) | changes).items() if v is not None}
  torch.save(state, tmp_path / "x.pt")
  call = lambda: convert.convert(source, str(tmp_path / "x.pt"), out=str(tmp_path / "run"))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "run", *words)
