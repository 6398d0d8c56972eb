"""What people have, as records for `grain_jax.data.build`.

scenes     the embedded images (`grain_jax.data.scenes`).
folder     a folder of one's own images with a file of annotations.
published  the annotation files published with GRAIN (github.com/shaunak27/grain-clip).

Own data (`--source=folder --input=FOLDER`). The annotations are FOLDER/annotations.jsonl or
FOLDER/annotations.csv, or the file given as --annotations. JSONL, a line an image:

  {"image": "images/0001.jpg", "captions": ["a dog on a sofa", "a brown dog sleeps on a sofa"],
   "regions": [{"description": "a brown dog", "box": [0.2, 0.1, 0.9, 0.7], "score": 0.8}],
   "split": "train"}

  image     path from FOLDER; JPEG, PNG or whatever PIL reads. It is also the record's key. One
            that leads out of FOLDER ("../x") is refused and counted, unless --allow_outside.
  captions  the original first, then generated ones; or "caption" with a single one.
  regions   optional, and may be empty: description, box (ymin, xmin, ymax, xmax) as fractions of
            the image as it is shown, upright where EXIF says that it was taken sideways; score
            (optional, 1): training takes the regions of highest score. Boxes written otherwise:
            --box_format=xyxy (xmin, ymin, xmax, ymax), xywh (xmin, ymin, width, height) or cxcywh
            (the centre's x and y, width, height), and --box_units=pixels, of the image as it is
            shown. One format holds for the whole file.
  split     optional, "train": or any other name. --val_fraction moves a part of train to val.
  negatives optional: [{"caption": str, "kind": relation | attribute | object | action}].

CSV: a header with the columns image, caption and, optionally, split; further lines with the same
image next to each other add captions.

What cannot be used is dropped and counted, and where a pattern shows why, a line says it. Where
more than --allow_dropped of the images, captions, regions or negatives are dropped, the build ends
with an error. OUT/preview.html shows two dozen of the images with their boxes and texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grain_jax import places, schema, textfiles
from grain_jax.data import box_formats, folder_lines, inputs, on_disk, records

OUTSIDE = "outside_the_folder"  # why a record is refused, unless --allow_outside is given
PUBLISHED_SIDE = 960  # pixels of the squashed image in which the published boxes are given


Refused = records.Refused


@dataclasses.dataclass(frozen=True)
class Source:
  """Where records come from."""

  name: str
  settings: Mapping[str, Any]  # JSON; a build with equal settings need not be repeated
  read: Callable[..., Iterator[tuple[str, dict[str, Any] | Refused]]]  # () -> (split, record)
  about: Mapping[str, Any]  # into the manifest: licence, class_names, ...
  total: int | None = None  # records, where that is known beforehand
  with_mask: bool = False
  with_label: bool = False
  check_image: bool = True  # decode each image; off where it has just been encoded
  tolerance: float = 1e-3  # how far outside a box may lie, as a fraction of the image
  max_pixels: int = schema.MAX_PIXELS  # of the largest image that is kept
  indexed: bool = False  # `read` takes a folder for the index that it makes
  images: Callable[[], Iterator[pathlib.Path]] | None = None  # files of all records, if they have
  box_format: str = "yxyx"  # of the regions' boxes, of `box_formats.FORMATS`
  box_units: str = "fractions"  # of `box_formats.UNITS`
  flags_for_boxes: bool = False  # the two are the user's to choose
  oddities: folder_lines.Oddities | None = None  # of the annotations; counted while they are read


def scenes(settings: Any, *, workers: int | None = None) -> Source:
  """The embedded images.

  Args:
    settings: a `scenes.SceneSettings`.
    workers: processes; None takes one per CPU core.
  """
  from grain_jax.data.scenes import concepts
  from grain_jax.data.scenes import scenes as scenes_lib

  sizes = scenes_lib.Scenes(settings).split_sizes
  known = dataclasses.asdict(settings)
  if not settings.negatives:
    del known["negatives"]  # a setting that came later: data built before are of equal settings

  def read() -> Iterator[tuple[str, dict[str, Any]]]:
    for split in scenes_lib.SPLITS:
      for record in scenes_lib.iterate(settings, split, workers=workers):
        yield split, record

  return Source(
    name="scenes",
    settings=known,
    read=read,
    about={
      "licence": "CC BY-SA 4.0",
      "attribution": concepts.attribution(),
      "class_names": scenes_lib.class_names(settings),
      "unseen_pairs": scenes_lib.unseen_pairs(settings),
      "descriptors": scenes_lib.descriptors(settings),
      "mask_names": scenes_lib.concept_names(settings),
    },
    total=sum(sizes.values()),
    with_mask=settings.masks,
    with_label=True,
    check_image=False,
  )


def folder(
  input_dir: str | pathlib.Path,
  *,
  annotations: str | pathlib.Path | None = None,
  val_fraction: float = 0.0,
  tolerance: float = 1e-3,
  licence: str = "",
  allow_outside: bool = False,
  max_pixels: int = schema.MAX_PIXELS,
  box_format: str = "yxyx",
  box_units: str = "fractions",
) -> Source:
  """A folder of one's own images; the format stands at the head of this file.

  Args:
    input_dir: folder that the image paths start from.
    annotations: JSONL or CSV file; default: the folder's own.
    val_fraction: part of the split train that goes to val, chosen by a hash of the key.
    tolerance: how far outside the image a box may lie (it is clipped), as a fraction of it.
    licence: of the images, for the manifest.
    allow_outside: read images outside the folder too, where a path leads there ("../x", "/x").
    max_pixels: of the largest image that is kept; larger ones are counted.
    box_format: of all boxes, one of `box_formats.FORMATS`.
    box_units: of all boxes, one of `box_formats.UNITS`; pixels are those of the image as it is
      shown, upright.
  """
  root = _existing(input_dir, "--input")
  if not 0 <= val_fraction < 1:
    raise ValueError(f"--val_fraction = {val_fraction}: not a part of the data. Use [0, 1).")
  schema.check_max_pixels(max_pixels, "--max_pixels")
  for name, value, choices in (
    ("box_format", box_format, box_formats.FORMATS),
    ("box_units", box_units, box_formats.UNITS),
  ):
    if value not in choices:
      raise ValueError(f"--{name} = {value!r} is none of {', '.join(choices)}. Use one.")
  file = _existing(annotations, "--annotations") if annotations else folder_lines.find(root)
  folder_lines.check_file(file)
  oddities = folder_lines.Oddities()

  def read() -> Iterator[tuple[str, dict[str, Any] | Refused]]:
    for line in folder_lines.read(file, oddities):
      found = line if isinstance(line, Refused) else folder_lines.parts(line, oddities)
      if isinstance(found, Refused) and found is line:
        yield "train", found
        continue
      key = found.key if isinstance(found, Refused) else found[0]["image"]
      split = str(line.get("split") or "train")
      split = "val" if split == "train" and _chance(key) < val_fraction else split
      record = _folder_record(root, found, allow_outside=allow_outside)
      if not isinstance(record, Refused):
        for lost in found[1]:
          yield split, lost
      yield split, record

  def images() -> Iterator[pathlib.Path]:
    for line in folder_lines.read(file):
      record: Any = line
      if not isinstance(line, Refused):
        record = _folder_record(root, folder_lines.parts(line), allow_outside=allow_outside)
      if not isinstance(record, Refused):
        yield record[schema.RECORD_IMAGE]

  settings = {"input": str(root), "annotations": inputs.stamp(file), "val_fraction": val_fraction}
  settings["tolerance"] = tolerance
  settings |= _unusual(
    allow_outside=allow_outside, max_pixels=max_pixels, box_format=box_format, box_units=box_units
  )
  return Source(
    "folder",
    settings,
    read,
    about={"licence": licence},
    tolerance=tolerance,
    images=images,
    max_pixels=max_pixels,
    box_format=box_format,
    box_units=box_units,
    flags_for_boxes=True,
    oddities=oddities,
  )


def published(
  images: str | pathlib.Path,
  *,
  captions: str | pathlib.Path,
  generated: Sequence[str | pathlib.Path] = (),
  boxes: Sequence[str | pathlib.Path] = (),
  descriptions: Sequence[str | pathlib.Path] = (),
  val_fraction: float = 0.0,
  tolerance: float = 0.05,
  licence: str = "",
  allow_outside: bool = False,
  max_pixels: int = schema.MAX_PIXELS,
) -> Source:
  """The annotation files published with GRAIN, over a folder of the images they name.

  Args:
    images: folder that the paths in the files start from.
    captions: `captions_pooled.csv` (image path, caption).
    generated: `captions_*_pooled.json` {path: caption of the language model}.
    boxes: `bboxes_*_pooled.json` {path: [{description, bbox, score}]}, bbox (x1, y1, x2, y2) in
      the 960-pixel space of the squashed image.
    descriptions: `desc_*.json` {path: [description]}; those without a box are counted, no more.
    val_fraction: see `folder`.
    tolerance: see `folder`; larger, because the detector's boxes reach over the edge.
    licence: of the images, for the manifest.
    allow_outside: see `folder`.
    max_pixels: see `folder`.
  """
  root = _existing(images, "--images")
  if not 0 <= val_fraction < 1:
    raise ValueError(f"--val_fraction = {val_fraction}: not a part of the data. Use [0, 1).")
  schema.check_max_pixels(max_pixels, "--max_pixels")
  table = _existing(captions, "--captions")
  files = {
    "generated": [_existing(f, "--generated") for f in generated],
    "boxes": [_existing(f, "--boxes") for f in boxes],
    "descriptions": [_existing(f, "--descriptions") for f in descriptions],
  }

  kinds = [(kind, file) for kind, paths in files.items() for file in paths]

  def read(scratch: str | pathlib.Path | None = None) -> Iterator[tuple[str, Any]]:
    with tempfile.TemporaryDirectory(dir=scratch, prefix="index-") as folder:
      index = on_disk.MemberIndex(pathlib.Path(folder), [file for _, file in kinds])
      with contextlib.closing(index):
        yield from _published_records(index)

  def _published_records(index: on_disk.MemberIndex) -> Iterator[tuple[str, Any]]:
    matched = False
    for row in _caption_rows(table):
      if isinstance(row, Refused):
        yield "train", row
        continue
      path, caption = row
      if not allow_outside and _is_outside(root, path):
        yield "train", Refused(path, "records", OUTSIDE)
        continue
      found: dict[str, list] = {kind: [] for kind in files}
      for number, value in index.find(path).items():
        kind = kinds[number][0]
        matched |= kind == "boxes"
        if kind != "generated":
          found[kind].extend(value or [])
        elif value is not None:
          found[kind].append(value)
      split = "val" if _chance(path) < val_fraction else "train"
      boxed = {r.get("description") for r in found["boxes"] if isinstance(r, Mapping)}
      for _ in set(found["descriptions"]) - boxed:
        yield split, Refused(path, "regions", "description_without_box")
      yield (
        split,
        {
          schema.RECORD_KEY: path,
          schema.RECORD_IMAGE: root / path,
          schema.RECORD_CAPTIONS: [caption, *found["generated"]],
          schema.RECORD_REGIONS: [_published_region(r) for r in found["boxes"]],
          schema.RECORD_NEGATIVES: [],
        },
      )
    firsts = [index.first_key(n) for n, (kind, _) in enumerate(kinds) if kind == "boxes"]
    theirs = next((key for key in firsts if key is not None), None)
    if theirs is not None and not matched:
      raise ValueError(
        f"no path of {table} stands in the box files (theirs look like {theirs!r}). "
        "Give the files of one dataset, with paths written alike."
      )

  def image_files() -> Iterator[pathlib.Path]:
    for row in _caption_rows(table):
      if not isinstance(row, Refused) and (allow_outside or not _is_outside(root, row[0])):
        yield root / row[0]

  settings = {
    "images": str(root),
    "captions": inputs.stamp(table),
    **{name: [inputs.stamp(f) for f in paths] for name, paths in files.items()},
    "val_fraction": val_fraction,
    "tolerance": tolerance,
  }
  settings |= _unusual(allow_outside=allow_outside, max_pixels=max_pixels)
  return Source(
    "published",
    settings,
    read,
    about={"licence": licence},
    tolerance=tolerance,
    indexed=True,
    images=image_files,
    max_pixels=max_pixels,
  )


_USUAL = {
  "allow_outside": False,
  "max_pixels": schema.MAX_PIXELS,
  "box_format": "yxyx",
  "box_units": "fractions",
}


def _unusual(**settings: Any) -> dict[str, Any]:
  """Settings that came later, where they are not what a dataset without them was built with."""
  return {name: value for name, value in settings.items() if value != _USUAL[name]}


def _is_outside(root: pathlib.Path, image: str) -> bool:
  """Whether the path in a file of annotations leads out of the folder, by ".." or from "/".

  Links inside the folder are followed, for its owner put them there; `LINK/../x` is no way out.
  """
  path = pathlib.PurePath(image)
  inside = not path.is_absolute() or places.find_file(path).is_relative_to(root)
  if ".." not in path.parts and inside:
    return False
  try:
    return not pathlib.Path(os.path.realpath(root / path)).is_relative_to(root)
  except ValueError:  # a NUL, half a character: `records.check` counts what is no path
    return False


def _folder_record(
  root: pathlib.Path, found: tuple[Mapping[str, Any], list] | Refused, *, allow_outside: bool
) -> dict[str, Any] | Refused:
  """The record of a line whose parts `folder_lines.parts` found."""
  if isinstance(found, Refused):
    return found
  image = found[0]["image"]
  if not allow_outside and _is_outside(root, image):
    return Refused(image, "records", OUTSIDE)
  return {
    schema.RECORD_KEY: image,
    schema.RECORD_IMAGE: root / image,
    schema.RECORD_CAPTIONS: found[0]["captions"],
    schema.RECORD_REGIONS: found[0]["regions"],
    schema.RECORD_NEGATIVES: found[0]["negatives"],
  }


def _published_region(region: Any) -> Any:
  try:
    if not isinstance(region["bbox"], list):  # "1234" is no four numbers
      return region
    x1, y1, x2, y2 = (float(x) / PUBLISHED_SIDE for x in region["bbox"])
  except (KeyError, TypeError, ValueError):
    return region  # `records.check` counts it as malformed
  box = (y1, x1, y2, x2)
  return {"description": region.get("description"), "box": box, "score": region.get("score", 1.0)}


def _caption_rows(file: pathlib.Path) -> Iterator[tuple[str, str] | Refused]:
  first = next(iter(textfiles.iterate_lines(file)), None)
  line = b"" if first is None else first.data
  delimiter = "\t" if b"\t" in line and b"," not in line.split(b"\t")[0] else ","
  for number, row in textfiles.read_csv(file, delimiter=delimiter):
    header = number == 1 and row and pathlib.PurePath(row[0]).suffix == ""
    if len(row) >= 2 and not header:
      yield row[0], row[1]
    elif row and not header:
      yield Refused(f"row {number}", "records", records.MALFORMED)


def _existing(path: str | pathlib.Path, flag: str) -> pathlib.Path:
  places.check(path, flag)
  found = pathlib.Path(path).expanduser().resolve()
  if not str(path) or not found.exists():
    raise ValueError(f"{flag} = {path}: there is no such file or folder. Correct the path.")
  return found


def _chance(key: str) -> float:
  """A number in [0, 1) that depends on the key alone."""
  digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:6], "big") / 2**48
