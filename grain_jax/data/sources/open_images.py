"""Open Images' boxes, V4 to V7 (--source=open_images --input=FOLDER).

FOLDER holds, in itself or in annotations/, oidv6-train-annotations-bbox.csv,
validation-annotations-bbox.csv or test-annotations-bbox.csv, class-descriptions-boxable.csv (mid
and name, without header) and the images <ImageID>.jpg, in itself or in train/, validation/, test/
or train_0/ to train_f/. Its boxes stand as XMin,XMax,YMin,YMax. A region is described by the name
of its class. Boxes around a group and of depictions (IsGroupOf, IsDepiction: drawings, toys) are
left out and counted, unless --keep_groups or --keep_depictions. Captions are those of Localized
Narratives (open_images_*_localized_narratives*.jsonl in FOLDER, or --captions); an image without
one gets one of the names of what is on it.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from grain_jax import textfiles
from grain_jax.data import records
from grain_jax.data.sources import base, image_index, indexed

GROUP, DEPICTION, UNKNOWN_CLASS = "group_of", "depiction", "unknown_class"
FLAGS = indexed.flags(
  base.Flag("classes", "class-descriptions-boxable.csv; default: that of --input"),
  base.Flag("captions", "files of Localized Narratives; default: those of --input", [], many=True),
  base.Flag("keep_groups", "keep boxes around a group", False, bool),
  base.Flag("keep_depictions", "keep boxes of drawings and toys", False, bool),
)
_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
_SPLITS = {"validation": "val", "train": "train", "test": "test"}
_FOLDER = {"val": "validation"}


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: indexed.Paths = None,
  images: str | pathlib.Path | None = None,
  classes: str | pathlib.Path | None = None,
  captions: indexed.Paths = None,
  keep_groups: bool = False,
  keep_depictions: bool = False,
  **common: Any,
) -> base.Source:
  """Open Images' images with boxes under the names of their classes.

  Args:
    input: folder of the set; the layout stands at the head of this file.
    annotations: *-annotations-bbox.csv; default: those of the folder.
    images: folder of the images, or of train, validation and test; default: the folder.
    classes: names of the classes; default: the folder's.
    captions: files of Localized Narratives; default: those of the folder.
    keep_groups: keep boxes around a group.
    keep_depictions: keep boxes of depictions.
    common: see `indexed.Common`.
  """
  home = base.existing(input, "--input")
  root = base.existing(images, "--images") if images else home
  files = indexed.paths(annotations, "--annotations")
  files = files or indexed.find_files(home, ["*annotations-bbox.csv"])
  if not files:
    raise indexed.no_files(
      home, "oidv6-train-annotations-bbox.csv or another *-annotations-bbox.csv"
    )
  texts = indexed.paths(captions, "--captions")
  texts = texts or indexed.find_files(home, ["open_images_*localized_narratives*.jsonl"])
  found = (
    [base.existing(classes, "--classes")]
    if classes
    else indexed.find_files(home, ["*class-descriptions-boxable.csv"])
  )
  if not found:
    raise ValueError(f"--classes: {home} holds no class-descriptions-boxable.csv. Name it.")
  table = found[0]
  skipped = {"IsGroupOf": GROUP} if not keep_groups else {}
  skipped |= {"IsDepiction": DEPICTION} if not keep_depictions else {}
  allow_outside = common.get("allow_outside", False)

  def fill(writer: image_index.Writer) -> None:
    for part, file in enumerate(files):
      _add_boxes(writer, file, part, skipped)
    for text in texts:
      _add_narratives(writer, text, len(files))

  names = functools.cache(lambda: _names(table))

  def locate(name: str, split: str) -> pathlib.Path | records.Refused:
    folders = [_FOLDER.get(split, split), split, f"{split}_{name[:1]}", f"OpenImages/{split}", ""]
    paths = indexed.in_folders(f"{name}.jpg", dict.fromkeys(folders))
    return indexed.locate(root, paths, allow_outside=allow_outside)

  def read(entry: image_index.Entry, index: image_index.Index) -> Iterator[base.Item]:
    split, key = _split(files[entry.part]), entry.id
    image = locate(key, split)
    if isinstance(image, records.Refused):
      yield split, image
      return
    regions, captions = [], []
    for said in entry.annotations:
      if "caption" in said:
        captions.append(said["caption"])
      elif "why" in said:
        yield split, records.Refused(key, "regions", said["why"])
      elif said["label"] not in names():
        yield split, records.Refused(key, "regions", UNKNOWN_CLASS)
      else:
        regions.append(indexed.region(names()[said["label"]], said["box"], said["score"]))
    captions = captions or indexed.caption_of_names(r["description"] for r in regions)
    yield split, indexed.record(key, image, captions, regions)

  def image_files() -> Iterator[pathlib.Path]:
    before = None
    for file in files:
      for row in textfiles.read_table(file)[1]:
        name = row.values.get("ImageID")
        if name and name != before:
          image = locate(name, _split(file))
          if isinstance(image, pathlib.Path):
            yield image
        before = name

  arguments = {
    "input": str(home), "images": str(root), "annotations": list(map(str, files)),
    "classes": str(table), "captions": list(map(str, texts)),
    "keep_groups": keep_groups, "keep_depictions": keep_depictions,
  }  # fmt: skip
  return indexed.source(
    "open_images",
    files=[*files, table, *texts],
    arguments=arguments,
    common=common,
    fill=fill,
    read=read,
    images=image_files,
  )


def _split(file: pathlib.Path) -> str:
  found = [name for name in _SPLITS if name in file.name]
  return _SPLITS[found[0]] if found else "train"


def _add_boxes(
  writer: image_index.Writer, file: pathlib.Path, part: int, skipped: Mapping[str, str]
) -> None:
  columns, rows = textfiles.read_table(file)
  missing = [name for name in _COLUMNS if name not in columns]
  if missing:
    raise ValueError(
      f"{file} has the columns {columns}: {', '.join(missing)} are needed. Give the file of boxes "
      "as Open Images publishes it."
    )
  before = None
  for number, row, surplus in rows:
    name = row["ImageID"]
    if not name or surplus:
      key = f"{file.name} row {number}"
      writer.refuse(records.Refused(key, "regions", records.MALFORMED))
      continue
    if name != before:
      writer.image(part, name, {})
    before = name
    why = next((why for flag, why in skipped.items() if row.get(flag) == "1"), None)
    if why:
      writer.annotation(part, name, "regions", {"why": why})
      continue
    box = [row[side] for side in ("YMin", "XMin", "YMax", "XMax")]
    score = row.get("Confidence") or 1.0
    said = {"label": row["LabelName"], "box": box, "score": score}
    writer.annotation(part, name, "regions", said)


def _add_narratives(writer: image_index.Writer, file: pathlib.Path, parts: int) -> None:
  for line in textfiles.iterate_lines(file):
    try:
      value = textfiles.parse_json(line.text())
      name, caption = value["image_id"], value["caption"]
    except (ValueError, KeyError, TypeError):
      key = f"{file.name} line {line.number}"
      writer.refuse(records.Refused(key, "captions", records.MALFORMED))
      continue
    for part in range(parts):
      writer.annotation(part, name, image_index.OPTIONAL, {"caption": caption})


def _names(table: pathlib.Path) -> dict[str, str]:
  """{class: name}; the header that later releases have is a class that no box has."""
  rows = (fields for _, fields in textfiles.read_csv(table))
  return {fields[0]: fields[1] for fields in rows if len(fields) > 1}
