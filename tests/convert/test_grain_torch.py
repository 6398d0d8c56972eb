"""GRAIN's published checkpoints, against the architecture from torch's own layers."""

import json

import numpy as np
import pytest
import stock_models as stock
import torch
from numpy.testing import assert_array_equal

from grain_jax import export
from grain_jax.convert import convert


@pytest.fixture(scope="module")
def towers():
  return stock.randomize(stock.GrainTowers())


@pytest.fixture(scope="module")
def decoder():
  return stock.randomize(stock.GrainDecoder())


def prefixed(module):
  return {f"module.{key}": value for key, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def checkpoint(towers, decoder, tmp_path_factory):
  """A published checkpoint; not to be written to. Only one of its dictionaries has 'module.'."""
  path = tmp_path_factory.mktemp("grain") / "grain.pth.tar"
  saved = {
    "epoch": 35, "iteration": 7, "best_acc": 0.4, "optimizer": {"state": {}, "param_groups": []},
    "state_dict": prefixed(decoder), "backbone_state_dict": towers.state_dict(),
  }  # fmt: skip
  torch.save(saved, path)
  return path


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
  """The imported model; not to be written to."""
  out = tmp_path_factory.mktemp("run") / "run"
  convert.convert("grain_torch", str(checkpoint), out=str(out))
  return out


def test_a_patch_is_what_any_query_sees_of_it_alone(run, towers, decoder, rng):
  config, params, _ = stock.run_of(run)
  image = stock.images(rng, 24)
  tokens = towers.visual(stock.pixels(config, image))[:, 1:]  # 3 x 3 patches
  alone = decoder(tokens.reshape(27, 1, 128))[1]
  want = stock.unit(torch.tensor(stock.unit(alone)).mean(dim=1))
  got = stock.ours(config, params, "encode_patches", image)
  stock.assert_close(got, np.asarray(want).reshape(3, 3, 3, 24))


def test_embeddings_and_boxes_are_those_of_torch(run, towers, decoder, rng):
  config, params, step = stock.run_of(run)
  assert (config.method, config.model.num_queries, config.data.max_regions) == ("grain", 3, 3)
  assert config.model.image.qk_norm and step == 0
  image, ids = stock.images(rng, 24), stock.texts(rng)
  pixels = stock.pixels(config, image)
  want = decoder(towers.visual(pixels))
  got = stock.ours(config, params, "encode_regions", image)
  stock.assert_close(got[0], stock.unit(want[0]))
  stock.assert_close(got[1], stock.unit(want[1]))
  stock.assert_close(got[2], want[2].detach().numpy())
  assert got[2].shape == (2, 3, 3, 4)
  tokens = stock.ours(config, params, "encode_tokens", image)
  stock.assert_close(tokens, towers.visual(pixels).detach().numpy())
  want = stock.unit(towers.encode_text(torch.tensor(ids.astype(np.int64))))
  stock.assert_close(stock.our_texts(config, params, ids), want)


@pytest.mark.parametrize("empty", [{}, {"state_dict": {}}, {"state_dict": None}])
def test_a_file_without_decoder_is_the_clip_baseline(towers, tmp_path, rng, empty):
  torch.save({"backbone_state_dict": prefixed(towers), **empty}, tmp_path / "clip.pth.tar")
  config = convert.convert("grain_torch", str(tmp_path / "clip.pth.tar"), out=str(tmp_path / "run"))
  stock.assert_same_clip(tmp_path / "run", towers, rng)
  assert config.method == "clip" and not config.model.image.pre_norm


@pytest.mark.parametrize("method", ["grain", "clip"])
def test_out_and_in_again_is_bit_equal(run, towers, decoder, tmp_path, method):
  if method == "clip":
    torch.save({"backbone_state_dict": towers.state_dict()}, tmp_path / "clip.pth.tar")
    run = tmp_path / "clip"
    convert.convert("grain_torch", str(tmp_path / "clip.pth.tar"), out=str(run))
  config, params, _ = stock.run_of(run)
  out = tmp_path / "again.pth.tar"
  export.export(str(run), format="grain_torch", out=str(out))
  saved = torch.load(out, weights_only=True)
  published = {"backbone_state_dict": towers}
  dead = {"backbone_state_dict": {"image_projection"} if method == "grain" else set()}
  if method == "grain":
    published["state_dict"] = decoder
    dead["state_dict"] = {"class_embed.weight", "class_embed.bias", "pos_embed", "temporal_embed"}
  assert saved["iteration"] == 0 and bool(saved["state_dict"]) == (method == "grain")
  for part, module in published.items():
    want = {key: value for key, value in module.state_dict().items() if key not in dead[part]}
    assert {key.removeprefix("module.") for key in saved[part]} == set(want)
    for key, value in want.items():
      assert_array_equal(saved[part][f"module.{key}"], value, err_msg=key)
  again = convert.convert("grain_torch", str(out), out=str(tmp_path / "run"))
  stock.assert_equal_trees(stock.run_of(tmp_path / "run")[1], params)
  assert again.to_dict() == stock.run_of(run)[0].to_dict() == config.to_dict()


def test_a_model_of_this_project_keeps_its_heads(tiny, tmp_path, rng):
  """They cannot be seen in shapes: the file carries the configuration."""
  params = stock.random_run(tmp_path / "run", tiny, rng)
  out = tmp_path / "own.pth.tar"
  export.export(str(tmp_path / "run"), format="grain_torch", out=str(out))
  config = convert.convert("grain_torch", str(out), out=str(tmp_path / "again"))
  stock.assert_equal_trees(stock.run_of(tmp_path / "again")[1], params)
  assert config.model.to_dict() == tiny.model.to_dict()
  saved = torch.load(out, weights_only=True)
  for bad in ("{", "[]", json.dumps({"method": "dino"}), 3):
    torch.save({**saved, "config": bad}, tmp_path / "bad.pth.tar")
    call = lambda: convert.convert(  # noqa: E731
      "grain_torch", str(tmp_path / "bad.pth.tar"), out=str(tmp_path / "bad")
    )
    stock.fails_in_one_line(call, tmp_path / "bad", "bad.pth.tar", "configuration")


def test_a_recipe_and_a_size(checkpoint, run, tmp_path):
  """Shapes must fit the recipe; positions are resized after that."""
  recipe = (
    "configs/cc12m.py:model.embed_dim=24,model.num_queries=3,data.max_regions=3,"
    "model.image.size=24,model.image.patch=8,model.image.width=128,model.image.depth=2,"
    "model.image.heads=4,model.image.mlp_ratio=0.75,model.text.width=64,model.text.depth=3,"
    "model.text.heads=2,model.text.mlp_ratio=1.5,model.text.context=16,model.decoder.width=64,"
    "model.decoder.depth=2,model.decoder.mlp_dim=96"
  )

  def run_with(recipe, out, **kwargs):
    return convert.convert("grain_torch", str(checkpoint), out=str(out), recipe=recipe, **kwargs)

  # Other heads change no shape but those of QK-norm.
  call = lambda: run_with(recipe, tmp_path / "bad")  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "bad", "attn.k_norm.bias", "(64,)", "(32,)")
  recipe = recipe.replace("image.heads=4", "image.heads=2")
  config = run_with(recipe, tmp_path / "run", image_size=40)
  assert (config.model.image.size, config.model.text.heads) == (40, 2)
  tower = stock.run_of(tmp_path / "run")[1]["image_tower"]
  assert tower["position_embedding"].shape == (26, 128)
  other = f"{recipe},model.decoder.memory_positions=True,model.image.patch_bias=False"
  call = lambda: run_with(other, tmp_path / "bad")  # noqa: E731
  words = ("query_decoder/memory_positions", "image_tower/patch_embedding/bias", "--config")
  stock.fails_in_one_line(call, tmp_path / "bad", *words)
  small = recipe.replace("image.size=24", "image.size=40")
  call = lambda: run_with(small, tmp_path / "bad")  # noqa: E731
  stock.fails_in_one_line(
    call, tmp_path / "bad", "visual.pos_embed", "(1, 10, 128)", "(1, 26, 128)"
  )


