"""Annotation files of outside datasets: one-line errors, images of COCO, Karpathy's split."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from grain_jax import places, textfiles
from grain_jax.evals.inputs.options import Options, find

GET_COCO = "Get val2014.zip, train2014.zip and val2017.zip from cocodataset.org into DIR/coco."
GET_FLICKR30K = (
  "Ask for the pictures at forms.illinois.edu/sec/229675 and unpack them into DIR/flickr30k/images."
)
_GET_KARPATHY = (
  "Get caption_datasets.zip from cs.stanford.edu/people/karpathy/deepimagesent and unpack it into "
  "DIR/karpathy."
)


# What the readers of sets call them by: one name for all that they need of annotations.
read_json, read_json_lines = textfiles.read_json, textfiles.read_json_lines


class Captioned(NamedTuple):
  """An image and its captions."""

  image: pathlib.Path
  captions: tuple[str, ...]


def entries(value: Any, where: object) -> Iterator[tuple[str, Any]]:
  """("WHERE entry KEY", entry) of a list or an object of entries."""
  if not isinstance(value, (Mapping, list)):
    raise ValueError(f"{where} holds a {type(value).__name__}, not entries. Is it the right file?")
  for key, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
    yield f"{where} entry {key!r}", entry


def field(entry: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
  """entry[name]; a one-line ValueError unless it is there, of the kind, and no blank string."""
  value = entry.get(name) if isinstance(entry, Mapping) else None
  if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
    wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    raise ValueError(f"{where}: {name} = {value!r} is no {wanted}. Is it the right file?")
  return value


def texts(entry: Any, name: str, where: str) -> tuple[str, ...]:
  """entry[name] as one text or more: a string, or a list of strings, none of them blank."""
  value = field(entry, name, (str, list), where)
  found = (value,) if isinstance(value, str) else tuple(value)
  if not found or not all(isinstance(text, str) and text.strip() for text in found):
    raise ValueError(f"{where}: {name} = {value!r}: give texts that are not blank.")
  return found


def coco_2014(root: pathlib.Path, filename: str) -> pathlib.Path:
  """Where the image COCO_{split}_{id}.jpg lies: ROOT/coco/{split}."""
  parts = filename.split("_")
  if len(parts) != 3 or parts[0] != "COCO":
    raise ValueError(f"{filename!r} is no name of a COCO 2014 picture: COCO_val2014_ID.jpg.")
  return root / "coco" / parts[1] / filename


def karpathy(options: Options, dataset: str, what: str) -> list[Captioned]:
  """The test split of Karpathy and Fei-Fei (CVPR 2015), as their file orders it.

  Reads ROOT/karpathy/dataset_{dataset}.json: {"images": [{"filename", "split", "sentences":
  [{"raw"}, ...]}, ...]}. All captions: some COCO images have six or seven.

  Args:
    options: with the root.
    dataset: "coco" or "flickr30k".
    what: the evaluation, for messages.
  """
  path = find(options, "karpathy", f"dataset_{dataset}.json", what=what, how=_GET_KARPATHY)
  assert options.root is not None  # or `find` had raised
  found = []
  for where, image in entries(field(read_json(path), "images", list, str(path)), path):
    if field(image, "split", str, where) != "test":
      continue
    name = field(image, "filename", str, where)
    file = options.root / "flickr30k" / "images" / name
    if dataset == "coco":
      file = coco_2014(options.root, name)
    sentences = field(image, "sentences", list, where)
    captions = tuple(field(s, "raw", str, where).strip() for s in sentences)
    if not captions:
      raise ValueError(f"{where}: sentences = []: each picture needs a caption.")
    found.append(Captioned(file, captions))
  if not found:
    raise ValueError(f"{what}: {path} has no image of split 'test'. Get it once more.")
  return found


def check_images(paths: Iterable[pathlib.Path], what: str, how: str) -> None:
  """A one-line ValueError where a folder holds none of the images needed from it."""
  needed: dict[pathlib.Path, list[pathlib.Path]] = {}
  for path in dict.fromkeys(paths):
    needed.setdefault(path.parent, []).append(path)
  for folder, own in needed.items():
    if not any(places.find_file(path).is_file() for path in own):
      raise ValueError(f"{what}: {folder} holds none of its {len(own)} pictures. {how}")
