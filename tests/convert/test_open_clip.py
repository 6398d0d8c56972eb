"""OpenCLIP's layout, against the same architecture from torch's own layers."""

import numpy as np
import pytest
import stock_models as stock
import torch
import transformers
from numpy.testing import assert_allclose

from grain_jax import export
from grain_jax.convert import convert, resize


@pytest.fixture(scope="module")
def model():
  return stock.randomize(stock.Clip())


def save(state, path):
  torch.save(state, path)
  return str(path)


def test_embeddings_are_those_of_torch_with_gelu(model, tmp_path, rng):
  path = save(model.state_dict(), tmp_path / "clip.pt")
  config = convert.convert("open_clip", path, out=str(tmp_path / "run"))
  stock.assert_same_clip(tmp_path / "run", model, rng)
  image, text = config.model.image, config.model.text
  assert (image.size, image.patch, image.width, image.depth, image.heads) == (24, 8, 128, 2, 2)
  assert (text.context, text.width, text.depth, text.heads) == (16, 64, 3, 1)
  assert_allclose(image.mean, transformers.image_utils.OPENAI_CLIP_MEAN)


def test_ce_clips_training_checkpoint_in_half_precision_has_quick_gelu(tmp_path, rng):
  """{'state_dict': ...}, 'module.' in front, and beside it what training needs."""
  quick = stock.randomize(stock.Clip(stock.QuickGelu)).half().float()
  state = {f"module.{k}": v.half() for k, v in quick.state_dict().items()}
  state["module.logit_scale"] = state["module.logit_scale"].reshape(1)
  wrapped = {"epoch": 5, "name": "ce", "state_dict": state, "optimizer": {"state": {}}}
  path = save(wrapped, tmp_path / "epoch_5.pt")
  convert.convert("ce_clip", path, out=str(tmp_path / "run"))
  stock.assert_same_clip(tmp_path / "run", quick, rng)
  convert.convert("open_clip", path, out=str(tmp_path / "same"), quick_gelu=True)
  (config, params, _), (same, same_params, _) = map(
    stock.run_of, (tmp_path / "run", tmp_path / "same")
  )
  stock.assert_equal_trees(params, same_params)
  assert config.to_dict() == same.to_dict()
  assert config.model.text.activation == config.model.image.activation == "quick_gelu"


@pytest.mark.parametrize(("flag", "expected"), [(None, "quick_gelu"), (False, "gelu")])
def test_openais_own_state_dict_has_quick_gelu(model, tmp_path, flag, expected):
  """As of its archive, which notes three sizes beside the weights."""
  sizes = {"input_resolution": 24, "context_length": 16, "vocab_size": 49408}
  notes = {name: torch.tensor(size) for name, size in sizes.items()}
  path = save({**model.state_dict(), **notes}, tmp_path / "ViT-B-32.pt")
  config, _ = convert.read("open_clip", path, quick_gelu=flag)
  assert config.model.image.activation == config.model.text.activation == expected


def test_through_transformers_and_back_is_bit_equal(model, tmp_path):
  """OpenCLIP has no export: out as CLIPModel and as safetensors, and in again."""
  path = save(model.state_dict(), tmp_path / "clip.pt")
  config = convert.convert("open_clip", path, out=str(tmp_path / "run"))
  _, params, _ = stock.run_of(tmp_path / "run")
  for name in ("hf_clip", "safetensors"):
    export.export(str(tmp_path / "run"), format=name, out=str(tmp_path / name))
    again = convert.convert(name, str(tmp_path / name), out=str(tmp_path / f"{name}_run"))
    stock.assert_equal_trees(stock.run_of(tmp_path / f"{name}_run")[1], params)
    assert again.to_dict() == config.to_dict()


def test_table_gives_the_state_dict_back(model):
  """The other direction of the table, which no command uses: every key and every bit."""
  from grain_jax.convert import layout, open_clip

  params = {}
  state = {k: v.numpy() for k, v in model.state_dict().items() if k != "attn_mask"}
  for rule in open_clip.rules(None):  # our tree, by hand: each leaf from the rule itself
    keys = [k for k in (rule.theirs.format(i) for i in range(3)) if k in state]
    keys = keys if "{}" in rule.theirs else [rule.theirs]
    parts = [np.split(state[k], len(rule.ours)) if rule.ours[1:] else [state[k]] for k in keys]
    for i, name in enumerate(rule.ours):
      values = [rule.form.to_ours(layer[i]) for layer in parts]
      params[name] = np.stack(values) if "{}" in rule.theirs else values[0]
  again = layout.write(open_clip.rules(None), params)
  assert again.keys() == state.keys()
  for key in state:
    np.testing.assert_array_equal(again[key], state[key], err_msg=key)


