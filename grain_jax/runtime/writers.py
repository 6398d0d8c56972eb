"""Where metrics go: metrics.jsonl and TensorBoard events (clu, which loads TensorFlow)."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from clu import metric_writers

from grain_jax.data import host_tensorflow  # noqa: F401  hides the GPUs before a writer is made
from grain_jax.runtime.metrics import read_jsonl


class JsonlWriter(metric_writers.MetricWriter):
  """Appends one JSON object a line, with `step`, to a file; scalars only."""

  def __init__(self, path: pathlib.Path, *, start_step: int = 0):
    """Opens `path`; lines of steps past `start_step` (of a run cut short) are taken out."""
    self._path, self._start_step = path, start_step
    self._keep([line for line in read_jsonl(path) if line["step"] <= start_step])

  def _keep(self, lines: list[dict[str, Any]]) -> None:
    temporary = self._path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(self._path)
    self._file = self._path.open("a")

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes one line; a value that is not finite is written as null (JSON has no NaN).

    At `start_step` (an evaluation done again) it takes the place of the line of the same names.
    """
    line: dict[str, Any] = {"step": int(step)}
    if step == self._start_step:
      self._file.close()
      names = {"step", *scalars}
      self._keep(
        [old for old in read_jsonl(self._path) if old["step"] < step or not old.keys() <= names]
      )
    for name, value in scalars.items():
      line[name] = float(value) if math.isfinite(float(value)) else None
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()

  def _ignore(self, *args: Any, **kwargs: Any) -> None:
    """Other kinds of metric go to TensorBoard alone."""

  write_summaries = write_images = write_videos = write_audios = _ignore
  write_texts = write_histograms = write_pointcloud = write_hparams = _ignore

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def create_writer(workdir: pathlib.Path, *, start_step: int) -> metric_writers.MetricWriter:
  """`metrics.jsonl` and TensorBoard events in `workdir`; nothing on processes but the first."""
  if jax.process_index() != 0:
    return metric_writers.MultiWriter([])
  return metric_writers.MultiWriter(
    [
      metric_writers.SummaryWriter(str(workdir)),
      JsonlWriter(workdir / "metrics.jsonl", start_step=start_step),
    ]
  )
