"""CLIPModel of `transformers`, in and out."""

import json

import numpy as np
import pytest
import stock_models as stock
import torch
import transformers
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from grain_jax import config as configs
from grain_jax import export
from grain_jax import tokenizer as tokenizers
from grain_jax.convert import convert
from grain_jax.data import transforms

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def make(activation="quick_gelu", **text):
  config = transformers.CLIPConfig(
    text_config={
      "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3,
      "num_attention_heads": 4, "max_position_embeddings": stock.CONTEXT, "eos_token_id": 49407,
      "hidden_act": activation, **text,
    },
    vision_config={
      "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
      "num_attention_heads": 3, "image_size": 24, "patch_size": 8, "hidden_act": activation,
      "layer_norm_eps": 1e-3,
    },
    projection_dim=20,
  )  # fmt: skip
  return stock.randomize(transformers.CLIPModel(config))


class Encoders:
  """`encode_image` and `encode_text` of a CLIPModel."""

  def __init__(self, model):
    self.model, self.logit_scale = model.eval(), model.logit_scale

  def encode_image(self, image):
    return self.model.get_image_features(image).pooler_output

  def encode_text(self, ids):
    return self.model.get_text_features(ids).pooler_output


@pytest.fixture(scope="module")
def model():
  return make()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  """Not to be written to."""
  folder = tmp_path_factory.mktemp("hf") / "clip"
  model.save_pretrained(folder)
  (folder / "preprocessor_config.json").write_text(
    json.dumps({"image_mean": MEAN, "image_std": STD})
  )
  return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """The imported model; not to be written to."""
  out = tmp_path_factory.mktemp("run") / "run"
  convert.convert("hf_clip", str(folder), out=str(out))
  return out


def test_embeddings_are_those_of_transformers(run, model, rng):
  stock.assert_same_clip(run, Encoders(model), rng)
  config, _, step = stock.run_of(run)
  assert (config.model.image.mean, config.model.image.std) == (tuple(MEAN), tuple(STD))
  assert step == 0 and config.data.dir == "" and config.method == "clip"
  assert config.data.eval_resize == "center_crop"


def test_patches_are_those_of_transformers(run, model, rng):
  """The last hidden state, normalised and projected as CLIP does it to the class token."""
  config, params, _ = stock.run_of(run)
  image = stock.images(rng, 24)
  hidden = model.eval().vision_model(stock.pixels(config, image)).last_hidden_state
  want = model.visual_projection(model.vision_model.post_layernorm(hidden[:, 1:]))
  got = stock.ours(config, params, "encode_patches", image)
  stock.assert_close(got, stock.unit(want).reshape(3, 3, 3, 20))


def test_how_a_picture_is_seen_goes_in_and_out(folder, run, tmp_path):
  """CLIP crops unless its processor says that it does not; an export says what the model does."""
  out = tmp_path / "out"
  export.export(str(run), format="hf_clip", out=str(out))
  processor = json.loads((out / "preprocessor_config.json").read_text())
  assert processor["do_center_crop"] and processor["size"] == {"shortest_edge": 24}
  processor |= {"do_center_crop": False, "size": {"height": 24, "width": 24}}
  (out / "preprocessor_config.json").write_text(json.dumps(processor))
  convert.convert("hf_clip", str(out), out=str(tmp_path / "squashing"))
  config, _, _ = stock.run_of(tmp_path / "squashing")
  assert config.data.eval_resize == "squash"


def test_gelu_and_the_pixels_of_openai_where_nothing_says_otherwise(tmp_path, rng):
  model = make("gelu", max_position_embeddings=150)  # longer than a row by default
  model.save_pretrained(tmp_path / "hf")
  convert.convert("hf_clip", str(tmp_path / "hf" / "model.safetensors"), out=str(tmp_path / "run"))
  stock.assert_same_clip(tmp_path / "run", Encoders(model), rng)
  config, _, _ = stock.run_of(tmp_path / "run")
  assert config.model.text.activation == config.model.image.activation == "gelu"
  assert config.data.row_length == config.model.text.context == 150
  assert_allclose(config.model.image.mean, transformers.image_utils.OPENAI_CLIP_MEAN)
  assert_allclose(config.model.image.std, transformers.image_utils.OPENAI_CLIP_STD)


