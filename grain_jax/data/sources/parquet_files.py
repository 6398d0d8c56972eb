"""Parquet files row by row, in blocks of row groups; what is damaged is counted, row by row."""

from __future__ import annotations

import fnmatch
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from grain_jax import failures, places
from grain_jax.data import records

DAMAGED = "damaged_parquet"
BLOCK = 4096  # rows a block, or one row group where that has more
_BATCH = 64  # rows held at a time: they may hold images


class Row(NamedTuple):
  """A row, or why it is none."""

  number: int  # in its file, from 0
  values: dict[str, Any] | None
  why: str = ""


def library() -> Any:
  """pyarrow.parquet; one line where it is not installed."""
  try:
    import pyarrow.parquet
  except ImportError:
    raise ValueError(
      "Parquet files are read with pyarrow, which is not installed: "
      "pip install -r requirements.txt."
    ) from None
  return pyarrow.parquet


def open_file(path: pathlib.Path) -> Any:
  """The pyarrow ParquetFile, or None where it is none or damaged."""
  parquet = library()
  try:
    return failures.retry_read(lambda: parquet.ParquetFile(path, buffer_size=1 << 20), path)
  except FileNotFoundError:
    raise
  except _errors():
    return None


def column_names(path: pathlib.Path) -> list[str]:
  """Names of the columns; [] of a damaged file."""
  file = open_file(path)
  if file is None:
    return []
  with file:
    return file.schema_arrow.names


def blocks(path: pathlib.Path, size: int | None = None) -> Iterator[dict[str, Any]]:
  """{groups: [first, past the last], row: number of the first} of a file, and of a damaged one."""
  file, size = open_file(path), size or BLOCK
  if file is None:
    yield {"groups": None, "row": 0}
    return
  with file:
    first = row = count = 0
    for group in range(file.num_row_groups):
      rows = file.metadata.row_group(group).num_rows
      if count and count + rows > size:
        yield {"groups": [first, group], "row": row}
        first, row, count = group, row + count, 0
      count += rows
    if count:
      yield {"groups": [first, file.num_row_groups], "row": row}


def read(
  path: pathlib.Path, block: Mapping[str, Any], *, columns: Sequence[str] | None = None
) -> Iterator[Row]:
  """The rows of a block; each that cannot be read has a reason instead of values.

  Args:
    path: of the file.
    block: one of `blocks`.
    columns: to read, those of them that the file has; None: all.
  """
  file = open_file(path)
  if file is None or block["groups"] is None:
    yield Row(0, None, DAMAGED)
    return
  number = block["row"]
  with file:
    if columns is not None:
      columns = [name for name in columns if name in file.schema_arrow.names]
    for group in range(*block["groups"]):
      past = number + file.metadata.row_group(group).num_rows
      try:
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
          for values in _values(batch):
            yield Row(number, values, "" if values is not None else records.MALFORMED)
            number += 1
      except _errors() as error:
        if failures.is_storage(error):
          raise failures.lost(path, error) from error
        yield from (Row(lost, None, DAMAGED) for lost in range(number, past))
      number = past


def regroup(path: pathlib.Path, target: pathlib.Path, columns: Sequence[str]) -> None:
  """Writes some columns of a file anew, in row groups of `BLOCK`, where its own are much larger.

  A row group is read from its start: blocks within one would read it again and again. A damaged
  file is not written anew, so that `read` counts its rows.
  """
  parquet = library()
  target.unlink(missing_ok=True)
  file = open_file(path)
  if file is None:
    return
  with file:
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    if max(groups, default=0) <= 2 * BLOCK:
      return
    kept = [name for name in columns if name in file.schema_arrow.names]
    try:
      batches = file.iter_batches(BLOCK, columns=kept)
      first = next(batches)
      with parquet.ParquetWriter(target, first.schema) as writer:
        for batch in itertools.chain([first], batches):
          writer.write_batch(batch)
    except _errors() as error:
      target.unlink(missing_ok=True)
      if failures.is_storage(error):
        raise failures.lost(path, error) from error


def _values(batch: Any) -> Iterator[dict[str, Any] | None]:
  """The rows of a batch; None for one that is no UTF-8."""
  try:
    yield from batch.to_pylist()
  except (ValueError, OverflowError):
    for i in range(batch.num_rows):
      try:
        yield batch.slice(i, 1).to_pylist()[0]
      except (ValueError, OverflowError):
        yield None


def _errors() -> tuple[type[Exception], ...]:
  import pyarrow

  return (pyarrow.ArrowException, OSError, ValueError, EOFError)


def class_names(path: pathlib.Path, column: str) -> list[str]:
  """Names behind whole numbers, where the Hugging Face hub's metadata has them; [] if not.

  Args:
    path: of the file.
    column: its name, with "." before the name of a part: objects.category.
  """
  file = open_file(path)
  if file is None:
    return []
  with file:
    found = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
  try:
    at: Any = json.loads(found)["info"]["features"]
    for part in column.split("."):
      at = at[part] if part in at else at["feature"][part]
    while isinstance(at, (Mapping, list)) and "names" not in at:
      at = at[0] if isinstance(at, list) else at["feature"]
    names = at["names"]
  except (KeyError, TypeError, ValueError, IndexError, RecursionError):
    return []
  return [str(name) for name in names] if isinstance(names, list) else []


def find(root: pathlib.Path) -> list[pathlib.Path]:
  """All Parquet files of a folder, or the file itself, in a fixed order."""
  return [root] if root.is_file() else below(root, "*.parquet")


def below(root: pathlib.Path, pattern: str) -> list[pathlib.Path]:
  """The files of a folder, and of those in it, whose names are of a pattern, in a fixed order."""
  return sorted_files(p for p in places.files_below(root) if fnmatch.fnmatchcase(p.name, pattern))


def sorted_files(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
  return sorted(path for path in paths if path.is_file())
