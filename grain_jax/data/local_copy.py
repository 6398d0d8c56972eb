"""A copy of shards on a machine's own disk, made while a run trains: `config.data.local_copy`.

The order of the data takes records from all shards of a split, so each machine copies all of them,
one after the other. What is finished has its name, and every process of the machine reads it from
then on (`dataset.Dataset`); until then the shard itself is read. A process that finds a shard being
copied by another one goes on to the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pathlib
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from grain_jax import failures, places
from grain_jax.data import dataset as dataset_lib
from grain_jax.data import mixture

_THREADS = 2  # shards that a process copies at a time
_BLOCK = 1 << 24  # bytes; a bucket is asked for as many at a time
_LEAVE_SECONDS = 5.0  # until a thread is left behind whose storage does not answer
_KEY = "config.data.local_copy"


class Part(NamedTuple):
  """A split that a run reads."""

  dataset: dataset_lib.Dataset
  split: str


class _Shard(NamedTuple):
  source: pathlib.Path
  target: pathlib.Path
  size: int  # bytes
  sha256: str


def splits_of(data: dataset_lib.Dataset | mixture.Mixture, split: str) -> list[Part]:
  """The splits that training reads."""
  if isinstance(data, mixture.Mixture):
    return [Part(part.dataset, part.split) for part in data.parts]
  return [Part(data, split)]


def check(folder: str) -> None:
  """Makes the folder of the copy, if there is to be one.

  Raises:
    ValueError: it cannot be; one line.
  """
  if not folder:
    return
  places.check(folder, _KEY)
  path = pathlib.Path(folder).expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f".probe-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()
  except OSError as error:
    raise ValueError(
      f"{_KEY} = {folder} cannot be written ({error.strerror}). Name a folder on this machine's "
      "disk, or leave it empty."
    ) from error


def check_room(folder: str, parts: Sequence[Part]) -> None:
  """Checks that what is not copied yet has room.

  Raises:
    ValueError: the disk is smaller than that; one line.
    failures.TransientError: there is no room now; one line.
  """
  if not folder:
    return
  missing = sum(shard.size - _held(shard) for shard in _shards(parts))
  disk = shutil.disk_usage(pathlib.Path(folder).expanduser())
  if missing > disk.total:
    raise ValueError(
      f"{_KEY} = {folder}: {missing / 1e9:.1f} GB are to be copied to a disk of "
      f"{disk.total / 1e9:.1f} GB. Name a larger one, or leave it empty to read the data in place."
    )
  if missing > disk.free:
    raise failures.TransientError(
      f"{_KEY} = {folder}: {missing / 1e9:.1f} GB are to be copied and {disk.free / 1e9:.1f} GB "
      "are free there. Make room and start again, or leave it empty to read the data in place."
    )


def _held(shard: _Shard) -> int:
  """Bytes of a shard that are on the disk already."""
  for path in (shard.target, _part_of(shard)):
    if path.is_file():
      return min(path.stat().st_size, shard.size)
  return 0


def _part_of(shard: _Shard) -> pathlib.Path:
  return shard.target.with_name(f"{shard.target.name}.part")


def _shards(parts: Sequence[Part]) -> list[_Shard]:
  """All shards of the splits, each content once."""
  found: dict[pathlib.Path, _Shard] = {}
  for data, split in parts:
    folder = data.copy_of(split)
    if folder is None:
      continue
    for entry in data.manifest["splits"][split]["shards"]:
      target = folder / entry["file"]
      source = data.directory / entry["file"]
      found.setdefault(target, _Shard(source, target, entry["bytes"], entry["sha256"]))
  return list(found.values())


class Copier:
  """Copies shards in the background, from when it is made until it is closed."""

  def __init__(self, folder: str, parts: Sequence[Part], *, say: Callable[[str], None]):
    """Starts; with an empty `folder` there is nothing to do.

    Args:
      folder: of the copy, `config.data.local_copy`.
      parts: what to copy.
      say: gets a line at the start and at the end.
    """
    self._folder, self._say = folder, say
    self._stopping = threading.Event()
    self._error: Exception | None = None
    self._todo: queue.SimpleQueue[_Shard] = queue.SimpleQueue()
    self._lock = threading.Lock()
    shards = [s for s in _shards(parts) if folder and not _is_finished(s)]
    self._left = len(shards)
    for shard in shards:
      self._todo.put(shard)
    self._began = time.monotonic()
    if shards:
      size = sum(shard.size for shard in shards) / 1e9
      say(f"copying {len(shards):,} shards, {size:.2f} GB, to {folder} beside the training")
    self._threads = [
      threading.Thread(target=self._work, name="local copy", daemon=True)
      for _ in range(min(_THREADS, len(shards)))
    ]
    for thread in self._threads:
      thread.start()

  def check(self) -> None:
    """Raises what ended the copying.

    Raises:
      dataset.ShardChanged: a shard is not what the manifest says; one line.
      failures.TransientError: the disk is full, or storage failed; one line.
    """
    if self._error is not None:
      raise self._error

  def wait(self) -> None:
    """Returns when all is copied, or raises as `check`."""
    for thread in self._threads:
      thread.join()
    self.check()

  def close(self) -> None:
    """Stops; what is copied of a shard stays, and is gone on with."""
    self._stopping.set()
    for thread in self._threads:
      thread.join(_LEAVE_SECONDS)

  def _work(self) -> None:
    try:
      while not self._stopping.is_set():
        try:
          shard = self._todo.get_nowait()
        except queue.Empty:
          return
        if copy(shard, stopped=self._stopping.is_set):
          self._finished()
        elif not self._stopping.is_set():  # another process is at it
          self._todo.put(shard)
          self._stopping.wait(1.0)
    except Exception as error:
      self._error = self._error or _told(error, self._folder)
      self._stopping.set()

  def _finished(self) -> None:
    with self._lock:
      self._left -= 1
      if not self._left:
        seconds = time.monotonic() - self._began
        self._say(f"all shards are copied to {self._folder}, {seconds:.0f} s after the start")


def _told(error: Exception, folder: str) -> Exception:
  """The error of a copy as the line with which the run ends."""
  if isinstance(error, (failures.TransientError, ValueError)):
    return error
  if isinstance(error, OSError) and error.filename is None:
    error.filename = folder
  if isinstance(error, OSError) and failures.is_no_room(error):
    return failures.TransientError(
      f"{_KEY} = {folder}: the disk is full ({error.strerror}). Make room and start again, or "
      "leave it empty to read the data in place."
    )
  if isinstance(error, OSError):
    return failures.TransientError(
      f"{_KEY} = {folder}: a shard cannot be copied ({error.strerror or error}: {error.filename}). "
      "When the storage is back, start again, or leave the key empty to read the data in place."
    )
  return error


def _is_finished(shard: _Shard) -> bool:
  try:
    return shard.target.stat().st_size == shard.size
  except OSError:
    return False


def copy(shard: _Shard, *, stopped: Callable[[], bool]) -> bool:
  """Copies a shard, from where an earlier copy was cut off; it gets its name when it is whole.

  Args:
    shard: which.
    stopped: whether to leave it.

  Returns:
    Whether it is there. False: another process copies it, or it was left.

  Raises:
    dataset.ShardChanged: its bytes are not those of the manifest.
    OSError, failures.TransientError: of the storage.
  """
  shard.target.parent.mkdir(parents=True, exist_ok=True)
  part = _part_of(shard)
  with part.with_suffix(".lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
    if _is_finished(shard):
      return True
    for again in (False, True):
      digest = _fill(part, shard, stopped=stopped)
      if digest is None:
        return False
      if digest == shard.sha256:
        part.rename(shard.target)
        return True
      part.unlink()  # of an earlier run, perhaps, whose disk lost something: once more, all of it
      if again:
        raise _differs(shard, digest)
  raise AssertionError("the second attempt returns or raises")


def _differs(shard: _Shard, digest: str) -> Exception:
  """The error of a shard whose bytes are not those of the manifest."""
  (stamp,) = places.stamps([shard.source])
  if stamp is None or stamp.size != shard.size:  # as where it is read in place
    size = "is gone" if stamp is None else f"has {stamp.size} bytes instead of {shard.size}"
    return failures.TransientError(
      f"shard {shard.source} {size} ({dataset_lib.MANIFEST}). When it is whole again, start the "
      "same command again."
    )
  return dataset_lib.ShardChanged(
    f"shard {shard.source} is not what {dataset_lib.MANIFEST} says (SHA-256 {digest[:12]}, not "
    f"{shard.sha256[:12]}): it was written anew, or is damaged. Restore it, or build the data into "
    "a new directory."
  )


def _fill(part: pathlib.Path, shard: _Shard, *, stopped: Callable[[], bool]) -> str | None:
  """Appends to a begun copy what is missing; SHA-256 of the whole, None where it was left."""
  digest = hashlib.sha256()
  with part.open("a+b") as file:
    file.seek(0)
    while data := file.read(_BLOCK):
      digest.update(data)
      if stopped():
        return None

    def append(read: Callable[[int], bytes]) -> bool:
      while data := read(_BLOCK):
        file.write(data)
        file.flush()
        digest.update(data)
        if stopped() or file.tell() > shard.size:
          return False
      return True

    for last in failures.attempts():
      try:
        with places.open_raw(shard.source, file.tell()) as source:
          if not append(source.read) and stopped():
            return None
        break
      except OSError as error:
        if failures.is_no_room(error) or not failures.is_storage(error) or last:
          raise
    os.fsync(file.fileno())
  return digest.hexdigest()