@pytest.mark.parametrize("side", [2, 5, 3])
def test_positions_are_resized_as_torch_does(side, rng):
  positions = rng.normal(size=(10, 8)).astype(np.float32)
  grid = torch.tensor(positions[1:]).reshape(1, 3, 3, 8).permute(0, 3, 1, 2)
  want = torch.nn.functional.interpolate(
    grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False
  )
  got = resize.position_embedding(positions, side)
  assert_allclose(got[0], positions[0])
  assert_allclose(got[1:], want.permute(0, 2, 3, 1).reshape(-1, 8), rtol=1e-5, atol=1e-6)


def test_another_image_size(model, tmp_path, rng):
  path = save(model.state_dict(), tmp_path / "clip.pt")
  convert.convert("open_clip", path, out=str(tmp_path / "run"), image_size=32)
  larger = stock.randomize(stock.Clip())
  positions = model.visual.positional_embedding.detach()
  grid = positions[1:].reshape(1, 3, 3, 128).permute(0, 3, 1, 2)
  grid = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
  positions = torch.cat([positions[:1], grid.permute(0, 2, 3, 1).reshape(16, 128)])
  larger.visual.positional_embedding = torch.nn.Parameter(positions)
  stock.assert_same_clip(tmp_path / "run", larger, rng)
  call = lambda: convert.convert("open_clip", path, out=str(tmp_path / "bad"), image_size=30)  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "bad", "--image_size=30", "patches of 8")


def resnet():
  """Names of a torchvision ResNet."""
  return {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64)}


def changed(state, **changes):
  state = dict(state)
  for key, value in changes.items():
    key = key.replace("__", ".")
    if value is None:
      del state[key]
    else:
      state[key] = value
  return state


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"visual__ln_post__bias": None, "ln_final__bias": None},
      ["lacks ln_final.bias, visual.ln_post.bias. "],
    ),
    ({"visual__proj": None}, ["lacks visual.proj"]),
    ({"visual__conv1__weight": None}, ["lacks visual.conv1.weight", "it has "]),
    ({"logit_bias": torch.zeros(())}, ["unknown logit_bias"]),
    ({"visual__ln_pre__weight": torch.zeros(3)}, ["visual.ln_pre.weight", "(3,)", "(128,)"]),
    ({"visual__positional_embedding": torch.zeros(9, 128)}, ["9 positions"]),
    ({"visual__positional_embedding": torch.zeros(9)}, ["visual.positional_embedding", "(9,)"]),
    ({"token_embedding__weight": torch.zeros(50, 64)}, ["50", "49408"]),
    ({"ln_final__bias": torch.full((64,), torch.nan)}, ["ln_final.bias", "not finite"]),
    ({"ln_final__bias": torch.zeros(64, dtype=torch.int32)}, ["ln_final.bias", "int32"]),
    ({"visual__trunk__norm__weight": torch.zeros(3)}, ["CLIPpy", "--from=clippy"]),
    ({"visual__layer1__0__conv1__weight": torch.zeros(3)}, ["ResNet"]),
  ],
)
def test_a_state_dict_that_is_none(model, tmp_path, changes, words):
  path = save(changed(model.state_dict(), **changes), tmp_path / "clip.pt")
  call = lambda: convert.convert("open_clip", path, out=str(tmp_path / "run"))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "run", "clip.pt", *words)


def test_another_architecture_and_flags_that_do_not_belong(model, tmp_path):
  path = save(resnet(), tmp_path / "resnet50.pth")
  out = tmp_path / "run"

  def fails(*words, source="open_clip", path=path, **kwargs):
    call = lambda: convert.convert(source, path, out=str(out), **kwargs)  # noqa: E731
    stock.fails_in_one_line(call, out, *words)

  fails("resnet50.pth", "visual.conv1.weight", "layer1.0.conv1.weight")
  clippy = {"visual.trunk.blocks.0.norm1.weight": torch.zeros(3), "text.a": torch.zeros(3)}
  fails("CLIPpy", path=save(clippy, tmp_path / "clippy_5k.pt"))
  fails("--from=onnx", "open_clip", source="onnx")
  fails("--quick_gelu", "hf_clip", source="hf_clip", quick_gelu=True)
  fails("--quick_gelu", "CE-CLIP", source="ce_clip", quick_gelu=False)
  clip = save(model.state_dict(), tmp_path / "clip.pt")
  recipe = (
    "configs/clip_cc12m.py:model.embed_dim=24,model.image.size=24,model.image.patch=8,"
    "model.image.width=128,model.image.depth=2,model.image.heads=2,model.image.mlp_ratio=0.75,"
    "model.image.pre_norm=True,model.image.patch_bias=False,model.image.qk_norm=False,"
    "model.text.width=64,model.text.depth=3,model.text.heads=2,model.text.context=16,"
  )
  fails("(96, 64)", "(128, 64)", "transformer.resblocks.0", path=clip,
        recipe=recipe + "model.text.mlp_ratio=2.0")  # fmt: skip
  recipe += "model.text.mlp_ratio=1.5"
  fails("'gelu'", "'quick_gelu'", path=clip, recipe=recipe, quick_gelu=False)
  config = convert.convert("open_clip", clip, out=str(out), recipe=recipe)
  assert config.model.text.heads == 2  # which the shapes cannot say
