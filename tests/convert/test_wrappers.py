"""Weights saved from models that torch has wrapped: compiled, distributed, or both, in any part."""

import copy

import pytest
import stock_models as stock
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grain_jax.convert import convert, state_dicts


def compiled(part):
  """Replaces a submodule, by its path, with what torch.compile makes of it."""

  def wrap(model):
    parent, _, name = part.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, name, torch.compile(getattr(parent, name)))
    return model

  return wrap


def parallel(part):
  """The same with torch's DataParallel, whose names are DistributedDataParallel's too."""

  def wrap(model):
    parent, _, name = part.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, name, nn.DataParallel(getattr(parent, name)))
    return model

  return wrap


def both(*steps):
  """One wrapper after the other."""

  def wrap(model):
    for step in steps:
      model = step(model)
    return model

  return wrap


# What wraps a whole model.
WHOLE = {
  "compiled": torch.compile,
  "parallel": nn.DataParallel,
  "compiled in parallel": both(torch.compile, nn.DataParallel),
  "parallel compiled": both(nn.DataParallel, torch.compile),
  "twice parallel": both(nn.DataParallel, nn.DataParallel),
}


def wrappers(image, block):
  """All of `WHOLE`, and wrapped parts: the image tower, a block, both and the whole besides."""
  return WHOLE | {
    "image tower compiled": compiled(image),
    "block compiled": compiled(block),
    "image tower in parallel": parallel(image),
    "image tower compiled in parallel": both(compiled(image), parallel(image)),
    "parts and the whole": both(both(compiled(block), compiled(image)), both(*WHOLE.values())),
  }


CLIP = wrappers("visual", "visual.transformer.resblocks.1")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """A CLIP of torch and its parameters as imported."""
  model = stock.randomize(stock.Clip())
  folder = tmp_path_factory.mktemp("clip")
  torch.save(model.state_dict(), folder / "clip.pt")
  convert.convert("open_clip", str(folder / "clip.pt"), out=str(folder / "run"))
  return model, stock.run_of(folder / "run")[1]


@pytest.mark.parametrize("wrap", CLIP)
def test_open_clip(clip, tmp_path, wrap):
  model, params = clip
  state = CLIP[wrap](copy.deepcopy(model)).state_dict()
  assert state.keys() != model.state_dict().keys()
  torch.save({"epoch": 1, "state_dict": state}, tmp_path / "clip.pt")
  convert.convert("open_clip", str(tmp_path / "clip.pt"), out=str(tmp_path / "run"))
  stock.assert_equal_trees(stock.run_of(tmp_path / "run")[1], params)


def test_hf_clip(tmp_path):
  config = transformers.CLIPConfig(
    text_config={
      "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 1,
      "num_attention_heads": 4, "max_position_embeddings": stock.CONTEXT, "eos_token_id": 49407,
    },
    vision_config={
      "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
      "num_attention_heads": 3, "image_size": 24, "patch_size": 8,
    },
    projection_dim=20,
  )  # fmt: skip
  model = stock.randomize(transformers.CLIPModel(config))
  found = []
  wraps = wrappers("vision_model", "vision_model.encoder.layers.0")
  for i, wrap in enumerate([lambda m: m, *wraps.values()]):
    folder = tmp_path / f"hf{i}"
    config.save_pretrained(folder)
    torch.save(wrap(copy.deepcopy(model)).state_dict(), folder / "pytorch_model.bin")
    convert.convert("hf_clip", str(folder), out=str(tmp_path / f"run{i}"))
    found.append(stock.run_of(tmp_path / f"run{i}")[1])
  for params in found[1:]:
    stock.assert_equal_trees(params, found[0])


@pytest.mark.parametrize("wrap", ["compiled", "compiled in parallel", "parts and the whole"])
def test_grain_torch_with_its_dead_weights(tmp_path, wrap):
  towers, decoder = stock.randomize(stock.GrainTowers()), stock.randomize(stock.GrainDecoder())
  layers = wrappers("transformer.decoder", "transformer.decoder.layers.1")
  for name, pair in (
    ("plain", (towers, decoder)),
    ("wrapped", (
      wrappers("visual", "visual.blocks.0")[wrap](copy.deepcopy(towers)),
      layers[wrap](copy.deepcopy(decoder)),
    )),
  ):  # fmt: skip
    saved = {"backbone_state_dict": pair[0].state_dict(), "state_dict": pair[1].state_dict()}
    torch.save(saved, tmp_path / f"{name}.pth.tar")
    path = str(tmp_path / f"{name}.pth.tar")
    convert.convert("grain_torch", path, out=str(tmp_path / name))
  stock.assert_equal_trees(
    stock.run_of(tmp_path / "wrapped")[1], stock.run_of(tmp_path / "plain")[1]
  )


def test_one_weight_under_two_names(tmp_path):
  state = {"a.weight": torch.zeros(2), "_orig_mod.a.weight": torch.ones(2)}
  with pytest.raises(ValueError, match=r"x.pt holds a.weight twice, once as _orig_mod.a.weight"):
    state_dicts.arrays(state, where="x.pt")


PARTS = st.sampled_from(["visual", "proj", "0", "1", "module_list", "orig_mod", "weight"])
TREES = st.lists(st.lists(PARTS, min_size=2, max_size=4), min_size=2, max_size=6)


@given(TREES, st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=4), st.data())
def test_names_come_back_from_under_any_wrappers(paths, outer, data):
  names = sorted({".".join(path) for path in paths})
  inner = data.draw(st.sampled_from([name.split(".")[0] for name in names]))
  wrapped = []
  for name in names:
    parts = name.split(".")
    if parts[0] == inner:
      parts.insert(1, "_orig_mod")
    wrapped.append(".".join([*outer, *parts]))
  assert state_dicts.unwrap(wrapped) == names


def test_a_module_of_that_name_beside_others_stays():
  keys = ["module.a", "b", "visual.module.a", "visual.b", "x.module"]
  assert state_dicts.unwrap(keys) == keys
