"""What img2dataset leaves: which images failed and why, and which file holds the image of a URL.

Its output `files` is FOLDER/00000/000000000.jpg with .json and .txt beside it, and
FOLDER/00000.parquet (all rows, failures too). Keys are its own numbers, so that images are found by
what the row said of them: their URL, or their id.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from grain_jax import places, textfiles
from grain_jax.data import records
from grain_jax.data.sources import grit_lists, parquet_files, sqlite_index

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
AMBIGUOUS = "several_images_of_that_name"
SUCCESS = "success"
_INDEX = "downloads.sqlite"
_STATUS = ("key", "status", "error_message", "url", "id", *grit_lists.SIZES)
_REASONS = {
  r"timed? ?out": "timeout",
  r"certificate|ssl": "certificate",
  r"name or service|getaddrinfo|name resolution|nodename|no address|unknown host": "unknown_host",
  r"robots|disallow": "robots",
  r"refused|reset|unreachable|remote end closed|no route": "connection",
  r"decod|cannot identify|truncated": "no_image",
}


def failure(status: Any, message: Any) -> str:
  """Why a row has no image, in one of a few words: failed_to_download_http_404."""
  status = re.sub(r"\W+", "_", str(status or "failed").lower()).strip("_")[:40] or "failed"
  text = str(message or "").lower()
  if found := re.search(r"http error (\d{3})", text):
    return f"{status}_http_{found.group(1)}"
  for pattern, word in _REASONS.items():
    if re.search(pattern, text):
      return f"{status}_{word}"
  return f"{status}_other" if text else status


def is_sidecar(columns: Iterable[str]) -> bool:
  """Whether a Parquet file of these columns lists img2dataset's downloads."""
  return {"key", "status"} <= set(columns)


def sidecar_rows(path: pathlib.Path) -> Iterator[dict[str, Any] | records.Refused]:
  """The columns `_STATUS` of a Parquet file beside a tar or folder; none if it is another's."""
  columns = parquet_files.column_names(path)
  if columns and not is_sidecar(columns):
    return
  for block in parquet_files.blocks(path):
    for row in parquet_files.read(path, block, columns=_STATUS):
      if row.values is None:
        yield records.Refused(f"{path.name} row {row.number}", "records", row.why)
      else:
        yield row.values


def pictures(root: pathlib.Path) -> Iterator[pathlib.Path]:
  """All image files of a folder, in no order."""
  return (path for path in places.files_below(root) if _is_image(path.name))


class Image(NamedTuple):
  """An image file, and what stands beside it."""

  file: pathlib.Path
  was_reshaped: bool  # padded or cut: boxes of the original are none of its


class Index:
  """Finds image files by URL, by id, and, where no file beside it says what it is, by name."""

  def __init__(self, root: pathlib.Path, index: sqlite_index.Index):
    """See `make` and `open`."""
    self._root, self._index = root, index

  @classmethod
  def make(cls, scratch: pathlib.Path, root: pathlib.Path) -> None:
    """Reads what stands beside all images of a folder, once; 100 bytes of disk an image."""
    columns = "kind TEXT, value TEXT, path TEXT, why TEXT, reshaped TEXT"
    sqlite_index.make(scratch / _INDEX, columns, _entries(root))

  @classmethod
  def open(cls, scratch: pathlib.Path, root: pathlib.Path) -> Index:
    """The index that `make` wrote."""
    return cls(root, sqlite_index.Index(scratch / _INDEX))

  def find(self, kind: str, value: Any) -> Image | str | None:
    """The image of a "url", an "id" or a "name"; why there is none; None where nothing is known."""
    rows = self._index.rows(
      "SELECT path, why, reshaped FROM entries WHERE kind = ? AND value = ? "
      "ORDER BY path = '', path LIMIT 2",
      (kind, str(value)),
    )
    if not rows:
      return None
    if kind == "name" and len(rows) > 1:
      return AMBIGUOUS
    path, why, reshaped = rows[0]
    return Image(self._root / path, bool(reshaped)) if path else why


def _entries(root: pathlib.Path) -> Iterator[_Entry]:
  """All that is known of a folder's images."""
  listed: set[pathlib.Path] = set()
  for sidecar in parquet_files.below(root, "*.parquet"):
    folder = sidecar.with_suffix("")
    if not folder.is_dir():
      continue
    names = {
      name.rpartition(".")[0]: name for name in sorted(os.listdir(folder)) if _is_image(name)
    }
    rows = 0
    for row in sidecar_rows(sidecar):
      if isinstance(row, records.Refused):
        continue  # its files are looked at one by one
      rows += 1
      name = names.pop(str(row["key"]), None) if row["status"] == SUCCESS else None
      path = "" if name is None else str((folder / name).relative_to(root))
      why = records.MISSING_IMAGE
      if row["status"] != SUCCESS:
        why = failure(row["status"], row.get("error_message"))
      yield from _known(row, path, "" if path else why)
    if rows and not names:
      listed.add(folder)
  for file in pictures(root):
    if file.parent not in listed:
      yield from _alone(root, file)


def told_beside(file: pathlib.Path) -> Mapping[str, Any]:
  """The JSON beside an image; {} where there is none."""
  try:
    told = textfiles.read_json(file.with_suffix(".json"))
  except (OSError, ValueError):
    return {}
  return told if isinstance(told, Mapping) else {}


def _alone(root: pathlib.Path, file: pathlib.Path) -> Iterator[_Entry]:
  """Entries of an image by the JSON beside it, or by its name where there is none."""
  beside = file.with_suffix(".json")
  path = str(file.relative_to(root))
  try:
    told = textfiles.read_json(beside) if beside.is_file() else None
  except ValueError:
    return  # nobody knows what image this is: a row that asks for it counts as missing
  known = list(_known(told, path, "")) if isinstance(told, Mapping) else []
  yield from known
  if not known:
    reshaped = isinstance(told, Mapping) and grit_lists.was_reshaped(told)
    yield "name", file.stem, path, "", _flag(reshaped)


# kind, value, path from root, why there is none, "1" where the image was padded or cut
_Entry = tuple[str, str, str, str, str]


def _known(values: Mapping[str, Any], path: str, why: str) -> Iterator[_Entry]:
  for kind in ("url", "id"):
    if _is_name(values.get(kind)):
      yield kind, str(values[kind]), path, why, _flag(grit_lists.was_reshaped(values))


def _flag(value: bool) -> str:
  return "1" if value else ""


def _is_name(value: Any) -> bool:
  return isinstance(value, int) or (isinstance(value, str) and bool(value))


def _is_image(name: str) -> bool:
  return name.lower().endswith(SUFFIXES)
