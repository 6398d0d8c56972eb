"""OpenCLIP's and OpenAI's CLIP with a vision transformer (and CE-CLIP, which is one).

A state dict, plain or in a training checkpoint under 'state_dict'. What it does not say stands in
open_clip_config.json beside it, where there is one. Else it is by convention: OpenAI's mean,
deviation and crop, the number of heads (OpenCLIP's: width / 64, and 16 for ViT-H, -g and -bigG) and
the activation: GELU, unless `quick_gelu`, "quickgelu" in the name or what OpenAI notes beside its
weights says otherwise (they have QuickGELU and all that is trained from them, but not OpenCLIP's
own models).
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

import ml_collections

from grain_jax.convert import clip_blocks, foreign, layout, open_clip_config, state_dicts

# What OpenAI's archives note beside the weights, and nobody else.
_OF_OPENAI = ("input_resolution", "context_length", "vocab_size")
_IGNORED = "|".join([r"(visual\.)?attn_mask", *_OF_OPENAI])
_HEADS = {1280: 16, 1408: 16, 1664: 16}
# As OpenCLIP names them on the hub.
_WEIGHTS = (
  "open_clip_model.safetensors",
  "open_clip_pytorch_model.safetensors",
  "open_clip_pytorch_model.bin",
  "open_clip_model.safetensors.index.json",
  "open_clip_pytorch_model.bin.index.json",
)


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
  """Reads a file of weights, and open_clip_config.json beside it.

  Args:
    path: .pt, .bin or .safetensors, or a folder as OpenCLIP has it on the hub.
    quick_gelu: whether both towers were trained with QuickGELU instead of GELU; None: as the
      configuration, the name or OpenAI's notes say, else GELU, as OpenCLIP does.

  Raises:
    ValueError: not such a model, or one whose image tower is not a plain vision transformer.
  """
  if path.is_dir():
    found = [name for name in _WEIGHTS if (path / name).is_file()]
    if not found:
      raise ValueError(f"--input={path} has none of {', '.join(_WEIGHTS)}. Name the file.")
    path = path / found[0]
  where = str(path)
  settings = open_clip_config.read(path.with_name(open_clip_config.NAME))
  weights = state_dicts.load(path)
  run_name = str(weights.get("name", "")) if "state_dict" in weights else ""
  if isinstance(weights.get("state_dict"), Mapping):
    weights = weights["state_dict"]
  state = _flat_text(state_dicts.arrays(weights, where=where))
  of_openai = all(name in state for name in _OF_OPENAI)
  state = state_dicts.without(state, _IGNORED)
  if any(key.startswith("visual.trunk.") for key in state):
    raise ValueError(
      f"{where} has a timm image tower (visual.trunk.*), as CLIPpy's checkpoints have: read it "
      "with --from=clippy."
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
  said = quick_gelu
  if settings is not None:
    settings.check_weights(facts)
    said = _agreed(quick_gelu, settings, path.name)
    facts |= settings.facts
  quick = said if said is not None else of_openai or _named_quick(path.name, run_name)
  name = "quick_gelu" if quick else "gelu"
  activation = {"model.image.activation": name, "model.text.activation": name}
  if said is not None:
    facts |= activation
  assumed = {
    **activation,
    "model.image.heads": _HEADS.get(width, max(width // 64, 1)),
    "model.image.norm_eps": 1e-5,
    **clip_blocks.text_assumed(text["model.text.width"]),
    **foreign.CLIP_PIXELS,
    "data.max_regions": 0,
  }
  size = None if settings is None else settings.image_size
  return foreign.ForeignCheckpoint(
    where,
    state,
    rules,
    facts,
    assumed,
    image_size=None if size == facts["model.image.size"] else size,
  )


def _flat_text(state: layout.State) -> layout.State:
  """Without the 'text.' that OpenCLIP's models with `custom_text` put before their text tower."""
  if "text.token_embedding.weight" not in state:
    return state
  return {key.removeprefix("text."): value for key, value in state.items()}


def _named_quick(*names: str) -> bool:
  """Whether OpenCLIP's name of a model is in one of these: 'ViT-B-32-quickgelu'."""
  return any("quickgelu" in re.sub(r"[-_ ]", "", name.lower()) for name in names)


def _agreed(flag: bool | None, settings: open_clip_config.Settings, name: str) -> bool:
  """The activation of which flag, configuration and name are not at odds."""
  if flag is not None and settings.quick_gelu not in (None, flag):
    raise ValueError(
      f"--quick_gelu={str(flag).lower()}, but {settings.where} has model_cfg.quick_gelu = "
      f"{str(settings.quick_gelu).lower()}. Leave the flag away, or mend the file."
    )
  said = settings.quick_gelu if flag is None else flag
  if said is None and _named_quick(name):
    raise ValueError(
      f"{settings.where} does not say model_cfg.quick_gelu, which is GELU to OpenCLIP, but the "
      f"name {name} does. Give --quick_gelu or --noquick_gelu."
    )
  return bool(said)
