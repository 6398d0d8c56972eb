"""Sentence-T5 as sentence-transformers saves it: a folder with modules.json; a text tower alone."""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections
import numpy as np

from grain_jax.convert import foreign, layout, state_dicts
from grain_jax.models import t5

_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
_WEIGHTS = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
_CONTEXT = 256  # max_seq_length of the published files, where the folder does not say it
_UNLIMITED = 100_000  # a model_max_length above means that there is none
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"
_DENSE = "2_Dense.linear.weight"


def text_rules(prefix: str = "", dense: str = _DENSE) -> list[layout.Rule]:
  """The text tower and its projection, whose keys begin with `prefix` or are `dense`."""
  theirs, ours = f"{prefix}encoder.block.{{}}", "text_tower/blocks"
  attention = {"query": "q", "key": "k", "value": "v", "out": "o"}
  relative = f"{prefix}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  rules = [
    *layout.same("text_tower/token_embedding", f"{prefix}{SHARED}"),
    *layout.same("text_tower/relative_bias", relative),
    *layout.same(f"{ours}/norm1/scale", f"{theirs}.layer.0.layer_norm.weight"),
    *layout.same(f"{ours}/norm2/scale", f"{theirs}.layer.1.layer_norm.weight"),
    *layout.same("text_tower/norm/scale", f"{prefix}encoder.final_layer_norm.weight"),
    *layout.linear("text_projection", dense.removesuffix(".weight"), bias=False),
  ]
  for name, their_name in attention.items():
    rules += layout.linear(
      f"{ours}/attention/{name}", f"{theirs}.layer.0.SelfAttention.{their_name}", bias=False
    )
  for name, their_name in (("fc1", "wi"), ("fc2", "wo")):
    rules += layout.linear(
      f"{ours}/mlp/{name}", f"{theirs}.layer.1.DenseReluDense.{their_name}", bias=False
    )
  return rules


def rules(config: ml_collections.ConfigDict | None = None) -> list[layout.Rule]:
  """The table; it is the same for all sizes."""
  del config
  return text_rules()


def load(path: pathlib.Path) -> foreign.ForeignCheckpoint:
  """Reads a folder of sentence-transformers, whose modules.json says what is in it.

  Raises:
    ValueError: other modules, or a model that this text tower cannot be; one line.
  """
  if not path.is_dir():
    raise ValueError(f"--input={path} is no folder: give the one that has modules.json.")
  folders = _modules(path)
  transformer, dense = folders["Transformer"], folders["Dense"]
  _check_pooling(folders["Pooling"] / "config.json")
  facts = _facts(transformer / "config.json")
  facts["model.text.context"] = _context(transformer)
  facts["model.embed_dim"] = _dense_width(dense / "config.json", facts["model.text.width"])
  facts["model.text.tokenizer"] = foreign.tokenizer_in(transformer)
  state = without_tied(_read_weights(transformer), where=str(transformer))
  projection = _read_weights(dense)
  state |= {f"2_Dense.{key}": value for key, value in projection.items()}
  return foreign.ForeignCheckpoint(
    where=str(path), state=state, rules=rules, facts={**facts, "method": "clip"},
    assumed={"data.max_regions": 0}, part="text",
  )  # fmt: skip


def without_tied(state: layout.State, *, where: str, prefix: str = "") -> layout.State:
  """The weights with T5's token embedding once, as `shared.weight`.

  Raises:
    ValueError: its two copies differ; one line.
  """
  state = dict(state)
  tied = state.pop(f"{prefix}{TIED}", None)
  if tied is None:
    return state
  shared = state.setdefault(f"{prefix}{SHARED}", tied)
  if not np.array_equal(shared, tied):
    raise ValueError(
      f"{where}: {prefix}{SHARED} and {prefix}{TIED} differ, and T5 has one token embedding."
    )
  return state


