"""A record: its bytes in a shard, and the checks it passes before it goes there.

A record is a dict with the keys of `schema.RECORD_*`. In a shard it is a serialised
`tf.train.Example`, laid out as TFDS lays out `metadata.features(...)`, so that TFDS reads it back.
"""

from __future__ import annotations

import io
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from grain_jax import failures, places, schema
from grain_jax.data import box_formats, decoding, example_proto

# Why `check` drops something; the manifest counts each by this name.
MISSING_IMAGE = "missing_image"
CORRUPT_IMAGE = "corrupt_image"
IMAGE_TOO_LARGE = "image_too_large"  # more pixels than --max_pixels
NO_CAPTION = "no_caption"
EMPTY_CAPTION = "empty_caption"
EMPTY_DESCRIPTION = "empty_description"
EMPTY_NEGATIVE = "empty_negative"  # a false caption or description without a character
BOX_NOT_FINITE = "box_not_finite"
BOX_OUTSIDE = "box_outside_image"
BOX_NO_AREA = "box_without_area"
_MOST_SCORE = float(np.finfo(np.float32).max)  # shards hold float32
BOX_UNDER_A_PIXEL = "box_under_a_pixel"  # all four within 1, given as pixels
MALFORMED = "malformed"


def _png(mask: np.ndarray) -> bytes:
  png = io.BytesIO()
  Image.fromarray(np.asarray(mask, np.uint8)).save(png, "PNG")
  return png.getvalue()


_NO_MASK = _png(np.zeros((1, 1)))


class Parsed(NamedTuple):
  """What training reads of a record. Texts are UTF-8 bytes."""

  key: bytes
  image: bytes
  captions: list[bytes]
  descriptions: list[bytes]
  boxes: np.ndarray  # f32 [n, 4] (ymin, xmin, ymax, xmax)
  scores: np.ndarray  # f32 [n]
  negatives: list[tuple[bytes, bytes]]  # (caption, kind)
  region_negatives: list[list[bytes]]  # false descriptions of each region
  mask: bytes  # PNG, or empty
  label: int  # -1 where there is none
  token_ids: Mapping[bytes, bytes]  # by text, see `token_ids`; empty where the shard holds none


class Checked(NamedTuple):
  """A record after `check`, and what it lost."""

  record: dict[str, Any] | None  # None: refused as a whole
  dropped: list[tuple[str, str]]  # (what: records | captions | regions | negatives, why: see above)
  fates: tuple[str, ...] = ()  # of the regions given, in their order: '' if kept, else why not
  has_line: bool | None = None  # in --annotated; None: that was not looked for


class Refused(NamedTuple):
  """In the place of a record: something that could not be made into one, and why."""

  key: str
  what: str  # records | captions | regions | negatives
  why: str


def encode(
  record: Mapping[str, Any],
  *,
  with_mask: bool = False,
  with_label: bool = False,
  token_ids: Callable[[Sequence[str]], Sequence[bytes]] | None = None,
) -> bytes:
  """A record as the bytes that TFDS would write, at a tenth of its time.

  Args:
    record: keys of `schema.RECORD_*`.
    with_mask: the dataset has masks.
    with_label: the dataset has labels.
    token_ids: gives the ids of texts, which are then written too; TFDS does not look at them.
  """
  example = example_proto.Example()
  feature = example.features.feature
  regions = record.get(schema.RECORD_REGIONS, ())
  negatives = record.get(schema.RECORD_NEGATIVES, ())

  def texts(name: str, values) -> None:
    feature[name].bytes_list.value.extend(v.encode() for v in values)

  texts(schema.RECORD_KEY, [record[schema.RECORD_KEY]])
  feature[schema.RECORD_IMAGE].bytes_list.value.append(record[schema.RECORD_IMAGE])
  texts(schema.RECORD_CAPTIONS, record[schema.RECORD_CAPTIONS])
  texts("regions/description", (r["description"] for r in regions))
  feature["regions/box"].float_list.value.extend(float(x) for r in regions for x in r["box"])
  feature["regions/score"].float_list.value.extend(float(r["score"]) for r in regions)
  texts("regions/negatives/ragged_flat_values", (n for r in regions for n in r["negatives"]))
  feature["regions/negatives/ragged_row_lengths_0"].int64_list.value.extend(
    len(r["negatives"]) for r in regions
  )
  texts("negatives/caption", (n["caption"] for n in negatives))
  texts("negatives/kind", (n["kind"] for n in negatives))
  if with_mask:
    mask = record.get(schema.RECORD_MASK)
    feature[schema.RECORD_MASK].bytes_list.value.append(_NO_MASK if mask is None else _png(mask))
  if with_label:
    label = record.get(schema.RECORD_LABEL)
    feature[schema.RECORD_LABEL].int64_list.value.append(-1 if label is None else int(label))
  if token_ids is not None:
    told = [
      *record[schema.RECORD_CAPTIONS],
      *(r["description"] for r in regions),
      *(n for r in regions for n in r["negatives"]),
      *(n["caption"] for n in negatives),
    ]
    feature[schema.RECORD_TOKEN_IDS].bytes_list.value.extend(token_ids(told))
  return example.SerializeToString(deterministic=True)  # features in one order in every process


