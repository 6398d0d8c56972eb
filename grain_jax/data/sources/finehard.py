"""FineHARD: boxes with short and long descriptions and false ones, over its images.

FOLDER is the set's root: jsonfiles/*.json (each an array of {f_path, caption, short_caption,
bbox_info}), url2key_jsons/*.json, and the images (or --images): at f_path, as the published script
renames them, or as img2dataset's output "files" does; then they are found by the URL that url2key
has for the name in f_path. --annotations names one of the JSON files, or a folder of them. The
record's key is f_path.

  captions   short_caption (of the web), then caption (long, generated).
  regions    of each bbox_info: bbox (x1, y1, x2, y2 as fractions; a fifth number is the score) with
             short_expr and its short_expr_negs (where flag_short_neg is 1), and with long_expr.
             --expressions=short or long takes one of the two. Those of an image that img2dataset
             padded or cut, as what stands beside it says, are left out and counted.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from grain_jax import schema
from grain_jax.data import records
from grain_jax.data.building import inputs
from grain_jax.data.sources import (
  base,
  downloads,
  grit_lists,
  json_arrays,
  parquet_files,
  url2key,
)

EXPRESSIONS = ("both", "short", "long")
FLAGS = (
  base.Flag("input", "the set's root", required=True),
  base.Flag("annotations", "JSON file or folder of them; default: jsonfiles of --input"),
  base.Flag("images", "folder that f_path starts from; default: --input"),
  base.Flag("expressions", "descriptions that become regions", "both", choices=EXPRESSIONS),
  base.tolerance_flag(grit_lists.TOLERANCE),
  *base.COMMON_FLAGS,
  base.OUTSIDE_FLAG,
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
  allow_outside: bool = False,
  max_pixels: int = schema.MAX_PIXELS,
) -> base.Source:
  """FineHARD in its published layout, which stands at the head of this file.

  Args:
    input: the set's root.
    annotations: JSON file, or folder of them; default: `jsonfiles` of the root.
    images: folder that f_path starts from; default: the root.
    expressions: descriptions that become regions, one of `EXPRESSIONS`.
    tolerance: how far outside the image a box may lie (it is clipped), as a fraction of it.
    val_fraction: part of the split train that goes to val, chosen by a hash of the key.
    licence: of the images, for the manifest.
    allow_outside: read images outside the folder too, where a path leads there.
    max_pixels: of the largest image that is kept.
  """
  home = base.existing(input, "--input")
  named = annotations or (home / "jsonfiles" if (home / "jsonfiles").is_dir() else home)
  tables = base.existing(named, "--annotations")
  root = base.existing(images, "--images") if images else home
  base.check_common(val_fraction=val_fraction, max_pixels=max_pixels)
  files = [tables] if tables.is_file() else parquet_files.sorted_files(tables.glob("*.json"))
  keys = parquet_files.sorted_files((home / "url2key_jsons").glob("*.json"))
  if not files:
    raise ValueError(f"{tables} holds no .json. Give FineHARD's jsonfiles as --annotations.")
  opened = functools.cache(
    lambda scratch: (downloads.Index.open(scratch, root), url2key.Keys.open(scratch))
  )

  def prepare(scratch: pathlib.Path) -> None:
    if keys:
      downloads.Index.make(scratch, root)
      url2key.Keys.make(scratch, keys)

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    for number, file in enumerate(files):
      for block in json_arrays.blocks(file):
        yield {"file": number, **block}

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    file = files[block["file"]]
    for number, item in json_arrays.read(file, block):
      key = item.get("f_path") if isinstance(item, Mapping) else None
      if not isinstance(key, str) or not key:
        yield "train", records.Refused(f"{file.name} item {number}", "records", records.MALFORMED)
        continue
      split = base.split_of(key, "train", val_fraction)
      image = _find_image(key, scratch)
      if isinstance(image, str):
        yield split, records.Refused(key, "records", image)
        continue
      captions = [item.get("short_caption"), item.get("caption")]
      regions = _regions(item.get("bbox_info"), expressions)
      if image.was_reshaped:
        yield from ((split, records.Refused(key, "regions", grit_lists.RESIZED)) for _ in regions)
        regions = []
      yield (
        split,
        {
          schema.RECORD_KEY: key,
          schema.RECORD_IMAGE: image.file,
          schema.RECORD_CAPTIONS: [text for text in captions if text is not None],
          schema.RECORD_REGIONS: regions,
          schema.RECORD_NEGATIVES: [],
        },
      )

  def _find_image(key: str, scratch: pathlib.Path) -> downloads.Image | str:
    if not allow_outside and base.is_outside(root, key):
      return base.OUTSIDE
    path = root / key
    if not keys:
      return downloads.Image(path, grit_lists.was_reshaped(downloads.told_beside(path)))
    index, known = opened(scratch)
    urls, why = known.find(key), None
    for url in urls:
      found = index.find("url", url)
      if isinstance(found, downloads.Image):
        return found
      why = why or found
    # img2dataset numbers images as f_path may be numbered: what it says of a file is believed.
    told = downloads.told_beside(path)
    if _is_file(path) and (not urls or told.get("url") in (None, *urls)):
      return downloads.Image(path, grit_lists.was_reshaped(told))
    return why or records.MISSING_IMAGE

  settings: dict[str, Any] = {
    "annotations": [inputs.stamp(file) for file in files],
    "url2key": [inputs.stamp(file) for file in keys],
    "images": str(root),
    "expressions": expressions,
    "tolerance": tolerance,
    "val_fraction": val_fraction,
    "allow_outside": allow_outside,
    "max_pixels": max_pixels,
  }
  arguments = {**settings, "input": str(home), "annotations": str(tables), "licence": licence}
  del arguments["url2key"]
  return base.Source(
    "finehard",
    settings,
    read,
    about={"licence": licence},
    blocks=blocks,
    prepare=prepare,
    recipe={"kind": "finehard", "arguments": arguments},
    tolerance=tolerance,
    images=lambda: downloads.pictures(root),
    max_pixels=max_pixels,
  )


def _regions(entries: Any, expressions: str) -> list[Any]:
  """Regions of an item's bbox_info; None for what is none, which `records.check` counts."""
  if not isinstance(entries, list):
    return [] if entries is None else [None]
  found: list[Any] = []
  for entry in entries:
    box = entry.get("bbox") if isinstance(entry, Mapping) else None
    if not isinstance(box, list) or len(box) not in (4, 5):
      found.append(None)
      continue
    x1, y1, x2, y2, *score = box
    region = {"box": (y1, x1, y2, x2), "score": score[0] if score else None, "negatives": []}
    short, long = entry.get("short_expr"), entry.get("long_expr")
    if expressions != "long":
      false = entry.get("short_expr_negs") if entry.get("flag_short_neg", 1) else None
      false = list(false.values()) if isinstance(false, Mapping) else false
      found.append({**region, "description": short, "negatives": false})
    if expressions == "long" or (expressions == "both" and long is not None and long != short):
      found.append({**region, "description": long})
  return found


def _is_file(path: pathlib.Path) -> bool:
  with contextlib.suppress(ValueError):  # a NUL: `records.check` counts what is no path
    return path.is_file()
  return False
