"""OpenCLIP's open_clip_config.json: the model, and how it sees an image.

{"model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", ...}, "preprocess_cfg": {"mean",
"std", "interpolation", "resize_mode", ...}}, keys that are missing with OpenCLIP's own defaults.
What is said there holds: it is taken over, or refused by its name where this model cannot be so.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from grain_jax.convert import foreign, state_dicts

NAME = "open_clip_config.json"
_OFF = (None, False, {}, [])  # a feature that is not asked for
# Keys that name a feature, and the values with which the model is the one built here; of any
# other key only `_OFF` will do.
_ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
  "model_cfg": {},
  "model_cfg.vision_cfg": {
    "pool_type": ("tok",),
    "pos_embed_type": ("learnable",),
    "block_type": ("default",),
  },
  "model_cfg.text_cfg": {
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    "block_type": ("default",),
    "tokenizer_kwargs": ({"clean": "lower"},),
  },
  "preprocess_cfg": {"mode": ("RGB",)},
}
# Keys read elsewhere in this file, those of training alone, and settings of features that are off.
_FREE: dict[str, frozenset[str]] = {
  "model_cfg": foreign.words(
    "embed_dim vision_cfg text_cfg quick_gelu custom_text init_logit_scale nonscalar_logit_scale "
    "output_dict cast_dtype"
  ),
  "model_cfg.vision_cfg": foreign.words(
    "layers width head_width mlp_ratio patch_size image_size norm_kwargs patch_dropout n_queries "
    "attn_pooler_queries attn_pooler_heads output_tokens timm_model_pretrained timm_pool timm_proj "
    "timm_proj_bias timm_drop timm_drop_path"
  ),
  "model_cfg.text_cfg": foreign.words(
    "context_length vocab_size width heads layers mlp_ratio norm_kwargs pad_id eos_id proj "
    "pooler_type output_tokens hf_model_pretrained hf_proj_type hf_pooler_type"
  ),
  "preprocess_cfg": foreign.words("mean std interpolation resize_mode size fill_color"),
}
_RESIZES = {"shortest": "center_crop", "squash": "squash"}
# 'random' is of training; OpenCLIP's inference is bicubic then.
_INTERPOLATIONS = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
_DEFAULTS = {
  "model_cfg.vision_cfg": {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16,
    "image_size": 224,
  },
  "model_cfg.text_cfg": {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12,
    "mlp_ratio": 4.0,
  },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a file says, checked; `facts` maps config keys to values."""

  where: str  # the file, for errors
  facts: Mapping[str, Any]
  quick_gelu: bool | None  # None: not said, which is GELU to OpenCLIP
  image_size: int  # in pixels; position embeddings of another size are resized to it
  _theirs: Mapping[str, Any]  # model.* key -> (their key, their value)

  def check_weights(self, facts: Mapping[str, Any]) -> None:
    """Raises a one-line ValueError where sizes are not those that the weights have."""
    for key, (name, value) in self._theirs.items():
      found = facts[key]
      ratio = key.endswith("mlp_ratio")
      width = facts[key.replace("mlp_ratio", "width")] if ratio else 0
      if int(width * value) != round(width * found) if ratio else value != found:
        raise ValueError(
          f"{self.where}: {name} = {value!r}, but the weights beside it have {found!r}. Give the "
          "file of these weights."
        )


