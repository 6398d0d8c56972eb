"""CE-CLIP's generated false captions (Enhance-FineGrained), over COCO's images.

FOLDER holds the published processed_dataset*.npy, or the same as JSON lines (*.jsonl, a record a
line), at any depth, and the images, unless --annotations (a file or a folder) and --images say
otherwise. A record's image is image_path where it has one, else
train2014/COCO_train2014_<image_id>.jpg: val2014 where the file's path has val in it. Its key is the
image's path and #id.

The .npy files are pickles. They are never unpickled: `object_arrays` reads the data in them and
refuses what would run. To have them as JSON lines, read by the same reader:

  python -m grain_jax.data.sources.ce_clip --input=FOLDER --out=LINES

Negatives stand in the order relation (relation_aug_caption), attribute (adj_), object (noun_),
action (verb_). Those that valid_caption marks as invalid (its items: the caption and these four),
and texts that are "###", are left out and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grain_jax import helptext, places, schema, textfiles
from grain_jax.data import records
from grain_jax.data.building import inputs
from grain_jax.data.sources import base, object_arrays, parquet_files

BLOCK = 4096  # lines a block
INVALID = "invalid_negative"
NO_TEXT = "###"
COLUMNS = {
  "relation": "relation_aug_caption",
  "attribute": "adj_aug_caption",
  "object": "noun_aug_caption",
  "action": "verb_aug_caption",
}
FLAGS = (
  base.Flag("input", "folder of the .npy or .jsonl files and the images", required=True),
  base.Flag("annotations", ".npy or .jsonl file, or folder of them; default: --input"),
  base.Flag("images", "folder of train2014 and val2014; default: --input"),
  *base.COMMON_FLAGS,
  base.OUTSIDE_FLAG,
)


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: str | pathlib.Path | None = None,
  images: str | pathlib.Path | None = None,
  val_fraction: float = 0.0,
  licence: str = "",
  allow_outside: bool = False,
  max_pixels: int = schema.MAX_PIXELS,
) -> base.Source:
  """CE-CLIP's captions over COCO's images; the layout stands at the head of this file.

  Args:
    input: folder of both.
    annotations: .npy or .jsonl file, or folder of them; default: `input`.
    images: folder that image paths start from; default: `input`.
    val_fraction: part of the split train that goes to val, chosen by a hash of the image's path.
    licence: of the images, for the manifest.
    allow_outside: read images outside the folder too, where a path leads there.
    max_pixels: of the largest image that is kept.
  """
  home = base.existing(input, "--input")
  named = base.existing(annotations, "--annotations") if annotations else home
  root = base.existing(images, "--images") if images else home
  base.check_common(val_fraction=val_fraction, max_pixels=max_pixels)
  files = [named] if named.is_file() else _find(named)

  def lines_of(number: int, scratch: pathlib.Path) -> pathlib.Path:
    file = files[number]
    return scratch / f"ce_clip_{number}.jsonl" if file.suffix == ".npy" else file

  def prepare(scratch: pathlib.Path) -> None:
    for number, file in enumerate(files):
      if file.suffix == ".npy":
        convert(file, lines_of(number, scratch))

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    for number in range(len(files)):
      start, count = textfiles.Place(), 0
      for line in textfiles.iterate_lines(lines_of(number, scratch)):
        if count == BLOCK:
          place = textfiles.Place(line.offset, line.number - 1)
          yield {"file": number, "start": list(start), "stop": place.offset}
          start, count = place, 0
        count += 1
      if count:
        yield {"file": number, "start": list(start), "stop": None}

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    file, start = files[block["file"]], textfiles.Place(*block["start"])
    is_val = _is_val(file)
    lines = textfiles.iterate_lines(
      lines_of(block["file"], scratch), start=start, stop=block["stop"]
    )
    for line in lines:
      where = f"{file.name} record {line.number}"
      try:
        values = textfiles.parse_json(line.text())
      except ValueError:
        yield "train", records.Refused(where, "records", "not_json")
        continue
      path = _image_path(values, is_val=is_val)
      if path is None:
        yield "train", records.Refused(where, "records", records.MALFORMED)
        continue
      # The captions of one image go to the same split.
      split = base.split_of(path, "val" if is_val else "train", val_fraction)
      if not allow_outside and base.is_outside(root, path):
        yield split, records.Refused(path, "records", base.OUTSIDE)
        continue
      own = values.get("id")
      name = own if isinstance(own, (int, str)) else f"{file.stem}:{line.number - 1}"
      key = f"{path}#{name}"
      negatives, lost = _negatives(key, values)
      for refused in lost:
        yield split, refused
      yield (
        split,
        {
          schema.RECORD_KEY: key,
          schema.RECORD_IMAGE: root / path,
          schema.RECORD_CAPTIONS: [values.get("caption")],
          schema.RECORD_REGIONS: [],
          schema.RECORD_NEGATIVES: negatives,
        },
      )

  def _is_val(file: pathlib.Path) -> bool:
    return bool(re.search(r"(?<![a-z])val", str(file.relative_to(named.parent))))

  def image_files() -> Iterator[pathlib.Path]:
    for file in files:
      told: str | None = None  # the captions of an image stand together
      for values in _values(file):
        path = _image_path(values, is_val=_is_val(file))
        if path is not None and path != told and (allow_outside or not base.is_outside(root, path)):
          yield root / path
        told = path

  settings: dict[str, Any] = {
    "annotations": [inputs.stamp(file) for file in files],
    "images": str(root),
    "val_fraction": val_fraction,
    "allow_outside": allow_outside,
    "max_pixels": max_pixels,
  }
  arguments = {**settings, "input": str(home), "annotations": str(named), "licence": licence}
  return base.Source(
    "ce_clip",
    settings,
    read,
    about={"licence": licence},
    blocks=blocks,
    prepare=prepare,
    recipe={"kind": "ce_clip", "arguments": arguments},
    images=image_files,
    max_pixels=max_pixels,
  )


def convert(file: pathlib.Path, out: pathlib.Path) -> int:
  """Writes the records of a .npy file as JSON lines, running nothing of it; how many they are.

  What is no record is the line null.

  Raises:
    ValueError: the file is no such file, or asks for more than data; one line.
  """
  items = object_arrays.read(file)
  with out.open("w", encoding="utf-8") as lines:
    for item in items:
      # Of what is nested deeper, a small file can hold more than a disk.
      lines.write(json.dumps(item if _is_flat(item) else None) + "\n")
  return len(items)


def _is_flat(item: Any) -> bool:
  """Whether it is a dict of texts, numbers and lists of those."""
  kinds = (str, int, float, type(None))
  return isinstance(item, dict) and all(
    isinstance(name, str)
    and (
      isinstance(value, kinds)
      or (isinstance(value, (list, tuple)) and all(isinstance(x, kinds) for x in value))
    )
    for name, value in item.items()
  )


def _values(file: pathlib.Path) -> Iterator[Any]:
  """The records of a file that can be read, in either form."""
  if file.suffix == ".npy":
    yield from filter(_is_flat, object_arrays.read(file))
    return
  for line in textfiles.iterate_lines(file):
    with contextlib.suppress(ValueError):  # `read` counts it
      yield textfiles.parse_json(line.text())


def _find(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder, by their numbers; of one that is there in both forms the JSON lines."""
  lines = parquet_files.below(folder, "*.jsonl")
  arrays = parquet_files.below(folder, "processed_dataset*.npy")
  known = {file.with_suffix("") for file in lines}
  files = [*lines, *(file for file in arrays if file.with_suffix("") not in known)]
  if not files:
    raise ValueError(
      f"{folder} holds neither processed_dataset*.npy nor *.jsonl. Give CE-CLIP's generated files "
      "as --annotations."
    )
  return sorted(files, key=lambda file: (file.parent, _natural(file.stem)))


