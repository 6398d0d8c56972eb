"""What Orbax and TensorStore print of a save that failed, dozens of stacks, kept off the terminal.

`checkpoint` says the same in one line; a log that grows is no help on a full disk.
"""

from __future__ import annotations

import functools
import logging as standard_logging
import sys
from typing import Any

from absl import logging


def _is_ours(record: standard_logging.LogRecord) -> bool:
  orbax = "/orbax/" in record.pathname and record.levelno >= standard_logging.ERROR
  task = record.name == "asyncio" and record.getMessage().startswith("Task exception was never")
  return not (orbax or task)


@functools.cache
def silence() -> None:
  """Drops Orbax's error records, and what its tasks raise after their loop has ended."""
  logging.get_absl_handler().addFilter(_is_ours)
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      before(unraisable)

  sys.unraisablehook = hook
