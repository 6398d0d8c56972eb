"""Grounding on outside data: boxes for given descriptions, `grounding:SET`.

Referring expressions (RefCOCO, RefCOCO+, RefCOCOg as MDETR's JSON files give them: the originals
are pickles, which this project does not load), phrases (Flickr30k Entities), the names of an
image's categories (COCO, LVIS), and one's own DIR/NAME/regions.jsonl or annotations.jsonl, a line
an image as `grain_jax.data.build --source=folder` reads it:

  {"image": "images/1.jpg", "regions": [{"description": "a dog", "box": [0.2, 0.1, 0.9, 0.7]}]}

with boxes (ymin, xmin, ymax, xmax) as fractions of the image and paths that start at DIR/NAME.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from grain_jax import places, schema, textfiles
from grain_jax.evals import grounding
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs import instances
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options, find

_REFERRING = (
  "Get mdetr_annotations.tar.gz (zenodo.org/records/4729015) and unpack its finetune_*.json files "
  "into DIR/refcoco; get train2014.zip from cocodataset.org and unpack it into DIR/coco."
)
_PHRASES = (
  "Get annotations.zip of github.com/BryanPlummer/flickr30k_entities and unpack it into "
  "DIR/flickr30k_entities, beside that repository's {split}.txt; ask for the pictures of Flickr30k "
  "at its own site (hockenmaier.cs.illinois.edu/DenotationGraph) and put them into "
  "DIR/flickr30k/images."
)
_OWN = ("regions.jsonl", "annotations.jsonl")
_PHRASE = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]+)\]")

REFERRING = {
  f"{name}_{split}": instances.Set(
    ("refcoco", f"finetune_{name}_{split}.json"), ("coco", "train2014"), _REFERRING
  )
  for name, splits in {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
  }.items()
  for split in splits
}
PHRASES = {
  f"flickr30k_entities_{split}": instances.Set(
    ("flickr30k_entities", f"{split}.txt"),
    ("flickr30k", "images"),
    _PHRASES.format(split=split),
  )
  for split in ("val", "test")
}
SETS: dict[str, instances.Set] = {**REFERRING, **PHRASES, **instances.SETS}


@dataclasses.dataclass(frozen=True)
class Grounded:
  """Images and what is to be found in them."""

  files: Sequence[pathlib.Path]
  given: Sequence[grounding.GroundingTargets]  # of each image; one description or more
  clipped: int  # boxes that reached out of their image
  dropped: int  # boxes without area


@dataclasses.dataclass(frozen=True)
class Region:
  """A line's region: its description and what else stands with it."""

  description: str
  box: np.ndarray  # (cx, cy, w, h) as fractions, f64 [4]
  negatives: tuple[str, ...] = ()  # descriptions that are wrong for it


@dataclasses.dataclass(frozen=True)
class Lines:
  """What a file of one's own holds."""

  rows: Sequence[tuple[str, Sequence[Region]]]  # image, regions with a description
  clipped: int
  dropped: int


def check(name: str, options: Options) -> None:
  """Raises a one-line ValueError where annotations or all images are missing or malformed."""
  what = f"grounding:{name}"
  found = load(name, options, what=what)
  if not found.files:
    raise ValueError(f"{what}: no image has a description with a box. Check the annotations.")
  how = SETS[name].how if name in SETS else "Paths of images start at the folder of the file."
  instances.check_files(found.files, what=what, how=how)


def contents(name: str, options: Options) -> tuple[Any, ...]:
  """What is read of a set, the items first: all processes must have the same."""
  found = load(name, options, what=f"grounding:{name}")
  return found.files, found.given


