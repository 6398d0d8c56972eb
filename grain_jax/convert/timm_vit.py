"""The plain vision transformer in timm's names: GRAIN's published tower, DINO's and CLIPpy's."""

from __future__ import annotations

import re
from typing import Any

from grain_jax.convert import foreign, layout


def rules(prefix: str = "", *, qk_norm: bool = False) -> list[layout.Rule]:
  """The table of an image tower.

  Args:
    prefix: of their keys, e.g. 'visual.trunk.'.
    qk_norm: with LayerNorm on queries and keys.
  """
  block, ours = f"{prefix}blocks.{{}}", "image_tower/blocks"
  table = [
    *layout.same("image_tower/class_token", f"{prefix}cls_token"),
    *layout.same("image_tower/position_embedding", f"{prefix}pos_embed", layout.BATCHED),
    *layout.same(
      "image_tower/patch_embedding/kernel", f"{prefix}patch_embed.proj.weight", layout.PATCHES
    ),
    *layout.same("image_tower/patch_embedding/bias", f"{prefix}patch_embed.proj.bias"),
    *layout.norm(f"{ours}/norm1", f"{block}.norm1"),
    *layout.joined(f"{ours}/attention", f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias"),
    *layout.linear(f"{ours}/attention/out", f"{block}.attn.proj"),
    *layout.norm(f"{ours}/norm2", f"{block}.norm2"),
    *layout.linear(f"{ours}/mlp/fc1", f"{block}.mlp.fc1"),
    *layout.linear(f"{ours}/mlp/fc2", f"{block}.mlp.fc2"),
    *layout.norm("image_tower/norm", f"{prefix}norm"),
  ]
  if qk_norm:
    table += layout.norm(f"{ours}/attention/query_norm", f"{block}.attn.q_norm")
    table += layout.norm(f"{ours}/attention/key_norm", f"{block}.attn.k_norm")
  return table


def facts(shapes: foreign.Shapes, prefix: str = "") -> dict[str, Any]:
  """What the weights show of the tower, as config keys and values; heads they do not."""
  width, _, patch, _ = shapes.shape_of(f"{prefix}patch_embed.proj.weight", 4)
  _, positions, _ = shapes.shape_of(f"{prefix}pos_embed", 3)
  return {
    "model.image.size": shapes.pixels(positions, patch),
    "model.image.width": width,
    "model.image.depth": shapes.depth(rf"{re.escape(prefix)}blocks\.(\d+)\."),
    "model.image.patch": patch,
    "model.image.mlp_ratio": shapes.shape_of(f"{prefix}blocks.0.mlp.fc1.weight", 2)[0] / width,
    "model.image.qk_norm": f"{prefix}blocks.0.attn.q_norm.weight" in shapes.state,
    "model.image.pre_norm": False,
    "model.image.patch_bias": True,
  }
