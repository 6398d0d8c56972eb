"""COCO's kind of file, {"images": [...], "annotations": [...], "categories": [...]}, into an index.

Such a file is read element by element; what of it is malformed is counted.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grain_jax import jsonfiles
from grain_jax.data import records
from grain_jax.data.sources import base, frames, image_index, indexed, mapping

CROWD = mapping.CROWD  # of COCO's iscrowd
UNKNOWN_CATEGORY = "unknown_category"
NO_SPAN = "no_span"  # of the caption, that a box is of
SPAN_OUTSIDE = "span_outside_caption"
CAPTIONS_FLAG = base.Flag(
  "captions", "COCO's captions_*.json for these images; default: those of --input", [], many=True
)
_IMAGE = ("file_name", "filename", "filepath", "coco_url", "width", "height", "split", "sentences")
_SPLIT = re.compile(
  r"(?:^|[^a-z])(train|minival|val|validation|testa|testb|test)(?=$|[^a-z])", re.IGNORECASE
)
_SPLITS = {"validation": "val", "minival": "val", "testa": "testA", "testb": "testB"}


def split_in(name: str) -> str:
  """The split that a file's name speaks of, the last one: train where it speaks of none."""
  found = _SPLIT.findall(name)
  return _SPLITS.get(found[-1].lower(), found[-1].lower()) if found else "train"


def add_file(
  writer: image_index.Writer,
  file: pathlib.Path,
  part: int,
  *,
  keep: Sequence[str],
  lists_images: bool = True,
) -> None:
  """Adds images, annotations and the categories of a file.

  Args:
    writer: of the index.
    file: of annotations.
    part: of the source.
    keep: keys of an annotation that are kept.
    lists_images: its images are those of the part; else another file's are, and it gives sizes.
  """
  categories: dict[str, Any] = {}
  for array, value in jsonfiles.iterate_elements(file):
    if array not in ("images", "annotations", "categories"):
      continue
    if not isinstance(value, Mapping):
      what = "records" if array == "images" else "regions"
      writer.refuse(records.Refused(f"{file.name}: {array}", what, records.MALFORMED))
    elif array == "categories":
      categories[str(value.get("id"))] = {k: value.get(k) for k in ("name", "def")}
    elif array == "images":
      name = value.get("id", value.get("cocoid"))
      name = value.get("cocoid", name)
      if is_id(name) and lists_images:
        writer.image(part, name, {k: value[k] for k in _IMAGE if k in value})
      elif is_id(name):
        size = {k: value.get(k) for k in ("width", "height")}
        writer.annotation(part, name, image_index.OPTIONAL, size)
      else:
        what = str(value.get("file_name", file.name))
        writer.refuse(records.Refused(what, "records", records.MALFORMED))
    else:
      what = "captions" if "caption" in value and "bbox" not in value else "regions"
      if is_id(value.get("image_id")):
        kept = {k: value[k] for k in keep if k in value}
        lost = what if lists_images else image_index.OPTIONAL
        writer.annotation(part, value["image_id"], lost, kept)
      else:
        key = f"{file.name}: annotation {value.get('id')}"
        writer.refuse(records.Refused(key, what, records.MALFORMED))
  if categories:
    writer.note(f"categories {part}", categories)


def add_captions(writer: image_index.Writer, file: pathlib.Path, part: int, prefix: str) -> None:
  """Adds COCO's captions of images that another set took over, under prefix + id."""
  for array, value in jsonfiles.iterate_elements(file):
    if array == "annotations" and isinstance(value, Mapping) and "caption" in value:
      name = f"{prefix}{value.get('image_id')}"
      writer.annotation(part, name, image_index.OPTIONAL, {"caption": value["caption"]})


def image_entries(file: pathlib.Path) -> Iterator[Mapping[str, Any]]:
  """The images of a file that have an id."""
  for array, value in jsonfiles.iterate_elements(file):
    if array == "images" and isinstance(value, Mapping):
      yield value


def is_id(value: Any) -> bool:
  return isinstance(value, (int, str)) and not isinstance(value, bool)


def captions_of(annotations: Iterable[Mapping[str, Any]]) -> list[Any]:
  return [a["caption"] for a in annotations if "caption" in a and "bbox" not in a]


def regions_of(
  key: str,
  annotations: Iterable[Mapping[str, Any]],
  frame: frames.Frame | None,
  descriptions: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], list[records.Refused]]:
  """(regions of annotations with a category, what is lost of them); crowds are left out.

  Args:
    key: of the record.
    annotations: of one image; those without a box are captions.
    frame: of their boxes (x, y, width, height).
    descriptions: of the categories, by id.
  """
  regions, lost = [], []
  for annotation in annotations:
    if "bbox" not in annotation:
      if annotation.keys().isdisjoint(("caption", "width")):
        lost.append(records.Refused(key, "regions", records.MALFORMED))
      continue
    if annotation.get("iscrowd") in (1, True):
      lost.append(records.Refused(key, "regions", CROWD))
      continue
    category = str(annotation.get("category_id"))
    if category not in descriptions:
      lost.append(records.Refused(key, "regions", UNKNOWN_CATEGORY))
      continue
    box = None if frame is None else frame.fractions(annotation["bbox"], "xywh")
    regions.append(indexed.region(descriptions[category], box, annotation.get("score", 1.0)))
  return regions, lost


def spanned(caption: Any, spans: Any) -> str | None:
  """The part of a caption that spans [[start, end], ...] (characters, end exclusive) cover.

  Spans with nothing but space between them are one; others are joined by a space.

  Returns:
    '' where there is no span, None where one is malformed or leaves the caption.
  """
  if not isinstance(caption, str) or not isinstance(spans, list):
    return None
  ends: list[list[int]] = []
  for span in spans:
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_offset, span)):
      return None
    if not 0 <= span[0] < span[1] <= len(caption):
      return None
    ends.append([int(x) for x in span])
  joined: list[list[int]] = []
  for start, end in sorted(ends):
    if joined and not caption[joined[-1][1] : start].strip():
      joined[-1][1] = max(end, joined[-1][1])
    else:
      joined.append([start, end])
  return " ".join(caption[start:end].strip() for start, end in joined).strip()


def _is_offset(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
