"""Objects365 (--source=objects365 --input=FOLDER).

FOLDER holds, in itself or in annotations/, objects365_{train,val}.json (v1) or
zhiyuan_objv2_{train,val}.json (v2), and the images in train/ and val/: of v2 in train/patchN/,
while the file says images/v1/patchN/ or images/v2/patchN/, of which the first two folders are taken
off. Three images of v2 are known to be missing everywhere; they are counted by a reason of their
own. A region is described by the name of its category; an image has no caption and gets one of the
names of what is on it. Crowds (iscrowd=1) are left out. Some names of v2 are wrong: where the file
that mmdetection's fix_o365_names.py writes (zhiyuan_objv2_train_fixname.json) is there, it is read
instead.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from grain_jax.data import records
from grain_jax.data.sources import base, coco_json, frames, image_index, indexed

KNOWN_MISSING = "known_missing_image"
FLAGS = indexed.flags()
_MISSING = frozenset(
  {
    "patch16/objects365_v2_00908726.jpg",
    "patch6/objects365_v1_00320532.jpg",
    "patch6/objects365_v1_00320534.jpg",
  }
)
_MENDED = "_fixname"  # of fix_o365_names.py, which mends names of categories
_PREFIX = re.compile(r"^(\./)?images/v[12]/")
_KEEP = ("bbox", "category_id", "iscrowd", "score")


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: indexed.Paths = None,
  images: str | pathlib.Path | None = None,
  **common: Any,
) -> base.Source:
  """Objects365's images with boxes under the names of their categories.

  Args:
    input: folder of the set; the layout stands at the head of this file.
    annotations: its JSON files; default: those of the folder.
    images: folder of train and val; default: the folder.
    common: see `indexed.Common`.
  """
  home = base.existing(input, "--input")
  root = base.existing(images, "--images") if images else home
  files = indexed.paths(annotations, "--annotations")
  files = files or _found(home)
  if not files:
    raise indexed.no_files(home, "objects365_train.json (v1) or zhiyuan_objv2_train.json (v2)")
  allow_outside = common.get("allow_outside", False)

  def fill(writer: image_index.Writer) -> None:
    for part, file in enumerate(files):
      coco_json.add_file(writer, file, part, keep=_KEEP)

  @functools.cache
  def categories(index: image_index.Index, part: int) -> Mapping[str, Any]:
    found = index.note(f"categories {part}") or {}
    return {number: entry["name"] for number, entry in found.items()}

  def locate(data: Mapping[str, Any], part: int) -> pathlib.Path | records.Refused:
    """An image's file, or why it is refused."""
    name = data.get("file_name")
    if not indexed.is_text(name):
      return records.Refused(str(data)[:80], "records", records.MALFORMED)
    short = _PREFIX.sub("", name)
    names = indexed.in_folders(short, [coco_json.split_in(files[part].stem), ""])
    image = indexed.locate(root, [*names, name], allow_outside=allow_outside)
    if short in _MISSING and isinstance(image, pathlib.Path) and not image.exists():
      return records.Refused(short, "records", KNOWN_MISSING)
    return image

  def read(entry: image_index.Entry, index: image_index.Index) -> Iterator[base.Item]:
    split = coco_json.split_in(files[entry.part].stem)
    image = locate(entry.data, entry.part)
    if isinstance(image, records.Refused):
      yield split, image
      return
    key = _PREFIX.sub("", entry.data["file_name"])
    frame = frames.frame_of(image, entry.data.get("width"), entry.data.get("height"))
    regions, lost = coco_json.regions_of(
      key, entry.annotations, frame, categories(index, entry.part)
    )
    yield from ((split, item) for item in lost)
    captions = indexed.caption_of_names(r["description"] for r in regions)
    yield split, indexed.record(key, image, captions, regions)

  def image_files() -> Iterator[pathlib.Path]:
    for part, file in enumerate(files):
      for data in coco_json.image_entries(file):
        image = locate(data, part)
        if isinstance(image, pathlib.Path):
          yield image

  arguments = {
    "input": str(home), "images": str(root), "annotations": list(map(str, files)),
  }  # fmt: skip
  return indexed.source(
    "objects365",
    files=files,
    arguments=arguments,
    common=common,
    fill=fill,
    read=read,
    images=image_files,
  )


def _found(home: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder; of one with mended names of categories, the mended one."""
  patterns = ("objects365_train.json", "objects365_val.json", "zhiyuan_objv2_*.json")
  files = [f for f in indexed.find_files(home, patterns) if not f.stem.endswith("_od")]
  mended = {
    file.with_name(file.name.replace(f"{_MENDED}.json", ".json"))
    for file in files
    if file.stem.endswith(_MENDED)
  }
  return [file for file in files if file not in mended]
