"""Own data: a folder of images with a file of annotations (--source=folder --input=FOLDER).

The annotations are FOLDER/annotations.jsonl or FOLDER/annotations.csv, or the file given as
--annotations. JSONL, a line an image:

  {"image": "images/0001.jpg", "captions": ["a dog on a sofa", "a brown dog sleeps on a sofa"],
   "regions": [{"description": "a brown dog", "box": [0.2, 0.1, 0.9, 0.7], "score": 0.8}],
   "split": "train"}

  image     path from FOLDER; JPEG, PNG or whatever PIL reads. It is also the record's key. One
            that leads out of FOLDER ("../x") is refused and counted, unless --allow_outside.
  captions  the original first, then generated ones; or "caption" with a single one, which comes
            before those of "captions" where both are given.
  regions   optional, and may be empty: description, box (ymin, xmin, ymax, xmax) as fractions of
            the image as it is shown, upright where EXIF says that it was taken sideways; score
            (optional, 1): training takes the regions of highest score. Boxes written otherwise:
            --box_format=xyxy (xmin, ymin, xmax, ymax), xywh (xmin, ymin, width, height) or cxcywh
            (the centre's x and y, width, height), and --box_units=pixels, of the image as it is
            shown. One format holds for the whole file. negatives (optional): [false description,
            ...], for data.negatives_per_region.
  split     optional, "train": or any other name. --val_fraction moves a part of train to val.
  negatives optional: [{"caption": str, "kind": relation | attribute | object | action}].

CSV: a header with the columns image, caption and, optionally, split; further lines with the same
image next to each other add captions.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from grain_jax import schema
from grain_jax.data import box_formats, records
from grain_jax.data.building import inputs
from grain_jax.data.sources import base, folder_lines

BLOCK = 1024  # lines a block
FLAGS = (
  base.Flag("input", "folder of images", required=True),
  base.Flag("annotations", "JSONL or CSV; default: the folder's own"),
  base.Flag(
    "box_format",
    "of all boxes; yxyx is ymin, xmin, ymax, xmax",
    "yxyx",
    choices=box_formats.FORMATS,
  ),
  base.Flag(
    "box_units",
    "of all boxes: fractions of the image, or its pixels as it is shown, upright",
    "fractions",
    choices=box_formats.UNITS,
  ),
  base.tolerance_flag(1e-3),
  *base.COMMON_FLAGS,
  base.OUTSIDE_FLAG,
)
_USUAL = {
  "allow_outside": False,
  "max_pixels": schema.MAX_PIXELS,
  "box_format": "yxyx",
  "box_units": "fractions",
}


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: str | pathlib.Path | None = None,
  val_fraction: float = 0.0,
  tolerance: float = 1e-3,
  licence: str = "",
  allow_outside: bool = False,
  max_pixels: int = schema.MAX_PIXELS,
  box_format: str = "yxyx",
  box_units: str = "fractions",
) -> base.Source:
  """A folder of one's own images; the format stands at the head of this file.

  Args:
    input: folder that the image paths start from.
    annotations: JSONL or CSV file; default: the folder's own.
    val_fraction: part of the split train that goes to val, chosen by a hash of the key.
    tolerance: how far outside the image a box may lie (it is clipped), as a fraction of it.
    licence: of the images, for the manifest.
    allow_outside: read images outside the folder too, where a path leads there ("../x", "/x").
    max_pixels: of the largest image that is kept; larger ones are counted.
    box_format: of all boxes, one of `box_formats.FORMATS`.
    box_units: of all boxes, one of `box_formats.UNITS`; pixels are those of the image as it is
      shown, upright.
  """
  root = base.existing(input, "--input")
  base.check_common(val_fraction=val_fraction, max_pixels=max_pixels)
  for name, value, choices in (
    ("box_format", box_format, box_formats.FORMATS),
    ("box_units", box_units, box_formats.UNITS),
  ):
    if value not in choices:
      raise ValueError(f"--{name} = {value!r} is none of {', '.join(choices)}. Use one.")
  file = base.existing(annotations, "--annotations") if annotations else folder_lines.find(root)
  folder_lines.check_file(file)
  oddities = folder_lines.Oddities()

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    yield from folder_lines.blocks(file, BLOCK)

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    for line in folder_lines.read(file, oddities, block=block):
      found = line if isinstance(line, records.Refused) else folder_lines.parts(line, oddities)
      if isinstance(found, records.Refused) and found is line:
        yield "train", found
        continue
      key = found.key if isinstance(found, records.Refused) else found[0]["image"]
      split = base.split_of(key, str(line.get("split") or "train"), val_fraction)
      record = _record(root, found, allow_outside=allow_outside)
      if not isinstance(record, records.Refused):
        for lost in found[1]:
          yield split, lost
      yield split, record

  def images() -> Iterator[pathlib.Path]:
    for line in folder_lines.read(file):
      record: Any = line
      if not isinstance(line, records.Refused):
        record = _record(root, folder_lines.parts(line), allow_outside=allow_outside)
      if not isinstance(record, records.Refused):
        yield record[schema.RECORD_IMAGE]

  later = {
    "allow_outside": allow_outside,
    "max_pixels": max_pixels,
    "box_format": box_format,
    "box_units": box_units,
  }
  settings = {"input": str(root), "annotations": inputs.stamp(file), "val_fraction": val_fraction}
  settings["tolerance"] = tolerance
  settings |= base.unusual(_USUAL, **later)
  arguments = {"input": str(root), "annotations": str(file), "val_fraction": val_fraction}
  arguments |= {"tolerance": tolerance, "licence": licence, **later}
  return base.Source(
    "folder",
    settings,
    read,
    about={"licence": licence},
    blocks=blocks,
    recipe={"kind": "folder", "arguments": arguments},
    tolerance=tolerance,
    images=images,
    max_pixels=max_pixels,
    box_format=box_format,
    box_units=box_units,
    flags_for_boxes=True,
    oddities=oddities,
  )


def _record(
  root: pathlib.Path,
  found: tuple[Mapping[str, Any], list] | records.Refused,
  *,
  allow_outside: bool,
) -> dict[str, Any] | records.Refused:
  """The record of a line whose parts `folder_lines.parts` found."""
  if isinstance(found, records.Refused):
    return found
  image = found[0]["image"]
  if not allow_outside and base.is_outside(root, image):
    return records.Refused(image, "records", base.OUTSIDE)
  return {
    schema.RECORD_KEY: image,
    schema.RECORD_IMAGE: root / image,
    schema.RECORD_CAPTIONS: found[0]["captions"],
    schema.RECORD_REGIONS: found[0]["regions"],
    schema.RECORD_NEGATIVES: found[0]["negatives"],
  }
