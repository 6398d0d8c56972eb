"""Comma- or tab-separated files with a header, in blocks of rows."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from grain_jax import textfiles

BLOCK = 4096  # rows a block


class Row(NamedTuple):
  """A row under the header."""

  number: int  # the header is row 1
  values: dict[str, str] | None  # by column; None where it has more or fewer fields


def columns(file: pathlib.Path, *, delimiter: str, needed: Sequence[str]) -> list[str]:
  """The columns of a file; a one-line ValueError where one that is needed is absent."""
  rows = textfiles.read_csv(file, delimiter=delimiter)
  _, found = next((row for row in rows if row[1]), (0, []))
  absent = [name for name in needed if name not in found]
  if absent:
    raise ValueError(
      f"{file} has the columns {', '.join(map(repr, found[:12])) or 'of an empty file'}: "
      f"{', '.join(absent)} is needed. Give the published file, with its header."
    )
  return found


def blocks(
  file: pathlib.Path, *, delimiter: str, size: int | None = None
) -> Iterator[dict[str, Any]]:
  """Parts of a file for `read`, the header in none."""
  start, count, header, size = None, 0, True, size or BLOCK
  for _, fields, place in textfiles.csv_places(file, delimiter=delimiter):
    if header:
      header = not fields
      start = place if not header else None
      continue
    count += bool(fields)
    if count >= size and place is not None:
      yield {"start": list(start), "stop": place.offset}
      start, count = place, 0
  if count:
    yield {"start": list(start), "stop": None}


def read(
  file: pathlib.Path, block: Mapping[str, Any], *, delimiter: str, names: Sequence[str]
) -> Iterator[Row]:
  """The rows of a block that are not empty.

  Args:
    file: with a header.
    block: one of `blocks`.
    delimiter: between fields.
    names: `columns` of the file.
  """
  start = textfiles.Place(*block["start"])
  rows = textfiles.read_csv(file, delimiter=delimiter, start=start, stop=block["stop"])
  for number, fields in rows:
    if fields:
      whole = len(fields) == len(names)
      yield Row(number, dict(zip(names, fields, strict=True)) if whole else None)
