"""Paths in buckets (gs://): epath's, with the errors that a path of a file system raises.

A bucket has no folders, locks or renames, but an object appears whole or not at all. TensorFlow,
which epath reads with, has tried a failed request several times (GCS_RETRY_CONFIG_MAX_RETRIES) when
it raises: that is a `failures.TransientError`, which nobody tries again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import pathlib
from collections.abc import Iterator
from typing import Any

from etils.epath import gpath, stat_utils

from grain_jax import failures

# By the code of a tf.errors.OpError, without loading TensorFlow.
_NOT_FOUND = (5,)
_DENIED = (7, 16)  # permission, authentication


def raise_as_of_files(error: Exception, path: object) -> None:
  """Raises what a path of a file system would, for an error of TensorFlow; else returns."""
  code = getattr(error, "error_code", None)
  if code is None:
    return
  why = failures.one_line(error, limit=300)
  if code in _NOT_FOUND:
    raise FileNotFoundError(errno.ENOENT, "there is no such object or bucket", str(path)) from error
  if code in _DENIED:
    raise PermissionError(
      errno.EACCES, f"the bucket denies it: have Storage Object Admin granted ({why})", str(path)
    ) from error
  if code in failures.TENSORFLOW_TRANSIENT or "libcurl code" in why:  # of the network
    raise failures.TransientError(
      f"{path}: the bucket does not answer as it should ({why}). When it does, start the same "
      "command again."
    ) from error
  raise OSError(errno.EINVAL, why, str(path)) from error


@contextlib.contextmanager
def _as_of_files(path: object) -> Iterator[None]:
  try:
    yield
  except Exception as error:
    raise_as_of_files(error, path)
    raise


def _wrapped(method: Any) -> Any:
  @functools.wraps(method)
  def call(self, *args: Any, **kwargs: Any) -> Any:
    with _as_of_files(self):
      return method(self, *args, **kwargs)

  return call


class Stat(stat_utils.StatResult):
  """epath's, with the names of `os.stat_result` too."""

  @property
  def st_size(self) -> int:
    return self.length

  @property
  def st_mtime(self) -> int:
    return self.mtime


class BucketPath(gpath.PosixGPath):
  """A path in a bucket, with those methods of `pathlib.Path` that are used here.

  Raises:
    FileNotFoundError, PermissionError, OSError: as `pathlib.Path` does.
    failures.TransientError: the bucket does not answer, after several attempts.
  """

  def stat(self) -> Stat:
    with _as_of_files(self):
      found = super().stat()
    return Stat(**{name: getattr(found, name) for name in stat_utils.StatResult.__annotations__})

  def _stat(self) -> Stat | None:
    try:
      return self.stat()
    except FileNotFoundError:
      return None

  # Not epath's: what does not answer would not exist.
  def exists(self) -> bool:
    return self._stat() is not None

  def is_dir(self) -> bool:
    found = self._stat()
    return found is not None and found.is_directory

  def is_file(self) -> bool:
    found = self._stat()
    return found is not None and not found.is_directory

  def is_symlink(self) -> bool:
    return False

  def samefile(self, other: object) -> bool:
    return str(self) == str(other)

  def iterdir(self) -> Iterator[BucketPath]:
    if not self.is_dir():
      raise FileNotFoundError(errno.ENOENT, "there is nothing", str(self))
    with _as_of_files(self):
      found = [name.rstrip("/") for name in self._backend.listdir(str(self))]
    return iter([self / name for name in sorted(set(found)) if name])

  def glob(self, pattern: str) -> Iterator[BucketPath]:
    with _as_of_files(self):
      return iter(sorted(super().glob(pattern)))

  def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
    """Nothing: an object's folders are a part of its name."""

  def resolve(self, strict: bool = False) -> BucketPath:
    return self

  def expanduser(self) -> BucketPath:
    return self

  @contextlib.contextmanager
  def open(self, mode: str = "r", **options: Any) -> Iterator[Any]:
    """A file to use within `with`; what is written appears, whole, when the block has ended."""
    with _as_of_files(self), super().open(mode, **options) as file:
      yield file

  unlink = _wrapped(gpath.PosixGPath.unlink)
  rmtree = _wrapped(gpath.PosixGPath.rmtree)
  rename = _wrapped(gpath.PosixGPath.rename)
  replace = _wrapped(gpath.PosixGPath.replace)
  copy = _wrapped(gpath.PosixGPath.copy)


class RawReader(io.RawIOBase):
  """The bytes of an object from an offset on."""

  def __init__(self, path: BucketPath, offset: int = 0):
    self._path, self._offset = path, offset
    self._stack = contextlib.ExitStack()
    self._file = self._stack.enter_context(path.open("rb"))
    if offset:
      self._file.seek(offset)

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    with _as_of_files(self._path):
      data = self._file.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)

  def close(self) -> None:
    self._stack.close()
    super().close()


def download(source: BucketPath, target: pathlib.Path) -> None:
  """An object as a file; an error leaves a part of it."""
  with source.open("rb") as reader, target.open("wb") as writer:
    while data := reader.read(1 << 23):
      writer.write(data)


def md5(path: BucketPath) -> str | None:
  """MD5 of an object in base64, as the bucket knows it; None where there is none.

  Raises:
    PermissionError, failures.TransientError: the bucket does not tell.
  """
  _, _, bucket, name = str(path).split("/", 3)
  try:
    found = _client().bucket(bucket).get_blob(name)
  except Exception as error:  # of google.api_core, google.auth and requests
    if getattr(error, "code", None) in (401, 403):
      raise PermissionError(errno.EACCES, failures.one_line(error), str(path)) from error
    raise failures.TransientError(f"{path}: {failures.one_line(error, limit=300)}") from error
  return None if found is None else found.md5_hash


@functools.cache
def _client() -> Any:
  from google.cloud import storage

  return storage.Client()


@functools.cache
def check_bucket(bucket: str) -> None:
  """Whether a bucket answers a listing; only success is remembered.

  Raises:
    FileNotFoundError, PermissionError, failures.TransientError: it does not.
  """
  # Of a folder that is not there: one request, which asks for no right on the bucket itself.
  list(BucketPath(f"gs://{bucket}/.grain_jax-none").glob("*"))


def walk(folder: BucketPath) -> list[BucketPath]:
  """All objects below a folder, in order."""
  found: list[BucketPath] = []
  for path in folder.iterdir():
    found += walk(path) if path.is_dir() else [path]
  return found
