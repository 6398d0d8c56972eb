"""The transformer of OpenAI's CLIP, whose names OpenCLIP, CE-CLIP and GRAIN's text tower keep."""

from __future__ import annotations

from typing import Any

from grain_jax.convert import foreign, layout


def blocks(ours: str, theirs: str) -> list[layout.Rule]:
  """The layers of a tower, e.g. of 'text_tower/blocks' and 'transformer.resblocks'."""
  prefix = f"{theirs}.{{}}"
  return [
    *layout.norm(f"{ours}/norm1", f"{prefix}.ln_1"),
    *layout.joined(
      f"{ours}/attention", f"{prefix}.attn.in_proj_weight", f"{prefix}.attn.in_proj_bias"
    ),
    *layout.linear(f"{ours}/attention/out", f"{prefix}.attn.out_proj"),
    *layout.norm(f"{ours}/norm2", f"{prefix}.ln_2"),
    *layout.linear(f"{ours}/mlp/fc1", f"{prefix}.mlp.c_fc"),
    *layout.linear(f"{ours}/mlp/fc2", f"{prefix}.mlp.c_proj"),
  ]


def text(prefix: str = "") -> list[layout.Rule]:
  """The text tower, its projection and the logit scale."""
  return [
    *layout.same("text_tower/token_embedding", f"{prefix}token_embedding.weight"),
    *layout.same("text_tower/position_embedding", f"{prefix}positional_embedding"),
    *blocks("text_tower/blocks", f"{prefix}transformer.resblocks"),
    *layout.norm("text_tower/norm", f"{prefix}ln_final"),
    *layout.same("text_projection/kernel", f"{prefix}text_projection"),
    *layout.same("logit_scale", f"{prefix}logit_scale"),
  ]


def text_facts(shapes: foreign.Shapes, prefix: str = "") -> dict[str, Any]:
  """Sizes of the text tower and of the joint space."""
  vocabulary, width = shapes.shape_of(f"{prefix}token_embedding.weight", 2)
  foreign.check_vocabulary(vocabulary, where=shapes.where)
  layers = f"{prefix}transformer.resblocks"
  return {
    "model.embed_dim": shapes.shape_of(f"{prefix}text_projection", 2)[1],
    "model.text.vocab_size": vocabulary,
    "model.text.width": width,
    "model.text.context": shapes.shape_of(f"{prefix}positional_embedding", 2)[0],
    "model.text.depth": shapes.depth(layers.replace(".", r"\.") + r"\.(\d+)\."),
    "model.text.mlp_ratio": shapes.shape_of(f"{layers}.0.mlp.c_fc.weight", 2)[0] / width,
  }


def text_assumed(width: int) -> dict[str, Any]:
  """OpenAI's conventions: heads of 64, LayerNorm eps of torch."""
  return {"model.text.heads": max(width // 64, 1), "model.text.norm_eps": 1e-5}