def test_parts_half_precision_and_pytorchs_own_format(run, model, tmp_path):
  """One model saved in many parts, as bfloat16, and as pytorch_model.bin."""
  _, params, _ = stock.run_of(run)
  model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
  assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
  convert.convert("hf_clip", str(tmp_path / "parts"), out=str(tmp_path / "1"))
  stock.assert_equal_trees(stock.run_of(tmp_path / "1")[1], params)

  model.config.save_pretrained(tmp_path / "bin")
  torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
  convert.convert("hf_clip", str(tmp_path / "bin"), out=str(tmp_path / "2"))
  stock.assert_equal_trees(stock.run_of(tmp_path / "2")[1], params)

  half = make().to(torch.bfloat16)
  half.save_pretrained(tmp_path / "half")
  convert.convert("hf_clip", str(tmp_path / "half"), out=str(tmp_path / "3"))
  got = stock.run_of(tmp_path / "3")[1]["text_projection"]["kernel"]
  assert_array_equal(got, half.text_projection.weight.float().detach().numpy().T)


def test_out_and_in_again_is_bit_equal(run, folder, model, tmp_path):
  export.export(str(run), format="hf_clip", out=str(tmp_path / "hf"))
  again = transformers.CLIPModel.from_pretrained(tmp_path / "hf")
  for (name, a), b in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
    assert_array_equal(a.numpy(), b.numpy(), err_msg=name)
  convert.convert("hf_clip", str(tmp_path / "hf"), out=str(tmp_path / "run"))
  config, params, _ = stock.run_of(run)
  config_again, params_again, _ = stock.run_of(tmp_path / "run")
  stock.assert_equal_trees(params, params_again)
  assert config_again.to_dict() == config.to_dict()


def test_a_trained_clip_embeds_alike_in_transformers(tmp_path, tiny, rng):
  """Own weights, a patch bias among them; texts and an image through their preprocessing."""
  tiny.method, tiny.data.max_regions, tiny.data.row_length = "clip", 0, 32
  tiny.model.image.update(pre_norm=True, qk_norm=False, activation="gelu", mlp_ratio=3.0)
  params = stock.random_run(tmp_path / "run", tiny, rng)
  export.export(str(tmp_path / "run"), format="hf_clip", out=str(tmp_path / "hf"))
  model = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
  processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "hf")
  tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "hf")

  smooth = np.linspace(0, 255, 53 * 70 * 3).reshape(53, 70, 3)
  picture = Image.fromarray((smooth + rng.integers(0, 40, smooth.shape)).clip(0, 255).astype("u1"))
  squashed = transforms.squash(picture, 32)[None]
  inputs = processor(picture, return_tensors="pt")
  assert_allclose(inputs["pixel_values"], stock.pixels(tiny, squashed), atol=1e-5)
  want = stock.unit(model.get_image_features(**inputs).pooler_output)
  stock.assert_close(stock.ours(tiny, params, "encode_image", squashed), want)

  captions = ["A photo of a dog.", "two  Red apples, on a table!", "a " * 60]
  rows = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
  packed = tokenizers.Tokenizer(context=32).pack_texts(captions, row_length=32, texts_per_row=1)
  got = stock.ours(
    tiny, params, "encode_text", packed.tokens, packed.segments, packed.positions, packed.ends
  )[packed.row, packed.slot]
  stock.assert_close(got, stock.unit(model.get_text_features(**rows).pooler_output))
  assert rows["input_ids"].shape[1] == 32


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"qk_norm": True, "pre_norm": True}, ["config.model.image.qk_norm"]),
    ({"qk_norm": False, "stem": "hmlp"}, ["config.model.image.pre_norm", "image.stem"]),
    ({"method": "grain"}, ["config.method", "qk_norm", "pre_norm"]),
    ({"logit_bias": True}, ["config.model.logit_bias"]),
  ],
)
def test_what_clipmodel_cannot_be_is_said(tmp_path, tiny, rng, changes, words):
  tiny.method = changes.pop("method", "clip")
  tiny.model.logit_bias = changes.pop("logit_bias", False)
  tiny.model.image.update(changes)
  stock.random_run(tmp_path / "run", tiny, rng)
  call = lambda: export.export(str(tmp_path / "run"), format="hf_clip", out=str(tmp_path / "hf"))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "hf", "--format=hf_clip", *words)


