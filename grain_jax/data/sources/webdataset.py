"""Tars of images with their texts beside them, as img2dataset and webdataset write them.

FOLDER holds NAME.tar, in folders of their own or not, each with the members KEY.jpg (or .png,
.webp, ...), KEY.json and KEY.txt of an image next to each other. A record's key is NAME/KEY. Read:

  captions  KEY.txt, and of KEY.json what is named like captions: caption, raw_caption, DreamLIP's
            and FLAIR's shortIB_captions to longLLA_captions, as a text or as its sentences (one
            caption). --caption_keys names others ("txt" is KEY.txt), the original's first; those
            whose list is one text in sentences stand in --long_captions too.
  regions   GRIT's noun_chunks and ref_exps, in offsets of the JSON's caption. Where width and
            height say that img2dataset padded or cut the image, they are left out and counted:
            download with --resize_mode keep_ratio.
  failures  NAME.parquet beside it, of img2dataset: what was not downloaded is counted by why.

A tar in whose path stands val, valid, validation, dev or test (cc3m-validation-0000.tar) is of that
split.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from grain_jax import schema, textfiles
from grain_jax.data import records
from grain_jax.data.sources import (
  base,
  downloads,
  grit_lists,
  parquet_files,
  splits,
  tar_files,
  texts,
)

BLOCK = 256 << 20  # bytes of tars a block, or one tar where that is larger
MOST = 512 << 20  # bytes of a member that is read into memory
TOO_LARGE = "file_too_large"
NOT_JSON = "not_json"
EXTENSIONS = tuple(suffix[1:] for suffix in downloads.SUFFIXES)
FLAGS = (
  base.Flag("input", "folder of tars, or a tar", required=True),
  base.Flag("caption_keys", "of captions in the JSON, and txt; default: by name", [], many=True),
  base.Flag("long_captions", "those whose list is one text in sentences", [], many=True),
  base.Flag(
    "expressions", "GRIT's lists that become regions", "both", choices=grit_lists.EXPRESSIONS
  ),
  base.tolerance_flag(grit_lists.TOLERANCE),
  *base.COMMON_FLAGS,
)


def source(
  input: str | pathlib.Path,  # noqa: A002
  *,
  caption_keys: Sequence[str] = (),
  long_captions: Sequence[str] = (),
  expressions: str = "both",
  tolerance: float = grit_lists.TOLERANCE,
  val_fraction: float = 0.0,
  licence: str = "",
  max_pixels: int = schema.MAX_PIXELS,
) -> base.Source:
  """Tars of images; the format stands at the head of this file.

  Args:
    input: folder of tars, or one tar.
    caption_keys: keys of the JSON that hold captions, and "txt", in their order; default: by name.
    long_captions: those of them whose list is one text in sentences.
    expressions: GRIT's lists that become regions, one of `grit_lists.EXPRESSIONS`.
    tolerance: how far outside the image a box may lie (it is clipped), as a fraction of it.
    val_fraction: part of the split train that goes to val, chosen by a hash of the key.
    licence: of the images, for the manifest.
    max_pixels: of the largest image that is kept.
  """
  root = base.existing(input, "--input")
  base.check_common(val_fraction=val_fraction, max_pixels=max_pixels)
  base_folder = root.parent if root.is_file() else root
  paths = [root] if root.is_file() else parquet_files.below(root, "*.tar")
  if not paths:
    raise ValueError(
      f"--input = {root} holds no .tar. Give the folder that img2dataset --output_format "
      "webdataset wrote; compressed tars are to be unpacked to .tar first."
    )
  if any(path.with_suffix(".parquet").is_file() for path in paths):
    parquet_files.library()

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    names: list[str] = []
    total = 0
    for path in paths:
      size = path.stat().st_size
      if names and total + size > BLOCK:
        yield {"tars": names}
        names, total = [], 0
      names.append(str(path.relative_to(base_folder)))
      total += size
    yield {"tars": names}

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    for name in block["tars"]:
      for item in _read_tar(base_folder / name, name.removesuffix(".tar")):
        key = item.key if isinstance(item, records.Refused) else item[schema.RECORD_KEY]
        yield base.split_of(key, splits.of_file(name), val_fraction), item

  def _read_tar(path: pathlib.Path, name: str) -> Iterator[dict[str, Any] | records.Refused]:
    with contextlib.closing(tar_files.Reader(path)) as reader:
      for sample in tar_files.samples(path, path.name):
        if isinstance(sample, records.Refused):
          yield sample._replace(key=f"{name}/{sample.key}")
          continue
        yield from _read_sample(f"{name}/{sample.key}", sample, reader)
    sidecar = path.with_suffix(".parquet")
    for row in downloads.sidecar_rows(sidecar) if sidecar.is_file() else ():
      if isinstance(row, records.Refused):
        yield row
      elif row["status"] != downloads.SUCCESS:
        why = downloads.failure(row["status"], row.get("error_message"))
        yield records.Refused(f"{name}/{row['key']}", "records", why)

  def _read_sample(
    key: str, sample: tar_files.Sample, reader: tar_files.Reader
  ) -> Iterator[dict[str, Any] | records.Refused]:
    members = sample.members
    extension = next((name for name in EXTENSIONS if name in members), None)
    if extension is None:
      yield records.Refused(key, "records", records.MISSING_IMAGE)
      return
    if max(members[n].size for n in (extension, "json", "txt") if n in members) > MOST:
      yield records.Refused(key, "records", TOO_LARGE)
      return
    values: Any = {}
    if "json" in members:
      values = _parse_json(reader.read(members["json"]))
      if not isinstance(values, dict):
        why = NOT_JSON if values is None else records.MALFORMED
        yield records.Refused(key, "records", why)
        return
    text = reader.read(members["txt"]) if "txt" in members else b""
    captions, lost = _captions(key, values, text)
    yield from lost
    regions, lost = grit_lists.regions(key, values, expressions=expressions)
    yield from lost
    yield {
      schema.RECORD_KEY: key,
      schema.RECORD_IMAGE: reader.read(members[extension]),
      schema.RECORD_CAPTIONS: captions,
      schema.RECORD_REGIONS: regions,
      schema.RECORD_NEGATIVES: [],
    }

  def _captions(
    key: str, values: dict[str, Any], text: bytes
  ) -> tuple[list[Any], list[records.Refused]]:
    """(captions, what of them is lost); the .txt repeats the JSON's caption, or is the only one."""
    try:
      written = text.decode("utf-8-sig").strip()
      lost = []
    except UnicodeDecodeError:
      written, lost = "", [records.Refused(key, "captions", records.MALFORMED)]
    if "txt" in caption_keys:
      values = {**values, "txt": written}
    found = texts.captions(values, names=caption_keys, long=long_captions)
    if not caption_keys and written and written not in found:
      found = [written, *found]
    return found, lost

  settings: dict[str, Any] = {
    "input": str(root),
    "caption_keys": list(caption_keys),
    "long_captions": list(long_captions),
    "expressions": expressions,
    "tolerance": tolerance,
    "val_fraction": val_fraction,
    "max_pixels": max_pixels,
  }

  def files() -> Iterator[pathlib.Path]:
    for path in paths:
      yield path
      if path.with_suffix(".parquet").is_file():
        yield path.with_suffix(".parquet")

  return base.Source(
    "webdataset",
    settings,
    read,
    about={"licence": licence},
    blocks=blocks,
    recipe={"kind": "webdataset", "arguments": {**settings, "licence": licence}},
    tolerance=tolerance,
    images=files,
    max_pixels=max_pixels,
  )


def _parse_json(data: bytes) -> Any:
  """The content; None of what is no JSON."""
  try:
    return textfiles.parse_json(data.decode("utf-8-sig"))
  except ValueError:
    return None
