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

from grain_jax import failures, places

_BOM = "\ufeff"
BUFFER = 1 << 20  # bytes of a read


class Place(NamedTuple):
  """A place in a file between two of its lines, and what lies before it."""

  offset: int = 0  # bytes
  line: int = 0  # lines
  row: int = 0  # rows of CSV


START = Place()


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
  with open_binary(path, name) as file:
    data = file.read()
  try:
    return _decode(data).removeprefix(_BOM)
  except ValueError as error:
    raise ValueError(f"{name} is {error}. Save it as UTF-8.") from None


def read_json(path: pathlib.Path, *, name: str = "") -> Any:
  """The content of a JSON file; see `read_text`."""
  name = name or str(path)
  with open_binary(path, name) as file:
    data = file.read()
  try:
    return parse_json(_decode(data).removeprefix(_BOM))
  except ValueError as error:
    raise ValueError(f"{name} is not JSON: {error}. Get or write it once more.") from None


def iterate_lines(
  path: pathlib.Path, *, name: str = "", start: Place = START, stop: int | None = None
) -> Iterator[Line]:
  """The lines of a file that hold more than white space, not yet decoded.

  Args:
    path: the file.
    name: what errors call it; default: the path.
    start: where the first of them begins.
    stop: offset in bytes before which they begin; None: to the end of the file.
  """
  offset = start.offset
  with open_binary(path, name or str(path), offset) as file:
    for number, data in enumerate(file, start=start.line + 1):
      if stop is not None and offset >= stop:
        return
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
  path: pathlib.Path,
  *,
  name: str = "",
  delimiter: str = ",",
  start: Place = START,
  stop: int | None = None,
) -> Iterator[tuple[int, list[str]]]:
  """(number from 1, fields) of each row of a CSV file; an empty line is a row without fields.

  As Python's `csv` in its strict mode: elsewhere, a quote that is not closed takes in the rows
  after it without a word. A quote inside a field that does not begin with one is a character.

  Args:
    path: the file.
    name: what errors call it; default: the path.
    delimiter: between fields.
    start: where the first row begins, of `csv_places`.
    stop: the offset of a later place, before which the last row ends; None: the file's end.
  """
  for number, fields, _ in csv_places(path, name=name, delimiter=delimiter, start=start, stop=stop):
    yield number, fields


def csv_places(
  path: pathlib.Path,
  *,
  name: str = "",
  delimiter: str = ",",
  start: Place = START,
  stop: int | None = None,
) -> Iterator[tuple[int, list[str], Place | None]]:
  """`read_csv`, and where the row after each begins; None where that is within a line."""
  name = name or str(path)
  lines = _CsvLines(path, name, start, stop)
  reader = csv.reader(lines, delimiter=delimiter, strict=True)
  number, line = start.row, start.line + 1
  while True:
    number, line = number + 1, start.line + reader.line_num + 1
    try:
      fields = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      raise ValueError(
        f"{name} is not CSV in UTF-8: {error} in row {number}, which begins in line {line}. Close "
        'each quote that opens there, and write a quote inside quotes twice ("").'
      ) from None
    yield number, fields, lines.place(number)


def read_table(
  path: pathlib.Path, *, name: str = "", start: Place = START, stop: int | None = None
) -> tuple[list[str], Iterator[Row]]:
  """(columns of the first row, the rows after it that are not empty); see `read_csv`."""
  rows = (row for row in read_csv(path, name=name) if row[1])
  _, columns = next(rows, (0, []))
  if start != START or stop is not None:
    rows = (row for row in read_csv(path, name=name, start=start, stop=stop) if row[1])
    if start == START:
      next(rows, None)
  return columns, (_row(number, columns, fields) for number, fields in rows)


def _row(number: int, columns: list[str], fields: list[str]) -> Row:
  padded = [*fields, *[None] * (len(columns) - len(fields))]
  surplus = tuple(field for field in fields[len(columns) :] if field.strip())
  return Row(number, dict(zip(columns, padded, strict=False)), surplus)


class _CsvLines:
  """Lines with their ends; those of old Macs ("\\r") are ends too, as `csv` has them."""

  def __init__(self, path: pathlib.Path, name: str, start: Place, stop: int | None):
    self._path, self._name, self._start, self._stop = path, name, start, stop
    self._offset, self._line = start.offset, start.line
    self._whole = True  # all of the last line that ends with "\n" was handed out
    self._lines = self._read()

  def __iter__(self) -> Iterator[str]:
    return self._lines

  def place(self, row: int) -> Place | None:
    """Where the next line begins, `row` rows before it; None inside of a line."""
    return Place(self._offset, self._line, row) if self._whole else None

  def _read(self) -> Iterator[str]:
    with open_binary(self._path, self._name, self._offset) as file:
      for data in file:
        if self._stop is not None and self._offset >= self._stop:
          return
        self._line += 1
        try:
          text = _decode(data, offset=self._offset, number=self._line)
        except ValueError as error:
          raise ValueError(
            f"{self._name} is not CSV in UTF-8: {error}. Save it as UTF-8."
          ) from None
        self._offset += len(data)
        text = text.removeprefix(_BOM) if self._line == 1 else text  # elsewhere a field's
        parts = list(io.StringIO(text, newline="")) if "\r" in text else [text]
        for number, part in enumerate(parts, start=1):
          self._whole = number == len(parts)
          yield part


def _decode(data: bytes, *, offset: int = 0, number: int = 0) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    number = number or 1 + data.count(b"\n", 0, error.start)
    raise ValueError(
      f"not UTF-8: byte 0x{data[error.start]:02x} at byte {offset + error.start} (line {number})"
    ) from None


def open_binary(path: pathlib.Path, name: str = "", offset: int = 0) -> io.BufferedReader:
  """The bytes of a file from an offset on; where the storage fails, they are read again.

  Args:
    path: the file.
    name: what errors call it; default: the path.
    offset: in bytes.

  Raises:
    ValueError: it cannot be read; one line.
  """
  return io.BufferedReader(_Retried(places.at(path), name or str(path), offset), BUFFER)


class _Retried(io.RawIOBase):
  """A file's bytes; where the storage fails, it is opened and read again at the same place."""

  def __init__(self, path: pathlib.Path, name: str, offset: int = 0):
    self._path, self._name = path, name
    self._file: io.RawIOBase | None = None
    self._offset = offset

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
        self._file = places.open_raw(self._path, self._offset)
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
