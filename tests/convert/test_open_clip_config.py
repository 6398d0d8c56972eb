"""OpenCLIP's open_clip_config.json beside the weights: taken over, or refused by its key."""

import json

import pytest
import stock_models as stock
import torch
from torch import nn

from grain_jax.convert import convert, open_clip_config


def tiny():
  """Of `stock.Clip`."""
  return {
    "model_cfg": {
      "embed_dim": 24,
      "vision_cfg": {
        "image_size": 24, "layers": 2, "width": 128, "patch_size": 8, "mlp_ratio": 0.75,
      },
      "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3,
        "mlp_ratio": 1.5,
      },
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
  }  # fmt: skip


def changed(values, path, value):
  *sections, leaf = path.split(".")
  for section in sections:
    values = values[section]
  values[leaf] = value


def write(folder, state, changes=(), name="open_clip_pytorch_model.bin", config=None):
  """A folder as on the hub; its path."""
  config = tiny() if config is None else config
  for path, value in dict(changes).items():
    changed(config, path, value)
  folder.mkdir()
  torch.save(state, folder / name)
  (folder / "open_clip_config.json").write_text(json.dumps(config))
  return str(folder / name)


@pytest.fixture(scope="module")
def clip():
  return stock.randomize(stock.Clip())


def test_activation_heads_and_eps_are_those_of_the_file(tmp_path, rng):
  model = stock.Clip(stock.QuickGelu)
  model.visual.transformer = stock.ClipTransformer(128, 2, 4, 96, stock.QuickGelu)
  model.transformer = stock.ClipTransformer(64, 3, 2, 96, stock.QuickGelu)
  stock.randomize(model)
  for tower, eps in ((model, 1e-2), (model.visual, 3e-2)):  # the image tower last
    for module in tower.modules():
      if isinstance(module, nn.LayerNorm):
        module.eps = eps
  changes = {
    "model_cfg.quick_gelu": True,
    "model_cfg.vision_cfg.head_width": 32,
    "model_cfg.text_cfg.heads": 2,
    "model_cfg.vision_cfg.norm_kwargs": {"eps": 3e-2},
    "model_cfg.text_cfg.norm_kwargs": {"eps": 1e-2},
  }
  path = write(tmp_path / "clip", model.state_dict(), changes)
  convert.convert("open_clip", path, out=str(tmp_path / "run"))
  stock.assert_same_clip(tmp_path / "run", model, rng)


def test_a_text_tower_of_its_own_module(clip, tmp_path, rng):
  """OpenCLIP's CustomTextCLIP."""
  state = {
    key if key == "logit_scale" or key.startswith("visual.") else f"text.{key}": value
    for key, value in clip.state_dict().items()
  }
  path = write(tmp_path / "clip", state, {"model_cfg.custom_text": True})
  convert.convert("open_clip", path, out=str(tmp_path / "run"))
  stock.assert_same_clip(tmp_path / "run", clip, rng)


def test_positions_are_resized_to_the_files_image_size(clip, tmp_path):
  path = write(tmp_path / "32", clip.state_dict(), {"model_cfg.vision_cfg.image_size": 32})
  convert.convert("open_clip", path, out=str(tmp_path / "file"))
  path = write(tmp_path / "24", clip.state_dict())
  convert.convert("open_clip", path, out=str(tmp_path / "flag"), image_size=32)
  (file, params, _), (flag, want, _) = map(stock.run_of, (tmp_path / "file", tmp_path / "flag"))
  stock.assert_equal_trees(params, want)
  assert file.to_dict() == flag.to_dict() and file.model.image.size == 32


def test_a_recipe_keeps_what_the_file_does_not_say(clip, tmp_path):
  path = write(tmp_path / "clip", clip.state_dict(), {
    "preprocess_cfg.interpolation": "bilinear", "preprocess_cfg.resize_mode": "shortest",
  })  # fmt: skip
  recipe = (
    "configs/clip_cc12m.py:model.embed_dim=24,model.image.size=24,model.image.patch=8,"
    "model.image.width=128,model.image.depth=2,model.image.heads=2,model.image.mlp_ratio=0.75,"
    "model.image.pre_norm=True,model.image.patch_bias=False,model.image.qk_norm=False,"
    "model.image.norm_eps=1e-5,model.text.width=64,model.text.depth=3,model.text.heads=1,"
    "model.text.context=16,model.text.mlp_ratio=1.5,optimizer.lr=1e-6,model.text.activation="
  )
  call = lambda: convert.convert(  # noqa: E731
    "open_clip", path, out=str(tmp_path / "x"), recipe=f"{recipe}quick_gelu"
  )
  stock.fails_in_one_line(call, tmp_path / "x", "model.text.activation", "'gelu'")
  config = convert.convert("open_clip", path, out=str(tmp_path / "run"), recipe=f"{recipe}gelu")
  assert config.optimizer.lr == 1e-6 and config.data.eval_resize == "center_crop"
  assert config.model.image.interpolation == "bilinear"
  assert config.model.image.mean == (0.5, 0.4, 0.3)


