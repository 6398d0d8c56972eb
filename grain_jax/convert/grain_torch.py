"""GRAIN's published checkpoints (.pth.tar of github.com/shaunak27/grain-clip), both ways.

A dictionary with the decoder's weights under 'state_dict' and the towers' under
'backbone_state_dict', each with 'module.' in front of its keys or without. A file without a decoder
is the CLIP baseline. What it does not say: heads (12 for a width of 768 and 384, 16 for 1,024, else
width / 64; 8 in the decoder), activations and eps; those are the published ones.
"""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections

from grain_jax import config as configs
from grain_jax.convert import clip_blocks, foreign, layout, native, state_dicts, timm_vit

_TOWERS, _DECODER = "backbone_state_dict", "state_dict"
_IMAGE = f"{_TOWERS}.visual."
# Dead weights of the published code: no output that is used depends on them.
_DEAD = rf"{_DECODER}\.(class_embed\..*|pos_embed|temporal_embed)"
_DEAD_PROJECTION = rf"{_TOWERS}\.image_projection"  # of the class token, where there is a decoder
_HEADS = {384: 12, 768: 12, 1024: 16}
_WHAT = "a GRAIN checkpoint"


def _decoder() -> list[layout.Rule]:
  """The decoder and its heads."""
  theirs = f"{_DECODER}.transformer.decoder.layers.{{}}"
  ours = "query_decoder/layers"
  rules = [
    *layout.linear("query_decoder/input", f"{_DECODER}.proj", bias=False),
    *layout.norm("query_decoder/input_norm", f"{_DECODER}.transformer.pre_norm"),
    *layout.same("query_decoder/query_embedding", f"{_DECODER}.query_embed.weight"),
    *layout.norm("query_decoder/norm", f"{_DECODER}.transformer.decoder.norm"),
    *layout.linear(f"{ours}/mlp/fc1", f"{theirs}.linear1"),
    *layout.linear(f"{ours}/mlp/fc2", f"{theirs}.linear2"),
    *layout.same("region_projection/kernel", f"{_DECODER}.obj_proj"),
    *layout.same("image_projection/kernel", f"{_DECODER}.img_proj"),
  ]
  for name in ("norm1", "norm2", "norm3"):
    rules += layout.norm(f"{ours}/{name}", f"{theirs}.{name}")
  for name, attention in (("self_attention", "self_attn"), ("cross_attention", "multihead_attn")):
    prefix = f"{theirs}.{attention}"
    rules += layout.joined(f"{ours}/{name}", f"{prefix}.in_proj_weight", f"{prefix}.in_proj_bias")
    rules += layout.linear(f"{ours}/{name}/out", f"{prefix}.out_proj")
  for i in range(3):
    rules += layout.linear(f"box_head/fc{i}", f"{_DECODER}.bbox_embed.layers.{i}")
  return rules


def rules(config: ml_collections.ConfigDict) -> list[layout.Rule]:
  """The table; keys of the two dictionaries carry its name in front."""
  table = timm_vit.rules(_IMAGE, qk_norm=config.model.image.qk_norm) + clip_blocks.text(
    f"{_TOWERS}."
  )
  if config.method == "grain":
    return table + _decoder()
  return table + layout.same("image_projection/kernel", f"{_TOWERS}.image_projection")


