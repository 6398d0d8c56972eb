"""Errors by what a new start can do about them.

What the user must change is a ValueError (code 1, one line). What may go well with the same command
later, lost storage or a time-out, is a `TransientError` (code 75, one line): launchers start again.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

EXIT_RESTART = 75  # EX_TEMPFAIL of sysexits.h: the launchers start again what ends with it
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell has it

# What the file system says of a name or of rights, not of itself: the same every time.
_OF_THE_USER = frozenset(
  {
    errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EROFS,
  }
)  # fmt: skip
# Libraries in C++ (TensorStore, TensorFlow) put the number, or the name, into the message.
_NUMBER = re.compile(r"\[(?:OS error|Errno) (\d+)")
_NAME = re.compile(r"\b(E[A-Z]{2,14})\b")


class TransientError(Exception):
  """Storage or another machine failed; the same command may succeed later."""


def _causes(error: BaseException) -> Iterator[BaseException]:
  """The error and what it was raised from, each once."""
  seen: set[int] = set()
  todo = [error]
  while todo:
    found = todo.pop()
    if id(found) not in seen:
      seen.add(id(found))
      yield found
      todo += [found.__cause__] if found.__cause__ is not None else []
      if found.__context__ is not None and not found.__suppress_context__:
        todo.append(found.__context__)


def os_errno(error: BaseException) -> int | None:
  """The operating system's error number behind an error, if one is."""
  for cause in _causes(error):
    if isinstance(cause, OSError) and cause.errno is not None:
      return cause.errno
    text = str(cause)
    if found := _NUMBER.search(text):
      return int(found.group(1))
    names = (getattr(errno, name, None) for name in _NAME.findall(text))
    if (number := next(filter(None, names), None)) is not None:
      return number
  return None


def is_transient(error: BaseException) -> bool:
  """Whether storage or time failed (EIO, ESTALE, no room, a time-out), rather than the input.

  Of an error that another library raised: its causes and its words are looked at.
  """
  if any(isinstance(cause, (TransientError, TimeoutError)) for cause in _causes(error)):
    return True
  number = os_errno(error)
  return number is not None and number not in _OF_THE_USER


def restart_helps(error: BaseException) -> bool:
  """Whether what ends a command may go well at the next start: then its code is EXIT_RESTART.

  A ValueError never: this project raises it where the user must change something.
  """
  return not isinstance(error, ValueError) and is_transient(error)


def one_line(error: BaseException, *, limit: int = 0) -> str:
  """An error's message in one line, cut to `limit` characters (0: not at all)."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text[:limit] if limit else text