def _modules(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """{last name of its class: folder} of the modules that modules.json lists."""
  path = folder / "modules.json"
  listed = state_dicts.read_json(path)
  try:
    found = {str(m["type"]).rpartition(".")[2]: pathlib.PurePath(m["path"]) for m in listed}
  except (TypeError, KeyError) as error:
    raise ValueError(f"{path} is no list of modules with a type and a path.") from error
  if tuple(found) != _MODULES or len(listed) != len(_MODULES):
    raise ValueError(
      f"{path} lists {', '.join(found) or 'nothing'}. Only {', '.join(_MODULES)} in this order, as "
      "Sentence-T5 has them, are read."
    )
  for name, place in found.items():
    if place.is_absolute() or ".." in place.parts:
      raise ValueError(f"{path}: the path {str(place)!r} of {name} is not within the folder.")
  return {name: folder / place for name, place in found.items()}


def _read_weights(folder: pathlib.Path) -> layout.State:
  found = [name for name in _WEIGHTS if (folder / name).is_file()]
  if not found:
    raise ValueError(f"--input: {folder} has none of {', '.join(_WEIGHTS)}.")
  path = folder / found[0]
  return state_dicts.arrays(state_dicts.load(path), where=str(path))


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  values = state_dicts.read_json(path)
  if not isinstance(values, dict):
    raise ValueError(f"{path} is not a JSON object.")
  return values


def _check_pooling(path: pathlib.Path) -> None:
  values = _read_object(path)
  modes = [k.removeprefix("pooling_mode_") for k, v in values.items()
           if k.startswith("pooling_mode_") and v]  # fmt: skip
  named = values.get("pooling_mode", [])
  modes += [named] if isinstance(named, str) else list(named)
  if modes not in (["mean_tokens"], ["mean"]):
    raise ValueError(f"{path}: pooling is {' and '.join(modes) or 'none'}; only mean is read.")


def _dense_width(path: pathlib.Path, width: int) -> int:
  """Outputs of the projection, which has neither bias nor activation."""
  values = _read_object(path)
  activation = str(values.get("activation_function", "Identity")).rpartition(".")[2]
  if values.get("bias", True) or activation != "Identity":
    raise ValueError(
      f"{path}: bias is {values.get('bias', True)} and the activation {activation}; the projection "
      "of texts has neither."
    )
  if values.get("in_features") != width or not isinstance(values.get("out_features"), int):
    raise ValueError(
      f"{path}: {values.get('in_features')} -> {values.get('out_features')} features do not follow "
      f"a tower of width {width}."
    )
  return values["out_features"]


def _context(folder: pathlib.Path) -> int:
  """Longest text in tokens: the tokenizer's own where sentence-transformers (6) notes it there."""
  path, tokenizer = folder / "sentence_bert_config.json", folder / "tokenizer_config.json"
  values = _read_object(path) if path.is_file() else {}
  if values.get("do_lower_case"):
    raise ValueError(f"{path}: do_lower_case is set; this tokenizer keeps the case of a text.")
  context = values.get("max_seq_length")
  if not context and tokenizer.is_file():
    path = tokenizer
    context = _read_object(path).get("model_max_length")
    if isinstance(context, (int, float)) and context > _UNLIMITED:
      context = None
  context = context or _CONTEXT
  if not isinstance(context, int) or context < 2:
    raise ValueError(f"{path}: longest text of {context!r} is no number of tokens from 2 on.")
  return context


def _facts(path: pathlib.Path) -> dict[str, Any]:
  """What config.json says of the tower, its omissions filled with T5's defaults."""
  values = _read_object(path)
  kind = values.get("model_type")
  if kind != "t5":
    raise ValueError(f"{path} describes a model of type {kind!r}. Only 't5' is read.")
  import transformers  # slow to import

  try:
    c = transformers.T5Config.from_dict(values)
    inner = c.num_heads * c.d_kv
    checked = {
      "feed_forward_proj": (c.feed_forward_proj, ("relu", "gelu")),
      "relative_attention_num_buckets": (c.relative_attention_num_buckets, (t5.BUCKETS,)),
      "relative_attention_max_distance": (c.relative_attention_max_distance, (t5.MAX_DISTANCE,)),
      "num_heads x d_kv": (inner, (c.d_model,)),
    }
    facts = {
      "model.text.kind": "t5",
      "model.text.vocab_size": c.vocab_size,
      "model.text.width": c.d_model,
      "model.text.depth": c.num_layers,
      "model.text.heads": c.num_heads,
      "model.text.mlp_ratio": c.d_ff / c.d_model,
      "model.text.activation": c.feed_forward_proj,
      "model.text.norm_eps": c.layer_norm_epsilon,
    }
  except Exception as error:  # their own checks raise many kinds
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{path} is not a T5Config ({reason}).") from error
  for name, (value, known) in checked.items():
    if value not in known:
      raise ValueError(
        f"{path}: {name} is {value!r}; this text tower has {' or '.join(map(repr, known))}."
      )
  return facts
