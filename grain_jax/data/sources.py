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
            (optional, 1): training takes the regions of highest score.
  split     optional, "train": or any other name. --val_fraction moves a part of train to val.
  negatives optional: [{"caption": str, "kind": relation | attribute | object | action}].

CSV: a header with the columns image, caption and, optionally, split; further lines with the same
image next to each other add captions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from grain_jax import places, schema, textfiles
from grain_jax.data import inputs, on_disk, records

OUTSIDE = "outside_the_folder"  # why a record is refused, unless --allow_outside is given
PUBLISHED_SIDE = 960  # pixels of the squashed image in which the published boxes are given


class Refused(NamedTuple):
  """In the place of a record: something that could not be made into one, and why."""

  key: str
  what: str  # records | captions | regions | negatives
  why: str


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


def scenes(settings: Any, *, workers: int | None = None) -> Source:
  """The embedded images.

  Args:
    settings: a `scenes.SceneSettings`.
    workers: processes; None takes one per CPU core.
  """
  from grain_jax.data.scenes import concepts
  from grain_jax.data.scenes import scenes as scenes_lib

  sizes = scenes_lib.Scenes(settings).split_sizes

  def read() -> Iterator[tuple[str, dict[str, Any]]]:
    for split in scenes_lib.SPLITS:
      for record in scenes_lib.iterate(settings, split, workers=workers):
        yield split, record

  return Source(
    name="scenes",
    settings=dataclasses.asdict(settings),
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
  """
  root = _existing(input_dir, "--input")
  if not 0 <= val_fraction < 1:
    raise ValueError(f"--val_fraction = {val_fraction}: not a part of the data. Use [0, 1).")
  schema.check_max_pixels(max_pixels, "--max_pixels")
  file = _annotations(root, annotations)
  lines = _csv_lines if file.suffix.lower() == ".csv" else _json_lines

  def read() -> Iterator[tuple[str, dict[str, Any] | Refused]]:
    for line in lines(file):
      if isinstance(line, Refused):
        yield "train", line
      else:
        split = str(line.get("split") or "train")
        record = _folder_record(root, line, allow_outside=allow_outside)
        key = record.key if isinstance(record, Refused) else record[schema.RECORD_KEY]
        yield ("val" if split == "train" and _chance(key) < val_fraction else split), record

  def images() -> Iterator[pathlib.Path]:
    for line in lines(file):
      record = line
      if not isinstance(line, Refused):
        record = _folder_record(root, line, allow_outside=allow_outside)
      if not isinstance(record, Refused):
        yield record[schema.RECORD_IMAGE]

  settings = {"input": str(root), "annotations": inputs.stamp(file), "val_fraction": val_fraction}
  settings["tolerance"] = tolerance
  settings |= _unusual(allow_outside=allow_outside, max_pixels=max_pixels)
  return Source(
    "folder",
    settings,
    read,
    about={"licence": licence},
    tolerance=tolerance,
    images=images,
    max_pixels=max_pixels,
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


def _unusual(*, allow_outside: bool, max_pixels: int) -> dict[str, Any]:
  """Settings that came later, where they are not what a dataset without them was built with."""
  settings = {"allow_outside": allow_outside, "max_pixels": max_pixels}
  usual = {"allow_outside": False, "max_pixels": schema.MAX_PIXELS}
  return {name: value for name, value in settings.items() if value != usual[name]}


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
  root: pathlib.Path, line: Mapping[str, Any], *, allow_outside: bool
) -> dict[str, Any] | Refused:
  image = line.get("image")
  captions = line.get("captions")
  captions = line.get("caption") if captions is None else captions
  captions = [captions] if isinstance(captions, str) else captions or []
  regions, negatives = line.get("regions") or [], line.get("negatives") or []
  if not isinstance(image, str) or not image:
    return Refused(str(line)[:80], "records", records.MALFORMED)
  if not all(isinstance(value, list) for value in (captions, regions, negatives)):
    return Refused(image, "records", records.MALFORMED)
  if not allow_outside and _is_outside(root, image):
    return Refused(image, "records", OUTSIDE)
  return {
    schema.RECORD_KEY: image,
    schema.RECORD_IMAGE: root / image,
    schema.RECORD_CAPTIONS: captions,
    schema.RECORD_REGIONS: regions,
    schema.RECORD_NEGATIVES: negatives,
  }


def _published_region(region: Any) -> Any:
  try:
    x1, y1, x2, y2 = (float(x) / PUBLISHED_SIDE for x in region["bbox"])
  except (KeyError, TypeError, ValueError):
    return region  # `records.check` counts it as malformed
  box = (y1, x1, y2, x2)
  return {"description": region.get("description"), "box": box, "score": region.get("score", 1.0)}


def _json_lines(file: pathlib.Path) -> Iterator[Mapping[str, Any] | Refused]:
  for line in textfiles.iterate_lines(file):  # what is no JSON or UTF-8 costs its line alone
    try:
      entry = textfiles.parse_json(line.text())
    except ValueError:
      entry = None
    refused = Refused(f"line {line.number}", "records", "not_json")
    yield entry if isinstance(entry, dict) else refused


def _csv_lines(file: pathlib.Path) -> Iterator[Mapping[str, Any] | Refused]:
  columns, rows = textfiles.read_table(file)
  if not {"image", "caption"} <= set(columns):
    raise ValueError(
      f"{file} has the columns {columns}: image and caption are needed. Write them into its first "
      "line."
    )
  current: dict[str, Any] = {}
  for number, row, surplus in rows:
    if surplus:  # a comma outside quotes: the caption would be cut there
      yield Refused(f"row {number}", "records", records.MALFORMED)
      continue
    if current and current["image"] == row["image"]:
      current["captions"].append(row["caption"])
      continue
    if current:
      yield current
    current = {"image": row["image"], "captions": [row["caption"]], "split": row.get("split")}
  if current:
    yield current


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


def _annotations(root: pathlib.Path, given: str | pathlib.Path | None) -> pathlib.Path:
  if given:
    return _existing(given, "--annotations")
  for name in ("annotations.jsonl", "annotations.csv"):
    if (root / name).is_file():
      return root / name
  raise ValueError(
    f"{root} holds neither annotations.jsonl nor annotations.csv: no captions to read. Write one "
    "(the format: python -m grain_jax.data.build --source=folder --help) or give --annotations."
  )


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
