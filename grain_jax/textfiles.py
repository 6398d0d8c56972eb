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
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from grain_jax import failures

_BOM = "\ufeff"
_BUFFER = 1 << 20  # bytes of a read
_JSON_SPACE = re.compile(r"[ \t\n\r]*").match
_DECODER = json.JSONDecoder()
_LONGEST_TOKEN = 32  # characters, of those that JSON's errors point at the beginning of


class Place(NamedTuple):
  """A place in a file between two of its lines, and what lies before it."""

  offset: int = 0  # bytes
  line: int = 0  # lines
  row: int = 0  # rows of CSV


_START = Place()


class Line(NamedTuple):
  """A line of a file; decoded when asked, so that a reader may count a bad one and go on."""

  number: int  # from 1
  offset: int  # bytes before it in the file
  data: bytes  # without its end

  def text(self) -> str:
    """The line without a byte order mark; a ValueError that begins with 'not UTF-8'."""
    return _decode(self.data, offset=self.offset, number=self.number).removeprefix(_BOM)


class Member(NamedTuple):
  """A member of a JSON object, and where it lies in its file: from its key's first quote."""

  key: str
  offset: int  # in bytes
  length: int  # in bytes, to the end of its value


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


def iterate_lines(
  path: pathlib.Path, *, name: str = "", start: Place = _START, stop: int | None = None
) -> Iterator[Line]:
  """The lines of a file that hold more than white space, not yet decoded.

  Args:
    path: the file.
    name: what errors call it; default: the path.
    start: where the first of them begins.
    stop: offset in bytes before which they begin; None: to the end of the file.
  """
  offset = start.offset
  with _open(path, name or str(path), offset) as file:
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


def iterate_json_object(path: pathlib.Path, *, name: str = "") -> Iterator[Member]:
  """The members of a JSON file that is one object {key: value, ...}, of any size.

  Held in memory are a few megabytes, or the longest member if that is more. What is such a file,
  and what is wrong with one, is as `read_json` has it.

  Raises:
    ValueError: one line with the place, after the members before it.
  """
  name = name or str(path)
  with _open(path, name) as file:
    try:
      window = _Window(file)
      if window.skip_space() != "{":
        content = read_json(path, name=name)  # it may be no JSON at all
        raise _NoObject(f"{name} holds a {type(content).__name__}, not an object {{key: value}}")
      window.at += 1
      more, first = window.skip_space() != "}", True
      while more:
        yield window.next_member(first=first)
        more, first = window.text[window.at] == ",", False
        window.at += more
      window.at += 1  # the brace that closes it
      if window.skip_space():
        raise window.error("Extra data", window.at)
    except _NoObject as error:
      raise ValueError(f"{error}. Give the right file.") from None
    except json.JSONDecodeError as error:
      raise ValueError(f"{name} is not JSON: {error.msg}. Get or write it once more.") from None
    except UnicodeError as error:
      raise ValueError(f"{name} is not JSON: {error}. Get or write it once more.") from None


def parse_member(data: bytes) -> tuple[str, Any]:
  """(key, value) of the bytes that a `Member` lies in."""
  text = data.decode("utf-8")
  key, end = json.decoder.scanstring(text, 1)
  colon = _JSON_SPACE(text, end).end()
  return key, _DECODER.raw_decode(text, _JSON_SPACE(text, colon + 1).end())[0]


