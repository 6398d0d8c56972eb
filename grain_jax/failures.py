"""Errors by what a new start can do about them.

What the user must change is a ValueError (code 1, one line). What may go well with the same command
later, lost storage or a time-out, is a `TransientError` (code 75, one line): launchers start again.
"""

from __future__ import annotations

import errno
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

EXIT_RESTART = 75  # EX_TEMPFAIL of sysexits.h: the launchers start again what ends with it
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell has it

# What `zipfile` and NumPy raise for an .npz with other bytes than were written.
DAMAGED_ARRAYS = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)

# Seconds between the attempts at a read that storage failed: 31.5 s in all.
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

# What an OSError says of a path or its rights: the same command fails again. Every other number is
# of the machine, the network or the disk.
_OF_THE_PATH = frozenset(
  {
    errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EROFS, errno.EXDEV,
  }
)  # fmt: skip
_NO_ROOM = frozenset({errno.EDQUOT, errno.EFBIG, errno.ENOSPC})  # somebody may make some
# Libraries in C++ (TensorStore, TensorFlow) put the number, or the name, into the message.
_NUMBER = re.compile(r"\[(?:OS error|Errno) (\d+)")
_NAME = re.compile(r"\b(E[A-Z]{2,14})\b")


# Codes of a tf.errors.OpError that time may mend: cancelled, unknown, deadline, exhausted, aborted,
# internal, unavailable, data loss.
TENSORFLOW_TRANSIENT = frozenset({1, 2, 4, 8, 10, 13, 14, 15})
# As TensorStore says it of a bucket. (XLA says RESOURCE_EXHAUSTED, of memory.)
_STATUS = re.compile(r"\b(?:UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): ")

Result = TypeVar("Result")


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
  for cause in _causes(error):
    if isinstance(cause, (TransientError, TimeoutError)) or is_storage(cause):
      return True
    # JAX's errors have such a code too, of a program: memory that it lacks it lacks again.
    of_tensorflow = any(c.__module__.startswith("tensorflow") for c in type(cause).__mro__)
    if of_tensorflow and getattr(cause, "error_code", None) in TENSORFLOW_TRANSIENT:
      return True
    if _STATUS.search(str(cause)):
      return True
  number = os_errno(error)
  return number is not None and number not in _OF_THE_PATH


def restart_helps(error: BaseException) -> bool:
  """Whether what ends a command may go well at the next start: then its code is EXIT_RESTART.

  A ValueError never: this project raises it where the user must change something.
  """
  return not isinstance(error, ValueError) and is_transient(error)


def one_line(error: BaseException, *, limit: int = 0) -> str:
  """An error's message in one line, cut to `limit` characters (0: not at all)."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text[:limit] if limit else text


def is_storage(error: BaseException) -> bool:
  """Whether an error is of the storage, not of what lies there or is missing there.

  Lost disks and mounts (EIO, ESTALE, ETIMEDOUT, ENOTCONN, ...), and what the machine ran out of
  (open files, memory). An OSError without a number is of a file's content (PIL, gzip) unless it is
  a time-out or a lost connection.
  """
  if not isinstance(error, OSError):
    return False
  if error.errno is None:
    return isinstance(error, (TimeoutError, ConnectionError, BlockingIOError, InterruptedError))
  return error.errno not in _OF_THE_PATH | _NO_ROOM


def is_no_room(error: BaseException) -> bool:
  """Whether a disk is full, or a quota."""
  return isinstance(error, OSError) and error.errno in _NO_ROOM


def attempts() -> Iterator[bool]:
  """Waits longer before each attempt but the first; yields whether it is the last one."""
  yield not RETRY_DELAYS
  for number, delay in enumerate(RETRY_DELAYS, start=1):
    time.sleep(delay)
    yield number == len(RETRY_DELAYS)


def retry_read(read: Callable[[], Result], what: object) -> Result:
  """`read()`, tried again while the storage fails.

  Args:
    read: reads something.
    what: is read; for the message.

  Raises:
    TransientError: the storage failed at every attempt; one line.
    OSError: something else is wrong, at once.
  """
  for last in attempts():
    try:
      return read()
    except OSError as error:
      if not is_storage(error):
        raise
      if last:
        raise lost(what, error) from error
  raise AssertionError("`attempts` ends with a last one")


def lost(what: object, error: object) -> TransientError:
  """The one line of storage that failed for good."""
  why = error.strerror if isinstance(error, OSError) and error.strerror else error
  why = " ".join(str(why).split())[:300].rstrip(".")
  return TransientError(
    f"{what} cannot be read: {why} ({1 + len(RETRY_DELAYS)} attempts in {sum(RETRY_DELAYS):g} s). "
    "The storage failed: when it is back, start the same command again. If the file itself is "
    "damaged, copy it again first."
  )
