"""How image processors of `transformers` (CLIP, ViT, SigLIP) see images: their file, both ways."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from grain_jax.convert import foreign, state_dicts

NAME = "preprocessor_config.json"
_LATER = "processor_config.json"  # what took its place: the same under 'image_processor'
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers
# Keys that change no pixel of an RGB image, or are read below.
_KNOWN = foreign.words(
  "image_mean image_std resample size crop_size do_resize do_center_crop do_rescale "
  "rescale_factor do_normalize do_convert_rgb image_processor_type feature_extractor_type "
  "processor_class default_to_square data_format input_data_format return_tensors use_fast device "
  "disable_grouping transformers_version _processor_class _valid_processor_keys"
)


class Kind(NamedTuple):
  """A class of processors, and what it does where its file says nothing."""

  types: tuple[str, ...]  # with -Fast or -Pil behind them
  mean: tuple[float, ...]
  std: tuple[float, ...]
  resample: int
  crops: bool


CLIP = Kind(
  ("CLIPImageProcessor", "CLIPFeatureExtractor"),
  mean=foreign.CLIP_PIXELS["model.image.mean"],
  std=foreign.CLIP_PIXELS["model.image.std"],
  resample=3,
  crops=True,
)
VIT = Kind(
  ("ViTImageProcessor", "ViTFeatureExtractor"),
  mean=(0.5,) * 3,
  std=(0.5,) * 3,
  resample=2,
  crops=False,
)
SIGLIP = Kind(
  ("SiglipImageProcessor", "SiglipFeatureExtractor"),
  mean=(0.5,) * 3,
  std=(0.5,) * 3,
  resample=3,
  crops=False,
)


def read(folder: pathlib.Path, *, size: int, kind: Kind = CLIP) -> dict[str, Any]:
  """Config keys and values of a folder's processor, what it omits as its class has it.

  Args:
    folder: with its file, or without: then nothing is said.
    size: of the model's images in pixels.
    kind: the class that it should be.

  Raises:
    ValueError: it does what is not done here; one line with the key.
  """
  path = next((folder / n for n in (NAME, _LATER) if (folder / n).is_file()), None)
  if path is None:
    return {}
  values = state_dicts.read_json(path)
  if path.name == _LATER and isinstance(values, dict):
    values = values.get("image_processor")
    if values is None:
      return {}
  if not isinstance(values, dict):
    raise ValueError(f"{path} holds no image processor, but a {type(values).__name__}.")
  _check_features(values, path, kind)
  facts: dict[str, Any] = {"model.image.mean": kind.mean, "model.image.std": kind.std}
  for key, theirs in (("model.image.mean", "image_mean"), ("model.image.std", "image_std")):
    if values.get(theirs) is not None:
      facts[key] = foreign.channels(values[theirs], f"{path}: {theirs}")
  if not _get(values, "do_normalize", True):
    facts |= {"model.image.mean": (0.0,) * 3, "model.image.std": (1.0,) * 3}
  resample = _get(values, "resample", kind.resample)
  if resample not in _RESAMPLE:
    raise ValueError(
      f"{path}: resample = {resample!r} is not built here; 2 (bilinear) and 3 (bicubic) are."
    )
  facts["model.image.interpolation"] = _RESAMPLE[resample]
  facts["data.eval_resize"] = _resize(values, size, path, kind)
  return facts


def write(path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """preprocessor_config.json in the folder `path`: images as the model sees them."""
  image = config.model.image
  crops = config.data.eval_resize == "center_crop"
  sides = {"height": image.size, "width": image.size}
  processor = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": image.size} if crops else sides,
    "resample": {name: number for number, name in _RESAMPLE.items()}[image.interpolation],
    "do_center_crop": crops,
    "crop_size": sides,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(image.mean),
    "image_std": list(image.std),
  }
  (path / NAME).write_text(json.dumps(processor, indent=2) + "\n")


def _get(values: Mapping[str, Any], key: str, default: Any) -> Any:
  value = values.get(key)
  return default if value is None else value


def _check_features(values: Mapping[str, Any], path: pathlib.Path, kind: Kind) -> None:
  name = values.get("image_processor_type") or values.get("feature_extractor_type")
  if str(name or kind.types[0]).removesuffix("Fast").removesuffix("Pil") not in kind.types:
    raise ValueError(f"{path} is of a {name}. Only {' and '.join(kind.types)} are read.")
  unknown = [key for key, value in values.items() if key not in _KNOWN and value]
  if unknown:
    key = unknown[0]
    raise ValueError(
      f"{path}: {key} = {values[key]!r} is not built here. {kind.types[0]} has no such key."
    )
  if not _get(values, "do_resize", True):
    raise ValueError(f"{path}: do_resize = false, but images of any size are resized here.")
  factor = _get(values, "rescale_factor", 1 / 255)
  scaled = isinstance(factor, (int, float)) and abs(factor * 255 - 1) < 1e-4
  if not _get(values, "do_rescale", True) or not scaled:
    raise ValueError(
      f"{path}: do_rescale = {values.get('do_rescale')!r}, rescale_factor = {factor!r}: pixels are "
      "in [0, 1] here, of factor 1/255."
    )


def _resize(values: Mapping[str, Any], size: int, path: pathlib.Path, kind: Kind) -> str:
  """Our name for how it makes any image a square of the model's size."""
  theirs = _get(values, "size", size)
  if not kind.crops and isinstance(theirs, int):  # one number: the shorter edge to CLIP's alone
    theirs = {"height": theirs, "width": theirs}
  edge = theirs.get("shortest_edge") if isinstance(theirs, dict) else theirs
  crops = _get(values, "do_center_crop", kind.crops)
  crop = _get(values, "crop_size", size)
  if isinstance(crop, dict) and crop.get("height") == crop.get("width"):
    crop = crop.get("height")
  if theirs in ({"height": size, "width": size}, [size, size]) and (not crops or crop == size):
    return "squash"
  whole = not isinstance(theirs, dict) or set(theirs) == {"shortest_edge"}
  if whole and edge == size and crops and crop == size:
    return "center_crop"
  raise ValueError(
    f"{path}: size = {theirs!r}, do_center_crop = {str(crops).lower()}, crop_size = {crop!r} is "
    f"not built here: images of {size} x {size} pixels are either the whole image, or the middle "
    "of one whose shorter edge has so many."
  )
