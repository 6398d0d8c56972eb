"""OpenCLIP's and OpenAI's CLIP with a vision transformer (and CE-CLIP, which is one).

A state dict, plain or in a training checkpoint under 'state_dict', with or without 'module.'. What
it does not say: the activation (`quick_gelu`: OpenAI's weights and all that is trained from them,
but not OpenCLIP's own models) and the number of heads (OpenCLIP's: width / 64, and 16 for
ViT-H, -g and -bigG).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import ml_collections

from grain_jax.convert import clip_blocks, foreign, layout, state_dicts

# Buffers, and what OpenAI's archives note beside the weights.
_IGNORED = r"(visual\.)?attn_mask|input_resolution|context_length|vocab_size"
_HEADS = {1280: 16, 1408: 16, 1664: 16}


def rules(config: ml_collections.ConfigDict) -> list[layout.Rule]:
  """The table; it is the same for all sizes."""
  del config
  return [
    *layout.same("image_tower/class_token", "visual.class_embedding", layout.VECTOR),
    *layout.same("image_tower/patch_embedding/kernel", "visual.conv1.weight", layout.PATCHES),
    *layout.same("image_tower/position_embedding", "visual.positional_embedding"),
    *layout.norm("image_tower/pre_norm", "visual.ln_pre"),
    *clip_blocks.blocks("image_tower/blocks", "visual.transformer.resblocks"),
    *layout.norm("image_tower/norm", "visual.ln_post"),
    *layout.same("image_projection/kernel", "visual.proj"),
    *clip_blocks.text(),
  ]


def load(path: pathlib.Path, *, quick_gelu: bool | None = None) -> foreign.ForeignCheckpoint:
  """Reads a file of weights.

  Args:
    path: .pt, .bin or .safetensors.
    quick_gelu: whether both towers were trained with QuickGELU instead of GELU; None: not known,
      GELU is assumed, as OpenCLIP does.

  Raises:
    ValueError: not such a model, or one whose image tower is not a plain vision transformer.
  """
  where = str(path)
  weights = state_dicts.load(path)
  if isinstance(weights.get("state_dict"), Mapping):
    weights = weights["state_dict"]
  state = state_dicts.without(state_dicts.arrays(weights, where=where), _IGNORED)
  if any(key.startswith("visual.trunk.") for key in state):
    raise ValueError(
      f"{where} has a timm image tower (visual.trunk.*), as CLIPpy's checkpoints have: CLIPpy's "
      "towers are not built yet."
    )
  if any(key.startswith("visual.layer1.") for key in state):
    raise ValueError(
      f"{where} is CLIP with a ResNet image tower. Only vision transformers are read."
    )
  if state.get("logit_scale") is not None and state["logit_scale"].shape == (1,):
    state["logit_scale"] = state["logit_scale"].reshape(())
  shapes = foreign.Shapes(state, where, "CLIP with a vision transformer in OpenCLIP's layout")
  width, _, patch, _ = shapes.shape_of("visual.conv1.weight", 4)
  positions, _ = shapes.shape_of("visual.positional_embedding", 2)
  hidden = shapes.shape_of("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
  text = clip_blocks.text_facts(shapes)
  facts = {
    "method": "clip",
    "model.image.size": shapes.pixels(positions, patch),
    "model.image.width": width,
    "model.image.depth": shapes.depth(r"visual\.transformer\.resblocks\.(\d+)\."),
    "model.image.patch": patch,
    "model.image.mlp_ratio": hidden / width,
    "model.image.qk_norm": False,
    "model.image.pre_norm": True,
    "model.image.patch_bias": False,
    **text,
  }
  name = "quick_gelu" if quick_gelu else "gelu"
  activation = {"model.image.activation": name, "model.text.activation": name}
  if quick_gelu is not None:
    facts |= activation
  assumed = {
    **activation,
    "model.image.heads": _HEADS.get(width, max(width // 64, 1)),
    "model.image.norm_eps": 1e-5,
    **clip_blocks.text_assumed(text["model.text.width"]),
    **foreign.CLIP_PIXELS,
    "data.max_regions": 0,
  }
  return foreign.ForeignCheckpoint(where, state, rules, facts, assumed)
