"""DINO's image tower (Caron et al., ICCV 2021): the project's own .pth, or a ViTModel folder.

The .pth is the bare state dict of the backbone, or a full checkpoint, of which the teacher's
backbone is read ('student' where there is no teacher). What it does not say is by convention: heads
of 64, LayerNorm eps 1e-6, ImageNet's mean and deviation, a center crop. Of a Hugging Face folder
config.json and the image processor's file say it; that processor squashes images.
"""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from grain_jax.convert import foreign, hf_processor, layout, state_dicts, timm_vit

_WHAT = "DINO's vision transformer"
_HEADS = r"head\..*"  # the projection heads of the .pth, which a tower has no use for
_VIT_HEADS = r"pooler\..*|classifier\..*|decoder\..*"  # of the models around a ViTModel
_WEIGHTS = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
_ACTIVATIONS = ("gelu", "quick_gelu")  # the same names and functions as here
_PIXELS = {
  "model.image.mean": (0.485, 0.456, 0.406),
  "model.image.std": (0.229, 0.224, 0.225),
  "model.image.interpolation": "bicubic",
  "data.eval_resize": "center_crop",
}
_FIXED = {"model.image.stem": "linear", "model.pool": "class", "model.projects_images": False}
_ASSUMED = {"method": "clip", "data.max_regions": 0, **_PIXELS}
# Of a ViTModel's blocks: the names on disk, and those that transformers has from version 5 on.
_ON_DISK = {
  "query": "attention.attention.query",
  "key": "attention.attention.key",
  "value": "attention.attention.value",
  "out": "attention.output.dense",
  "fc1": "intermediate.dense",
  "fc2": "output.dense",
}
_IN_MEMORY = {
  "query": "attention.q_proj",
  "key": "attention.k_proj",
  "value": "attention.v_proj",
  "out": "attention.o_proj",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}