def read_csv(
  path: pathlib.Path,
  *,
  name: str = "",
  delimiter: str = ",",
  start: Place = _START,
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
  start: Place = _START,
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


def read_table(path: pathlib.Path, *, name: str = "") -> tuple[list[str], Iterator[Row]]:
  """(columns of the first row, the rows after it that are not empty); see `read_csv`."""
  rows = (row for row in read_csv(path, name=name) if row[1])
  _, columns = next(rows, (0, []))
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
    with _open(self._path, self._name, self._offset) as file:
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


class _NoObject(Exception):
  """JSON, but no object."""


class _Window:
  """A part of a long JSON text; what lies before `at` goes when more is read."""

  def __init__(self, file: io.BufferedReader):
    self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")()
    self.text, self.at = "", 0
    self._read = 0  # bytes read
    self._byte, self._mark = 0, 0  # the byte that text[_mark] begins at
    self._before = self._lines = 0  # characters and lines before the text
    self._column = 0  # characters of its line before it
    if self.more() and self.text.startswith(_BOM):
      self._byte, self.text = len(codecs.BOM_UTF8), self.text[1:]

  def more(self) -> bool:
    """Reads as much again as there is left, and no less than `_BUFFER`; whether there was any."""
    self._byte, self._mark = self._byte_of(self.at), 0
    gone, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
    self._before += len(gone)
    self._lines += gone.count("\n")
    self._column = len(gone) - gone.rfind("\n") - 1 + ("\n" not in gone) * self._column
    data = self._file.read(max(_BUFFER, len(self.text)))
    waiting = len(self._decoder.getstate()[0])
    try:
      self.text += self._decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
      line = 1 + self._lines + self.text.count("\n") + error.object.count(b"\n", 0, error.start)
      place = self._read - waiting + error.start
      bad = error.object[error.start]
      raise UnicodeError(f"not UTF-8: byte 0x{bad:02x} at byte {place} (line {line})") from None
    self._read += len(data)
    return bool(data)

  def skip_space(self) -> str:
    """Moves to the next character that is none; '' at the end."""
    while True:
      self.at = _JSON_SPACE(self.text, self.at).end()
      if self.at < len(self.text) or not self.more():
        return self.text[self.at : self.at + 1]

  def next_member(self, *, first: bool) -> Member:
    """The member at `at`, which moves on to the "," or "}" behind it."""
    self.skip_space()
    while True:
      try:
        key, end, after = self._parse()
      except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None
      except json.JSONDecodeError as error:
        # Of a member that is only cut off here, no error but this one is so far from the end.
        cut_off = "Unterminated" in error.msg or len(self.text) - error.pos < _LONGEST_TOKEN
        if not cut_off or not self.more():
          raise self._json_error(first) from None
        continue
      offset = self._byte_of(self.at)
      length = self._byte_of(end) - offset
      self.at = after
      return Member(key, offset, length)

  def _parse(self) -> tuple[str, int, int]:
    """(key, end of the value, place of what follows it)."""
    text, at = self.text, self.at
    if text[at : at + 1] != '"':
      raise json.JSONDecodeError("no key", text, at)
    key, end = json.decoder.scanstring(text, at + 1)
    colon = _JSON_SPACE(text, end).end()
    if text[colon : colon + 1] != ":":
      raise json.JSONDecodeError("no colon", text, colon)
    _, end = _DECODER.raw_decode(text, _JSON_SPACE(text, colon + 1).end())
    after = _JSON_SPACE(text, end).end()
    if text[after : after + 1] not in (",", "}") or after == len(text):
      raise json.JSONDecodeError("no end", text, after)
    return key, end, after

  def _json_error(self, first: bool) -> json.JSONDecodeError:
    """What `json` says of the member at `at`."""
    before = "{" if first else '{"":0,'
    try:
      json.loads(before + self.text[self.at :])
    except json.JSONDecodeError as error:
      return self.error(error.msg, self.at + error.pos - len(before))
    return self.error("Expecting ',' delimiter", self.at)

  def error(self, message: str, at: int) -> json.JSONDecodeError:
    """With the place in the file, as `json` words it."""
    lines = self.text.count("\n", 0, at)
    column = at - self.text.rfind("\n", 0, at) if lines else self._column + at + 1
    place = f"line {1 + self._lines + lines} column {column} (char {self._before + at})"
    return json.JSONDecodeError(f"{message}: {place}", "", 0)

  def _byte_of(self, at: int) -> int:
    """The place in the file of text[at]; never before the one asked for last."""
    passed = self.text[self._mark : at]
    self._byte += len(passed) if passed.isascii() else len(passed.encode("utf-8"))
    self._mark = at
    return self._byte


def _open(path: pathlib.Path, name: str, offset: int = 0) -> io.BufferedReader:
  return io.BufferedReader(_Retried(pathlib.Path(path), name, offset), _BUFFER)


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
