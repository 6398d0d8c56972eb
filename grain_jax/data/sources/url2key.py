"""FineHARD's url2key files: which URL the image of a name came from.

Each is {url: key}, or an array of [url, key], of {url: key}, or of {"url": ..., "key": ...}.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from grain_jax.data.sources import sqlite_index

_NAME = "url2key.sqlite"


class Keys:
  """URLs by the name of an image."""

  def __init__(self, index: sqlite_index.Index):
    """See `make` and `open`."""
    self._index = index

  @classmethod
  def make(cls, scratch: pathlib.Path, files: Sequence[pathlib.Path]) -> None:
    """Reads all files once, in memory that does not grow.

    Raises:
      ValueError: a file is no JSON; one line.
    """
    rows = ((_number(file.name), key, url) for file in files for url, key in pairs(file))
    sqlite_index.make(scratch / _NAME, "folder TEXT, key TEXT, url TEXT", rows)

  @classmethod
  def open(cls, scratch: pathlib.Path) -> Keys:
    return cls(sqlite_index.Index(scratch / _NAME))

  def find(self, path: str) -> list[str]:
    """URLs of f_path, coyo_image_K/NNNNN/KEY.jpg; of the file for K where one is."""
    rows = self._index.rows(
      "SELECT url FROM entries WHERE folder IN (?, '') AND key = ? ORDER BY folder = '', url",
      (_number(path), pathlib.PurePosixPath(path).stem),
    )
    return [url for (url,) in rows]


def pairs(file: pathlib.Path) -> Iterator[tuple[str, str]]:
  """(URL, key without folder and extension) of a url2key file."""
  try:
    import ijson
  except ImportError:
    raise ValueError(
      "Large JSON files are read with ijson, which is not installed: "
      "pip install -r requirements.txt."
    ) from None
  try:
    with file.open("rb") as opened:
      for url, key in _pairs(ijson.basic_parse(opened, use_float=True)):
        if isinstance(url, str) and url and isinstance(key, (str, int)):
          yield url, pathlib.PurePosixPath(str(key)).stem
  except (ijson.JSONError, UnicodeDecodeError) as error:
    why = " ".join(str(error).split())[:200]
    raise ValueError(f"{file} is not JSON: {why}. Get it once more.") from None


def _pairs(events: Iterator[tuple[str, Any]]) -> Iterator[tuple[Any, Any]]:
  """(url, key) of objects {url: key}, of objects with these two names, and of arrays of two."""
  stack: list[list[Any]] = []  # of open arrays and objects: their values, or [key, value] pairs
  names: list[Any] = []
  for event, value in events:
    if event in ("start_map", "start_array"):
      stack.append([])
      names.append(None)
    elif event == "map_key":
      names[-1] = value
    elif event == "end_map":
      named = dict(stack.pop())
      names.pop()
      if named.keys() >= {"url", "key"}:
        yield named["url"], named["key"]
    elif event == "end_array":
      items = stack.pop()
      names.pop()
      if len(items) == 2:
        yield items[0], items[1]
    elif stack and names[-1] in ("url", "key"):
      stack[-1].append((names[-1], value))
    elif stack and names[-1] is not None:
      if not stack[-1]:  # of an object with "url" the other names are none
        yield names[-1], value
    elif stack and len(stack[-1]) < 3:  # a long array of other things is none of these
      stack[-1].append(value)


def _number(name: str) -> str:
  found = re.search(r"coyo_image_(\d+)", name)
  return found.group(1) if found else ""