def read(path: pathlib.Path) -> Settings | None:
  """What the file says; None where there is none.

  Raises:
    ValueError: it is of another form, or says what this model cannot be; one line with the key.
  """
  if not path.is_file():
    return None
  where = str(path)
  values = state_dicts.read_json(path)
  sections = {"model_cfg": _section(values, "model_cfg", where)}
  for part in ("vision_cfg", "text_cfg"):
    sections[f"model_cfg.{part}"] = _section(sections["model_cfg"], part, where)
  sections["preprocess_cfg"] = _section(values, "preprocess_cfg", where, needed=False)
  for name, section in sections.items():
    _check_features(name, section, where)
  model = sections["model_cfg"]
  vision, text = (
    {**_DEFAULTS[name], **{k: v for k, v in sections[name].items() if v is not None}}
    for name in ("model_cfg.vision_cfg", "model_cfg.text_cfg")
  )
  if isinstance(vision["layers"], list):
    raise ValueError(
      f"{where}: model_cfg.vision_cfg.layers = {vision['layers']!r} is a ResNet. Only vision "
      "transformers are read."
    )
  for prefix, part in (("vision_cfg", vision), ("text_cfg", text)):
    for key, value in part.items():
      if key in _DEFAULTS[f"model_cfg.{prefix}"]:
        part[key] = _size(value, f"{where}: model_cfg.{prefix}.{key}", whole=key != "mlp_ratio")
  theirs = {
    "model.embed_dim": ("embed_dim", model.get("embed_dim")),
    "model.image.width": ("vision_cfg.width", vision["width"]),
    "model.image.depth": ("vision_cfg.layers", vision["layers"]),
    "model.image.patch": ("vision_cfg.patch_size", vision["patch_size"]),
    "model.image.mlp_ratio": ("vision_cfg.mlp_ratio", vision["mlp_ratio"]),
    "model.text.context": ("text_cfg.context_length", text["context_length"]),
    "model.text.vocab_size": ("text_cfg.vocab_size", text["vocab_size"]),
    "model.text.width": ("text_cfg.width", text["width"]),
    "model.text.depth": ("text_cfg.layers", text["layers"]),
    "model.text.mlp_ratio": ("text_cfg.mlp_ratio", text["mlp_ratio"]),
  }
  quick_gelu = model.get("quick_gelu")
  if quick_gelu is not None and not isinstance(quick_gelu, bool):
    raise ValueError(f"{where}: model_cfg.quick_gelu = {quick_gelu!r} is neither true nor false.")
  facts = {
    "model.image.heads": max(vision["width"] // vision["head_width"], 1),
    "model.text.heads": text["heads"],
    "model.image.norm_eps": _norm_eps(vision, f"{where}: model_cfg.vision_cfg"),
    "model.text.norm_eps": _norm_eps(text, f"{where}: model_cfg.text_cfg"),
    **_pixels(sections["preprocess_cfg"], vision["image_size"], where),
  }
  return Settings(
    where=where,
    facts=facts,
    quick_gelu=quick_gelu,
    image_size=vision["image_size"],
    _theirs={key: (f"model_cfg.{name}", value) for key, (name, value) in theirs.items()},
  )


def _section(values: Any, key: str, where: str, *, needed: bool = True) -> dict[str, Any]:
  section = values.get(key) if isinstance(values, dict) else None
  if section is None and not needed:
    return {}
  if not isinstance(section, dict):
    raise ValueError(f"{where} is not of OpenCLIP's form: {key} = {section!r} is no object.")
  return section


def _check_features(name: str, section: Mapping[str, Any], where: str) -> None:
  for key, value in section.items():
    if key in _FREE[name] or value in _OFF or value in _ALLOWED[name].get(key, ()):
      continue
    known = [repr(v) for v in _ALLOWED[name].get(key, ())]
    raise ValueError(
      f"{where}: {name}.{key} = {value!r} is not built here"
      f"{f'; {known[0]} is' if known else ''}. Take a plain CLIP with a vision transformer."
    )


def _size(value: Any, name: str, *, whole: bool) -> Any:
  """A positive number; both sides of a square are one."""
  if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
    value = value[0]
  kinds = (int,) if whole else (int, float)
  if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
    raise ValueError(f"{name} = {value!r} is no positive size (of a square, where it has sides).")
  return value


def _norm_eps(part: Mapping[str, Any], name: str) -> float:
  """Of LayerNorm; torch's where nothing is said."""
  values = part.get("norm_kwargs") or {}
  if not isinstance(values, dict) or set(values) - {"eps"}:
    raise ValueError(f"{name}.norm_kwargs = {values!r} is not built here: eps alone is.")
  return float(values.get("eps", 1e-5))


def _pixels(cfg: Mapping[str, Any], size: int, where: str) -> dict[str, Any]:
  facts = {
    "model.image.mean": foreign.CLIP_PIXELS["model.image.mean"],
    "model.image.std": foreign.CLIP_PIXELS["model.image.std"],
  }
  for key in ("mean", "std"):
    value = cfg.get(key)
    if value is not None:
      value = value if isinstance(value, list) else [value] * 3  # as OpenCLIP reads one number
      facts[f"model.image.{key}"] = foreign.channels(value, f"{where}: preprocess_cfg.{key}")
  for ours, key, table in (
    ("model.image.interpolation", "interpolation", _INTERPOLATIONS),
    ("data.eval_resize", "resize_mode", _RESIZES),
  ):
    value = cfg.get(key) or next(iter(table))
    if value not in table:
      raise ValueError(
        f"{where}: preprocess_cfg.{key} = {value!r} is not built here; {', '.join(table)} are."
      )
    facts[ours] = table[value]
  if cfg.get("size") is not None:
    theirs = cfg["size"]
    theirs = theirs[-2:] if isinstance(theirs, list) else theirs
    if _size(theirs, f"{where}: preprocess_cfg.size", whole=True) != size:
      raise ValueError(
        f"{where}: preprocess_cfg.size = {cfg['size']!r}, but model_cfg.vision_cfg.image_size = "
        f"{size}. Make them one."
      )
  return facts
