"""Metrics from the device: (sum, weight) means, reading them back, the progress line."""

from __future__ import annotations

import collections
import pathlib
import shutil
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from absl import logging

from grain_jax import local_files, places, textfiles

Pairs = Mapping[str, tuple[Any, Any]]

# Of these the total of the steps is told, not their mean.
COUNTS = ("bad_examples", "dropped_texts", "truncated_texts", "nonfinite", "skipped_updates")


def summarize(steps: Iterable[Pairs], prefix: str = "train/") -> dict[str, float]:
  """Means over steps of (sum, weight) pairs, weighted; totals for `COUNTS`.

  A metric whose weights are all 0 (no region in any image) is left out.
  """
  sums: dict[str, float] = collections.defaultdict(float)
  weights: dict[str, float] = collections.defaultdict(float)
  for pairs in jax.device_get(list(steps)):
    for name, (value, weight) in pairs.items():
      sums[name] += float(value)
      weights[name] += float(weight)
  result = {}
  for name, total in sums.items():
    if name.rpartition("/")[2] in COUNTS:
      result[prefix + name] = total
    elif weights[name]:
      result[prefix + name] = total / weights[name]
  return result


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
  """The objects of a metrics file, each with `step`; none where there is no file.

  Lines that are no object with a step (a killed run leaves one half written) are passed over and
  counted in a warning.
  """
  if not path.exists():
    return []
  kept, broken = [], []
  for line in textfiles.iterate_lines(path):
    try:
      entry = textfiles.parse_json(line.text())
    except ValueError:
      entry = None
    if isinstance(entry, dict) and isinstance(entry.get("step"), int):
      kept.append(entry)
    else:
      broken.append(line.number)
  if broken:
    logging.warning("%s: %d broken lines passed over, first %d.", path, len(broken), broken[0])
  return kept


def format_duration(seconds: float) -> str:
  """'1:02:03' or '2:03'."""
  minutes, s = divmod(int(seconds), 60)
  hours, m = divmod(minutes, 60)
  return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Speed(NamedTuple):
  """Of the steps since it was last asked."""

  samples_per_second: float
  left: float  # seconds to the end of the run
  waited: float  # seconds that the loop waited for data
  waited_share: float  # of the time, in [0, 1]


class Progress:
  """Speed and time left, without the first step's compilation and without evaluations."""

  def __init__(self, *, total_steps: int, batch_size: int):
    self._total = total_steps
    self._batch = batch_size
    self._mark: tuple[int, float] | None = None
    self._paused = self._waited = 0.0

  def start(self, step: int) -> None:
    """From here (after `step` updates) time counts."""
    self._mark = (step, time.monotonic())
    self._paused = self._waited = 0.0

  def pause(self, seconds: float) -> None:
    """Takes out time that was not spent training."""
    self._paused += seconds

  def waited(self, seconds: float) -> None:
    """Time spent waiting for data; it counts as training."""
    self._waited += seconds

  def speed(self, step: int) -> Speed:
    """The speed since the last call."""
    assert self._mark is not None, "start() comes first"
    steps = max(step - self._mark[0], 1)
    seconds = max(time.monotonic() - self._mark[1] - self._paused, 1e-9)
    waited = self._waited
    self.start(step)
    left = (self._total - step) * seconds / steps
    return Speed(self._batch * steps / seconds, left, waited, min(waited / seconds, 1.0))

  def line(self, step: int, values: Mapping[str, float], left: float) -> str:
    """'step  100/700  loss 9.312 (caption 4.1, box 2.0, region 3.2)  250 samples/s  3:21 left'.

    Where records were bad, their number since the last line follows: '  4 bad records'.
    """
    first = ("caption", "box", "region")
    losses = [key.removeprefix("train/loss_") for key in values if key.startswith("train/loss_")]
    losses = [name for name in losses if not name.startswith("box_")]  # of which box is the sum
    losses = [name for name in first if name in losses] + sorted(set(losses) - set(first))
    parts = [f"{name} {values['train/loss_' + name]:.3f}" for name in losses]
    bad = round(values.get("train/bad_examples", 0))
    skipped = f"  {bad:,} bad record{'s' * (bad > 1)}" if bad else ""
    loss = "no loss" if "train/loss" not in values else f"loss {values['train/loss']:.3f}"
    return (
      f"step {step:>{len(str(self._total))}}/{self._total}  {loss} "
      f"({', '.join(parts)})  {values['train/samples_per_second']:.0f} samples/s  "
      f"{format_duration(left)} left{skipped}"
    )


class Profiler:
  """A trace of some steps for TensorBoard or Perfetto, written by the first process."""

  def __init__(self, window: Any, folder: pathlib.Path):
    """`window`: `config.profile`, with start_step (0: no trace) and num_steps."""
    self._first = window.start_step if jax.process_index() == 0 else 0
    self._last = self._first + window.num_steps - 1
    self._folder = folder
    # The profiler of JAX writes to a disk.
    bucket = bool(self._first) and places.is_bucket(folder)
    self._local = local_files.temporary_folder() if bucket else folder
    self._running = False

  def before(self, step: int) -> None:
    """Begins the trace at its first step, or later where the run goes on within the window."""
    if self._first and not self._running and self._first <= step <= self._last:
      jax.profiler.start_trace(str(self._local))
      self._running = True

  def after(self, step: int, values: Any) -> None:
    """Ends the trace after its last step, once the device has computed `values`."""
    if self._running and step >= self._last:
      jax.block_until_ready(values)
      self.close()

  def close(self) -> None:
    """Writes what there is of a trace, as when the run ends within its window."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      if self._local != self._folder:
        places.upload(self._local, self._folder)
        shutil.rmtree(self._local, ignore_errors=True)
