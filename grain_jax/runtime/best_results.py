"""Which checkpoints are best: the result of each, by one metric, in `best.json` beside them."""

from __future__ import annotations

import json
import math
import pathlib

from absl import logging

from grain_jax import places
from grain_jax.runtime import distributed


class BestResults:
  """Results of checkpoints by one metric, greater is better.

  Args:
    path: of the file that keeps them.
    metric: its name; empty: none are kept.
  """

  def __init__(self, path: pathlib.Path, metric: str):
    self._path, self._metric = path, metric
    self._results = self._read()  # {step: result}

  def record(self, step: int, results: dict[str, float]) -> None:
    """Notes the evaluation of checkpoint `step`; all processes must call it.

    Raises:
      ValueError: the metric is not among the results.
    """
    if not self._metric:
      return
    if self._metric not in results:
      near = ", ".join(sorted(results))
      raise ValueError(
        f"config.checkpoint.best_metric = {self._metric!r} is not a result of config.evals. "
        f"Choose one of {near}."
      )
    # Of process 0, so that all keep the same.
    value = distributed.broadcast("best", repr(float(results[self._metric])))
    self._results[step] = float(value)
    if distributed.process_index() == 0:
      numbers = {s: v if math.isfinite(v) else None for s, v in self._results.items()}
      content = {"metric": self._metric, "best": self.best(), "results": numbers}
      places.write_text(self._path, json.dumps(content, indent=2) + "\n")

  def forget_after(self, step: int) -> None:
    """Drops what was noted of later checkpoints."""
    self._results = {s: v for s, v in self._results.items() if s <= step}

  def best(self) -> int | None:
    """Step of the best result on record, the earliest of equal ones; None without any."""
    return next(iter(self.ranked()), None)

  def ranked(self) -> list[int]:
    """Steps, the best first; a result that is no number is none."""
    finite = sorted((-v, s) for s, v in self._results.items() if math.isfinite(v))
    return [step for _, step in finite]

  def _read(self) -> dict[int, float]:
    """What `record` left for the same metric."""
    if not self._metric or not self._path.is_file():
      return {}
    try:
      content = json.loads(self._path.read_text())
      results = content["results"].items() if content["metric"] == self._metric else ()
      return {int(step): math.nan if value is None else float(value) for step, value in results}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
      logging.warning("%s is damaged and is begun anew: %s", self._path, error)
      return {}