def activation(path, tmp_path, **kwargs):
  config, _ = convert.read("open_clip", path, **kwargs)
  assert config.model.image.activation == config.model.text.activation
  return config.model.text.activation


def test_the_activation_by_file_flag_and_name(clip, tmp_path):
  state = clip.state_dict()
  bare = str(tmp_path / "vit_b_32-quickgelu-laion400m_e32-46683a32.pt")  # a published name
  torch.save(state, bare)
  assert activation(bare, tmp_path) == "quick_gelu"
  assert activation(bare, tmp_path, quick_gelu=False) == "gelu"
  run = tmp_path / "epoch_1.pt"
  torch.save({"name": "2023-model_ViT-B-32-quickgelu-lr_1e-3", "state_dict": state}, run)
  assert activation(str(run), tmp_path) == "quick_gelu"
  torch.save({"name": "2023-model_ViT-B-32-lr_1e-3", "state_dict": state}, run)
  assert activation(str(run), tmp_path) == "gelu"

  plain = write(tmp_path / "a", state)
  assert activation(plain, tmp_path) == "gelu"
  assert activation(plain, tmp_path, quick_gelu=True) == "quick_gelu"  # where the file is silent
  quick = write(tmp_path / "b", state, {"model_cfg.quick_gelu": True})
  assert activation(quick, tmp_path, quick_gelu=True) == "quick_gelu"
  with pytest.raises(ValueError, match="--quick_gelu=false, but .* model_cfg.quick_gelu = true"):
    activation(quick, tmp_path, quick_gelu=False)
  odd = write(tmp_path / "c", state, name="ViT-B-32-quickgelu.pt")
  with pytest.raises(ValueError, match="does not say model_cfg.quick_gelu.* Give --quick_gelu or"):
    activation(odd, tmp_path)
  said = write(tmp_path / "d", state, {"model_cfg.quick_gelu": False}, name="B-32-quickgelu.pt")
  assert activation(said, tmp_path) == "gelu"