def _natural(name: str) -> list[tuple[int, str]]:
  """Sorts processed_dataset10 after processed_dataset9."""
  return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _image_path(values: Any, *, is_val: bool) -> str | None:
  if not isinstance(values, Mapping):
    return None
  path, number = values.get("image_path"), values.get("image_id")
  if isinstance(path, str) and path:
    return path
  if isinstance(number, str) and re.fullmatch(r"[0-9]{1,12}", number):
    number = int(number)
  if isinstance(number, bool) or not isinstance(number, int) or number < 0:
    return None
  split = "val2014" if is_val else "train2014"
  return f"{split}/COCO_{split}_{number:012d}.jpg"


def _negatives(
  key: str, values: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[records.Refused]]:
  """(negatives in the order of `COLUMNS`, those that are none)."""
  valid = values.get("valid_caption")
  if valid is not None and not (isinstance(valid, list) and len(valid) == 1 + len(COLUMNS)):
    return [], [records.Refused(key, "negatives", records.MALFORMED)] * len(COLUMNS)
  kept = []
  lost = []
  for number, (kind, column) in enumerate(COLUMNS.items(), start=1):
    text = values.get(column)
    is_text = isinstance(text, str) and text.strip() not in ("", NO_TEXT)
    if text is None and valid is None:
      continue
    if not is_text or (valid is not None and not valid[number]):
      lost.append(records.Refused(key, "negatives", INVALID))
    else:
      kept.append({"caption": text, "kind": kind})
  return kept, lost


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m grain_jax.data.sources.ce_clip",
    description="CE-CLIP's .npy files as JSON lines; nothing in them is run.",
    formatter_class=helptext.ArgparseFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--input", required=True, help="processed_dataset*.npy, or folder of them")
  parser.add_argument("--out", required=True, help="folder to write processed_dataset*.jsonl into")
  flags = parser.parse_args(arguments)
  try:
    root = base.existing(flags.input, "--input")
    places.check(flags.out, "--out")
    out = pathlib.Path(flags.out).expanduser()
    for file in [root] if root.is_file() else _find(root):
      if file.suffix == ".npy":
        out.mkdir(parents=True, exist_ok=True)
        lines = out / f"{file.stem}.jsonl"
        print(f"{lines}: {convert(file, lines):,} records")
  except (OSError, ValueError) as error:
    print(f"{parser.prog}: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