def load(path: pathlib.Path) -> foreign.ForeignCheckpoint:
  """Reads a .pth of DINO, or a folder (or a file of weights beside a config.json) of a ViTModel.

  Raises:
    ValueError: it is neither, or a ViTModel that this tower cannot be; one line.
  """
  folder = path if path.is_dir() else path.parent
  if path.is_dir():
    found = [name for name in _WEIGHTS if (path / name).is_file()]
    if not found:
      raise ValueError(
        f"--input={path} has none of {', '.join(_WEIGHTS)}. Name the .pth file, or such a folder."
      )
    path = path / found[0]
  weights = _backbone(state_dicts.load(path))
  state = _without_prefix(state_dicts.arrays(weights, where=str(path)), "backbone.")
  if any(key.removeprefix("vit.").startswith("embeddings.") for key in state):
    return _load_vit(_without_prefix(state, "vit."), path, folder / "config.json")
  state = _without(state, _HEADS, path)
  facts = timm_vit.facts(foreign.Shapes(state, str(path), _WHAT))
  assumed = {
    **_ASSUMED,
    "model.image.heads": max(facts["model.image.width"] // 64, 1),
    "model.image.activation": "gelu",
    "model.image.norm_eps": 1e-6,
  }
  facts |= {**_FIXED, "model.embed_dim": facts["model.image.width"]}
  return foreign.ForeignCheckpoint(
    str(path), state, lambda config: timm_vit.rules(), facts, assumed, part="image"
  )


def _backbone(saved: dict[str, Any]) -> Mapping[str, Any]:
  """The state dict in what the file holds: the teacher's of a full checkpoint."""
  for name in ("teacher", "student", "state_dict"):
    if isinstance(saved.get(name), Mapping):
      return saved[name]
  return saved


def _without_prefix(state: layout.State, prefix: str) -> layout.State:
  """Keys without `prefix`, where any has it."""
  return {key.removeprefix(prefix): value for key, value in state.items()}


def _without(state: layout.State, ignored: str, path: pathlib.Path) -> layout.State:
  """Without the heads that no tower has; says how many arrays they were."""
  kept = state_dicts.without(state, ignored)
  if left_out := [key for key in state if key not in kept]:
    logging.getLogger(__name__).warning(
      "%s: %d arrays of heads are left out: %s", path, len(left_out), layout.few(left_out)
    )
  return kept


def _load_vit(
  state: layout.State, path: pathlib.Path, config: pathlib.Path
) -> foreign.ForeignCheckpoint:
  """A ViTModel's weights, in either of its key forms."""
  facts = _vit_facts(config)
  pixels = hf_processor.read(path.parent, size=facts["model.image.size"], kind=hf_processor.VIT)
  on_disk = any(re.match(r"encoder\.layer\.", key) for key in state)
  return foreign.ForeignCheckpoint(
    where=str(path),
    state=_without(state, _VIT_HEADS, path),
    rules=lambda config: _vit_rules(on_disk=on_disk),
    facts={**facts, **_FIXED, **pixels, "model.embed_dim": facts["model.image.width"]},
    assumed=_ASSUMED,
    part="image",
  )


def _vit_rules(*, on_disk: bool) -> list[layout.Rule]:
  names, ours = (_ON_DISK if on_disk else _IN_MEMORY), "image_tower/blocks"
  theirs = "encoder.layer.{}" if on_disk else "layers.{}"
  patches = "embeddings.patch_embeddings.projection"
  rules = [
    *layout.same("image_tower/class_token", "embeddings.cls_token"),
    *layout.same(
      "image_tower/position_embedding", "embeddings.position_embeddings", layout.BATCHED
    ),
    *layout.same("image_tower/patch_embedding/kernel", f"{patches}.weight", layout.PATCHES),
    *layout.same("image_tower/patch_embedding/bias", f"{patches}.bias"),
    *layout.norm(f"{ours}/norm1", f"{theirs}.layernorm_before"),
    *layout.norm(f"{ours}/norm2", f"{theirs}.layernorm_after"),
    *layout.norm("image_tower/norm", "layernorm"),
  ]
  for name, their_name in names.items():
    room = "mlp" if name.startswith("fc") else "attention"
    rules += layout.linear(f"{ours}/{room}/{name}", f"{theirs}.{their_name}")
  return rules


def _vit_facts(path: pathlib.Path) -> dict[str, Any]:
  """What config.json says, its omissions filled with the defaults of `transformers`."""
  values = state_dicts.read_json(path)
  kind = values.get("model_type") if isinstance(values, dict) else None
  if kind != "vit":
    raise ValueError(f"{path} describes a model of type {kind!r}. Only 'vit' is read.")
  import transformers  # slow to import

  try:
    config = transformers.ViTConfig.from_dict(values)
    facts = {
      "model.image.size": config.image_size,
      "model.image.patch": config.patch_size,
      "model.image.width": config.hidden_size,
      "model.image.depth": config.num_hidden_layers,
      "model.image.heads": config.num_attention_heads,
      "model.image.mlp_ratio": config.intermediate_size / config.hidden_size,
      "model.image.activation": config.hidden_act,
      "model.image.norm_eps": config.layer_norm_eps,
      "model.image.qk_norm": False,
      "model.image.pre_norm": False,
      "model.image.patch_bias": True,
    }
  except Exception as error:  # their own checks raise many kinds
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{path} is not a ViTConfig ({reason}).") from error
  if config.hidden_act not in _ACTIVATIONS:
    raise ValueError(
      f"{path}: hidden_act {config.hidden_act!r} is unknown here; known are "
      f"{', '.join(_ACTIVATIONS)}."
    )
  if not config.qkv_bias or config.num_channels != 3:
    raise ValueError(
      f"{path}: qkv_bias = {config.qkv_bias!r}, num_channels = {config.num_channels!r}; the tower "
      "here has the bias, and three channels."
    )
  return facts
