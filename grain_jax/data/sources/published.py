"""The annotation files published with GRAIN (github.com/shaunak27/grain-clip), over their images.

captions_pooled.csv (image path, caption), captions_*_pooled.json {path: caption of the language
model}, bboxes_*_pooled.json {path: [{description, bbox, score}]} with bbox (x1, y1, x2, y2) in the
960-pixel space of the squashed image, desc_*.json {path: [description]}. With --input=FOLDER the
files of these names in FOLDER are taken, and FOLDER holds the images too, unless --images is given.

The CSV has a header (filepath, title, or the like) or none. A row with more fields than that, whose
caption has a comma outside quotes, is left out and counted.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grain_jax import schema, textfiles
from grain_jax.data import records
from grain_jax.data.building import inputs, on_disk
from grain_jax.data.sources import base, folder_lines

BLOCK = 1024  # rows of the captions a block
SIDE = 960  # pixels of the squashed image in which the published boxes are given
FLAGS = (
  base.Flag("input", "folder with the files below, and the images"),
  base.Flag("images", "folder of images; default: --input"),
  base.Flag("captions", "captions_pooled.csv; default: that of --input"),
  base.Flag("generated", "captions_*_pooled.json", [], many=True),
  base.Flag("boxes", "bboxes_*_pooled.json", [], many=True),
  base.Flag("descriptions", "desc_*.json", [], many=True),
  base.tolerance_flag(0.05),
  *base.COMMON_FLAGS,
  base.OUTSIDE_FLAG,
)
_PATTERNS = {
  "generated": "captions_*_pooled.json",
  "boxes": "bboxes_*_pooled.json",
  "descriptions": "desc_*.json",
}
_USUAL = {"allow_outside": False, "max_pixels": schema.MAX_PIXELS}


def source(
  images: str | pathlib.Path | None = None,
  *,
  input: str | pathlib.Path | None = None,  # noqa: A002
  captions: str | pathlib.Path | None = None,
  generated: Sequence[str | pathlib.Path] = (),
  boxes: Sequence[str | pathlib.Path] = (),
  descriptions: Sequence[str | pathlib.Path] = (),
  val_fraction: float = 0.0,
  tolerance: float = 0.05,
  licence: str = "",
  allow_outside: bool = False,
  max_pixels: int = schema.MAX_PIXELS,
) -> base.Source:
  """The annotation files published with GRAIN, over a folder of the images they name.

  Args:
    images: folder that the paths in the files start from.
    input: folder where what is not given here lies, under its published name.
    captions: `captions_pooled.csv` (image path, caption).
    generated: `captions_*_pooled.json` {path: caption of the language model}.
    boxes: `bboxes_*_pooled.json` {path: [{description, bbox, score}]}, bbox (x1, y1, x2, y2) in
      the 960-pixel space of the squashed image.
    descriptions: `desc_*.json` {path: [description]}; those without a box are counted, no more.
    val_fraction: see `folder.source`.
    tolerance: see there; larger, because the detector's boxes reach over the edge.
    licence: of the images, for the manifest.
    allow_outside: see `folder.source`.
    max_pixels: see there.
  """
  if images is None and input is None:
    raise ValueError("--input or --images: name the folder of the images.")
  home = None if input is None else base.existing(input, "--input")
  root = base.existing(images, "--images") if images is not None else home
  base.check_common(val_fraction=val_fraction, max_pixels=max_pixels)
  if captions is None and home is None:
    raise ValueError("--captions: name captions_pooled.csv, or the folder that has it as --input.")
  table = base.existing(captions if captions else home / "captions_pooled.csv", "--captions")
  given = {"generated": generated, "boxes": boxes, "descriptions": descriptions}
  files = {
    kind: [base.existing(f, f"--{kind}") for f in paths]
    if paths or home is None
    else sorted(home.glob(_PATTERNS[kind]))
    for kind, paths in given.items()
  }
  kinds = [kind for kind, paths in files.items() for _ in paths]
  paths = [file for several in files.values() for file in several]
  opened = functools.cache(lambda scratch: on_disk.MemberIndex.open(scratch, paths))

  def prepare(scratch: pathlib.Path) -> None:
    with contextlib.closing(on_disk.MemberIndex.make(scratch, paths)) as index:
      _check_names(table, index, kinds)

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    start, count = textfiles.Place(), 0
    for _, _, place in textfiles.csv_places(table, delimiter=_delimiter(table)):
      count += 1
      if count >= BLOCK and place is not None:
        yield {"start": list(start), "stop": place.offset}
        start, count = place, 0
    if count:
      yield {"start": list(start), "stop": None}

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    index = opened(scratch)
    start = textfiles.Place(*block["start"])
    for row in _caption_rows(table, start=start, stop=block["stop"]):
      if isinstance(row, records.Refused):
        yield "train", row
        continue
      path, caption = row
      if not allow_outside and base.is_outside(root, path):
        yield "train", records.Refused(path, "records", base.OUTSIDE)
        continue
      found: dict[str, list] = {kind: [] for kind in files}
      split = base.split_of(path, "train", val_fraction)
      for number, value in index.find(path).items():
        if value is None:
          continue
        if kinds[number] == "generated":
          found["generated"].append(value)
        elif isinstance(value, list):
          found[kinds[number]].extend(value)
        else:
          yield split, records.Refused(path, "regions", records.MALFORMED)
      described = [text for text in found["descriptions"] if isinstance(text, str)]
      for _ in found["descriptions"][len(described) :]:
        yield split, records.Refused(path, "regions", records.MALFORMED)
      boxed = [r.get("description") for r in found["boxes"] if isinstance(r, Mapping)]
      for _ in set(described).difference(text for text in boxed if isinstance(text, str)):
        yield split, records.Refused(path, "regions", "description_without_box")
      yield (
        split,
        {
          schema.RECORD_KEY: path,
          schema.RECORD_IMAGE: root / path,
          schema.RECORD_CAPTIONS: [caption, *found["generated"]],
          schema.RECORD_REGIONS: [_region(r) for r in found["boxes"]],
          schema.RECORD_NEGATIVES: [],
        },
      )

  def image_files() -> Iterator[pathlib.Path]:
    for row in _caption_rows(table):
      if isinstance(row, records.Refused):
        continue
      if allow_outside or not base.is_outside(root, row[0]):
        yield root / row[0]

  settings = {
    "images": str(root),
    "captions": inputs.stamp(table),
    **{name: [inputs.stamp(f) for f in several] for name, several in files.items()},
    "val_fraction": val_fraction,
    "tolerance": tolerance,
  }
  settings |= base.unusual(_USUAL, allow_outside=allow_outside, max_pixels=max_pixels)
  arguments = {"images": str(root), "captions": str(table), "val_fraction": val_fraction}
  arguments |= {name: list(map(str, several)) for name, several in files.items()}
  arguments |= {"tolerance": tolerance, "licence": licence}
  arguments |= {"allow_outside": allow_outside, "max_pixels": max_pixels}
  return base.Source(
    "published",
    settings,
    read,
    about={"licence": licence},
    blocks=blocks,
    prepare=prepare,
    recipe={"kind": "published", "arguments": arguments},
    tolerance=tolerance,
    images=image_files,
    max_pixels=max_pixels,
  )


def _check_names(table: pathlib.Path, index: on_disk.MemberIndex, kinds: Sequence[str]) -> None:
  """Raises where no image of the captions stands in any file of boxes."""
  firsts = [index.first_key(n) for n, kind in enumerate(kinds) if kind == "boxes"]
  theirs = next((key for key in firsts if key is not None), None)
  if theirs is None:
    return
  for row in _caption_rows(table):
    if isinstance(row, records.Refused):
      continue
    if any(kinds[number] == "boxes" for number in index.find(row[0])):
      return
  raise ValueError(
    f"no path of {table} stands in the box files (theirs look like {theirs!r}). "
    "Give the files of one dataset, with paths written alike."
  )


def _region(region: Any) -> Any:
  try:
    if not isinstance(region["bbox"], list):  # "1234" is no four numbers
      return region
    x1, y1, x2, y2 = (float(x) / SIDE for x in region["bbox"])
  except (KeyError, TypeError, ValueError, OverflowError):
    return region  # `records.check` counts it as malformed
  box = (y1, x1, y2, x2)
  return {"description": region.get("description"), "box": box, "score": region.get("score", 1.0)}


def _delimiter(file: pathlib.Path) -> str:
  first = next(iter(textfiles.iterate_lines(file)), None)
  line = b"" if first is None else first.data
  return "\t" if b"\t" in line and b"," not in line.split(b"\t")[0] else ","


def _caption_rows(
  file: pathlib.Path, *, start: textfiles.Place = textfiles.START, stop: int | None = None
) -> Iterator[tuple[str, str] | records.Refused]:
  delimiter = _delimiter(file)
  _, first = next(textfiles.read_csv(file, delimiter=delimiter), (0, []))
  header = _is_header(first)
  columns = max(len(first), 2) if header else 2
  rows = textfiles.read_csv(file, delimiter=delimiter, start=start, stop=stop)
  for number, row in rows:
    if not row or (header and number == 1):
      continue
    if len(row) < 2 or any(field.strip() for field in row[columns:]):
      yield records.Refused(f"row {number}", "records", records.MALFORMED)
    else:
      yield row[0], row[1]


def _is_header(row: Sequence[str]) -> bool:
  """Whether the first row names the columns; paths of images need have no ending."""
  if not row or pathlib.PurePath(row[0]).suffix:
    return False
  names = [folder_lines.nearest(name, ("image", "captions")) for name in row[:2]]
  return "image" in names[:1] or "captions" in names[1:]
