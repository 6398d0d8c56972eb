"""COCO: captions, and instances as regions (--source=coco --input=FOLDER).

FOLDER holds, as COCO publishes them, annotations/captions_{train,val}{2014,2017}.json and
annotations/instances_{train,val}{2014,2017}.json, either or both of them, and the images in
train2017/ and val2017/ (%012d.jpg) or train2014/ and val2014/ (COCO_train2014_%012d.jpg). An image
is one record, with COCO's id as key; its regions are described by the names of their categories.
Crowds (iscrowd=1) are left out. An image without captions gets one of the names of what is on it.

Where FOLDER holds dataset_coco.json (Karpathy's splits), or it is given as --annotations, captions
and splits are its: restval is train. Boxes are then those of the instances files, of either year
(--year where FOLDER holds both).
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grain_jax.data import records
from grain_jax.data.sources import (
  base,
  coco_json,
  coco_names,
  frames,
  image_index,
  indexed,
)

FLAGS = indexed.flags(
  base.Flag("year", "2014 or 2017, where --input holds both", None, choices=("2014", "2017"))
)
_KARPATHY = "dataset_coco.json"
# Other tools put files of their own beside these ("instances_train2017_norefval.json").
_PATTERNS = tuple(
  f"{kind}_{split}20[0-9][0-9].json"
  for kind in ("captions", "instances")
  for split in ("train", "val")
)
_KEEP = ("caption", "bbox", "category_id", "iscrowd", "score")
_YEAR = re.compile(r"(train|val|test)(2014|2015|2017)")
_FOLDERS = ("train2017", "val2017", "train2014", "val2014", "test2014", "test2015", "test2017")


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: indexed.Paths = None,
  images: str | pathlib.Path | None = None,
  year: str | None = None,
  **common: Any,
) -> base.Source:
  """COCO's images with captions, and boxes under the names of their categories.

  Args:
    input: folder of the set; the layout stands at the head of this file.
    annotations: files of captions, of instances, or Karpathy's; default: those of the folder.
    images: folder of train2017 and others; default: the folder.
    year: 2014 or 2017, where the folder holds both.
    common: see `indexed.Common`.
  """
  home = base.existing(input, "--input")
  root = base.existing(images, "--images") if images else home
  files = indexed.paths(annotations, "--annotations") or _found(home, year)
  karpathy = [file for file in files if _is_karpathy(file)]
  others = [file for file in files if file not in karpathy]
  if karpathy and not any("instances" in file.name for file in others):
    others += [f for f in _of_year(home, year) if "instances" in f.name]
  if karpathy:  # whose images are those of both years
    _check_one_year(others, home)
  names = list(dict.fromkeys("" if karpathy else _part(file) for file in [*karpathy, *others]))
  allow_outside = common.get("allow_outside", False)

  def part_of(file: pathlib.Path) -> int:
    return 0 if karpathy else names.index(_part(file))

  def fill(writer: image_index.Writer) -> None:
    for file in karpathy:
      coco_json.add_file(writer, file, 0, keep=())
    for file in others:
      coco_json.add_file(writer, file, part_of(file), keep=_KEEP, lists_images=not karpathy)

  def locate(data: Mapping[str, Any], name: str, key: str) -> pathlib.Path | records.Refused:
    return indexed.locate(root, _file_names(data, name, key), allow_outside=allow_outside)

  @functools.cache
  def categories(index: image_index.Index, part: int) -> Mapping[str, Any]:
    found = index.note(f"categories {part}") or {}
    return {number: entry["name"] for number, entry in found.items()}

  def read(entry: image_index.Entry, index: image_index.Index) -> Iterator[base.Item]:
    name, data = names[entry.part], entry.data
    split = _split(data, name)
    if not any(indexed.is_text(data.get(k)) for k in ("file_name", "filename", "coco_url")):
      yield split, records.Refused(entry.id, "records", records.MALFORMED)
      return
    image = locate(data, name, entry.id)
    if isinstance(image, records.Refused):
      yield split, image
      return
    key = entry.id.zfill(12)
    size = next((a for a in (data, *entry.annotations) if "width" in a), {})
    frame = frames.frame_of(image, size.get("width"), size.get("height"))
    regions, lost = coco_json.regions_of(
      key, entry.annotations, frame, categories(index, entry.part)
    )
    yield from ((split, item) for item in lost)
    captions = [s.get("raw") if isinstance(s, dict) else s for s in data.get("sentences") or []]
    captions += coco_json.captions_of(entry.annotations)
    captions = captions or indexed.caption_of_names(r["description"] for r in regions)
    yield split, indexed.record(key, image, captions, regions, [entry.id])

  def image_files() -> Iterator[pathlib.Path]:
    told: set[int] = set()
    for file in [*karpathy, *others]:
      if part_of(file) in told:
        continue
      told.add(part_of(file))
      for data in coco_json.image_entries(file):
        name = "" if karpathy else _part(file)
        if any(indexed.is_text(data.get(k)) for k in ("file_name", "filename", "coco_url")):
          image = locate(data, name, str(data.get("cocoid", data.get("id"))))
          if isinstance(image, pathlib.Path):
            yield image

  arguments = {
    "input": str(home), "annotations": list(map(str, files)), "images": str(root), "year": year,
  }  # fmt: skip
  return indexed.source(
    "coco",
    files=[*karpathy, *others],
    arguments=arguments,
    common=common,
    fill=fill,
    read=read,
    images=image_files,
  )


def _found(home: pathlib.Path, year: str | None) -> list[pathlib.Path]:
  karpathy = indexed.find_files(home, [_KARPATHY])
  if karpathy:
    return karpathy[:1]
  files = _of_year(home, year)
  if not files:
    raise indexed.no_files(home, f"captions_*.json, instances_*.json or {_KARPATHY}")
  _check_one_year(files, home)
  return files


def _check_one_year(files: Sequence[pathlib.Path], home: pathlib.Path) -> None:
  """Raises where boxes and captions of an image would be there twice."""
  years = sorted({found[2] for file in files if (found := _YEAR.search(file.name))})
  if len(years) > 1:
    raise ValueError(
      f"--input = {home} holds annotations of {' and '.join(years)}, of the same images. Choose "
      f"with --year={years[-1]}."
    )


def _of_year(home: pathlib.Path, year: str | None) -> list[pathlib.Path]:
  files = indexed.find_files(home, _PATTERNS)
  return [file for file in files if year is None or year in file.name]


def _is_karpathy(file: pathlib.Path) -> bool:
  if file.name.startswith(("captions_", "instances_")):
    return False
  return "sentences" in next(coco_json.image_entries(file), {})


def _part(file: pathlib.Path) -> str:
  """'train2017' of annotations/captions_train2017.json; a split where no year is told."""
  found = _YEAR.search(file.name)
  return found[0] if found else coco_json.split_in(file.stem)


def _split(data: Mapping[str, Any], part: str) -> str:
  if part:
    return coco_json.split_in(re.sub(r"\d+$", "", part))
  split = data.get("split")
  return "train" if split in (None, "restval") else str(split)


def _file_names(data: Mapping[str, Any], part: str, key: str) -> Sequence[str]:
  """Where an image may lie, from its own place to those of the other year."""
  name = next(
    data[k] for k in ("file_name", "filename", "coco_url") if indexed.is_text(data.get(k))
  )
  if "://" in name:
    name = coco_names.last_parts(name)
  folders = [f for f in (data.get("filepath"), part, "") if isinstance(f, str)]
  names = indexed.in_folders(name, folders)
  number = coco_names.id_in_name(name)
  if number:
    plain = f"{number.zfill(12)}.jpg"
    for folder in _FOLDERS:
      own = f"COCO_{folder}_{plain}" if folder.endswith(("2014", "2015")) else plain
      names += indexed.in_folders(own, [folder])
  return list(dict.fromkeys(names))
