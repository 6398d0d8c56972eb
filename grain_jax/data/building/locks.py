"""A folder that one process at a time writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import pathlib
from collections.abc import Callable, Iterator

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def held(folder: pathlib.Path, say: Callable[[str], None]) -> Iterator[None]:
  """Holds a folder, which it makes, until the process ends.

  A file system without locks is said in a line: two writers at once are then the user's to avoid.

  Raises:
    ValueError: another process holds it; one line.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in _BUSY:
        raise ValueError(
          f"another command writes {folder}. Wait for it, stop it, or choose another --out."
        ) from None
      say(f"{folder} is on a file system without locks: start no second command that writes there")
    yield
