"""The shard of the images that each process reads, where all evaluate together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class ProcessShard:
  """Process `index` of `count` reads p = ceil(n / count) rows of n, from row index * p on.

  `gather_rows` and `gather_lists` are collective: all processes call them, in the same order.
  """

  index: int = 0
  count: int = 1
  # This process's array -> the arrays of all, stacked: [...] -> [count, ...]. Shapes are equal on
  # all processes; 64-bit numbers need not survive it.
  all_gather: Callable[[np.ndarray], np.ndarray] = lambda array: array[None]

  def shard_size(self, size: int) -> int:
    """Rows that each process reads of `size`; those beyond `size` do not count."""
    return -(-size // self.count)

  def holds(self, row: int, size: int) -> bool:
    """Whether this process reads `row` of `size`."""
    return row // self.shard_size(size) == self.index

  def gather_rows(self, rows: np.ndarray, size: int) -> np.ndarray:
    """The rows of all processes: [shard_size(size), ...] on each -> [size, ...]."""
    if self.count == 1:
      return rows[:size]
    gathered = np.asarray(self.all_gather(rows))
    return gathered.reshape(self.count * len(rows), *rows.shape[1:])[:size]

  def gather_lists(self, rows: list[Any], size: int) -> list[Any]:
    """`gather_rows` of a list of what JSON can hold, one entry a row."""
    if self.count == 1:
      return rows[:size]
    text = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    lengths = np.asarray(self.all_gather(np.asarray([len(text)], np.int32))).reshape(-1)
    room = 1 << int(lengths.max()).bit_length()  # few lengths, as each is compiled once
    padded = np.zeros(room, np.uint8)
    padded[: len(text)] = text
    texts = np.asarray(self.all_gather(padded))
    gathered = [json.loads(t[:n].tobytes()) for t, n in zip(texts, lengths, strict=True)]
    return [row for rows in gathered for row in rows][:size]


SINGLE_PROCESS = ProcessShard()  # one process, which reads everything
