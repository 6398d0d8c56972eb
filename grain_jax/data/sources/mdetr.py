"""Files of MDETR and GLIP, whose boxes point at spans of captions (--source=mdetr --input=FOLDER).

RefCOCO, RefCOCO+ and RefCOCOg (finetune_refcoco_train.json, ...), Flickr30k Entities
(final_flickr_separateGT_train.json) and GoldG (final_mixed_train_no_coco.json): COCO's kind of
JSON, in which an image is listed once for each of its captions or expressions, with "caption", and
an annotation has tokens_positive [[start, end], ...]: characters of that caption, which describe
its box. FOLDER holds such files, in itself, in annotations/ or in mdetr_annotations/, and the
images; the split is the one that a file's name speaks of (train, val, test, testA, testB).

All that a split says of an image is one record: its captions, each once, and a region for each box;
the key is its file name. A box that an earlier file has with the same text is left out and counted
(mixed and mixed_no_coco, separateGT and mergedGT repeat one another). Expressions of RefCOCO are no
captions of a whole image: COCO's go before them, where captions_*.json are in FOLDER or
FOLDER/annotations or given as --captions.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from grain_jax import jsonfiles
from grain_jax.data import records
from grain_jax.data.sources import base, coco_json, coco_names, frames, image_index, indexed

FLAGS = indexed.flags(coco_json.CAPTIONS_FLAG)
_PATTERNS = ("finetune_*.json", "final_*.json", "*_train.json", "*_val.json", "*_test*.json")
_CONVERTED = ("_vg", "_od")  # lines of ODVG, which others make of these files
_OTHERS = ("captions_", "instances_", "lvis_", "zhiyuan_", "objects365_")
REPEATED = "region_of_another_file"
_COCO = "coco/"  # before COCO's id, as an alias of an image
_FOLDERS = (
  "",
  "train2014",
  "val2014",
  "train2017",
  "val2017",
  "VG_100K",
  "VG_100K_2",
  "flickr30k-images",
  "flickr30k_images",
)


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: indexed.Paths = None,
  images: str | pathlib.Path | None = None,
  captions: indexed.Paths = None,
  **common: Any,
) -> base.Source:
  """Images with captions, and boxes described by spans of these.

  Args:
    input: folder of the files and images; the layout stands at the head of this file.
    annotations: the JSON files; default: those of the folder.
    images: folder that file names start from, or that holds the sets' own folders (train2014, ...);
      default: the folder.
    captions: COCO's captions files; default: those of the folder.
    common: see `indexed.Common`.
  """
  home = base.existing(input, "--input")
  root = base.existing(images, "--images") if images else home
  files = indexed.paths(annotations, "--annotations")
  files = files or [
    file
    for file in indexed.find_files(home, _PATTERNS)
    if not file.name.startswith(_OTHERS) and not file.stem.endswith(_CONVERTED)
  ]
  if not files:
    raise indexed.no_files(home, "finetune_*.json or final_*.json of MDETR")
  texts = indexed.paths(captions, "--captions")
  texts = texts or indexed.find_files(home, ["captions_*.json"])
  splits = list(dict.fromkeys(coco_json.split_in(file.stem) for file in files))
  allow_outside = common.get("allow_outside", False)

  def fill(writer: image_index.Writer) -> None:
    for number, file in enumerate(files):
      _add_file(writer, file, splits.index(coco_json.split_in(file.stem)), number)
    for text in texts:
      for part in range(len(splits)):
        coco_json.add_captions(writer, text, part, _COCO)

  def locate(name: str) -> pathlib.Path | records.Refused:
    names = indexed.in_folders(name, _FOLDERS)
    return indexed.locate(root, names, allow_outside=allow_outside)

  def read(entry: image_index.Entry, index: image_index.Index) -> Iterator[base.Item]:
    split, key = splits[entry.part], entry.id
    image = locate(key)
    if isinstance(image, records.Refused):
      yield split, image
      return
    frame = frames.frame_of(image, entry.data.get("width"), entry.data.get("height"))
    said = {a["entry"]: a["text"] for a in entry.annotations if "text" in a}
    regions, file_of = [], {}
    for annotation in entry.annotations:
      if "of" not in annotation:
        continue
      found = _region(annotation, said.get(annotation["of"]), frame)
      if isinstance(found, str):
        yield split, records.Refused(key, "regions", found)
        continue
      number = annotation["of"].partition("/")[0]
      if file_of.setdefault((found["description"], str(found["box"])), number) != number:
        yield split, records.Refused(key, "regions", REPEATED)
      else:
        regions.append(found)
    captions = [*coco_json.captions_of(entry.annotations), *said.values()]
    once = indexed.each_once(captions)
    yield split, indexed.record(key, image, once, regions, [coco_names.id_of(entry.data)])

  def image_files() -> Iterator[pathlib.Path]:
    before = None
    for file in files:
      for data in coco_json.image_entries(file):
        name = data.get("file_name")
        if indexed.is_text(name) and name != before:
          image = locate(name)
          if isinstance(image, pathlib.Path):
            yield image
        before = name

  arguments = {
    "input": str(home), "images": str(root), "annotations": list(map(str, files)),
    "captions": list(map(str, texts)),
  }  # fmt: skip
  return indexed.source(
    "mdetr",
    files=[*files, *texts],
    arguments=arguments,
    common=common,
    fill=fill,
    read=read,
    images=image_files,
  )


def _add_file(writer: image_index.Writer, file: pathlib.Path, part: int, number: int) -> None:
  """Adds a file; an entry is "NUMBER/ID", for the ids of two files have nothing in common."""
  for array, value in jsonfiles.iterate_elements(file):
    if array not in ("images", "annotations"):
      continue
    kind, name = ("records", "id") if array == "images" else ("regions", "image_id")
    given = value if isinstance(value, Mapping) else {}
    is_good = array == "annotations" or indexed.is_text(given.get("file_name"))
    if not is_good or not coco_json.is_id(given.get(name)):
      key = f"{file.name}: {array} {str(value)[:60]}"
      writer.refuse(records.Refused(key, kind, records.MALFORMED))
      continue
    entry = f"{number}/{given[name]}"
    if array == "images":
      path = value["file_name"]
      data = {k: value.get(k) for k in ("file_name", "width", "height")}
      writer.image(part, path, data)
      writer.alias(part, entry, path)
      known = coco_names.id_of(data)
      if known:
        writer.alias(part, f"{_COCO}{known}", path)
      said = {"entry": entry, "text": value.get("caption")}
      writer.annotation(part, entry, image_index.OPTIONAL, said)
    else:
      kept = {k: value.get(k) for k in ("bbox", "tokens_positive", "iscrowd", "score")}
      writer.annotation(part, entry, "regions", {"of": entry, **kept})


def _region(
  annotation: Mapping[str, Any], caption: Any, frame: frames.Frame | None
) -> dict[str, Any] | str:
  """The region of an annotation, or why there is none."""
  if annotation["iscrowd"] in (1, True):
    return coco_json.CROWD
  spans = annotation["tokens_positive"]
  if not isinstance(spans, list):
    return records.MALFORMED if spans else coco_json.NO_SPAN
  text = coco_json.spanned(caption, spans)
  if text is None:
    return coco_json.SPAN_OUTSIDE
  if not text:
    return coco_json.NO_SPAN
  box = None if frame is None else frame.fractions(annotation["bbox"], "xywh")
  score = annotation["score"]
  return indexed.region(text, box, 1.0 if score is None else score)
