"""JSON files of any size: members of an object or an array by their place, elements of arrays."""

from __future__ import annotations

import codecs
import io
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from grain_jax import textfiles

_BOM = "\ufeff"
_JSON_SPACE = re.compile(r"[ \t\n\r]*").match
_DECODER = json.JSONDecoder()
_LONGEST_TOKEN = 32  # characters, of those that JSON's errors point at the beginning of


class Member(NamedTuple):
  """A member of a JSON object, and where it lies in its file: from its key's first quote."""

  key: str
  offset: int  # in bytes
  length: int  # in bytes, to the end of its value


def iterate_object(path: pathlib.Path, *, name: str = "") -> Iterator[Member]:
  """The members of a JSON file that is one object {key: value, ...}, of any size.

  Held in memory are a few megabytes, or the longest member if that is more. What is such a file,
  and what is wrong with one, is as `textfiles.read_json` has it.

  Raises:
    ValueError: one line with the place, after the members before it.
  """
  return _iterate(path, name or str(path), _OBJECT)


def iterate_array(path: pathlib.Path, *, name: str = "") -> Iterator[Member]:
  """The items of a JSON file that is one array [value, ...], with empty keys; see above."""
  return _iterate(path, name or str(path), _ARRAY)


def _iterate(path: pathlib.Path, name: str, kind: _Kind) -> Iterator[Member]:
  with textfiles.open_binary(path, name) as file:
    try:
      window = _Window(file, kind)
      if window.skip_space() != kind.opening:
        content = textfiles.read_json(path, name=name)  # it may be no JSON at all
        raise _NoObject(f"{name} holds a {type(content).__name__}, not {kind.words}")
      window.at += 1
      more, first = window.skip_space() != kind.closing, True
      while more:
        yield window.next_member(first=first)
        more, first = window.text[window.at] == ",", False
        window.at += more
      window.at += 1  # what closes it
      if window.skip_space():
        raise window.error("Extra data", window.at)
    except _NoObject as error:
      raise ValueError(f"{error}. Give the right file.") from None
    except json.JSONDecodeError as error:
      raise ValueError(f"{name} is not JSON: {error.msg}. Get or write it once more.") from None
    except UnicodeError as error:
      raise ValueError(f"{name} is not JSON: {error}. Get or write it once more.") from None


class Element(NamedTuple):
  """An element of an array in a JSON file."""

  array: str  # key of the member of the file's object that is the array; "": the file itself
  value: Any


def iterate_elements(path: pathlib.Path, *, name: str = "") -> Iterator[Element]:
  """The elements of a JSON file that is an array, or an object with members that are arrays.

  Of COCO's kind of file, {"images": [...], "annotations": [...]}, the elements of both, in the
  file's order. Members that are no arrays are read over. Held in memory are a few megabytes, or the
  longest element if that is more. Numbers are Python's: NaN and Infinity, which many programs
  write, too.

  Raises:
    ValueError: one line with the place, after the elements before it.
  """
  name = name or str(path)
  with textfiles.open_binary(path, name) as file:
    try:
      window = _Window(file, _OBJECT)
      if window.skip_space() == "[":
        yield from window.elements("")
      elif window.skip_space() == "{":
        yield from window.elements_of_members()
      else:
        content = textfiles.read_json(path, name=name)  # it may be no JSON at all
        raise _NoObject(f"{name} holds a {type(content).__name__}, neither an object nor an array")
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


class _NoObject(Exception):
  """JSON, but not of the kind that was asked for."""


class _Kind(NamedTuple):
  """What a file is as a whole."""

  opening: str
  closing: str
  before: str  # what may stand before a member that is not the first
  words: str


_OBJECT = _Kind("{", "}", '{"":0,', "an object {key: value}")
_ARRAY = _Kind("[", "]", "[0,", "an array [value, ...]")


