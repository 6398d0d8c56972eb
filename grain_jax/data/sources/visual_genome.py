"""Visual Genome's region descriptions (--source=visual_genome --input=FOLDER).

FOLDER holds image_data.json, region_descriptions.json and the images, in VG_100K/ and VG_100K_2/:
which of them stands in an image's url. Regions have no scores and many overlap: --nms and
--max_regions thin them out. An image has no caption: it gets COCO's where it is one of COCO's and
captions_*.json are in FOLDER, or FOLDER/annotations, or given as --captions; else one made of the
phrases of its five largest regions.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from grain_jax import jsonfiles
from grain_jax.data import records
from grain_jax.data.sources import base, coco_json, coco_names, frames, image_index, indexed

TOLERANCE = 0.05  # boxes reach over the edge
FLAGS = indexed.flags(coco_json.CAPTIONS_FLAG, tolerance=TOLERANCE)
_FILES = ("image_data.json", "region_descriptions.json")
_FOLDERS = ("VG_100K", "VG_100K_2")
_COCO = "coco/"  # before COCO's id, as an alias of an image


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: indexed.Paths = None,
  images: str | pathlib.Path | None = None,
  captions: indexed.Paths = None,
  tolerance: float = TOLERANCE,
  **common: Any,
) -> base.Source:
  """Visual Genome's images with a description a region.

  Args:
    input: folder of the set; the layout stands at the head of this file.
    annotations: image_data.json and region_descriptions.json, or one of them where the other lies
      in the folder.
    images: folder of VG_100K and VG_100K_2; default: the folder.
    captions: COCO's captions files; default: those of the folder.
    tolerance: see `indexed.Common`.
    common: see `indexed.Common`.
  """
  home = base.existing(input, "--input")
  root = base.existing(images, "--images") if images else home
  given = indexed.paths(annotations, "--annotations")
  for file in given:
    if not any(name.removesuffix(".json") in file.name for name in _FILES):
      raise ValueError(
        f"--annotations = {file}: neither {' nor '.join(_FILES)}. Name one of these."
      )
  of_images, of_regions = (_file(name, given, home) for name in _FILES)
  texts = indexed.paths(captions, "--captions")
  texts = texts or indexed.find_files(home, ["captions_*.json"])

  def fill(writer: image_index.Writer) -> None:
    for _, value in jsonfiles.iterate_elements(of_images):
      _add_image(writer, value)
    for _, value in jsonfiles.iterate_elements(of_regions):
      _add_regions(writer, value)
    for file in texts:
      coco_json.add_captions(writer, file, 0, _COCO)

  def locate(data: Mapping[str, Any], name: str) -> pathlib.Path:
    return indexed.locate(root, _file_names(data, name), allow_outside=True)

  def read(entry: image_index.Entry, index: image_index.Index) -> Iterator[base.Item]:
    image = locate(entry.data, entry.id)
    key = _file_names(entry.data, entry.id)[0]
    said = [a for a in entry.annotations if "phrase" in a]
    size = (entry.data.get("width"), entry.data.get("height"))
    frame = frames.frame_of(image, *size) if said else None
    regions = []
    for region in said:
      box = [region.get(k) for k in ("x", "y", "width", "height")]
      box = None if frame is None else frame.fractions(box, "xywh")
      regions.append(indexed.region(region["phrase"], box))
    found = indexed.each_once(coco_json.captions_of(entry.annotations))
    found = found or indexed.caption_of_phrases(regions, tolerance=tolerance)
    yield "train", indexed.record(key, image, found, regions, [coco_names.id_of(entry.data)])

  def image_files() -> Iterator[pathlib.Path]:
    for _, value in jsonfiles.iterate_elements(of_images):
      if isinstance(value, Mapping) and coco_json.is_id(value.get("image_id")):
        yield locate(value, str(value["image_id"]))

  files = [of_images, of_regions]
  arguments = {
    "input": str(home), "images": str(root), "annotations": list(map(str, files)),
    "captions": list(map(str, texts)),
  }  # fmt: skip
  return indexed.source(
    "visual_genome",
    files=[*files, *texts],
    arguments=arguments,
    common={**common, "tolerance": tolerance},
    fill=fill,
    read=read,
    images=image_files,
  )


def _file(name: str, given: list[pathlib.Path], home: pathlib.Path) -> pathlib.Path:
  stem = name.removesuffix(".json")
  found = [f for f in given if stem in f.name] or indexed.find_files(home, [name])
  if not found:
    raise indexed.no_files(home, name)
  return found[0]


def _add_image(writer: image_index.Writer, value: Any) -> None:
  if not isinstance(value, Mapping) or not coco_json.is_id(value.get("image_id")):
    writer.refuse(records.Refused(str(value)[:80], "records", records.MALFORMED))
    return
  data = {k: value.get(k) for k in ("url", "width", "height", "coco_id")}
  writer.image(0, value["image_id"], data)
  known = coco_names.id_of(data)
  if known:
    writer.alias(0, f"{_COCO}{known}", value["image_id"])


def _add_regions(writer: image_index.Writer, value: Any) -> None:
  """Of v1.2, with the image's id as "id", of copies with "image_id" there or in each region."""
  regions = value.get("regions") if isinstance(value, Mapping) else None
  if not isinstance(regions, list):
    writer.refuse(records.Refused(str(value)[:80], "regions", records.MALFORMED))
    return
  own = value.get("id", value.get("image_id"))
  for region in regions:
    inner = region.get("image_id") if isinstance(region, Mapping) else None
    name = own if own is not None else inner
    if not isinstance(region, Mapping) or not coco_json.is_id(name):
      writer.refuse(records.Refused(str(region)[:80], "regions", records.MALFORMED))
      continue
    kept = {k: region.get(k) for k in ("phrase", "x", "y", "width", "height")}
    writer.annotation(0, name, "regions", kept)


def _file_names(data: Mapping[str, Any], name: str) -> list[str]:
  """Where an image may lie: in the folder of its url first."""
  name = name.replace("/", "_")  # a number; nothing else leads anywhere
  url = data.get("url")
  folder = url.split("/")[-2] if isinstance(url, str) and url.count("/") else ""
  folders = [folder] if folder in _FOLDERS else []
  return indexed.in_folders(f"{name}.jpg", dict.fromkeys([*folders, *_FOLDERS, ""]))
