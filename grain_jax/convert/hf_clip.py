"""CLIPModel of `transformers`: a folder with config.json and weights, both ways."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_collections
import numpy as np
import safetensors.numpy

from grain_jax import tokenizer as tokenizers
from grain_jax.convert import foreign, hf_processor, layout, state_dicts

_WEIGHTS = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
_IGNORED = r".*\.embeddings\.position_ids"  # a buffer of older versions
_ACTIVATIONS = ("gelu", "quick_gelu")  # the same names and functions as here
_ARGMAX_END = 2  # eos_token_id of OpenAI's files: the feature stands at the largest id, CLIP's end


def _tower(ours: str, theirs: str) -> list[layout.Rule]:
  ours, theirs = f"{ours}/blocks", f"{theirs}.encoder.layers.{{}}"
  attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
  rules = layout.norm(f"{ours}/norm1", f"{theirs}.layer_norm1")
  rules += layout.norm(f"{ours}/norm2", f"{theirs}.layer_norm2")
  for name, their_name in attention.items():
    rules += layout.linear(f"{ours}/attention/{name}", f"{theirs}.self_attn.{their_name}")
  for name in ("fc1", "fc2"):
    rules += layout.linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}")
  return rules


def rules(config: ml_collections.ConfigDict | None = None) -> list[layout.Rule]:
  """The table; it is the same for all sizes."""
  del config
  image, text = "vision_model.embeddings", "text_model.embeddings"
  return [
    *layout.same("image_tower/class_token", f"{image}.class_embedding", layout.VECTOR),
    *layout.same(
      "image_tower/patch_embedding/kernel", f"{image}.patch_embedding.weight", layout.PATCHES
    ),
    *layout.same("image_tower/position_embedding", f"{image}.position_embedding.weight"),
    *layout.norm("image_tower/pre_norm", "vision_model.pre_layrnorm"),  # their spelling
    *_tower("image_tower", "vision_model"),
    *layout.norm("image_tower/norm", "vision_model.post_layernorm"),
    *layout.linear("image_projection", "visual_projection", bias=False),
    *layout.same("text_tower/token_embedding", f"{text}.token_embedding.weight"),
    *layout.same("text_tower/position_embedding", f"{text}.position_embedding.weight"),
    *_tower("text_tower", "text_model"),
    *layout.norm("text_tower/norm", "text_model.final_layer_norm"),
    *layout.linear("text_projection", "text_projection", bias=False),
    *layout.same("logit_scale", "logit_scale"),
  ]


def load(path: pathlib.Path) -> foreign.ForeignCheckpoint:
  """Reads a folder of `save_pretrained`, or a file of weights beside its config.json.

  Raises:
    ValueError: not a CLIPModel, or one that this model cannot be (another activation, vocabulary).
  """
  folder = path if path.is_dir() else path.parent
  if path.is_dir():
    found = [name for name in _WEIGHTS if (path / name).is_file()]
    if not found:
      raise ValueError(f"--input={path} has none of {', '.join(_WEIGHTS)}.")
    path = path / found[0]
  facts = _facts(folder / "config.json")
  pixels = hf_processor.read(folder, size=facts["model.image.size"])
  state = state_dicts.arrays(state_dicts.load(path), where=str(path))
  return foreign.ForeignCheckpoint(
    where=str(path),
    state=state_dicts.without(state, _IGNORED),
    rules=rules,
    facts={**facts, **pixels},
    assumed={**foreign.CLIP_PIXELS, "data.max_regions": 0},
  )


def _facts(path: pathlib.Path) -> dict[str, Any]:
  """What config.json says, its omissions filled with the defaults of `transformers`."""
  values = state_dicts.read_json(path)
  kind = values.get("model_type") if isinstance(values, dict) else None
  if kind != "clip":
    raise ValueError(f"{path} describes a model of type {kind!r}. Only 'clip' is read.")
  import transformers  # slow to import

  try:
    config = transformers.CLIPConfig.from_dict(values)
    image, text = config.vision_config, config.text_config
    facts = {
      "method": "clip",
      "model.embed_dim": config.projection_dim,
      "model.image.size": image.image_size,
      "model.image.patch": image.patch_size,
      "model.image.qk_norm": False,
      "model.image.pre_norm": True,
      "model.image.patch_bias": False,
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
  except Exception as error:  # their own checks raise many kinds
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{path} is not a CLIPConfig ({reason}).") from error
  for name in ("image", "text"):
    activation = facts[f"model.{name}.activation"]
    if activation not in _ACTIVATIONS:
      raise ValueError(
        f"{path}: hidden_act {activation!r} is unknown here; known are {', '.join(_ACTIVATIONS)}."
      )
  foreign.check_vocabulary(text.vocab_size, where=str(path))
  if text.eos_token_id not in (_ARGMAX_END, tokenizers.END):
    raise ValueError(
      f"{path}: eos_token_id is {text.eos_token_id}. Here the feature of a text stands at "
      f"{tokenizers.END}, the end of CLIP's vocabulary."
    )
  return facts


def save(path: pathlib.Path, *, config: ml_collections.ConfigDict, params: Any, step: int) -> None:
  """Writes a folder that CLIPModel, CLIPTokenizer and CLIPImageProcessor load.

  A bias of the patch embedding goes into the patches' positions, to which it is added anyway.

  Args:
    path: the folder, which is made.
    config: of the run.
    params: its parameters, NumPy arrays.
    step: of the checkpoint; these files have no place for it.

  Raises:
    ValueError: the model is none that CLIPModel can be; the line names the config key.
  """
  del step
  _check_expressible(config)
  tower = dict(params["image_tower"])
  tower["patch_embedding"] = dict(tower["patch_embedding"])
  bias = tower["patch_embedding"].pop("bias", None)
  if bias is not None:
    tower["position_embedding"] = tower["position_embedding"].copy()
    tower["position_embedding"][1:] += bias
  path.mkdir()
  state = layout.write(rules(), {**params, "image_tower": tower})
  safetensors.numpy.save_file(state, path / "model.safetensors", metadata={"format": "pt"})
  _save_config(path, config, logit_scale=float(np.asarray(params["logit_scale"])))
  hf_processor.write(path, config)
  _save_tokenizer(path, context=config.model.text.context)


def _check_expressible(config: ml_collections.ConfigDict) -> None:
  image = config.model.image
  reasons = {
    f"config.method = {config.method!r} (it is CLIP alone)": config.method != "clip",
    "config.model.image.qk_norm = True (it has no QK-norm)": image.qk_norm,
    "config.model.image.pre_norm = False (it normalises the embeddings)": not image.pre_norm,
    "config.model.image.stem = 'hmlp' (its patch embedding is linear)": image.stem != "linear",
    f"config.model.pool = {config.model.pool!r} (it takes the class token)": (
      config.model.pool not in ("default", "class")
    ),
    f"config.model.auxiliary_pool = {config.model.auxiliary_pool!r} (it has one embedding)": (
      config.model.auxiliary_pool != "none"
    ),
    "config.model.logit_bias = True (its logits have no bias)": config.model.logit_bias,
    "config.model.projects_images = False (it projects)": not config.model.projects_images,
    f"config.model.text.tokenizer = {config.model.text.tokenizer!r} (it has CLIP's)": bool(
      config.model.text.tokenizer
    ),
    f"config.model.text.kind = {config.model.text.kind!r} (its text tower is CLIP's)": (
      config.model.text.kind != "clip"
    ),
    "config.model.image.class_token = False (it has one)": not image.class_token,
    "config.model.image.activation = 'gelu_tanh'": image.activation == "gelu_tanh",
    "config.model.text.activation = 'gelu_tanh'": config.model.text.activation == "gelu_tanh",
  }
  stand = [reason for reason, applies in reasons.items() if applies]
  if stand:
    raise ValueError(f"--format=hf_clip: CLIPModel cannot have {' and '.join(stand)}.")


def _save_config(
  path: pathlib.Path, config: ml_collections.ConfigDict, *, logit_scale: float
) -> None:
  import transformers  # slow to import

  m = config.model

  def tower(t: Any) -> dict[str, Any]:
    return {
      "hidden_size": t.width,
      "intermediate_size": round(t.width * t.mlp_ratio),
      "num_hidden_layers": t.depth,
      "num_attention_heads": t.heads,
      "hidden_act": t.activation,
      "layer_norm_eps": t.norm_eps,
      "projection_dim": m.embed_dim,
    }

  text = {
    **tower(m.text),
    "vocab_size": m.text.vocab_size,
    "max_position_embeddings": m.text.context,
    "bos_token_id": tokenizers.START,
    "eos_token_id": tokenizers.END,
    "pad_token_id": tokenizers.END,
  }
  image = {**tower(m.image), "image_size": m.image.size, "patch_size": m.image.patch}
  transformers.CLIPConfig(
    text_config=text,
    vision_config=image,
    projection_dim=m.embed_dim,
    logit_scale_init_value=logit_scale,
    architectures=["CLIPModel"],
    dtype="float32",
  ).save_pretrained(path)


def _save_tokenizer(path: pathlib.Path, *, context: int) -> None:
  """tokenizer.json and tokenizer_config.json, and vocab.json and merges.txt for older versions."""
  import transformers  # slow to import

  model = json.loads(tokenizers.vocabulary_json())["model"]
  merges = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in model["merges"]]
  transformers.CLIPTokenizer(
    vocab=model["vocab"], merges=merges, model_max_length=context
  ).save_pretrained(path)
  (path / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
  (path / "merges.txt").write_text("\n".join(lines) + "\n")
