"""CLIPpy's image tower (Ranasinghe et al., ICCV 2023), of a checkpoint such as clippy_5k.pt.

OpenCLIP's training checkpoint, or its bare state dict: a DINO ViT in timm's names under
'visual.trunk', a Sentence-T5 under 'text'. The image tower alone is read, and how many arrays are
left out is said. By convention: heads of 64, GELU, LayerNorm eps 1e-6, OpenAI's pixels and crop.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping

from grain_jax.convert import foreign, layout, state_dicts, timm_vit

_TRUNK = "visual.trunk."
_OTHERS = r"text\..*|logit_scale"


def load(path: pathlib.Path, tokenizer: str | None = None) -> foreign.ForeignCheckpoint:
  """Reads the image tower of a checkpoint.

  Raises:
    ValueError: it has no such tower, or other weights beside it; one line.
  """
  weights = state_dicts.load(path)
  if isinstance(weights.get("state_dict"), Mapping):
    weights = weights["state_dict"]
  state = state_dicts.arrays(weights, where=str(path))
  others = [key for key in state if key not in state_dicts.without(state, _OTHERS)]
  if others:
    logging.getLogger(__name__).warning(
      "%s: %d arrays beside the image tower are left out: %s",
      path, len(others), layout.few(others),
    )  # fmt: skip
  return image_tower(state_dicts.without(state, _OTHERS), where=str(path))


def image_tower(state: layout.State, *, where: str) -> foreign.ForeignCheckpoint:
  """The image tower of weights 'visual.trunk.*'; CLIPpy max-pools its tokens, without projection.

  Args:
    state: the weights, with nothing beside them.
    where: the file, for errors.
  """
  shapes = foreign.Shapes(state, where, "CLIPpy with its image tower in timm's names")
  facts = timm_vit.facts(shapes, _TRUNK)
  assumed = {
    "method": "clip",
    "data.max_regions": 0,
    "model.image.heads": max(facts["model.image.width"] // 64, 1),
    "model.image.activation": "gelu",
    "model.image.norm_eps": 1e-6,
    **foreign.CLIP_PIXELS,
  }
  return foreign.ForeignCheckpoint(
    where,
    state,
    lambda config: timm_vit.rules(_TRUNK, qk_norm=config.model.image.qk_norm),
    {**facts, "model.image.stem": "linear"},
    assumed,
    part="image",
  )
