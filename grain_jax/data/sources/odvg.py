"""Lines of grounding or detection, as MM-GDINO and LLMDet have them (--source=odvg --input=FOLDER).

JSON lines, one an image: {"filename", "height", "width"} with either

  "grounding": {"caption": str, "regions": [{"phrase": str, "bbox": [x1, y1, x2, y2] in pixels, or a
    list of such boxes, "tokens_positive": [[start, end], ...]}]}
  "detection": {"instances": [{"bbox": [x1, y1, x2, y2], "label": int, "category": str}]}

FOLDER holds them as *.jsonl, *_od.json or *_vg.json, in itself or in annotations/, and the images.
A region is described by its phrase, or where it has none by its span of the caption; an instance by
its category, or its label's name in --label_map=FILE ({"0": "person", ...}), by default that of
FOLDER (*label_map.json, if it is one). All lines of an image are one record, each caption once; of
detection, the caption is made of the names of what is on it. The split is the one that a file's
name speaks of.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grain_jax import textfiles
from grain_jax.data import records
from grain_jax.data.sources import base, coco_json, coco_names, frames, image_index, indexed

FLAGS = indexed.flags(
  base.Flag("label_map", "JSON {label: name}; default: *label_map.json of --input, if it is one")
)
_PATTERNS = ("*.jsonl", "*_od.json", "*_vg.json")


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: indexed.Paths = None,
  images: str | pathlib.Path | None = None,
  label_map: str | pathlib.Path | None = None,
  **common: Any,
) -> base.Source:
  """Images with boxes described by phrases, or by the names of their categories.

  Args:
    input: folder of the files and images; the format stands at the head of this file.
    annotations: the files; default: those of the folder.
    images: folder that file names start from; default: the folder.
    label_map: JSON file {label: name}; default: the folder's *label_map.json, if it is one.
    common: see `indexed.Common`.
  """
  home = base.existing(input, "--input")
  root = base.existing(images, "--images") if images else home
  files = indexed.paths(annotations, "--annotations") or indexed.find_files(home, _PATTERNS)
  if not files:
    raise indexed.no_files(home, "*.jsonl, *_od.json or *_vg.json")
  beside = indexed.find_files(home, ["*label_map.json"])
  labels = beside[0] if len(beside) == 1 else None
  labels = base.existing(label_map, "--label_map") if label_map else labels
  splits = list(dict.fromkeys(coco_json.split_in(file.stem) for file in files))
  allow_outside = common.get("allow_outside", False)

  def fill(writer: image_index.Writer) -> None:
    names = _names(labels)
    for file in files:
      part = splits.index(coco_json.split_in(file.stem))
      for where, value in _lines(file):
        if isinstance(value, records.Refused):
          writer.refuse(value)
        elif not indexed.is_text(value.get("filename")):
          writer.refuse(records.Refused(where, "records", records.MALFORMED))
        else:
          data = {k: value.get(k) for k in ("filename", "height", "width")}
          writer.image(part, data["filename"], data)
          writer.annotation(part, data["filename"], "regions", _said(value, names))

  def locate(name: str) -> pathlib.Path | records.Refused:
    return indexed.locate(root, indexed.in_folders(name, [""]), allow_outside=allow_outside)

  def read(entry: image_index.Entry, index: image_index.Index) -> Iterator[base.Item]:
    split, key = splits[entry.part], entry.id
    image = locate(key)
    if isinstance(image, records.Refused):
      yield split, image
      return
    frame = frames.frame_of(image, entry.data["width"], entry.data["height"])
    captions, regions = [], []
    for said in entry.annotations:
      if said["caption"] is not None and said["caption"] not in captions:
        captions.append(said["caption"])
      yield from ((split, records.Refused(key, "regions", why)) for why in said["lost"])
      for text, box in said["regions"]:
        found = None if frame is None else frame.fractions(box, "xyxy")
        regions.append(indexed.region(text, found))
    texts = captions or indexed.caption_of_names(r["description"] for r in regions)
    yield split, indexed.record(key, image, texts, regions, [coco_names.id_of(entry.data)])

  def image_files() -> Iterator[pathlib.Path]:
    before = None
    for file in files:
      for _, value in _lines(file):
        name = None if isinstance(value, records.Refused) else value.get("filename")
        if indexed.is_text(name) and name != before:
          image = locate(name)
          if isinstance(image, pathlib.Path):
            yield image
        before = name

  arguments = {
    "input": str(home), "images": str(root), "annotations": list(map(str, files)),
    "label_map": str(labels) if labels else None,
  }  # fmt: skip
  return indexed.source(
    "odvg",
    files=[*files, *([labels] if labels else [])],
    arguments=arguments,
    common=common,
    fill=fill,
    read=read,
    images=image_files,
  )


def _lines(file: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any] | records.Refused]]:
  """('FILE line N', object) of each line; in the place of what is none, why."""
  for line in textfiles.iterate_lines(file):
    where = f"{file.name} line {line.number}"
    try:
      value = textfiles.parse_json(line.text())
    except ValueError:
      value = None
    refused = records.Refused(where, "records", "not_json")
    yield where, value if isinstance(value, dict) else refused


@functools.cache
def _names(file: pathlib.Path | None) -> Mapping[str, Any]:
  found = {} if file is None else textfiles.read_json(file, name=f"--label_map = {file}")
  if not isinstance(found, dict):
    raise ValueError(f"--label_map = {file} is no object {{label: name}}. Give the right file.")
  return found


def _said(line: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
  """{caption, regions [[description, box]], lost [why]} of a line."""
  caption, regions, lost = None, [], []
  grounding, detection = line.get("grounding"), line.get("detection")
  if isinstance(grounding, Mapping):
    caption = grounding.get("caption")
    given = grounding.get("regions")
    for region in given if isinstance(given, list) else [given] * (given is not None):
      found = _region(region, caption)
      regions += found if isinstance(found, list) else []
      lost += [found] if isinstance(found, str) else []
  if isinstance(detection, Mapping):
    given = detection.get("instances")
    for instance in given if isinstance(given, list) else [given] * (given is not None):
      if not isinstance(instance, Mapping):
        lost.append(records.MALFORMED)
        continue
      text = instance.get("category")
      text = names.get(str(instance.get("label"))) if text is None else text
      if text is None:
        lost.append(coco_json.UNKNOWN_CATEGORY)
      else:
        regions.append([text, instance.get("bbox")])
  return {"caption": caption, "regions": regions, "lost": lost}


def _region(region: Any, caption: Any) -> list[list[Any]] | str:
  """[[description, box]] of a region with one box or several; why there is none."""
  if not isinstance(region, Mapping):
    return records.MALFORMED
  text, boxes = region.get("phrase"), region.get("bbox")
  if isinstance(text, list) and all(isinstance(part, str) for part in text):
    text = " ".join(text)
  spans = region.get("tokens_positive")
  if text is None and spans:
    text = coco_json.spanned(caption, spans)
    if text is None:
      return coco_json.SPAN_OUTSIDE
  if text is None:
    return coco_json.NO_SPAN
  several = isinstance(boxes, Sequence) and bool(boxes) and isinstance(boxes[0], list)
  return [[text, box] for box in (boxes if several else [boxes])]
