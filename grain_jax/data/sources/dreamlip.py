"""DreamLIP's CSV files of long captions, over images that img2dataset downloaded as files.

FOLDER holds the published CSV (cc3m_3long_3short_1raw_captions_url.csv; several are read one after
the other) and the images, unless --annotations and --images say otherwise. Its column "Image Path"
is the image's URL, by which img2dataset's KEY.json beside KEY.jpg, or 00000.parquet beside 00000/,
tells the image; it is the record's key. Captions are raw_caption and then the six others in their
published order, empty ones left out and counted. Tars of the same: --source=webdataset.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from grain_jax import schema
from grain_jax.data import records
from grain_jax.data.building import inputs
from grain_jax.data.sources import base, downloads, parquet_files, tables, texts

URL = "Image Path"
FLAGS = (
  base.Flag("input", "folder of the CSV and the images", required=True),
  base.Flag("annotations", "CSV file, or folder of them; default: --input"),
  base.Flag("images", "folder of images; default: --input"),
  *base.COMMON_FLAGS,
)


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  annotations: str | pathlib.Path | None = None,
  images: str | pathlib.Path | None = None,
  val_fraction: float = 0.0,
  licence: str = "",
  max_pixels: int = schema.MAX_PIXELS,
) -> base.Source:
  """DreamLIP's captions over downloaded images; the layout stands at the head of this file.

  Args:
    input: folder of both.
    annotations: CSV file, or folder of them; default: `input`.
    images: folder of images; default: `input`.
    val_fraction: part of the split train that goes to val, chosen by a hash of the key.
    licence: of the images, for the manifest.
    max_pixels: of the largest image that is kept.
  """
  home = base.existing(input, "--input")
  named = base.existing(annotations, "--annotations") if annotations else home
  root = base.existing(images, "--images") if images else home
  base.check_common(val_fraction=val_fraction, max_pixels=max_pixels)
  files = [named] if named.is_file() else parquet_files.sorted_files(named.glob("*.csv"))
  if not files:
    raise ValueError(f"{named} holds no .csv. Give DreamLIP's file of captions as --annotations.")
  columns = [tables.columns(file, delimiter=",", needed=(URL,)) for file in files]
  captions = [texts.find_names(names) for names in columns]
  if not all(captions):
    raise ValueError(f"{files[0]} has no column of captions. Give the published file.")
  opened = functools.cache(lambda scratch: downloads.Index.open(scratch, root))

  def prepare(scratch: pathlib.Path) -> None:
    downloads.Index.make(scratch, root)

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    for number, file in enumerate(files):
      for block in tables.blocks(file, delimiter=","):
        yield {"file": number, **block}

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    index, file = opened(scratch), files[block["file"]]
    names = captions[block["file"]]
    for row in tables.read(file, block, delimiter=",", names=columns[block["file"]]):
      if row.values is None or not row.values[URL]:
        where = f"{file.name} row {row.number}"
        yield "train", records.Refused(where, "records", records.MALFORMED)
        continue
      url = row.values[URL]
      split = base.split_of(url, "train", val_fraction)
      image = index.find("url", url) or records.MISSING_IMAGE
      if isinstance(image, str):
        yield split, records.Refused(url, "records", image)
        continue
      yield (
        split,
        {
          schema.RECORD_KEY: url,
          schema.RECORD_IMAGE: image.file,
          schema.RECORD_CAPTIONS: texts.captions(row.values, names=names),
          schema.RECORD_REGIONS: [],
          schema.RECORD_NEGATIVES: [],
        },
      )

  settings: dict[str, Any] = {
    "annotations": [inputs.stamp(file) for file in files],
    "images": str(root),
    "val_fraction": val_fraction,
    "max_pixels": max_pixels,
  }
  arguments = {**settings, "input": str(home), "annotations": str(named), "licence": licence}
  return base.Source(
    "dreamlip",
    settings,
    read,
    about={"licence": licence},
    blocks=blocks,
    prepare=prepare,
    recipe={"kind": "dreamlip", "arguments": arguments},
    images=lambda: downloads.pictures(root),
    max_pixels=max_pixels,
  )
