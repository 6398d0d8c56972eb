"""Errors by what a new start can do about them.

What the user must change is a ValueError (code 1, one line). What may go well with the same command
later, lost storage or a time-out, is a `TransientError` (code 75, one line): launchers start again.
"""

from __future__ import annotations

EXIT_RESTART = 75  # EX_TEMPFAIL of sysexits.h: the launchers start again what ends with it


class TransientError(Exception):
  """Storage or another machine failed; the same command may succeed later."""
