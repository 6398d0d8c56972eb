"""Evaluations of a run that failed: kept in its workdir until the run ends and says so."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

from grain_jax import failures, places
from grain_jax.runtime import distributed


class FailedEvaluations:
  """What failed, by name and step, also before the run was stopped and went on."""

  def __init__(self, folder: pathlib.Path):
    """`folder`: of the run. All processes must make one."""
    self._file = folder / "failed_evaluations.json"
    text = ""
    if distributed.process_index() == 0 and self._file.exists():
      text = self._file.read_text()
    told = distributed.broadcast("failed evaluations", text)
    self._lines: dict[str, tuple[str, bool]] = json.loads(told) if told else {}

  def note(self, step: int, errors: Mapping[str, Exception]) -> None:
    """The evaluations at a step are done, and these of them failed."""
    here = f" at step {step}"
    before = self._lines
    self._lines = {name: told for name, told in before.items() if not name.endswith(here)}
    for name, error in errors.items():
      self._lines[name + here] = failures.one_line(error), failures.restart_helps(error)
    if distributed.process_index() == 0 and self._lines != before:
      places.write_text(self._file, json.dumps(self._lines))

  def take(self) -> dict[str, Exception]:
    """All of them, by name and step; the run ends with them, and a later start knows none."""
    if distributed.process_index() == 0:
      self._file.unlink(missing_ok=True)
    return {
      name: failures.TransientError(line) if again else ValueError(line)
      for name, (line, again) in self._lines.items()
    }
