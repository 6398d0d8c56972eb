"""CLIPpy's checkpoints such as clippy_5k.pt (Ranasinghe et al., ICCV 2023), both ways.

OpenCLIP's training checkpoint, or its bare state dict: a DINO ViT in timm's names under
'visual.trunk', a Sentence-T5 under 'text' ('text.0.auto_model', or 'text.0.model' from
sentence-transformers 6 on), its projection 'text.2.linear', the logit scale. The tokenizer,
which the file lacks, comes by --tokenizer; without one texts are given as token ids. A file that
has the image tower alone gives that. By convention: heads of 64, GELU and ReLU, eps 1e-6, OpenAI's
pixels and crop, the maximum over all tokens, texts of 256 tokens (what `SentenceTransformer.encode`
cuts them to: T5's positions are relative, so that training, padded to 77, fixes no length).
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from grain_jax import config as configs
from grain_jax import places, sentencepiece, tokenizing
from grain_jax.convert import foreign, layout, sentence_t5, state_dicts, timm_vit
from grain_jax.models import t5

_TRUNK = "visual.trunk."
_SCALE = "logit_scale"
_TEXT, _NEWER = "text.0.auto_model.", "text.0.model."  # by the version of sentence-transformers
_DENSE = "text.2.linear.weight"
_CONTEXT = 256
_PADDING = 128  # a T5's embedding is padded to a multiple of it
_ASSUMED = {
  "data.max_regions": 0,
  "model.image.activation": "gelu",
  "model.image.norm_eps": 1e-6,
  **foreign.CLIP_PIXELS,
}
_FACTS = {
  "method": "clip",
  "model.pool": "max",
  "model.projects_images": False,
  "model.logit_bias": False,
  "model.image.stem": "linear",
  "model.text.kind": "t5",
}
_ASSUMED_OF_TEXT = {
  "model.pool_includes_class": True,
  "model.text.activation": "relu",
  "model.text.norm_eps": 1e-6,
  "model.text.context": _CONTEXT,
}


def rules(config: ml_collections.ConfigDict, *, text: str = _TEXT) -> list[layout.Rule]:
  """The table of the whole model, whose text tower's keys begin with `text`."""
  return [
    *timm_vit.rules(_TRUNK, qk_norm=config.model.image.qk_norm),
    *sentence_t5.text_rules(text, _DENSE),
    *layout.same("logit_scale", "logit_scale"),
  ]


def load(path: pathlib.Path, tokenizer: str | None = None) -> foreign.ForeignCheckpoint:
  """Reads a checkpoint: the whole model, or the image tower where it has no other.

  Args:
    path: the file.
    tokenizer: folder of the SentencePiece tokenizer of its text tower.

  Raises:
    ValueError: it lacks a tower that is asked for, has other weights beside it, or the tokenizer is
      of another one; one line.
  """
  weights = state_dicts.load(path)
  if isinstance(weights.get("state_dict"), Mapping):
    weights = weights["state_dict"]
  state = state_dicts.arrays(weights, where=str(path))
  if tokenizer is not None or any(key.startswith("text.") for key in state):
    return _whole(state, tokenizer, where=str(path))
  return image_tower(state_dicts.without(state, _SCALE), where=str(path))


def image_tower(state: layout.State, *, where: str) -> foreign.ForeignCheckpoint:
  """The image tower of weights 'visual.trunk.*'; CLIPpy max-pools its tokens, without projection.

  Args:
    state: the weights, with nothing beside them.
    where: the file, for errors.
  """
  facts, assumed = _image(state, where)
  pooled = {"model.pool": "max", "model.projects_images": False}
  facts |= {**pooled, "model.embed_dim": facts["model.image.width"]}
  return foreign.ForeignCheckpoint(
    where,
    state,
    lambda config: timm_vit.rules(_TRUNK, qk_norm=config.model.image.qk_norm),
    facts,
    {"method": "clip", **assumed},
    part="image",
  )


