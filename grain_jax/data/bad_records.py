"""When bad records are so many that a run ends."""

from __future__ import annotations

import collections
import dataclasses

import ml_collections
import numpy as np

from grain_jax import config as configs


@dataclasses.dataclass(frozen=True)
class Limits:
  """How many bad records a run goes on with; keys of `config.data`."""

  in_a_row: int  # so many one after the other end it; 0: any number may
  fraction: float  # more than this of the last `window` records end it; 1: all may be bad
  window: int  # records
  least: int  # bad records in the window below which the fraction does not count

  @classmethod
  def from_config(cls, config: ml_collections.ConfigDict) -> Limits:
    """Of `config.data`; one that is older than the keys has no limits."""
    flat = configs.ADDED | dict(configs.flatten(config))
    return cls(
      in_a_row=flat["data.max_bad_in_a_row"],
      fraction=flat["data.max_bad_fraction"],
      window=flat["data.bad_window"],
      least=flat["data.min_bad"],
    )


class BadRecordCounter:
  """Counts bad records in the order in which a process trains on them.

  It counts from the process's start. The order depends on seed and step alone, so of two runs that
  start at the same step and read the same data both end at the same record.
  """

  def __init__(self, limits: Limits):
    self._limits = limits
    self._seen = self._in_a_row = 0
    self._bad: collections.deque[int] = collections.deque()  # numbers of those in the window

  def add(self, good: np.ndarray) -> tuple[int, str] | None:
    """Takes in a batch.

    Args:
      good: of each record whether it can be used, bool [b].

    Returns:
      None, or at the first record that is one too many its place in the batch and what is too much.
    """
    limits, before = self._limits, -1
    for place in np.flatnonzero(~good).tolist():
      number = self._seen + place
      self._in_a_row = self._in_a_row + 1 if place == before + 1 else 1
      before = place
      self._bad.append(number)
      while self._bad[0] <= number - limits.window:
        self._bad.popleft()
      if limits.in_a_row and self._in_a_row >= limits.in_a_row:
        return place, f"{self._in_a_row} records in a row are bad (config.data.max_bad_in_a_row)"
      last, bad = min(number + 1, limits.window), len(self._bad)
      if bad >= limits.least and bad > limits.fraction * last:
        return place, (
          f"{bad} of the last {last} records are bad, more than config.data.max_bad_fraction = "
          f"{limits.fraction:g}"
        )
    self._seen += len(good)
    if before != len(good) - 1:
      self._in_a_row = 0
    return None