def run(encoders: Encoders, name: str, options: Options) -> dict[str, float | int]:
  """Mean IoU and recall of the boxes found for descriptions; see `grounding.evaluate_given`.

  Returns:
    `grounding/{name}/...`: those, and counts: `examples` images of `rows`, `clipped_boxes`,
    `dropped_boxes`.
  """
  what = f"grounding:{name}"
  encoders.require_regions(what)
  found = load(name, options, what=what)
  unreadable = images_lib.Unreadable()

  def batches() -> Iterator[tuple[np.ndarray, list[grounding.GroundingTargets]]]:
    for batch in instances.batches(encoders, found.files, what=what, unreadable=unreadable):
      yield batch.image, [found.given[i] for i in batch.index]

  results = grounding.evaluate_given(encoders.regions, encoders.text, batches())
  instances.warn(what, len(found.files), unreadable, options.warn)
  results |= {"examples": len(found.files) - len(unreadable), "rows": len(found.files)}
  results |= {"clipped_boxes": found.clipped, "dropped_boxes": found.dropped}
  return {f"grounding/{name}/{key}": value for key, value in results.items()}


def load(name: str, options: Options, *, what: str) -> Grounded:
  """What a set holds, `options.limit` applied."""
  if name in REFERRING:
    return _referring(name, options, what)
  if name in PHRASES:
    return _phrases(name, options, what)
  if name in instances.SETS:
    return _categories(name, options, what)
  file, lines = own_lines(name, options, what=what)
  kept = [(image, regions) for image, regions in lines.rows if regions]
  kept = kept[: options.limit or None]
  given = [
    grounding.GroundingTargets([r.description for r in regions], [r.box[None] for r in regions])
    for _, regions in kept
  ]
  return Grounded([file.parent / image for image, _ in kept], given, lines.clipped, lines.dropped)


def own_lines(name: str, options: Options, *, what: str) -> tuple[pathlib.Path, Lines]:
  """The file of one's own and what it holds; `what` needs DIR/NAME/regions.jsonl."""
  how = (
    f"Known sets are {', '.join(SETS)}; for your own, write DIR/{name}/regions.jsonl, a line an "
    'image: {"image": path, "regions": [{"description": text, "box": [ymin, xmin, ymax, xmax]}]}.'
  )
  if options.root is not None:
    for file in (places.find_file(options.root / name / own) for own in _OWN):
      if file.is_file():
        return file, read_lines(file)
  file = find(options, name, _OWN[0], what=what, how=how)
  raise ValueError(f"{what}: {file} is no file. {how}")


def read_lines(file: pathlib.Path) -> Lines:
  """A file of one's own; boxes are clipped, those without area dropped, both counted.

  Regions without a description are left out.

  Raises:
    ValueError: one line with the number of the line that is wrong.
  """
  rows, clipped, dropped = [], 0, 0
  for where, entry in textfiles.read_json_lines(file):
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
      raise ValueError(f"{where} names no image. Give {{'image': path, 'regions': [...]}}.")
    found = entry.get("regions") or []
    if not isinstance(found, list) or not all(isinstance(region, dict) for region in found):
      raise ValueError(f"{where}: regions is no list of objects. Give description and box of each.")
    regions = []
    for region in found:
      box, outside = _own_box(region.get("box"), where)
      description = "" if region.get("description") is None else region["description"]
      negatives = region.get("negatives") or []
      if not isinstance(description, str) or not _texts(negatives):
        raise ValueError(f"{where}: description is a text, negatives are texts. Mend the line.")
      dropped += box is None
      clipped += outside
      if box is not None and description.strip():
        regions.append(Region(description.strip(), box, tuple(text.strip() for text in negatives)))
    rows.append((entry["image"], regions))
  return Lines(rows, clipped, dropped)


def _texts(values: Any) -> bool:
  return isinstance(values, list) and all(isinstance(v, str) and v.strip() for v in values)


def _own_box(box: Any, where: str) -> tuple[np.ndarray | None, bool]:
  """(ymin, xmin, ymax, xmax) -> (cx, cy, w, h), None without area; whether it was clipped."""
  numbers = isinstance(box, list) and len(box) == 4
  if not numbers or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in box):
    raise ValueError(f"{where}: box = {box!r} is no [ymin, xmin, ymax, xmax]. Give four fractions.")
  corners = np.asarray(box, np.float64)
  if np.abs(corners).max() > 2:
    raise ValueError(f"{where}: box = {box} is in pixels. Give fractions of the image.")
  inside = np.clip(corners, 0, 1)
  ymin, xmin, ymax, xmax = inside
  if ymax <= ymin or xmax <= xmin:
    return None, False
  center = np.array([(xmin + xmax) / 2, (ymin + ymax) / 2, xmax - xmin, ymax - ymin])
  return center, bool(np.abs(inside - corners).max() > 1e-3)


