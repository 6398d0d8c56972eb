"""Parquet files that hold images and their texts, as hubs and img2dataset deliver them.

FOLDER holds NAME.parquet, in folders of their own or not. A record's key is NAME/ROW, or the value
of --key_column. Read are

  image     --image_column: bytes of a file, or {bytes, path} (of which a path is used where there
            are no bytes, from FOLDER). By default image, jpg, img, png, webp, picture, image_bytes
            or bytes, or the only column of that kind.
  captions  --caption_columns, the original's first: texts, lists of texts (each a caption) or class
            indices. By default what is named like captions, as --source=webdataset has it; those
            whose list is one text in sentences stand in --long_captions too.
  regions   --boxes_column and --labels_column (objects.bbox and objects.category, say), with
            --box_format and --box_units, and --scores_column; else GRIT's noun_chunks and ref_exps.
            Labels that are numbers become the names that the Hugging Face hub's metadata has.
            Boxes beside which iscrowd or is_crowd is set are around many: left out, counted.
  status    of img2dataset: what was not downloaded is counted by why.

A file in whose path stands val, valid, validation, dev or test is of that split.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grain_jax import schema
from grain_jax.data import box_formats, records
from grain_jax.data.sources import (
  base,
  downloads,
  grit_lists,
  mapping,
  parquet_files,
  splits,
  texts,
)

IMAGES = ("image", "jpg", "img", "png", "webp", "picture", "image_bytes", "bytes")
FLAGS = (
  base.Flag("input", "folder of Parquet files, or one of them", required=True),
  base.Flag("image_column", "of the images; default: by name and kind"),
  base.Flag(
    "caption_columns", "of captions, the original's first; default: by name", [], many=True
  ),
  base.Flag("long_captions", "those whose list is one text in sentences", [], many=True),
  base.Flag("key_column", "of unique keys; default: the file's name and the row's number"),
  base.Flag("boxes_column", "of lists of boxes"),
  base.Flag("labels_column", "of their labels"),
  base.Flag("scores_column", "of their scores"),
  base.Flag("box_format", "of all boxes", "yxyx", choices=box_formats.FORMATS),
  base.Flag("box_units", "of all boxes", "fractions", choices=box_formats.UNITS),
  base.Flag(
    "expressions", "GRIT's lists that become regions", "both", choices=grit_lists.EXPRESSIONS
  ),
  base.tolerance_flag(grit_lists.TOLERANCE),
  *base.COMMON_FLAGS,
  base.OUTSIDE_FLAG,
)


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  image_column: str | None = None,
  caption_columns: Sequence[str] = (),
  long_captions: Sequence[str] = (),
  key_column: str | None = None,
  boxes_column: str | None = None,
  labels_column: str | None = None,
  scores_column: str | None = None,
  box_format: str = "yxyx",
  box_units: str = "fractions",
  expressions: str = "both",
  tolerance: float = grit_lists.TOLERANCE,
  val_fraction: float = 0.0,
  licence: str = "",
  allow_outside: bool = False,
  max_pixels: int = schema.MAX_PIXELS,
) -> base.Source:
  """Parquet files with images in them; flags and format stand at the head of this file."""
  settings: dict[str, Any] = {**locals(), "input": str(base.existing(input, "--input"))}
  settings |= {name: list(settings[name]) for name in ("caption_columns", "long_captions")}
  del settings["licence"]
  base.check_common(val_fraction=val_fraction, max_pixels=max_pixels)
  root = pathlib.Path(settings["input"])
  home = root.parent if root.is_file() else root
  paths = parquet_files.find(root)
  if not paths:
    raise ValueError(f"--input = {root} holds no .parquet. Give the folder that holds them.")
  if bool(boxes_column) != bool(labels_column):
    raise ValueError("--boxes_column and --labels_column: each needs the other. Give both.")
  image, captions = _choose(paths, settings)
  names = functools.cache(parquet_files.class_names)
  columns = [*captions, *filter(None, (key_column, boxes_column, labels_column, scores_column))]
  columns += mapping.crowd_paths(boxes_column, separator=".") if boxes_column else []
  columns = [column.partition(".")[0] for column in (image, *columns)] + columns
  columns += [*_OTHERS, *(() if boxes_column else (*grit_lists.NAMES, "caption"))]

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    for path in paths:
      for block in parquet_files.blocks(path):
        yield {"file": str(path.relative_to(home)), **block}

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    name = block["file"].removesuffix(".parquet")
    split = splits.of_file(block["file"])
    path = home / block["file"]
    for row in parquet_files.read(path, block, columns=dict.fromkeys(columns)):
      key = f"{name}/{row.number}"
      if row.values is None:
        yield split, records.Refused(key, "records", row.why)
        continue
      if key_column:
        key = mapping.look_up(row.values, key_column, separator=".")
        key = str(key) if isinstance(key, (int, str)) else None
      if not key:
        yield split, records.Refused(f"{name}/{row.number}", "records", "no_key")
        continue
      for item in _read_row(key, row.values, path):
        yield base.split_of(key, split, val_fraction), item

  def _read_row(
    key: str, values: dict[str, Any], path: pathlib.Path
  ) -> Iterator[dict[str, Any] | records.Refused]:
    status = values.get("status")
    if isinstance(status, str) and status != downloads.SUCCESS and "error_message" in values:
      why = downloads.failure(status, values["error_message"])
      yield records.Refused(key, "records", why)
      return
    data = _image(mapping.look_up(values, image, separator="."), home, allow_outside=allow_outside)
    if isinstance(data, str):
      yield records.Refused(key, "records", data)
      return
    found = {}
    for column in captions:
      value = mapping.look_up(values, column, separator=".")
      found[column] = mapping.text(value, names(path, column) if isinstance(value, int) else ())
    own, lost = _regions(key, values, path)
    yield from lost
    yield {
      schema.RECORD_KEY: key,
      schema.RECORD_IMAGE: data,
      schema.RECORD_CAPTIONS: texts.captions(found, names=caption_columns, long=long_captions),
      schema.RECORD_REGIONS: own,
      schema.RECORD_NEGATIVES: [],
    }

  def _regions(
    key: str, values: Mapping[str, Any], path: pathlib.Path
  ) -> tuple[list[Any], list[records.Refused]]:
    if not boxes_column or not labels_column:
      return grit_lists.regions(key, values, expressions=expressions)
    boxes, labels, scores = (
      mapping.look_up(values, column, separator=".") if column else None
      for column in (boxes_column, labels_column, scores_column)
    )
    return mapping.regions(
      key,
      boxes,
      labels,
      scores,
      around_many=mapping.crowds(values, boxes_column, separator="."),
      names=names(path, labels_column),
    )

  return base.Source(
    "parquet",
    settings,
    read,
    about={"licence": licence},
    blocks=blocks,
    recipe={"kind": "parquet", "arguments": {**settings, "licence": licence}},
    tolerance=tolerance,
    images=lambda: iter(paths),
    max_pixels=max_pixels,
    box_format=box_format if boxes_column else "yxyx",
    box_units=box_units if boxes_column else "fractions",
    flags_for_boxes=bool(boxes_column),
  )


_OTHERS = ("status", "error_message", "width", "height", "original_width", "original_height")


def _choose(paths: Sequence[pathlib.Path], settings: Mapping[str, Any]) -> tuple[str, list[str]]:
  """(column of images, columns of captions) of the first file that can be read."""
  file = next(filter(None, map(parquet_files.open_file, paths)), None)
  if file is None:
    raise ValueError(f"{paths[0]} is no Parquet file, and so is none beside it. Get them again.")
  with file:
    fields = {field.name: str(field.type) for field in file.schema_arrow}
  given = [settings["image_column"], *settings["caption_columns"]]
  given += [settings[f"{name}_column"] for name in ("key", "boxes", "labels", "scores")]
  for column in filter(None, given):
    if column not in fields and column.partition(".")[0] not in fields:
      raise ValueError(f"{paths[0]} has no column {column!r}, but {', '.join(fields)}. Name those.")
  held = [n for n, kind in fields.items() if "binary" in kind and "list" not in kind]
  image = settings["image_column"] or next((name for name in IMAGES if name in held), None)
  if image is None and len(held) == 1:
    image = held[0]
  if image is None:
    raise ValueError(
      f"{paths[0]} has the columns {', '.join(fields)}: which holds the images? Say so with "
      "--image_column; where none does, download them first (docs/data.md)."
    )
  captions = settings["caption_columns"] or texts.find_names(fields)
  if not captions:
    raise ValueError(
      f"{paths[0]} has the columns {', '.join(fields)}: which holds captions? Say so with "
      "--caption_columns."
    )
  return image, list(captions)


def _image(value: Any, root: pathlib.Path, *, allow_outside: bool) -> bytes | pathlib.Path | str:
  """Bytes of an image, the path of its file, or why there is neither."""
  if isinstance(value, Mapping):
    if isinstance(value.get("bytes"), bytes):
      return value["bytes"]
    value = value.get("path")
  if isinstance(value, bytes):
    return value
  if not isinstance(value, str) or not value:
    return records.MISSING_IMAGE
  if not allow_outside and base.is_outside(root, value):
    return base.OUTSIDE
  return root / value
