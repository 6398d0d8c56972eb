"""Sources whose annotations are gathered by image on disk first: what they have in common."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from grain_jax import schema
from grain_jax.data import records
from grain_jax.data.building import inputs
from grain_jax.data.sources import base, image_index

BLOCK = 2048  # images a block
TOLERANCE = 0.01  # annotators' boxes reach a few pixels over the edge
ANNOTATIONS_FLAG = base.Flag("annotations", "files; default: those of --input", [], many=True)
IMAGES_FLAG = base.Flag("images", "folder of images; default: --input")
PHRASES = 5  # of an image's regions, of which a caption is made

Paths = str | pathlib.Path | Sequence[str | pathlib.Path] | None


@dataclasses.dataclass(frozen=True)
class Common:
  """The values of the flags that all of them have."""

  val_fraction: float = 0.0
  tolerance: float = TOLERANCE
  licence: str = ""
  allow_outside: bool = False
  max_pixels: int = schema.MAX_PIXELS


def flags(*own: base.Flag, tolerance: float = TOLERANCE) -> tuple[base.Flag, ...]:
  """The flags of a source: those of all, and its own."""
  return (
    base.Flag("input", "folder of the set, in its published layout", required=True),
    ANNOTATIONS_FLAG,
    IMAGES_FLAG,
    *own,
    base.tolerance_flag(tolerance),
    *base.COMMON_FLAGS,
    base.OUTSIDE_FLAG,
  )


def source(
  kind: str,
  *,
  files: Sequence[pathlib.Path],
  arguments: Mapping[str, Any],
  common: Mapping[str, Any],
  fill: Callable[[image_index.Writer], None],
  read: Callable[[image_index.Entry, image_index.Index], Iterator[base.Item]],
  images: Callable[[], Iterator[pathlib.Path]],
) -> base.Source:
  """A source over an `image_index`.

  Args:
    kind: of the source.
    files: of annotations.
    arguments: of the kind's `source`, as JSON, without those of `Common`.
    common: values of `Common`.
    fill: puts the annotations into the index.
    read: an image of the index -> what is lost of it, and its record, each with its split before
      --val_fraction.
    images: files of all records.
  """
  values = Common(**common)
  base.check_common(val_fraction=values.val_fraction, max_pixels=values.max_pixels)
  opened = functools.cache(image_index.Index)

  def prepare(scratch: pathlib.Path) -> None:
    opened.cache_clear()
    image_index.make(scratch, fill)

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    return opened(scratch).blocks(BLOCK)

  def read_block(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    index = opened(scratch)
    for entry in index.read(block):
      if isinstance(entry, records.Refused):
        yield "train", entry
        continue
      for split, item in read(entry, index):
        key = item.key if isinstance(item, records.Refused) else item[schema.RECORD_KEY]
        yield base.split_of(key, split, values.val_fraction), item

  settings = {**arguments, "files": [inputs.stamp(file) for file in files]}
  settings |= {name: v for name, v in dataclasses.asdict(values).items() if name != "licence"}
  return base.Source(
    kind,
    settings,
    read_block,
    about={"licence": values.licence},
    blocks=blocks,
    prepare=prepare,
    recipe={"kind": kind, "arguments": {**arguments, **dataclasses.asdict(values)}},
    tolerance=values.tolerance,
    images=images,
    max_pixels=values.max_pixels,
  )


def paths(given: Paths, flag: str) -> list[pathlib.Path]:
  """The files that a flag names, one or several; those of a folder are not looked for."""
  several = [given] if isinstance(given, (str, pathlib.Path)) else list(given or ())
  found = [base.existing(path, flag) for path in several]
  for path in found:
    if not path.is_file():
      raise ValueError(f"{flag} = {path} is a folder. Name the files in it.")
  return found


def find_files(root: pathlib.Path, patterns: Iterable[str]) -> list[pathlib.Path]:
  """Files of a folder, or of its folder of annotations, by their names; each once."""
  found = {
    file: None
    for folder in (root, root / "annotations", root / "mdetr_annotations")
    for pattern in patterns
    for file in sorted(folder.glob(pattern))
    if file.is_file()
  }
  return list(found)


def no_files(root: pathlib.Path, names: str) -> ValueError:
  return ValueError(
    f"--input = {root}: neither it nor its folder annotations holds {names}. Give the folder of "
    "the set, or name the files with --annotations."
  )


def locate(
  root: pathlib.Path, names: Sequence[str], *, allow_outside: bool
) -> pathlib.Path | records.Refused:
  """The first file of some names in a folder that is there, else the first name's.

  A name that leads out of the folder is refused.
  """
  if not allow_outside and any(base.is_outside(root, name) for name in names):
    return records.Refused(names[0], "records", base.OUTSIDE)
  for name in names:
    try:
      if os.path.exists(root / name):
        return root / name
    except ValueError:  # a NUL, half a character: `records.check` counts what is no path
      break
  return root / names[0]


def in_folders(name: str, folders: Iterable[str]) -> list[str]:
  """A file's name in each of some folders ('': none), and in each below `images`, once."""
  inside = [f"{folder}/{name}" if folder else name for folder in folders]
  return list(dict.fromkeys([*inside, *(f"images/{path}" for path in inside)]))


def region(description: Any, box: Any, score: Any = 1.0) -> dict[str, Any]:
  return {"description": description, "box": box, "score": score, "negatives": []}


def record(
  key: str,
  image: pathlib.Path,
  captions: Sequence[Any],
  regions: Sequence[Mapping[str, Any]],
  ids: Sequence[str] = (),
) -> dict[str, Any]:
  """A record; `ids` (COCO's) are asked for by an exclusion and not written."""
  return {
    schema.RECORD_KEY: key,
    schema.RECORD_IMAGE: image,
    schema.RECORD_CAPTIONS: list(captions),
    schema.RECORD_REGIONS: list(regions),
    schema.RECORD_NEGATIVES: [],
    "ids": [name for name in ids if name],
  }


def caption_of_names(names: Iterable[Any]) -> list[str]:
  """A caption of an image that has none: what is on it, each once ("dog, traffic light")."""
  once = dict.fromkeys(name.strip() for name in names if isinstance(name, str) and name.strip())
  return [", ".join(once)] if once else []


def caption_of_phrases(regions: Sequence[Mapping[str, Any]], *, tolerance: float) -> list[str]:
  """A caption of an image that has none: phrases of its largest regions ("a lawn. a brown dog").

  Args:
    regions: of the image; those whose box cannot be used say nothing of it.
    tolerance: how far outside a box may lie.
  """
  sizes: dict[str, float] = {}
  for entry in regions:
    text, box = entry["description"], records.check_box(entry["box"], tolerance=tolerance)
    if is_text(text) and not isinstance(box, str):
      area, text = (box[2] - box[0]) * (box[3] - box[1]), text.strip().rstrip(".")
      sizes[text] = max(area, sizes.get(text, 0.0))
  largest = sorted(sizes, key=lambda text: -sizes[text])  # stable
  return [". ".join(largest[:PHRASES])] if largest else []


def each_once(values: Sequence[Any]) -> list[Any]:
  """Values of any kind without those that came before: captions that two files hold."""
  return [value for i, value in enumerate(values) if value not in values[:i]]


def is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())