def load(path: pathlib.Path) -> foreign.ForeignCheckpoint:
  """Reads a checkpoint.

  Raises:
    ValueError: it is none of GRAIN, or has weights that GRAIN has not; one line.
  """
  where = str(path)
  saved = state_dicts.load(path)
  if _TOWERS not in saved:
    raise ValueError(
      f"{where} is not {_WHAT}: it has no {_TOWERS}; it has {layout.few(list(map(str, saved)))}."
    )
  state = {}
  for part in (_TOWERS, _DECODER):
    if saved.get(part) or part == _TOWERS:
      weights = state_dicts.arrays(saved[part], where=f"{where}: {part}")
      state |= {f"{part}.{key}": value for key, value in weights.items()}
  is_grain = any(key.startswith(f"{_DECODER}.") for key in state)
  state = state_dicts.without(state, _DEAD)
  if is_grain:
    state = state_dicts.without(state, _DEAD_PROJECTION)
  shapes = foreign.Shapes(state, where, _WHAT)
  facts = timm_vit.facts(shapes, _IMAGE) | clip_blocks.text_facts(shapes, f"{_TOWERS}.")
  facts |= _decoder_facts(shapes) if is_grain else {"method": "clip"}
  width = facts["model.image.width"]
  assumed = {
    "model.image.heads": _HEADS.get(width, max(width // 64, 1)),
    **clip_blocks.text_assumed(facts["model.text.width"]),
  }
  if not is_grain:
    assumed["data.max_regions"] = 0
  carried = native.carried_config(saved["config"], where) if "config" in saved else {}
  return foreign.ForeignCheckpoint(where, state, rules, facts, assumed, carried)


def _decoder_facts(shapes: foreign.Shapes) -> dict[str, Any]:
  queries, width = shapes.shape_of(f"{_DECODER}.query_embed.weight", 2)
  layers = f"{_DECODER}.transformer.decoder.layers"
  return {
    "method": "grain",
    "model.num_queries": queries - 1,  # the image query is the last
    "model.decoder.width": width,
    "model.decoder.depth": shapes.depth(layers.replace(".", r"\.") + r"\.(\d+)\."),
    "model.decoder.mlp_dim": shapes.shape_of(f"{layers}.0.linear1.weight", 2)[0],
    "model.decoder.memory_positions": False,
  }


def save(path: pathlib.Path, *, config: ml_collections.ConfigDict, params: Any, step: int) -> None:
  """Writes a .pth.tar in the published names, with 'module.' in front.

  It holds no optimiser and none of the dead weights: the published code loads it with
  `strict=False`. Our own `load` finds the configuration in it, as JSON.

  Args:
    path: the file.
    config: of the run.
    params: its parameters, NumPy arrays.
    step: of the checkpoint, kept as 'iteration'.

  Raises:
    ValueError: the model has parts that the published one has not; the line names the config key.
  """
  try:
    import torch
  except ImportError as error:
    raise ValueError("--format=grain_torch needs PyTorch: pip install torch.") from error
  _check_expressible(config)
  parts: dict[str, dict[str, Any]] = {_TOWERS: {}, _DECODER: {}}
  for key, value in layout.write(rules(config), params).items():
    part, name = key.split(".", 1)
    parts[part][f"module.{name}"] = torch.from_numpy(value.copy())
  saved = {"epoch": 0, "iteration": step, "best_acc": 0.0, **parts}
  torch.save({**saved, "config": configs.to_json(config)}, path)


def _check_expressible(config: ml_collections.ConfigDict) -> None:
  image = config.model.image
  reasons = {
    "config.model.image.pre_norm = True": image.pre_norm,
    "config.model.image.patch_bias = False": not image.patch_bias,
    "config.model.image.stem = 'hmlp'": image.stem != "linear",
    f"config.model.pool = {config.model.pool!r}": config.model.pool
    not in ("default", "query" if config.method == "grain" else "class"),
    f"config.model.auxiliary_pool = {config.model.auxiliary_pool!r}": (
      config.model.auxiliary_pool != "none"
    ),
    "config.model.logit_bias = True": config.model.logit_bias,
    "config.model.projects_images = False": not config.model.projects_images,
    f"config.model.text.tokenizer = {config.model.text.tokenizer!r}": bool(
      config.model.text.tokenizer
    ),
    f"config.model.text.kind = {config.model.text.kind!r}": config.model.text.kind != "clip",
    "config.model.image.class_token = False": not image.class_token,
    "config.model.image.activation = 'gelu_tanh'": image.activation == "gelu_tanh",
    "config.model.text.activation = 'gelu_tanh'": config.model.text.activation == "gelu_tanh",
    "config.model.decoder.memory_positions = True": (
      config.method == "grain" and config.model.decoder.memory_positions
    ),
  }
  stand = [reason for reason, applies in reasons.items() if applies]
  if stand:
    raise ValueError(
      f"--format=grain_torch: the published model cannot have {' and '.join(stand)}. Take "
      "--format=safetensors."
    )
