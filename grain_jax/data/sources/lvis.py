"""LVIS: COCO's images with boxes of 1,203 categories (--source=lvis --input=FOLDER).

FOLDER holds lvis_v1_{train,val}.json, in itself or in annotations/, and the images in train2017/
and val2017/: an image has no file name, its coco_url says where it lies (some of val lie in
train2017). A region is described by the definition of its category ("a clock that wakes a sleeper
at some preset time"), or with --descriptions=names by its name ("alarm clock"). Captions are
COCO's, where captions_*.json are in FOLDER or FOLDER/annotations or given as --captions; an image
without one gets one of the names of what is on it.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from grain_jax.data import records
from grain_jax.data.sources import base, coco_json, coco_names, frames, image_index, indexed

DESCRIPTIONS = ("definitions", "names")
FLAGS = indexed.flags(
  base.Flag(
    "descriptions", "what describes a region, of its category", "definitions", choices=DESCRIPTIONS
  ),
  coco_json.CAPTIONS_FLAG,
)
_KEEP = ("bbox", "category_id", "iscrowd", "score")


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: indexed.Paths = None,
  images: str | pathlib.Path | None = None,
  descriptions: str = "definitions",
  captions: indexed.Paths = None,
  **common: Any,
) -> base.Source:
  """LVIS's images with boxes under definitions, or names, of their categories.

  Args:
    input: folder of the set; the layout stands at the head of this file.
    annotations: lvis_*.json; default: those of the folder.
    images: folder of train2017 and val2017; default: the folder.
    descriptions: one of `DESCRIPTIONS`.
    captions: COCO's captions files; default: those of the folder.
    common: see `indexed.Common`.
  """
  if descriptions not in DESCRIPTIONS:
    raise ValueError(f"--descriptions = {descriptions!r} is none of {', '.join(DESCRIPTIONS)}.")
  home = base.existing(input, "--input")
  root = base.existing(images, "--images") if images else home
  files = indexed.paths(annotations, "--annotations")
  files = files or indexed.find_files(home, ["lvis_v*_train.json", "lvis_v*_val.json"])
  if not files:
    raise indexed.no_files(home, "lvis_v1_train.json or lvis_v1_val.json")
  texts = indexed.paths(captions, "--captions")
  texts = texts or indexed.find_files(home, ["captions_*.json"])
  allow_outside = common.get("allow_outside", False)

  def fill(writer: image_index.Writer) -> None:
    for part, file in enumerate(files):
      coco_json.add_file(writer, file, part, keep=_KEEP)
      for text in texts:
        coco_json.add_captions(writer, text, part, "")

  @functools.cache
  def categories(index: image_index.Index, part: int) -> tuple[dict[str, Any], dict[Any, str]]:
    """({id: description}, {description: name}) of the categories."""
    found = index.note(f"categories {part}") or {}
    names = {number: _name(entry["name"]) for number, entry in found.items()}
    texts = dict(names)
    if descriptions == "definitions":
      texts |= {n: e["def"] for n, e in found.items() if indexed.is_text(e["def"])}
    return texts, {texts[number]: names[number] for number in names}

  def locate(data: Mapping[str, Any]) -> pathlib.Path | records.Refused:
    return indexed.locate(root, _file_names(data), allow_outside=allow_outside)

  def read(entry: image_index.Entry, index: image_index.Index) -> Iterator[base.Item]:
    split = coco_json.split_in(files[entry.part].stem)
    if not _file_names(entry.data):
      yield split, records.Refused(entry.id, "records", records.MALFORMED)
      return
    image = locate(entry.data)
    if isinstance(image, records.Refused):
      yield split, image
      return
    key = entry.id.zfill(12)
    texts, names = categories(index, entry.part)
    frame = frames.frame_of(image, entry.data.get("width"), entry.data.get("height"))
    regions, lost = coco_json.regions_of(key, entry.annotations, frame, texts)
    yield from ((split, item) for item in lost)
    found = indexed.each_once(coco_json.captions_of(entry.annotations))
    found = found or indexed.caption_of_names(names[r["description"]] for r in regions)
    yield split, indexed.record(key, image, found, regions, [coco_names.id_of(entry.data)])

  def image_files() -> Iterator[pathlib.Path]:
    for file in files:
      for data in coco_json.image_entries(file):
        image = locate(data) if _file_names(data) else None
        if isinstance(image, pathlib.Path):
          yield image

  arguments = {
    "input": str(home), "images": str(root), "annotations": list(map(str, files)),
    "descriptions": descriptions, "captions": list(map(str, texts)),
  }  # fmt: skip
  return indexed.source(
    "lvis",
    files=[*files, *texts],
    arguments=arguments,
    common=common,
    fill=fill,
    read=read,
    images=image_files,
  )


def _name(name: Any) -> Any:
  return name.replace("_", " ").strip() if isinstance(name, str) else name


def _file_names(data: Mapping[str, Any]) -> list[str]:
  """Where an image may lie; [] where nothing says that."""
  url, name = data.get("coco_url"), data.get("file_name")
  if indexed.is_text(url) and coco_names.last_parts(url):
    lies = coco_names.last_parts(url)
    return [*indexed.in_folders(lies, [""]), lies.rpartition("/")[2]]
  return indexed.in_folders(name, ["", "train2017", "val2017"]) if indexed.is_text(name) else []