def _referring(name: str, options: Options, what: str) -> Grounded:
  """An image stands in the file once for each expression: all of them together here."""
  own = SETS[name]
  content = instances.read(find(options, *own.annotations, what=what, how=own.how))
  texts: dict[str, list[str]] = {}
  boxes: dict[str, list[np.ndarray]] = {}
  for image in content.images:
    if image.caption.strip() and len(image.boxes):
      texts.setdefault(image.name, []).append(image.caption.strip())
      boxes.setdefault(image.name, []).append(image.boxes)
  names = list(texts)[: options.limit or None]
  return Grounded(
    [own.file(options.root, n) for n in names],
    [grounding.GroundingTargets(texts[n], boxes[n]) for n in names],
    content.clipped,
    content.dropped,
  )


def _categories(name: str, options: Options, what: str) -> Grounded:
  """A description for each category of an image; its boxes are those of that category."""
  own = SETS[name]
  content = instances.load(name, options, what=what)
  files, given = [], []
  for image in content.images:
    single = image.single()
    if not len(single):
      continue
    present = np.unique(image.category[single])
    files.append(own.file(options.root, image.name))
    given.append(
      grounding.GroundingTargets(
        [content.names[int(c)] for c in present],
        [image.boxes[single][image.category[single] == c] for c in present],
      )
    )
  return Grounded(files, given, content.clipped, content.dropped)


def _phrases(name: str, options: Options, what: str) -> Grounded:
  """Flickr30k Entities: every phrase of the five captions that has a box (Plummer et al., 2017)."""
  own = SETS[name]
  listed = find(options, *own.annotations, what=what, how=own.how)
  keys = textfiles.read_text(listed).split()[: options.limit or None]
  folder, files, given = own.annotations[0], [], []
  clipped = dropped = 0
  for key in keys:
    xml = find(options, folder, "Annotations", f"{key}.xml", what=what, how=own.how)
    text = find(options, folder, "Sentences", f"{key}.txt", what=what, how=own.how)
    boxes, out, empty = _entity_boxes(xml)
    clipped, dropped = clipped + out, dropped + empty
    phrases = [m for m in _PHRASE.findall(textfiles.read_text(text)) if m[0] in boxes]
    if phrases:
      files.append(own.file(options.root, f"{key}.jpg"))
      given.append(
        grounding.GroundingTargets([p for _, p in phrases], [boxes[c] for c, _ in phrases])
      )
  return Grounded(files, given, clipped, dropped)


def _entity_boxes(file: pathlib.Path) -> tuple[Mapping[str, np.ndarray], int, int]:
  """Boxes by the id of what they show, (cx, cy, w, h) [B, 4]; how many were clipped, dropped."""
  try:
    tree = ElementTree.parse(file)
    width, height = (int(tree.findtext(f"size/{side}", "0")) for side in ("width", "height"))
    boxes: dict[str, list[np.ndarray]] = {}
    clipped = dropped = 0
    for entry in tree.iterfind("object"):
      bounds = entry.find("bndbox")
      if bounds is None:  # of the whole scene, or not to be seen
        continue
      # Pixels are counted from 1.
      corners = [int(bounds.findtext(k, "")) - 1 for k in ("ymin", "xmin", "ymax", "xmax")]
      inside = np.clip(corners, 0, [height, width, height, width])
      if (inside[2:] <= inside[:2]).any():
        dropped += 1
        continue
      clipped += bool((inside != corners).any())
      box = schema.corners_to_center(inside / np.array([height, width, height, width]))
      for id_ in entry.iterfind("name"):
        boxes.setdefault(id_.text or "", []).append(box)
  except (ElementTree.ParseError, ValueError, ZeroDivisionError) as error:
    raise ValueError(f"{file} is no annotation of Flickr30k Entities: {error}.") from error
  return {key: np.stack(own) for key, own in boxes.items()}, clipped, dropped
