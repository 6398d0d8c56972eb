"""SigLIP and SigLIP 2 of fixed resolution: a SiglipModel folder, or big_vision's .npz.

A whole model (Zhai et al., ICCV 2023; Tschannen et al., arXiv 2502.14786). SigLIP 2's NaFlex models
take images of any shape and are none of these. big_vision's .npz has no tokenizer beside it.
"""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections

from grain_jax import sentencepiece, tokenizing
from grain_jax.convert import big_vision, foreign, hf_processor, layout, state_dicts

_WEIGHTS = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
_FILES = (".safetensors", ".bin", ".json")  # of weights that stand beside their config.json
_PADDING = 128  # rows of the text tower that no token has
_IGNORED = r".*\.embeddings\.position_ids"  # a buffer of older versions
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
_FIXED = {
  "method": "clip",
  "model.pool": "map",
  "model.projects_images": False,
  "model.logit_bias": True,
  "model.image.class_token": False,
  "model.image.patch_bias": True,
  "model.image.pre_norm": False,
  "model.image.qk_norm": False,
  "model.image.stem": "linear",
  "model.text.kind": "siglip",
}
_ASSUMED = {
  "data.max_regions": 0,
  "data.eval_resize": "squash",
  "loss.contrast": "sigmoid",
  "model.image.mean": hf_processor.SIGLIP.mean,
  "model.image.std": hf_processor.SIGLIP.std,
  "model.image.interpolation": "bicubic",
}


def load(path: pathlib.Path, tokenizer: str | None = None) -> foreign.ForeignCheckpoint:
  """Reads a folder of a SiglipModel (or its weights beside config.json), or big_vision's .npz.

  Args:
    path: folder or file.
    tokenizer: folder of the tokenizer; by default the model's own.

  Raises:
    ValueError: neither, or a model that this one cannot be; one line.
  """
  if path.suffix == ".npz" and path.is_file():
    found = big_vision.read(path)
    if tokenizer is None:
      foreign.warn_without_tokenizer(f"{path} has none, as all files of big_vision")
    facts = {**found.facts, **_FIXED, "model.text.tokenizer": tokenizer or tokenizing.NONE}
    _check_tokenizer(facts, where=path)
    return foreign.ForeignCheckpoint(str(path), found.state, found.rules, facts, _ASSUMED)
  if path.is_file() and path.suffix not in _FILES:
    raise ValueError(
      f"--input={path} is neither a folder of a SiglipModel (config.json, model.safetensors) nor "
      "an .npz of big_vision."
    )
  return _load_folder(path, tokenizer)


def _check_tokenizer(facts: dict[str, Any], *, where: pathlib.Path) -> None:
  """Raises where a tokenizer is neither SigLIP's nor Gemma's, or of another text tower."""
  folder, rows = facts["model.text.tokenizer"], facts["model.text.vocab_size"]
  if folder == tokenizing.NONE:
    return
  sentencepiece.find_file(folder)
  if sentencepiece.read_kind(folder).name == "t5":
    raise ValueError(
      f"{folder}: {sentencepiece.SETTINGS[0]} names neither SiglipTokenizer (SigLIP) nor "
      "GemmaTokenizer (SigLIP 2) as tokenizer_class. Fetch it from where the weights come from."
    )
  context = facts["model.text.context"]
  size = sentencepiece.SentencePiece(folder, context).vocabulary_size
  if not rows - _PADDING < size <= rows:
    raise ValueError(
      f"{folder} has a tokenizer of {size} tokens and the text tower of {where} {rows}, of which "
      f"fewer than {_PADDING} may be padding. Give the tokenizer that it was trained with."
    )


def _load_folder(path: pathlib.Path, tokenizer: str | None) -> foreign.ForeignCheckpoint:
  folder = path if path.is_dir() else path.parent
  facts = _facts(folder / "config.json")
  if path.is_dir():
    found = [name for name in _WEIGHTS if (path / name).is_file()]
    if not found:
      raise ValueError(f"--input={path} has none of {', '.join(_WEIGHTS)}.")
    path = path / found[0]
  facts["model.text.tokenizer"] = tokenizer or foreign.tokenizer_in(folder)
  _check_tokenizer(facts, where=path)
  pixels = hf_processor.read(folder, size=facts["model.image.size"], kind=hf_processor.SIGLIP)
  state = state_dicts.arrays(state_dicts.load(path), where=str(path))
  return foreign.ForeignCheckpoint(
    where=str(path),
    state=state_dicts.without(state, _IGNORED),
    rules=rules,
    facts={**facts, **pixels},
    assumed=_ASSUMED,
  )