class _Window:
  """A part of a long JSON text; what lies before `at` goes when more is read."""

  def __init__(self, file: io.BufferedReader, kind: _Kind):
    self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")()
    self._kind = kind
    self.text, self.at = "", 0
    self._read = 0  # bytes read
    self._byte, self._mark = 0, 0  # the byte that text[_mark] begins at
    self._before = self._lines = 0  # characters and lines before the text
    self._column = 0  # characters of its line before it
    if self.more() and self.text.startswith(_BOM):
      self._byte, self.text = len(codecs.BOM_UTF8), self.text[1:]

  def more(self) -> bool:
    """Reads as much as is left, or `textfiles.BUFFER` if that is more; whether there was any."""
    self._byte, self._mark = self._byte_of(self.at), 0
    gone, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
    self._before += len(gone)
    self._lines += gone.count("\n")
    self._column = len(gone) - gone.rfind("\n") - 1 + ("\n" not in gone) * self._column
    data = self._file.read(max(textfiles.BUFFER, len(self.text)))
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
    """The member at `at`, which moves on to the "," behind it, or what closes the whole."""
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
      except ValueError as error:  # a whole number longer than Python reads
        raise self.error(str(error), self.at) from None
      offset = self._byte_of(self.at)
      length = self._byte_of(end) - offset
      self.at = after
      return Member(key, offset, length)

  def elements(self, array: str) -> Iterator[Element]:
    """The elements of the array that begins at `at`, which moves behind it."""
    self.at += 1
    more = self.skip_space() != "]"
    while more:
      yield Element(array, self._next_value(",]"))
      more = self.text[self.at] == ","
      self.at += more
    self.at += 1

  def elements_of_members(self) -> Iterator[Element]:
    """The elements of all arrays among the members of the object that begins at `at`."""
    self.at += 1
    more = self.skip_space() != "}"
    while more:
      key = self._next_value(":")
      if not isinstance(key, str):
        raise self.error("Expecting property name enclosed in double quotes", self.at)
      self.at += 1
      if self.skip_space() == "[":
        yield from self.elements(key)
      else:
        self._next_value(",}")
      after = self.skip_space()
      if after not in (",", "}") or not after:
        raise self.error("Expecting ',' delimiter", self.at)
      more = after == ","
      self.at += more
    self.at += 1

  def _next_value(self, ends: str) -> Any:
    """The value at `at`, which moves on to what ends it."""
    self.skip_space()
    while True:
      try:
        value, end = _DECODER.raw_decode(self.text, self.at)
        after = _JSON_SPACE(self.text, end).end()
        if self.text[after : after + 1] not in tuple(ends):
          raise json.JSONDecodeError(f"Expecting {ends[0]!r} delimiter", self.text, after)
      except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None
      except json.JSONDecodeError as error:
        # Of a value that is only cut off here, no error but this one is so far from the end.
        cut_off = "Unterminated" in error.msg or len(self.text) - error.pos < _LONGEST_TOKEN
        ahead = error.pos - self.at
        if not cut_off or not self.more():
          raise self.error(error.msg, self.at + ahead) from None
        continue
      except ValueError as error:  # a whole number longer than Python reads
        raise self.error(str(error), self.at) from None
      self.at = after
      return value

  def _parse(self) -> tuple[str, int, int]:
    """(key, end of the value, place of what follows it)."""
    text, key, value = self.text, "", self.at
    if self._kind is _OBJECT:
      key, value = self._parse_key()
    _, end = _DECODER.raw_decode(text, value)
    after = _JSON_SPACE(text, end).end()
    if text[after : after + 1] not in (",", self._kind.closing) or after == len(text):
      raise json.JSONDecodeError("no end", text, after)
    return key, end, after

  def _parse_key(self) -> tuple[str, int]:
    """(key, place of its value)."""
    text, at = self.text, self.at
    if text[at : at + 1] != '"':
      raise json.JSONDecodeError("no key", text, at)
    key, end = json.decoder.scanstring(text, at + 1)
    colon = _JSON_SPACE(text, end).end()
    if text[colon : colon + 1] != ":":
      raise json.JSONDecodeError("no colon", text, colon)
    return key, _JSON_SPACE(text, colon + 1).end()

  def _json_error(self, first: bool) -> json.JSONDecodeError:
    """What `json` says of the member at `at`."""
    before = self._kind.opening if first else self._kind.before
    try:
      json.loads(before + self.text[self.at :])
    except json.JSONDecodeError as error:
      return self.error(error.msg, self.at + error.pos - len(before))
    except ValueError as error:
      return self.error(str(error), self.at)
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
