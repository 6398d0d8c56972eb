"""NegCLIP's TSV files: COCO's captions, each with false ones made by exchanging its words.

FOLDER holds the published TSV (train_neg_clip.tsv, or whatever *.tsv there is; --annotations names
one) with the columns title, filepath and neg_caption, a list of texts as Python writes it, and the
images that filepath names from FOLDER, or from --images. A file whose name has val or valid in it
is of the split val. A row is a record, for the false captions are those of its own caption: its key
is filepath#ROW. All are of the kind relation (words of the caption in another order). neg_image
(rows of similar images) is not read.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator
from typing import Any

from grain_jax import schema
from grain_jax.data import records
from grain_jax.data.building import inputs
from grain_jax.data.sources import base, parquet_files, splits, tables

TITLE, PATH, NEGATIVES = "title", "filepath", "neg_caption"
KIND = "relation"
FLAGS = (
  base.Flag("input", "folder of the TSV and the images", required=True),
  base.Flag("annotations", "TSV file, or folder of them; default: --input"),
  base.Flag("images", "folder that filepath starts from; default: --input"),
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
  """NegCLIP's captions over COCO's images; the layout stands at the head of this file.

  Args:
    input: folder of both.
    annotations: TSV file, or folder of them; default: `input`.
    images: folder that `filepath` starts from; default: `input`.
    val_fraction: part of the split train that goes to val, chosen by a hash of the image's path.
    licence: of the images, for the manifest.
    allow_outside: read images outside the folder too, where a path leads there.
    max_pixels: of the largest image that is kept.
  """
  home = base.existing(input, "--input")
  named = base.existing(annotations, "--annotations") if annotations else home
  root = base.existing(images, "--images") if images else home
  base.check_common(val_fraction=val_fraction, max_pixels=max_pixels)
  files = [named] if named.is_file() else parquet_files.sorted_files(named.glob("*.tsv"))
  if not files:
    raise ValueError(f"{named} holds no .tsv. Give NegCLIP's file as --annotations.")
  needed = (TITLE, PATH, NEGATIVES)
  columns = [tables.columns(file, delimiter="\t", needed=needed) for file in files]

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    for number, file in enumerate(files):
      for block in tables.blocks(file, delimiter="\t"):
        yield {"file": number, **block}

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    file = files[block["file"]]
    own_split = _split(file)
    prefix = f"{file.name}:" if len(files) > 1 else ""
    for row in tables.read(file, block, delimiter="\t", names=columns[block["file"]]):
      where = f"{file.name} row {row.number}"
      if row.values is None or not row.values[PATH]:
        yield own_split, records.Refused(where, "records", records.MALFORMED)
        continue
      path = row.values[PATH]
      # The captions of one image go to the same split.
      split = base.split_of(path, own_split, val_fraction)
      if not allow_outside and base.is_outside(root, path):
        yield split, records.Refused(path, "records", base.OUTSIDE)
        continue
      key = f"{prefix}{path}#{row.number - 2}"  # as the file's own index counts
      false = parse_list(row.values[NEGATIVES])
      if false is None:
        yield split, records.Refused(key, "negatives", records.MALFORMED)
      yield (
        split,
        {
          schema.RECORD_KEY: key,
          schema.RECORD_IMAGE: root / path,
          schema.RECORD_CAPTIONS: [row.values[TITLE]],
          schema.RECORD_REGIONS: [],
          schema.RECORD_NEGATIVES: [{"caption": text, "kind": KIND} for text in false or ()],
        },
      )

  def image_files() -> Iterator[pathlib.Path]:
    for file, names in zip(files, columns, strict=True):
      for block in tables.blocks(file, delimiter="\t"):
        for row in tables.read(file, block, delimiter="\t", names=names):
          path = row.values[PATH] if row.values is not None else ""
          if path and (allow_outside or not base.is_outside(root, path)):
            yield root / path

  settings: dict[str, Any] = {
    "annotations": [inputs.stamp(file) for file in files],
    "images": str(root),
    "val_fraction": val_fraction,
    "allow_outside": allow_outside,
    "max_pixels": max_pixels,
  }
  arguments = {**settings, "input": str(home), "annotations": str(named), "licence": licence}
  return base.Source(
    "neg_clip",
    settings,
    read,
    about={"licence": licence},
    blocks=blocks,
    recipe={"kind": "neg_clip", "arguments": arguments},
    images=image_files,
    max_pixels=max_pixels,
  )


def parse_list(text: str) -> list[Any] | None:
  """A list as Python writes it, without running anything; None of what is no list."""
  try:
    found = ast.literal_eval(text.strip())
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return None
  return found if isinstance(found, list) else None


def _split(file: pathlib.Path) -> str:
  """train_neg_clip.tsv, valid_neg_clip.tsv."""
  return splits.of_file(file.name.replace("_", "-"))
