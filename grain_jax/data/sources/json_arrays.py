"""Files that are one JSON array each, in blocks of items: no block reads what lies before it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from grain_jax import failures, jsonfiles, textfiles

BLOCK = 4096  # items a block
MOST = 64 << 20  # bytes a block, where items are long


def blocks(path: pathlib.Path, size: int | None = None) -> Iterator[dict[str, int]]:
  """{start, stop (bytes), first (number of the first item)} of a file.

  Raises:
    ValueError: it is no JSON array; one line.
  """
  size = size or BLOCK
  start = stop = first = count = 0
  for item in jsonfiles.iterate_array(path):
    if count and (count == size or item.offset + item.length - start > MOST):
      yield {"start": start, "stop": stop, "first": first}
      first, count = first + count, 0
    start, stop, count = start if count else item.offset, item.offset + item.length, count + 1
  if count:
    yield {"start": start, "stop": stop, "first": first}


def read(path: pathlib.Path, block: Mapping[str, int]) -> Iterator[tuple[int, Any]]:
  """(number from 0, item) of a block."""
  data = failures.retry_read(lambda: _part(path, block["start"], block["stop"]), path)
  try:
    items = json.loads(f"[{data.decode('utf-8')}]")
  except ValueError:
    raise ValueError(f"{path} has changed while it was read. Start again.") from None
  yield from enumerate(items, start=block["first"])


def _part(path: pathlib.Path, start: int, stop: int) -> bytes:
  with textfiles.open_binary(path, str(path), start) as file:
    return file.read(stop - start)
