"""GRIT's Parquet files of captions and boxes, over images that lie on the disk.

FOLDER holds the published *.parquet (columns id, url, caption, noun_chunks, ref_exps, ...) and the
images, unless --annotations (a file or a folder) and --images say otherwise. An image is found by
what img2dataset wrote beside it (KEY.json, or FOLDER/00000.parquet beside FOLDER/00000/): the row's
id, else its url; where nothing stands beside the images, by a file named as the row's id, else as
its key. A record's key is the id. The usual download are tars: --source=webdataset reads those.

Each phrase with a box is a region: of noun_chunks, and of ref_exps where that is longer. Where the
JSON or the Parquet beside an image says that img2dataset padded or cut it, its boxes are left out
and counted.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from grain_jax import schema
from grain_jax.data import records
from grain_jax.data.building import inputs
from grain_jax.data.sources import base, downloads, grit_lists, parquet_files

COLUMNS = ("key", "id", "url", "caption", "width", "height", *grit_lists.NAMES)
FLAGS = (
  base.Flag("input", "folder of the Parquet files and the images", required=True),
  base.Flag("annotations", "Parquet file or folder of them; default: --input"),
  base.Flag("images", "folder of images; default: --input"),
  base.Flag("expressions", "lists that become regions", "both", choices=grit_lists.EXPRESSIONS),
  base.tolerance_flag(grit_lists.TOLERANCE),
  *base.COMMON_FLAGS,
)


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: str | pathlib.Path | None = None,
  images: str | pathlib.Path | None = None,
  expressions: str = "both",
  tolerance: float = grit_lists.TOLERANCE,
  val_fraction: float = 0.0,
  licence: str = "",
  max_pixels: int = schema.MAX_PIXELS,
) -> base.Source:
  """GRIT's annotations over images on the disk; the layout stands at the head of this file.

  Args:
    input: folder of both.
    annotations: Parquet file, or folder of them; default: `input`.
    images: folder of images; default: `input`.
    expressions: lists that become regions, one of `grit_lists.EXPRESSIONS`.
    tolerance: how far outside the image a box may lie (it is clipped), as a fraction of it.
    val_fraction: part of the split train that goes to val, chosen by a hash of the key.
    licence: of the images, for the manifest.
    max_pixels: of the largest image that is kept.
  """
  home = base.existing(input, "--input")
  tables = base.existing(annotations, "--annotations") if annotations else home
  root = base.existing(images, "--images") if images else home
  base.check_common(val_fraction=val_fraction, max_pixels=max_pixels)
  every = parquet_files.find(tables)
  files = [f for f in every if not downloads.is_sidecar(parquet_files.column_names(f))]
  if not files:
    raise ValueError(
      f"{tables} holds none of GRIT's .parquet. Give the folder of coyo_0_snappy.parquet and the "
      "others as --annotations; tars are read by --source=webdataset."
    )
  opened = functools.cache(lambda scratch: downloads.Index.open(scratch, root))

  def prepare(scratch: pathlib.Path) -> None:
    downloads.Index.make(scratch, root)
    for number, file in enumerate(files):
      parquet_files.regroup(file, scratch / f"grit_{number}.parquet", COLUMNS)

  def table(number: int, scratch: pathlib.Path) -> pathlib.Path:
    regrouped = scratch / f"grit_{number}.parquet"
    return regrouped if regrouped.is_file() else files[number]

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    for number in range(len(files)):
      for block in parquet_files.blocks(table(number, scratch)):
        yield {"file": number, **block}

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    index = opened(scratch)
    file = files[block["file"]]
    for row in parquet_files.read(table(block["file"], scratch), block, columns=COLUMNS):
      if row.values is None:
        yield "train", records.Refused(f"{file.name} row {row.number}", "records", row.why)
        continue
      key = str(row.values.get("id") or row.values.get("url") or row.values.get("key") or "")
      if not key:
        yield "train", records.Refused(f"{file.name} row {row.number}", "records", "no_key")
        continue
      split = base.split_of(key, "train", val_fraction)
      image = find_image(index, row.values)
      if isinstance(image, str):
        yield split, records.Refused(key, "records", image)
        continue
      regions, lost = grit_lists.regions(
        key, row.values, expressions=expressions, reshaped=image.was_reshaped
      )
      for refused in lost:
        yield split, refused
      yield (
        split,
        {
          schema.RECORD_KEY: key,
          schema.RECORD_IMAGE: image.file,
          schema.RECORD_CAPTIONS: [row.values.get("caption")],
          schema.RECORD_REGIONS: regions,
          schema.RECORD_NEGATIVES: [],
        },
      )

  settings: dict[str, Any] = {
    "annotations": [inputs.stamp(file) for file in files],
    "images": str(root),
    "expressions": expressions,
    "tolerance": tolerance,
    "val_fraction": val_fraction,
    "max_pixels": max_pixels,
  }
  arguments = {**settings, "input": str(home), "annotations": str(tables), "licence": licence}
  return base.Source(
    "grit",
    settings,
    read,
    about={"licence": licence},
    blocks=blocks,
    prepare=prepare,
    recipe={"kind": "grit", "arguments": arguments},
    tolerance=tolerance,
    images=lambda: downloads.pictures(root),
    max_pixels=max_pixels,
  )


def find_image(index: downloads.Index, values: Mapping[str, Any]) -> downloads.Image | str:
  """A row's image, or why there is none."""
  why = None
  for kind, name in (("id", "id"), ("url", "url"), ("name", "id"), ("name", "key")):
    found = index.find(kind, values.get(name))
    if isinstance(found, downloads.Image):
      return found
    why = why or found
  return why or records.MISSING_IMAGE
