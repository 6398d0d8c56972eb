"""Text files that people have (UTF-8: plain, JSON, JSON lines, CSV), one meaning for every reader.

A byte order mark is dropped, lines end with "\\n" or "\\r\\n" and with nothing else (U+2028 and
U+0085 are characters of a text), and files are read in pieces, again where the storage failed. What
is wrong with a file is a ValueError in one line with the place; storage that stays lost a
`failures.TransientError`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from grain_jax import failures

_BOM = "\ufeff"
_BUFFER = 1 << 20  # bytes of a read


class Line(NamedTuple):
  """A line of a file; decoded when asked, so that a reader may count a bad one and go on."""

  number: int  # from 1
  offset: int  # bytes before it in the file
  data: bytes  # without its end

  def text(self) -> str:
    """The line without a byte order mark; a ValueError that begins with 'not UTF-8'."""
    return _decode(self.data, offset=self.offset, number=self.number).removeprefix(_BOM)


class Row(NamedTuple):
  """A row of a CSV file with a header."""

  number: int  # the header is row 1
  values: dict[str, str | None]  # by column; None where the row ends before it
  surplus: tuple[str, ...]  # fields past the last column


def read_text(path: pathlib.Path, *, name: str = "") -> str:
  """The whole text of a file, its line ends as they are.

  Args:
    path: the file.
    name: what errors call it, such as '--texts=a.txt'; default: the path.
  """
  name = name or str(path)
  with _open(path, name) as file:
    data = file.read()
  try:
    return _decode(data).removeprefix(_BOM)
  except ValueError as error:
    raise ValueError(f"{name} is {error}. Save it as UTF-8.") from None


def read_json(path: pathlib.Path, *, name: str = "") -> Any:
  """The content of a JSON file; see `read_text`."""
  name = name or str(path)
  with _open(path, name) as file:
    data = file.read()
  try:
    return parse_json(_decode(data).removeprefix(_BOM))
  except ValueError as error:
    raise ValueError(f"{name} is not JSON: {error}. Get or write it once more.") from None


def iterate_lines(path: pathlib.Path, *, name: str = "") -> Iterator[Line]:
  """The lines of a file that hold more than white space, not yet decoded."""
  offset = 0
  with _open(path, name or str(path)) as file:
    for number, data in enumerate(file, start=1):
      if data.removeprefix(codecs.BOM_UTF8).strip():
        yield Line(number, offset, data.removesuffix(b"\n").removesuffix(b"\r"))
      offset += len(data)


def read_lines(path: pathlib.Path, *, name: str = "") -> list[str]:
  """The lines of a file that are not blank, without the white space around them."""
  found = []
  for line in iterate_lines(path, name=name):
    try:
      found.append(line.text().strip())
    except ValueError as error:
      raise ValueError(f"{name or path} is {error}. Save it as UTF-8.") from None
  return [text for text in found if text]


def read_json_lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """("PATH line N", content) of each line of a file of JSON lines that is not blank."""
  for line in iterate_lines(path):
    where = f"{path} line {line.number}"
    try:
      yield where, parse_json(line.text())
    except ValueError as error:
      raise ValueError(f"{where} is not JSON: {error}. Mend the line.") from None


def parse_json(text: str) -> Any:
  """The content of a JSON text; a ValueError also where it is nested too deeply to be read."""
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None


def read_csv(
  path: pathlib.Path, *, name: str = "", delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
  """(number from 1, fields) of each row of a CSV file; an empty line is a row without fields.

  As Python's `csv` in its strict mode: elsewhere, a quote that is not closed takes in the rows
  after it without a word. A quote inside a field that does not begin with one is a character.
  """
  name = name or str(path)
  reader = csv.reader(_csv_lines(path, name), delimiter=delimiter, strict=True)
  number, line = 0, 1
  while True:
    number, line = number + 1, reader.line_num + 1
    try:
      fields = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      raise ValueError(
        f"{name} is not CSV in UTF-8: {error} in row {number}, which begins in line {line}. Close "
        'each quote that opens there, and write a quote inside quotes twice ("").'
      ) from None
    yield number, fields


def read_table(path: pathlib.Path, *, name: str = "") -> tuple[list[str], Iterator[Row]]:
  """(columns of the first row, the rows after it that are not empty); see `read_csv`."""
  rows = (row for row in read_csv(path, name=name) if row[1])
  _, columns = next(rows, (0, []))
  return columns, (_row(number, columns, fields) for number, fields in rows)


def _row(number: int, columns: list[str], fields: list[str]) -> Row:
  padded = [*fields, *[None] * (len(columns) - len(fields))]
  surplus = tuple(field for field in fields[len(columns) :] if field.strip())
  return Row(number, dict(zip(columns, padded, strict=False)), surplus)


def _csv_lines(path: pathlib.Path, name: str) -> Iterator[str]:
  """Lines with their ends; those of old Macs ("\\r") are ends too, as `csv` has them."""
  offset = 0
  with _open(path, name) as file:
    for number, data in enumerate(file, start=1):
      try:
        text = _decode(data, offset=offset, number=number)
      except ValueError as error:
        raise ValueError(f"{name} is not CSV in UTF-8: {error}. Save it as UTF-8.") from None
      offset += len(data)
      text = text.removeprefix(_BOM) if number == 1 else text  # elsewhere it may be a field's
      yield from io.StringIO(text, newline="") if "\r" in text else (text,)


def _decode(data: bytes, *, offset: int = 0, number: int = 0) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    number = number or 1 + data.count(b"\n", 0, error.start)
    raise ValueError(
      f"not UTF-8: byte 0x{data[error.start]:02x} at byte {offset + error.start} (line {number})"
    ) from None


def _open(path: pathlib.Path, name: str) -> io.BufferedReader:
  return io.BufferedReader(_Retried(pathlib.Path(path), name), _BUFFER)


class _Retried(io.RawIOBase):
  """A file's bytes; where the storage fails, it is opened and read again at the same place."""

  def __init__(self, path: pathlib.Path, name: str):
    self._path, self._name = path, name
    self._file: io.RawIOBase | None = None
    self._offset = 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    try:
      count = failures.retry_read(lambda: self._read(buffer), self._path)
    except OSError as error:
      why = error.strerror or failures.one_line(error)
      raise ValueError(f"{self._name}: {why}. Correct the path or its rights.") from error
    self._offset += count
    return count

  def _read(self, buffer: Any) -> int:
    try:
      if self._file is None:
        self._file = self._path.open("rb", buffering=0)
        if self._offset:
          self._file.seek(self._offset)
      return self._file.readinto(buffer) or 0
    except OSError:
      self._forget()
      raise

  def _forget(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None

  def close(self) -> None:
    self._forget()
    super().close()
