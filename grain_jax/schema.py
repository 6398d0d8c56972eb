"""Names, shapes and units of a record and of a batch: the only place they are defined.

A record is one image with its texts and regions, as it stands in a shard. A batch is what the host
hands to the devices. `data` writes both, `models` and `objectives` read the second.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Field:
  """One named array: symbolic shape, NumPy dtype name, meaning."""

  shape: tuple[str | int, ...]
  dtype: str
  doc: str


# A record's keys, as TFDS features (`data.build` turns this into a FeaturesDict).
RECORD_KEY = "key"  # str, unique in the dataset
RECORD_IMAGE = "image"  # JPEG bytes, RGB
RECORD_CAPTIONS = "captions"  # [str], the original first, then the LLM's
RECORD_REGIONS = "regions"  # [{description: str, box: f32 [4], score: f32, negatives: [str]}]
RECORD_IDS = "ids"  # [str], names of the image elsewhere; of a source alone, not in a shard
RECORD_NEGATIVES = "negatives"  # [{caption: str, kind: str}]
RECORD_TOKEN_IDS = "token_ids"  # [bytes], of each text (`data.token_ids`); in a shard, not in TFDS
RECORD_MASK = "mask"  # u8 [H, W]: 0 background, else 1 + index into the dataset's mask names
RECORD_LABEL = "label"  # i64, index into the split's class names

# Kinds of hard negatives, in the order of their ids (CE-CLIP, arXiv 2306.08832).
NEGATIVE_KINDS = ("relation", "attribute", "object", "action")

# Pixels of the largest image that is decoded: where PIL begins to warn of decompression bombs. One
# of that size takes 0.36 GB in PIL, and twice that where it has transparency.
MAX_PIXELS = 89_478_485
# PIL itself refuses more than twice its own limit.
MOST_PIXELS = 2 * MAX_PIXELS

# A host batch: b images, L tokens a row, R regions, K negatives of the caption, N of each region;
# T = 1 + R + K + R N texts an image in the order caption, R descriptions, K negatives, and region
# by region its N false descriptions.
BATCH: Mapping[str, Field] = {
  "image": Field(("b", "H", "W", 3), "uint8", "RGB, not normalised"),
  "tokens": Field(("b", "L"), "int32", "token ids of all texts of an image in one row; 0 pads"),
  "segments": Field(("b", "L"), "int32", "1 + index of the text a token belongs to; 0 is padding"),
  "positions": Field(("b", "L"), "int32", "position of a token within its own text"),
  "ends": Field(("b", "T"), "int32", "index in the row of each text's last token; 0 if absent"),
  "text_mask": Field(("b", "T"), "bool", "the text exists and fits"),
  "negative_kind": Field(("b", "K"), "int32", "index into NEGATIVE_KINDS"),
  "region_negative_mask": Field(
    ("b", "R", "N"), "bool", "a false description of it exists and fits"
  ),
  "boxes": Field(("b", "R", 4), "float32", "(cx, cy, w, h) as fractions of the image"),
  "region_mask": Field(("b", "R"), "bool", "the region exists"),
  "example_mask": Field(("b",), "bool", "the example counts: false for padding and bad records"),
}

# Besides, where several sources are trained on (`config.data.sources`).
SOURCE = "source"
_OF_SOURCES = {SOURCE: Field(("b",), "int32", "which of config.data.sources it is of")}


def source_names(sources: Sequence[Mapping[str, Any]]) -> list[str]:
  """Of each of `config.data.sources` its name, or that of its folder."""
  return [entry.get("name") or pathlib.PurePath(entry["dir"]).name for entry in sources]


def batch_shapes(
  *,
  batch: int,
  image_size: int,
  row_length: int,
  regions: int,
  negatives: int = 0,
  region_negatives: int = 0,
  sources: int = 0,
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype of each array of a host batch.

  Args:
    batch: images in the batch (b).
    image_size: side of the square image in pixels (H = W).
    row_length: tokens in a packed row (L).
    regions: regions an image (R).
    negatives: hard-negative captions an image (K).
    region_negatives: false descriptions a region (N).
    sources: of a mixture; 0: there is none, and no field `SOURCE`.

  Returns:
    {name: (shape, dtype)} in the order of `BATCH`.
  """
  sizes: dict[str | int, int] = {
    "b": batch,
    "H": image_size,
    "W": image_size,
    "L": row_length,
    "T": 1 + regions + negatives + regions * region_negatives,
    "R": regions,
    "K": negatives,
    "N": region_negatives,
  }
  return {
    name: (tuple(sizes.get(d, d) for d in field.shape), np.dtype(field.dtype))  # type: ignore
    for name, field in (BATCH | _OF_SOURCES if sources else BATCH).items()
  }


def check_batch(batch: Mapping[str, Any], /, **sizes: int) -> None:
  """Raises a one-line ValueError where `batch` differs from `batch_shapes(**sizes)`."""
  want = batch_shapes(**sizes)
  if batch.keys() != want.keys():
    missing, extra = sorted(want.keys() - batch.keys()), sorted(batch.keys() - want.keys())
    raise ValueError(f"batch has the wrong keys: missing {missing}, unexpected {extra}.")
  for name, (shape, dtype) in want.items():
    value = batch[name]
    if tuple(value.shape) != shape or np.dtype(value.dtype) != dtype:
      raise ValueError(
        f"batch[{name!r}] is {value.dtype}{list(value.shape)}, expected {dtype}{list(shape)}."
      )


def corners_to_center(boxes: np.ndarray) -> np.ndarray:
  """(ymin, xmin, ymax, xmax) of a record -> (cx, cy, w, h) of a batch, both in [0, 1], [..., 4]."""
  ymin, xmin, ymax, xmax = np.moveaxis(np.asarray(boxes, np.float32), -1, 0)
  return np.stack([(xmin + xmax) / 2, (ymin + ymax) / 2, xmax - xmin, ymax - ymin], axis=-1)


def center_to_corners(boxes: np.ndarray) -> np.ndarray:
  """(cx, cy, w, h) of a batch -> (ymin, xmin, ymax, xmax) of a record, both in [0, 1], [..., 4]."""
  cx, cy, w, h = np.moveaxis(np.asarray(boxes, np.float32), -1, 0)
  return np.stack([cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2], axis=-1)


def check_max_pixels(max_pixels: Any, name: str = "config.data.max_pixels") -> None:
  """Raises a one-line ValueError where a limit of pixels is none that can be kept.

  Args:
    max_pixels: of the largest image to decode.
    name: where it was given.
  """
  whole = isinstance(max_pixels, int) and not isinstance(max_pixels, bool)
  if not whole or not 1 <= max_pixels <= MOST_PIXELS:
    raise ValueError(
      f"{name} = {max_pixels!r} is not in [1, {MOST_PIXELS}]: PIL opens no larger images. Choose "
      "another."
    )
