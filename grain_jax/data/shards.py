"""Open shards: a bounded pool of ArrayRecord readers, and what went wrong with a read.

A process may open so many files (RLIMIT_NOFILE), and a data set of the size of CC12M can have more
shards. `READERS` keeps open what fits and closes the reader that was used least recently.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import pathlib
import re
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access
_LEAST = 512  # readers kept open where the limit allows
_OTHERS = 256  # open files left to the rest of the process
_ENOUGH = 1 << 20  # readers; where the limit is larger, or there is none

_NUMBERS = {os.strerror(number): number for number in errno.errorcode}
_SYSTEM = re.compile(r"^(?:.*; )?\w+\(\) failed: ([^;]+)")  # as Riegeli reports a system call


def open_files_limit() -> int:
  """Files that this process may have open (the soft limit)."""
  try:
    import resource
  except ImportError:  # Windows
    return _ENOUGH
  soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return _ENOUGH if soft == resource.RLIM_INFINITY else soft


def capacity(limit: int) -> int:
  """Readers that may be open at a time: half of the limit, at least 512 where there is room."""
  return max(limit // 2, min(_LEAST, limit - _OTHERS), 1)


def system_error(error: BaseException, path: object) -> OSError | None:
  """The OSError that a RuntimeError of array_record tells in words; None: it is of the content."""
  if isinstance(error, OSError):
    return error
  found = _SYSTEM.match(" ".join(str(error).split()))
  if not found:
    return None
  words = found.group(1).strip()
  return OSError(_NUMBERS.get(words, errno.EIO), words, str(path))


def has_given_up(error: BaseException) -> bool:
  """Whether it is of a bucket, which array_record has asked again for a quarter of an hour."""
  return "Retry policy exhausted" in str(error)


def _open_reader(path: str) -> Any:
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(path, _OPTIONS)
  if not reader.ok():  # it says so with the first read
    try:
      reader.read([0])
    finally:
      reader.close()
    raise RuntimeError("it cannot be opened")
  return reader


_Key = tuple[str, Hashable]  # path and owner


class _Entry:
  """A reader, who uses it, and whether it is to be closed by the last of them."""

  def __init__(self):
    self.lock = threading.Lock()  # of opening: others who want the same shard wait
    self.reader: Any = None
    self.users = 0
    self.discarded = False


class ReaderPool:
  """ArrayRecord readers of shards, shared by threads; no more than `limit` are open at a time.

  Attributes:
    opens: readers opened so far.
  """

  def __init__(self, limit: int | None = None, open_reader: Callable[[str], Any] = _open_reader):
    """`limit`: most readers open at a time; None: by this process's limit, at the first read."""
    self.opens = 0
    self._limit, self._open_reader = limit, open_reader
    self._entries: collections.OrderedDict[_Key, _Entry] = collections.OrderedDict()
    self._forgotten: collections.deque[Hashable] = collections.deque()  # owners
    self._count = 0  # readers open or being opened, discarded ones that are still used among them
    self._changed = threading.Condition()

  @property
  def limit(self) -> int:
    """Most readers that may be open at a time."""
    if self._limit is None:
      self._limit = capacity(open_files_limit())
    return self._limit

  def __len__(self) -> int:
    return self._count

  @contextlib.contextmanager
  def reader(
    self,
    path: str | pathlib.Path,
    *,
    owner: Hashable = None,
    on_open: Callable[[], None] = lambda: None,
  ) -> Iterator[Any]:
    """A reader of `path`, which stays open at least until the block ends.

    Args:
      path: of the shard.
      owner: for whom; another one opens the file anew, which may have been replaced meanwhile.
      on_open: called where it had to be opened.

    Raises:
      OSError: it cannot be opened, or is no whole ArrayRecord file.
    """
    key = (str(path), owner)
    entry = self._acquire(key)
    try:
      with entry.lock:
        if entry.reader is None:
          entry.reader = self._open(str(path))
          on_open()
      yield entry.reader
    except BaseException:
      self._discard(key, entry)  # a handle may be stale: the next one opens the file again
      raise
    finally:
      self._release(entry)

  def discard(self, path: str | pathlib.Path, *, owner: Hashable = None) -> None:
    """Forgets the reader of `path`: the next use opens the file again."""
    key = (str(path), owner)
    with self._changed:
      entry = self._entries.get(key)
    if entry is not None:
      self._discard(key, entry)

  def forget(self, owner: Hashable) -> None:
    """Has the readers of `owner` closed with the next use of the pool.

    Not here: garbage is collected in the middle of anything, so of this pool's work too.
    """
    self._forgotten.append(owner)

  def _acquire(self, key: _Key) -> _Entry:
    with self._changed:
      while self._forgotten:
        owner = self._forgotten.popleft()
        for other, entry in [(k, e) for k, e in self._entries.items() if k[1] == owner]:
          self._discard(other, entry)
      while (entry := self._entries.get(key)) is None:
        if self._count < self.limit:
          entry = self._entries[key] = _Entry()
          self._count += 1
          break
        if not self._close_idle():
          self._changed.wait()  # all are in use, each by a thread that needs no second one
      self._entries.move_to_end(key)
      entry.users += 1
    return entry

  def _close_idle(self) -> bool:
    """Closes the least recently used reader that nobody uses; False: there is none."""
    for key, entry in self._entries.items():
      if not entry.users:
        del self._entries[key]
        self._count -= 1
        _close(entry)
        return True
    return False

  def _open(self, path: str) -> Any:
    while True:
      try:
        reader = self._open_reader(path)
        break
      except Exception as error:
        words = " ".join(str(error).split())
        found = system_error(error, path) or OSError(errno.EIO, words, path)
        # Where the rest of the process holds more files than was left to it, the pool gives way.
        if found.errno not in (errno.EMFILE, errno.ENFILE) or not self._shrink():
          raise found from error
    with self._changed:
      self.opens += 1
    return reader

  def _shrink(self) -> bool:
    """Closes an idle reader for good, so that one less is open from now on."""
    with self._changed:
      closed = self._close_idle()
      self._limit = max(self._count, 1)
    return closed

  def _discard(self, key: _Key, entry: _Entry) -> None:
    with self._changed:
      if entry.discarded:  # by another thread that used it
        return
      entry.discarded = True
      if self._entries.get(key) is entry:
        del self._entries[key]
      if not entry.users:
        self._count -= 1
        _close(entry)
        self._changed.notify_all()

  def _release(self, entry: _Entry) -> None:
    with self._changed:
      entry.users -= 1
      if not entry.users:
        if entry.discarded:
          self._count -= 1
          _close(entry)
        self._changed.notify_all()


def _close(entry: _Entry) -> None:
  if entry.reader is not None:
    entry.reader.close()
    entry.reader = None


READERS = ReaderPool()  # of all datasets that this process reads