def _image(state: layout.State, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """(facts, conventions) of the image tower, as config keys and values."""
  shapes = foreign.Shapes(state, where, "CLIPpy with its image tower in timm's names")
  facts = timm_vit.facts(shapes, _TRUNK)
  heads = {"model.image.heads": max(facts["model.image.width"] // 64, 1)}
  return {**facts, "model.image.stem": "linear"}, {**_ASSUMED, **heads}


def _whole(state: layout.State, tokenizer: str | None, *, where: str) -> foreign.ForeignCheckpoint:
  """Both towers, the projection of texts and the logit scale."""
  facts, assumed = _image(state, where)
  newer = any(key.startswith(_NEWER) for key in state)
  text = _NEWER if newer and not any(key.startswith(_TEXT) for key in state) else _TEXT
  state = sentence_t5.without_tied(state, where=where, prefix=text)
  if state.get("logit_scale") is not None and state["logit_scale"].shape == (1,):
    state["logit_scale"] = state["logit_scale"].reshape(())
  shapes = foreign.Shapes(state, where, "CLIPpy with a Sentence-T5")
  chosen = tokenizing.NONE if tokenizer is None else tokenizer
  facts |= {**_text_facts(shapes, text), **_FACTS, "model.text.tokenizer": chosen}
  if facts["model.embed_dim"] != facts["model.image.width"]:
    raise ValueError(
      f"{where}: {_DENSE} has {facts['model.embed_dim']} outputs and the image tower a width of "
      f"{facts['model.image.width']}. CLIPpy projects no images: the two are equal."
    )
  if tokenizer is None:
    foreign.warn_without_tokenizer(f"{where} has no tokenizer, as all of CLIPpy's (it is T5's)")
  else:
    _check_tokenizer(tokenizer, facts["model.text.vocab_size"], where=where)
  return foreign.ForeignCheckpoint(
    where, state, functools.partial(rules, text=text), facts, {**assumed, **_ASSUMED_OF_TEXT}
  )


def _text_facts(shapes: foreign.Shapes, text: str) -> dict[str, Any]:
  """What the weights show of the text tower and of the joint space."""
  vocabulary, width = shapes.shape_of(f"{text}shared.weight", 2)
  layers = f"{text}encoder.block"
  relative = f"{layers}.0.layer.0.SelfAttention.relative_attention_bias.weight"
  buckets, heads = shapes.shape_of(relative, 2)
  if buckets != t5.BUCKETS:
    raise ValueError(
      f"{shapes.where}: {relative} has {buckets} rows; this text tower has {t5.BUCKETS} buckets of "
      "relative positions."
    )
  hidden = shapes.shape_of(f"{layers}.0.layer.1.DenseReluDense.wi.weight", 2)[0]
  return {
    "model.embed_dim": shapes.shape_of(_DENSE, 2)[0],
    "model.text.vocab_size": vocabulary,
    "model.text.width": width,
    "model.text.depth": shapes.depth(re.escape(layers) + r"\.(\d+)\."),
    "model.text.heads": heads,
    "model.text.mlp_ratio": hidden / width,
  }


def _check_tokenizer(folder: str, rows: int, *, where: str) -> None:
  """Raises where a folder has no tokenizer, or one that is not of an embedding of so many rows."""
  if not any((places.at(folder) / name).is_file() for name in sentencepiece.FILES):
    raise ValueError(
      f"--tokenizer={folder} has no {' or '.join(sentencepiece.FILES)}. Give the folder of "
      "sentence-t5-base, or of any T5 v1.0."
    )
  size = sentencepiece.SentencePiece(folder, _CONTEXT).vocabulary_size
  if not rows - _PADDING < size <= rows:
    raise ValueError(
      f"--tokenizer={folder} has {size} tokens and the text tower of {where} {rows}, of which "
      f"fewer than {_PADDING} are padding. Give the tokenizer that it was trained with."
    )


def save(path: pathlib.Path, *, config: ml_collections.ConfigDict, params: Any, step: int) -> None:
  """Writes a .pt as OpenCLIP's training saves CLIPpy, without its optimiser, in the older names.

  It has no place for the tokenizer, which `load` asks for again, nor for the text's context.

  Args:
    path: the file.
    config: of the run.
    params: its parameters, NumPy arrays.
    step: of the checkpoint; the file has no place for it.

  Raises:
    ValueError: the model is none that CLIPpy can be; the line names the config keys.
  """
  del step
  try:
    import torch
  except ImportError as error:
    raise ValueError("--format=clippy needs PyTorch: pip install torch.") from error
  _check_expressible(config)
  written = layout.write(rules(config), params)
  state = {key: torch.from_numpy(value.copy()) for key, value in written.items()}
  state[f"{_TEXT}{sentence_t5.TIED}"] = state[f"{_TEXT}{sentence_t5.SHARED}"]
  torch.save({"epoch": 0, "name": "clippy-B-16", "state_dict": state}, path)


def _check_expressible(config: ml_collections.ConfigDict) -> None:
  heads = max(config.model.image.width // 64, 1)
  wanted = {**_FACTS, **_ASSUMED, **_ASSUMED_OF_TEXT, "model.image.heads": heads}
  wanted |= {
    "model.image.qk_norm": False,
    "model.image.pre_norm": False,
    "model.image.patch_bias": True,
    "model.image.interpolation": "bicubic",
  }
  for key in ("model.text.context", "data.max_regions"):  # the weights are the same with any
    del wanted[key]
  if config.model.text.kind != "t5":  # which is said
    wanted = {k: v for k, v in wanted.items() if not re.match(r"model\.text\.(act|norm)", k)}
  flat = dict(configs.flatten(config))
  stand = [
    f"config.{key} = {flat[key]!r}" if not isinstance(value, tuple) else f"config.{key} not CLIP's"
    for key, value in wanted.items()
    if flat[key] != value
  ]
  if not config.model.text.tokenizer:
    stand.append("config.model.text.tokenizer = ''")
  if stand:
    raise ValueError(
      f"--format=clippy: CLIPpy cannot have {' and '.join(stand)}. Take --format=safetensors."
    )