def edit(folder, target, **changes):
  """A copy of a config.json with other values, beside the same weights."""
  target.mkdir()
  (target / "model.safetensors").symlink_to(folder / "model.safetensors")
  values = json.loads((folder / "config.json").read_text())
  for key, value in changes.items():
    node, _, leaf = key.rpartition("__")
    (values[node] if node else values)[leaf] = value
  (target / "config.json").write_text(json.dumps(values))
  return target


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model_type": "siglip"}, ["'siglip'", "'clip'"]),
    ({"text_config__vocab_size": 1000}, ["a vocabulary of 1000", "49408"]),
    ({"text_config__eos_token_id": 7}, ["eos_token_id", "7"]),
    ({"vision_config__hidden_act": "gelu_new"}, ["'gelu_new'", "quick_gelu"]),
    ({"vision_config__num_hidden_layers": 3}, ["lacks vision_model.encoder.layers.2"]),
    (
      {"vision_config__num_hidden_layers": 1},
      ["unknown", "vision_model.encoder.layers.1", " more"],
    ),
    ({"text_config__intermediate_size": 64}, ["(80, 32)", "(64, 32)", "text_model.encoder"]),
    ({"vision_config__hidden_size": 50}, ["(50)", "heads (3)"]),
    ({"vision_config": 3}, ["config.json", "CLIPConfig"]),
  ],
)
def test_a_config_that_does_not_fit_the_weights(folder, tmp_path, changes, words):
  path = edit(folder, tmp_path / "hf", **changes)
  call = lambda: convert.convert("hf_clip", str(path), out=str(tmp_path / "run"))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "run", *words)


def test_a_folder_without_weights_and_an_out_that_is_taken(folder, run, tmp_path):
  out = str(tmp_path / "run")
  call = lambda: convert.convert("hf_clip", str(tmp_path), out=out)  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "run", "model.safetensors", "pytorch_model.bin")
  call = lambda: convert.convert("hf_clip", str(tmp_path / "nowhere"), out=out)  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "run", "nowhere", "does not exist")
  call = lambda: convert.convert("hf_clip", str(folder), out=str(run))  # noqa: E731
  stock.fails_in_one_line(call, run, "--out", "exists already")


def test_a_recipe_must_describe_the_checkpoint(folder, run, tmp_path):
  """`--config` gives what the file does not say, and may not deny what it says."""
  sizes = (
    "method=clip,model.embed_dim=20,model.image.size=24,model.image.patch=8,model.image.width=48,"
    "model.image.depth=2,model.image.heads=3,model.image.mlp_ratio=2.0,model.image.pre_norm=True,"
    "model.image.patch_bias=False,model.image.qk_norm=False,model.image.norm_eps=1e-3,"
    "model.image.activation=quick_gelu,model.text.width=32,model.text.depth=3,model.text.heads=4,"
    "model.text.mlp_ratio=2.5,model.text.context=16,optimizer.lr=1e-6"
  )
  recipe = f"configs/clip_cc12m.py:{sizes}"
  convert.convert("hf_clip", str(folder), out=str(tmp_path / "run"), recipe=recipe)
  config, params, _ = stock.run_of(tmp_path / "run")
  stock.assert_equal_trees(params, stock.run_of(run)[1])
  assert config.optimizer.lr == 1e-6 and config.model.image.mean == tuple(MEAN)
  wrong = {
    "heads=4": ["model.text.heads = 8", "4"],
    "norm_eps=1e-3": ["model.image.norm_eps = 1e-05", "0.001"],
    "method=clip": ["'grain'", "method clip"],
    "width=32": ["(49408, 32)", "(49408, 64)", "token_embedding"],
  }
  for text, words in wrong.items():
    key, _, _ = text.partition("=")
    other = {"heads": "8", "norm_eps": "1e-5", "method": "grain", "width": "64"}[key]
    bad = recipe.replace(text, f"{key}={other}")
    call = lambda bad=bad: convert.convert(  # noqa: E731
      "hf_clip", str(folder), out=str(tmp_path / "bad"), recipe=bad
    )
    stock.fails_in_one_line(call, tmp_path / "bad", *words)


def test_imported_config_has_every_key(run):
  from configs import common

  config, _, _ = stock.run_of(run)
  want = {key for key, _ in configs.flatten(configs.resolve(common.get_config()))}
  assert {key for key, _ in configs.flatten(config)} == want
  configs.check(config)