@pytest.mark.parametrize(
  ("key", "value", "says"),
  [
    ("model_cfg.vision_cfg.timm_model_name", "vit_base_patch16_siglip_224", "is not built here"),
    ("model_cfg.vision_cfg.layers", [3, 4, 6, 3], "is a ResNet"),
    ("model_cfg.vision_cfg.ls_init_value", 1e-4, "is not built here"),
    ("model_cfg.vision_cfg.attentional_pool", True, "is not built here"),
    ("model_cfg.vision_cfg.attentional_pool", "parallel", "is not built here"),
    ("model_cfg.vision_cfg.no_ln_pre", True, "is not built here"),
    ("model_cfg.vision_cfg.pool_type", "avg", "'tok' is"),
    ("model_cfg.vision_cfg.final_ln_after_pool", True, "is not built here"),
    ("model_cfg.vision_cfg.pos_embed_type", "sin_cos_2d", "'learnable' is"),
    ("model_cfg.vision_cfg.act_kwargs", {"approximate": "tanh"}, "is not built here"),
    ("model_cfg.vision_cfg.norm_kwargs", {"eps": 1e-6, "bias": False}, "eps alone is"),
    ("model_cfg.vision_cfg.width", 192, "192, but the weights beside it have 128"),
    ("model_cfg.vision_cfg.mlp_ratio", 4.0, "4.0, but the weights beside it have 0.75"),
    ("model_cfg.vision_cfg.patch_size", [8, 16], "no positive size"),
    ("model_cfg.vision_cfg.image_size", [24, 32], "no positive size"),
    ("model_cfg.vision_cfg.rope", True, "is not built here"),
    ("model_cfg.text_cfg.hf_model_name", "roberta-base", "is not built here"),
    ("model_cfg.text_cfg.hf_tokenizer_name", "bert-base-uncased", "is not built here"),
    ("model_cfg.text_cfg.tokenizer_kwargs", {"clean": "canonicalize"}, "{'clean': 'lower'} is"),
    ("model_cfg.text_cfg.no_causal_mask", True, "is not built here"),
    ("model_cfg.text_cfg.pool_type", "last", "'argmax' is"),
    ("model_cfg.text_cfg.proj_bias", True, "is not built here"),
    ("model_cfg.text_cfg.proj_type", "none", "'linear' is"),
    ("model_cfg.text_cfg.embed_cls", True, "is not built here"),
    ("model_cfg.text_cfg.context_length", 77, "77, but the weights beside it have 16"),
    ("model_cfg.embed_dim", 512, "512, but the weights beside it have 24"),
    ("model_cfg.embed_dim", None, "None, but the weights beside it have 24"),
    ("model_cfg.multimodal_cfg", {"layers": 12}, "is not built here"),
    ("model_cfg.init_logit_bias", -10, "is not built here"),
    ("model_cfg.quick_gelu", "yes", "neither true nor false"),
    ("model_cfg.text_cfg", None, "is no object"),
    ("model_cfg.vision_cfg", "ViT-B-32", "is no object"),
    ("preprocess_cfg.resize_mode", "longest", "shortest, squash are"),
    ("preprocess_cfg.interpolation", "nearest", "bicubic, bilinear, random are"),
    ("preprocess_cfg.mean", [0.5, 0.5], "not 3 numbers"),
    ("preprocess_cfg.std", 0, "divides by what is not positive"),
    ("preprocess_cfg.mode", "L", "'RGB' is"),
    ("preprocess_cfg.size", [3, 32, 32], "image_size = 24"),
    ("preprocess_cfg.crop_pct", 0.9, "is not built here"),
  ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_key(clip, tmp_path, key, value, says):
  path = write(tmp_path / "clip", clip.state_dict(), {key: value})
  call = lambda: convert.convert("open_clip", path, out=str(tmp_path / "run"))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "run", key.split(".")[-1], says, "open_clip_config.json")


# What the hub has, by hand: laion's ViT-B-32 and ViT-H-14, OpenAI's by timm, and one of later years
# that writes all of its defaults.
B32 = {
  "model_cfg": {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {
      "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12,
    },
  },
  "preprocess_cfg": {
    "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
  },
}  # fmt: skip
H14 = {
  "model_cfg": {
    "embed_dim": 1024,
    "vision_cfg": {
      "image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14,
    },
    "text_cfg": {
      "context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24,
    },
  },
  "preprocess_cfg": B32["preprocess_cfg"],
}  # fmt: skip
FULL = {
  "model_cfg": {
    **B32["model_cfg"], "quick_gelu": True, "custom_text": False, "init_logit_bias": None,
    "vision_cfg": {
      **B32["model_cfg"]["vision_cfg"], "ls_init_value": None, "patch_dropout": 0.5,
      "attentional_pool": False, "attn_pooler_queries": 256, "attn_pooler_heads": 8,
      "no_ln_pre": False, "pos_embed_type": "learnable", "final_ln_after_pool": False,
      "pool_type": "tok", "output_tokens": False, "act_kwargs": {}, "norm_kwargs": {},
      "timm_model_name": None, "timm_pool": "avg", "timm_proj": "linear", "timm_drop": 0.0,
    },
    "text_cfg": {
      **B32["model_cfg"]["text_cfg"], "hf_tokenizer_name": None, "pad_id": 0, "proj_bias": False,
      "pool_type": "argmax", "proj_type": "linear", "hf_pooler_type": "mean_pooler",
    },
  },
  "preprocess_cfg": {
    "size": [224, 224], "mode": "RGB", "mean": 0.5, "std": [0.5, 0.5, 0.5],
    "interpolation": "random", "resize_mode": "squash", "fill_color": 0,
  },
}  # fmt: skip


@pytest.mark.parametrize(
  ("config", "heads", "resize", "quick"),
  [(B32, (12, 8), "center_crop", None), (H14, (16, 16), "center_crop", None),
   (FULL, (12, 8), "squash", True)],
)  # fmt: skip
def test_files_as_the_hub_has_them(tmp_path, config, heads, resize, quick):
  (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
  found = open_clip_config.read(tmp_path / "open_clip_config.json")
  facts = found.facts
  assert (facts["model.image.heads"], facts["model.text.heads"]) == heads
  assert facts["data.eval_resize"] == resize and found.quick_gelu is quick
  assert facts["model.image.interpolation"] == "bicubic"
  if config is FULL:
    assert facts["model.image.mean"] == facts["model.image.std"] == (0.5, 0.5, 0.5)
  assert open_clip_config.read(tmp_path / "none.json") is None


def test_a_folder_without_weights(tmp_path):
  (tmp_path / "clip").mkdir()
  (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(tiny()))
  call = lambda: convert.convert(  # noqa: E731
    "open_clip", str(tmp_path / "clip"), out=str(tmp_path / "run")
  )
  stock.fails_in_one_line(call, tmp_path / "run", "open_clip_model.safetensors", "Name the file")
