"""What each process reads of the pictures that all of them evaluate together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Share:
  """Process `index` of `count` reads p = ceil(n / count) rows of n, from row index * p on.

  `join` and `join_lists` are collective: all processes call them, in the same order.
  """

  index: int = 0
  count: int = 1
  # This process's array -> the arrays of all, stacked: [...] -> [count, ...]. Shapes are equal on
  # all processes; 64-bit numbers need not survive it.
  gather: Callable[[np.ndarray], np.ndarray] = lambda array: array[None]

  def rows(self, size: int) -> int:
    """Rows that each process reads of `size`; those beyond `size` do not count."""
    return -(-size // self.count)

  def is_own(self, row: int, size: int) -> bool:
    """Whether this process reads `row` of `size`."""
    return row // self.rows(size) == self.index

  def join(self, part: np.ndarray, size: int) -> np.ndarray:
    """The rows of all processes: [rows(size), ...] on each -> [size, ...]."""
    if self.count == 1:
      return part[:size]
    whole = np.asarray(self.gather(part))
    return whole.reshape(self.count * len(part), *part.shape[1:])[:size]

  def join_lists(self, part: list[Any], size: int) -> list[Any]:
    """The same of a list of what JSON can hold, one entry a row."""
    if self.count == 1:
      return part[:size]
    text = np.frombuffer(json.dumps(part).encode(), np.uint8)
    lengths = np.asarray(self.gather(np.asarray([len(text)], np.int32))).reshape(-1)
    room = 1 << int(lengths.max()).bit_length()  # few lengths, as each is compiled once
    padded = np.zeros(room, np.uint8)
    padded[: len(text)] = text
    texts = np.asarray(self.gather(padded))
    rows = [json.loads(t[:n].tobytes()) for t, n in zip(texts, lengths, strict=True)]
    return [row for own in rows for row in own][:size]


ALONE = Share()  # one process, which reads everything