def parse(data: bytes) -> Parsed:
  """The parts of a serialised record; a one-line ValueError where they do not belong together.

  In Python, because it is faster: 6 us a record against 9 us of a batched `tf.io.parse_example`.
  """
  try:
    feature = example_proto.Example.FromString(data).features.feature
  except MemoryError:
    raise
  except Exception as error:  # protobuf's DecodeError, whose module differs between versions
    raise ValueError(f"not a tf.train.Example ({type(error).__name__})") from None

  def texts(name: str) -> list[bytes]:
    return list(feature[name].bytes_list.value) if name in feature else []

  def bytes_feature(name: str) -> bytes:
    values = texts(name)
    return values[0] if values else b""

  boxes = np.array(feature["regions/box"].float_list.value, np.float32)
  scores = np.array(feature["regions/score"].float_list.value, np.float32)
  descriptions = texts("regions/description")
  captions, negatives = texts(schema.RECORD_CAPTIONS), texts("negatives/caption")
  flat = texts("regions/negatives/ragged_flat_values")
  false, token_ids = iter(flat), texts(schema.RECORD_TOKEN_IDS)
  name = "regions/negatives/ragged_row_lengths_0"
  numbers = list(feature[name].int64_list.value) if name in feature else []
  numbers = numbers or [0] * len(descriptions)
  label = feature[schema.RECORD_LABEL].int64_list.value
  kinds = texts("negatives/kind")
  if len(boxes) != 4 * len(descriptions) or len(scores) != len(descriptions):
    raise ValueError(
      f"{len(descriptions)} descriptions, {len(boxes) / 4:g} boxes and {len(scores)} scores"
    )
  if len(numbers) != len(descriptions) or sum(numbers) != len(flat) or min(numbers, default=0) < 0:
    raise ValueError(
      f"{len(descriptions)} descriptions, {len(flat)} false ones of {len(numbers)}: {sum(numbers)}"
    )
  if len(negatives) != len(kinds):
    raise ValueError(f"{len(negatives)} false captions and {len(kinds)} kinds")
  told = [*captions, *descriptions, *flat, *negatives] if token_ids else []
  if len(told) != len(token_ids):
    raise ValueError(f"{len(told)} texts and token ids of {len(token_ids)}")
  return Parsed(
    key=bytes_feature(schema.RECORD_KEY),
    image=bytes_feature(schema.RECORD_IMAGE),
    captions=captions,
    descriptions=descriptions,
    boxes=boxes.reshape(-1, 4),
    scores=scores,
    negatives=list(zip(negatives, kinds, strict=True)),
    region_negatives=[list(itertools.islice(false, number)) for number in numbers],
    mask=bytes_feature(schema.RECORD_MASK),
    label=label[0] if label else -1,
    token_ids=dict(zip(told, token_ids, strict=True)),
  )


def check_box(
  box: Any,
  *,
  tolerance: float = 1e-3,
  box_format: str = "yxyx",
  size: tuple[int, int] | None = None,
) -> tuple[float, ...] | str:
  """A box (ymin, xmin, ymax, xmax) clipped to the image, or the reason why it cannot be used.

  Args:
    box: four numbers, as fractions of the image or in pixels.
    tolerance: how far a box may lie outside, as a fraction of the image.
    box_format: one of `box_formats.FORMATS`.
    size: (width, height) of the image as it is shown, where the box is in pixels.
  """
  if isinstance(box, (str, bytes, Mapping)):  # else "1234" would be four numbers
    return MALFORMED
  try:
    numbers = [float(x) for x in box]
  except (TypeError, ValueError, OverflowError):
    return MALFORMED
  if len(numbers) != 4:
    return MALFORMED
  if not all(map(math.isfinite, numbers)):
    return BOX_NOT_FINITE
  corners = box_formats.to_corners(numbers, box_format)
  if size is not None:
    if box_formats.is_under_a_pixel(numbers):
      return BOX_UNDER_A_PIXEL
    corners = box_formats.to_fractions(corners, size)
  if min(corners) < -tolerance or max(corners) > 1 + tolerance:
    return BOX_OUTSIDE
  # In float32, as it will stand in the shard: what is left must have an area there.
  ymin, xmin, ymax, xmax = (float(np.float32(min(max(x, 0.0), 1.0))) for x in corners)
  return (ymin, xmin, ymax, xmax) if ymax > ymin and xmax > xmin else BOX_NO_AREA