@pytest.mark.parametrize(
  ("part", "changes", "words"),
  [
    ("backbone_state_dict", {"visual.norm.bias": None}, ["lacks backbone_state_dict.visual.norm"]),
    ("backbone_state_dict", {"visual.head.bias": 3}, ["unknown backbone_state_dict.visual.head"]),
    ("backbone_state_dict", {"visual.pos_embed": None}, ["not a GRAIN", "visual.pos_embed"]),
    ("backbone_state_dict", {"image_projection": 3, "class_embed.bias": 3}, ["class_embed.bias"]),
    ("state_dict", {"query_embed.weight": None}, ["not a GRAIN checkpoint", "query_embed.weight"]),
    ("state_dict", {"obj_proj": 5}, ["state_dict.obj_proj", "(5,)", "(64, 24)"]),
    ("state_dict", {"txt_proj.weight": 5}, ["unknown state_dict.txt_proj.weight"]),
    ("state_dict", {"pos_embed2": 5}, ["unknown state_dict.pos_embed2"]),
  ],
)
def test_weights_that_are_not_grains(checkpoint, tmp_path, part, changes, words):
  saved = torch.load(checkpoint, weights_only=True)
  prefix = "module." if part == "state_dict" else ""
  for key, value in changes.items():
    saved[part].pop(prefix + key, None)
    if value is not None:
      saved[part][prefix + key] = torch.zeros(value)
  torch.save(saved, tmp_path / "bad.pth.tar")
  call = lambda: convert.convert(  # noqa: E731
    "grain_torch", str(tmp_path / "bad.pth.tar"), out=str(tmp_path / "run")
  )
  stock.fails_in_one_line(call, tmp_path / "run", "bad.pth.tar", *words)


def test_other_files(tmp_path, tiny, rng):
  for saved, words in (
    ({"conv1.weight": torch.zeros(3)}, ["backbone_state_dict", "conv1.weight"]),
    ({"backbone_state_dict": {"conv1.weight": torch.zeros(3)}}, ["patch_embed", "conv1.weight"]),
    ({"backbone_state_dict": 3}, ["backbone_state_dict", "not a dictionary"]),
    ({"backbone_state_dict": {"a": 3}}, ["not a state dict", "a"]),
  ):
    torch.save(saved, tmp_path / "bad.pth.tar")
    call = lambda: convert.convert(  # noqa: E731
      "grain_torch", str(tmp_path / "bad.pth.tar"), out=str(tmp_path / "out")
    )
    stock.fails_in_one_line(call, tmp_path / "out", "bad.pth.tar", *words)
  tiny.model.decoder.memory_positions = True
  tiny.model.image.update(pre_norm=True, stem="hmlp")
  stock.random_run(tmp_path / "run", tiny, rng)
  call = lambda: export.export(  # noqa: E731
    str(tmp_path / "run"), format="grain_torch", out=str(tmp_path / "out")
  )
  stock.fails_in_one_line(
    call, tmp_path / "out", "memory_positions", "image.pre_norm", "image.stem"
  )