def _tower(ours: str, theirs: str) -> list[layout.Rule]:
  ours, theirs = f"{ours}/blocks", f"{theirs}.encoder.layers.{{}}"
  table = layout.norm(f"{ours}/norm1", f"{theirs}.layer_norm1")
  table += layout.norm(f"{ours}/norm2", f"{theirs}.layer_norm2")
  for name, theirs_name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
    table += layout.linear(f"{ours}/attention/{name}", f"{theirs}.self_attn.{theirs_name}_proj")
  for name in ("fc1", "fc2"):
    table += layout.linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}")
  return table


def rules(config: ml_collections.ConfigDict | None = None) -> list[layout.Rule]:
  """The table of a SiglipModel; it is the same for all sizes."""
  del config
  image, text, head = "vision_model.embeddings", "text_model.embeddings", "vision_model.head"
  patches = f"{image}.patch_embedding"
  return [
    *layout.same("image_tower/patch_embedding/kernel", f"{patches}.weight", layout.PATCHES),
    *layout.same("image_tower/patch_embedding/bias", f"{patches}.bias"),
    *layout.same("image_tower/position_embedding", f"{image}.position_embedding.weight"),
    *_tower("image_tower", "vision_model"),
    *layout.norm("image_tower/norm", "vision_model.post_layernorm"),
    *layout.same("pooling/probe", f"{head}.probe"),
    *layout.joined(
      "pooling/attention", f"{head}.attention.in_proj_weight", f"{head}.attention.in_proj_bias"
    ),
    *layout.linear("pooling/attention/out", f"{head}.attention.out_proj"),
    *layout.norm("pooling/norm", f"{head}.layernorm"),
    *layout.linear("pooling/mlp/fc1", f"{head}.mlp.fc1"),
    *layout.linear("pooling/mlp/fc2", f"{head}.mlp.fc2"),
    *layout.same("text_tower/token_embedding", f"{text}.token_embedding.weight"),
    *layout.same("text_tower/position_embedding", f"{text}.position_embedding.weight"),
    *_tower("text_tower", "text_model"),
    *layout.norm("text_tower/norm", "text_model.final_layer_norm"),
    *layout.linear("text_projection", "text_model.head"),
    *layout.same("logit_scale", "logit_scale", big_vision.SCALAR),
    *layout.same("logit_bias", "logit_bias", big_vision.SCALAR),
  ]


def _facts(path: pathlib.Path) -> dict[str, Any]:
  """What config.json says, its omissions filled with the defaults of `transformers`."""
  values = state_dicts.read_json(path)
  kind = values.get("model_type") if isinstance(values, dict) else None
  if kind == "siglip2":
    raise ValueError(
      f"{path} describes a NaFlex model (model_type 'siglip2'), whose images keep their shape. "
      "Only those of fixed resolution are read, whose model_type is 'siglip' (SigLIP 2's too)."
    )
  if kind != "siglip":
    raise ValueError(f"{path} describes a model of type {kind!r}. Only 'siglip' is read.")
  import transformers  # slow to import

  try:
    # CLIP's ids are the class's defaults, of which it warns; texts are the tokenizer's affair here.
    texts = {**(values.get("text_config") or {}), "bos_token_id": None, "eos_token_id": None}
    config = transformers.SiglipConfig.from_dict({**values, "text_config": texts})
    image, text = config.vision_config, config.text_config
    facts = {
      "model.embed_dim": text.projection_size,
      "model.image.size": image.image_size,
      "model.image.patch": image.patch_size,
      "model.text.vocab_size": text.vocab_size,
      "model.text.context": text.max_position_embeddings,
    }
    for name, tower in (("image", image), ("text", text)):
      facts |= {
        f"model.{name}.width": tower.hidden_size,
        f"model.{name}.depth": tower.num_hidden_layers,
        f"model.{name}.heads": tower.num_attention_heads,
        f"model.{name}.mlp_ratio": tower.intermediate_size / tower.hidden_size,
        f"model.{name}.activation": tower.hidden_act,
        f"model.{name}.norm_eps": tower.layer_norm_eps,
      }
    checked = {
      "num_channels": (image.num_channels, (3,)),
      "vision_use_head": (image.vision_use_head, (True,)),
      "projection_size": (text.projection_size, (image.hidden_size,)),
    }
  except Exception as error:  # their own checks raise many kinds
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{path} is not a SiglipConfig ({reason}).") from error
  for name in ("image", "text"):
    checked[f"hidden_act ({name})"] = (facts[f"model.{name}.activation"], tuple(_ACTIVATIONS))
  for name, (value, known) in checked.items():
    if value not in known:
      raise ValueError(f"{path}: {name} is {value!r}; here it is {' or '.join(map(repr, known))}.")
  for name in ("image_size", "patch_size"):
    if not isinstance(getattr(image, name), int):
      raise ValueError(f"{path}: {name} is {getattr(image, name)!r}; only squares are read.")
  for name in ("image", "text"):
    facts[f"model.{name}.activation"] = _ACTIVATIONS[facts[f"model.{name}.activation"]]
  return {**facts, **_FIXED}
