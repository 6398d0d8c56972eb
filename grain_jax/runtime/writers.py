"""Where metrics go: metrics.jsonl and TensorBoard events (clu, which loads TensorFlow)."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
import threading
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import jax
from absl import logging
from clu import metric_writers

from grain_jax import failures, local_files, places
from grain_jax.data import host_tensorflow  # noqa: F401  hides the GPUs before a writer is made
from grain_jax.runtime.metrics import read_jsonl

# Seconds between two uploads of metrics into a bucket, where a file that has grown is written anew.
UPLOAD_SECONDS = 15.0
METRICS = "metrics.jsonl"


class JsonlWriter(metric_writers.MetricWriter):
  """Appends one JSON object a line, with `step`, to a file; scalars only."""

  def __init__(self, path: pathlib.Path, *, start_step: int = 0):
    """Opens `path`; lines of steps past `start_step` (of a run cut short) are taken out."""
    self._path, self._start_step = path, start_step
    self._keep([line for line in read_jsonl(path) if line["step"] <= start_step])

  def _keep(self, lines: list[dict[str, Any]]) -> None:
    places.write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
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


class _Mirrored(metric_writers.MultiWriter):
  """Writers into a local folder whose files are uploaded to a bucket, beside the training.

  After `flush` everything is there. An upload that fails before is warned about: the next one
  sends the same.
  """

  def __init__(self, folder: pathlib.Path, target: pathlib.Path, *, start_step: int):
    super().__init__(
      [
        metric_writers.SummaryWriter(str(folder)),
        JsonlWriter(folder / METRICS, start_step=start_step),
      ]
    )
    self._folder, self._target = folder, target
    self._pool = futures.ThreadPoolExecutor(1)
    self._closing = threading.Event()  # no pause between uploads
    self._running: futures.Future[None] | None = None
    self._sent: dict[str, tuple[int, int]] = {}  # size and time of files, as uploaded
    self.flush()

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    super().write_scalars(step, scalars)
    if self._running is None or self._running.done():
      self._settle()
      self._running = self._pool.submit(self._send, pause=UPLOAD_SECONDS)

  def _send(self, *, pause: float = 0.0) -> None:
    for file in sorted(self._folder.iterdir()):
      about = file.stat()
      stamp = (about.st_size, about.st_mtime_ns)
      if self._sent.get(file.name) != stamp:
        places.write_bytes(self._target / file.name, file.read_bytes())
        self._sent[file.name] = stamp
    self._closing.wait(pause)

  def _settle(self) -> None:
    if self._running is not None:
      try:
        self._running.result()
      except (OSError, failures.TransientError) as error:
        logging.warning("metrics are not uploaded yet: %s", error)
      self._running = None

  def flush(self) -> None:
    super().flush()
    self._closing.set()
    self._settle()
    self._closing.clear()
    self._send()

  def close(self) -> None:
    self.flush()
    super().close()
    self._send()
    self._pool.shutdown()
    shutil.rmtree(self._folder, ignore_errors=True)


def create_writer(workdir: pathlib.Path, *, start_step: int) -> metric_writers.MetricWriter:
  """`metrics.jsonl` and TensorBoard events in `workdir`; nothing on processes but the first."""
  if jax.process_index() != 0:
    return metric_writers.MultiWriter([])
  if places.is_bucket(workdir):
    folder = local_files.temporary_folder()
    if (workdir / METRICS).is_file():
      (folder / METRICS).write_bytes((workdir / METRICS).read_bytes())
    return _Mirrored(folder, workdir, start_step=start_step)
  return metric_writers.MultiWriter(
    [
      metric_writers.SummaryWriter(str(workdir)),
      JsonlWriter(workdir / METRICS, start_step=start_step),
    ]
  )