def check(
  record: Mapping[str, Any],
  *,
  tolerance: float = 1e-3,
  check_image: bool = True,
  max_pixels: int = schema.MAX_PIXELS,
  max_side: int = 0,
  box_format: str = "yxyx",
  box_units: str = "fractions",
  need_caption: bool = True,
) -> Checked:
  """Takes out of a record what cannot be used.

  An image without regions is kept; one that cannot be decoded, or without a caption, is not. Where
  the storage of an image fails, that is a `failures.TransientError`: the image may be good.

  Args:
    record: keys of `schema.RECORD_*`; the image may be the path of its file.
    tolerance: see `check_box`.
    check_image: decode the image; off for a source that has just encoded it.
    max_pixels: of the largest image that is kept.
    max_side: pixels of the longer side beyond which an image is stored smaller; 0: never.
    box_format: of the regions' boxes, one of `box_formats.FORMATS`.
    box_units: of the regions' boxes, one of `box_formats.UNITS`.
    need_caption: an image without a caption is not kept; off where captions are yet to come.
  """
  dropped: list[tuple[str, str]] = []
  given = list(record[schema.RECORD_CAPTIONS])
  captions = [t.strip() for t in given if _is_text(t)]
  dropped += [("captions", MALFORMED)] * (len(given) - len(captions))
  dropped += [("captions", EMPTY_CAPTION)] * captions.count("")
  captions = [t for t in captions if t]
  if not _is_text(record[schema.RECORD_KEY]):
    return Checked(None, [*dropped, ("records", MALFORMED)])
  if need_caption and not captions:
    return Checked(None, [*dropped, ("records", NO_CAPTION)])
  image = record[schema.RECORD_IMAGE]
  if check_image:
    try:
      if isinstance(image, pathlib.Path):
        file = places.find_file(image)
        image = failures.retry_read(file.read_bytes, file)
      image = decoding.as_jpeg(image, max_pixels=max_pixels)
    except OSError:
      return Checked(None, [*dropped, ("records", MISSING_IMAGE)])
    except decoding.TooManyPixels:
      return Checked(None, [*dropped, ("records", IMAGE_TOO_LARGE)])
    except ValueError:
      return Checked(None, [*dropped, ("records", CORRUPT_IMAGE)])
  regions, fates = [], []
  size = decoding.size_as_shown(image) if box_units == "pixels" else None
  if max_side:
    image = decoding.as_jpeg(image, max_pixels=max_pixels, max_side=max_side)
  for region in record.get(schema.RECORD_REGIONS) or ():
    checked = _check_region(region, tolerance=tolerance, box_format=box_format, size=size)
    fates.append(checked if isinstance(checked, str) else "")
    if isinstance(checked, str):
      dropped.append(("regions", checked))
    else:
      checked["negatives"], lost = _usable(region.get("negatives"), _why_no_text)
      dropped += [("negatives", why) for why in lost]
      regions.append(checked)
  negatives, lost = _usable(record.get(schema.RECORD_NEGATIVES), _why_no_negative)
  dropped += [("negatives", why) for why in lost]
  clean = {
    **record,
    schema.RECORD_IMAGE: image,
    schema.RECORD_CAPTIONS: captions,
    schema.RECORD_REGIONS: regions,
    schema.RECORD_NEGATIVES: negatives,
  }
  return Checked(clean, dropped, tuple(fates))


def _is_text(value: Any) -> bool:
  """Whether it is a string that UTF-8 can hold: JSON can carry halves of a character."""
  try:
    value.encode("utf-8")
  except (AttributeError, UnicodeEncodeError):
    return False
  return isinstance(value, str)


def _why_no_text(value: Any) -> str:
  """Why a false text cannot be used; '' if it can."""
  if not _is_text(value):
    return MALFORMED
  return "" if value.strip() else EMPTY_NEGATIVE


def _why_no_negative(value: Any) -> str:
  if not isinstance(value, Mapping) or value.get("kind") not in schema.NEGATIVE_KINDS:
    return MALFORMED
  return _why_no_text(value.get("caption"))


def _usable(values: Any, why_not: Callable[[Any], str]) -> tuple[list[Any], list[str]]:
  """(the good ones of a list, why the others are not); what is no list is one that is not."""
  if values is None:
    return [], []
  if not isinstance(values, (list, tuple)):
    return [], [MALFORMED]
  reasons = [why_not(value) for value in values]
  good = [value for value, why in zip(values, reasons, strict=True) if not why]
  return good, [why for why in reasons if why]


def _check_region(region: Any, **boxes: Any) -> dict[str, Any] | str:
  """The region with its box as it will stand in the shard; `boxes` as `check_box` takes them."""
  if not isinstance(region, Mapping):
    return MALFORMED
  description = region.get("description")
  if not isinstance(description, str) or not description.strip():
    return EMPTY_DESCRIPTION
  if not _is_text(description):
    return MALFORMED
  box = check_box(region.get("box"), **boxes)
  if isinstance(box, str):
    return box
  try:
    score = 1.0 if region.get("score") is None else float(region["score"])
  except (TypeError, ValueError, OverflowError):  # JSON holds whole numbers of any length
    return MALFORMED
  return {
    "description": description.strip(),
    "box": box,
    "score": score if is_score(score) else 0.0,
  }


def is_score(value: float) -> bool:
  """Whether a shard can hold it as a score; 0 stands for one that is NaN, infinite or too large."""
  return abs(value) <= _MOST_SCORE  # NaN is not
