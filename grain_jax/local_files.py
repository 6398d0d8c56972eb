"""What lies in buckets as files on the local disk, for as long as the process runs."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import pathlib
import shutil
import tempfile
from concurrent import futures

from grain_jax import places

_SETTINGS = (".json", ".txt", ".model")  # of weights: configurations and vocabularies
_MOST_SETTINGS = 64 << 20  # bytes; Gemma's vocabulary has 33 MB
# A name that no folder of a user has: what dead processes left is removed by it.
_SCRATCH = ".grain_jax-process-"
_TRIES = 5


@functools.cache
def _scratch() -> pathlib.Path:
  """This process's folder for copies; what killed ones have left goes first."""
  for left in pathlib.Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
    if (descriptor := _lock(left)) is not None:
      shutil.rmtree(left, ignore_errors=True)
      os.close(descriptor)
  for _ in range(_TRIES):
    folder = pathlib.Path(tempfile.mkdtemp(prefix=_SCRATCH))
    # A process that starts in this moment may take it for one that was left.
    if _lock(folder) is not None and folder.is_dir():
      break
    shutil.rmtree(folder, ignore_errors=True)
  else:  # a file system without locks, where none is removed either
    folder = pathlib.Path(tempfile.mkdtemp(prefix=_SCRATCH))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def _lock(folder: pathlib.Path) -> int | None:
  """A lock on a folder until this process ends; None: another has it, or there are no locks."""
  try:
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
  except (ImportError, OSError):
    return None
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    os.close(descriptor)
    return None
  return descriptor


def remove_temporary() -> None:
  """Removes what `temporary_folder` and `fetch` made: for a process that ends without `atexit`."""
  if _scratch.cache_info().currsize:
    shutil.rmtree(_scratch(), ignore_errors=True)


def temporary_folder() -> pathlib.Path:
  """A new folder on the local disk, which goes when the process ends."""
  return pathlib.Path(tempfile.mkdtemp(dir=_scratch()))


def fetch(path: str | os.PathLike, *, beside: bool = False) -> pathlib.Path:
  """A file or folder on the local disk: itself, or a copy of what is in a bucket.

  The copy goes when the process ends. What is not there stays as it is named. `beside`: with a file
  of weights what it is read with: the configurations and vocabularies beside it, and its shards.
  """
  if not places.is_bucket(path):
    return places.at(path)
  from grain_jax import buckets

  source = places.at(path)
  if source.is_file():
    objects, root = [source], source.parent
  elif source.is_dir():
    objects, root = buckets.walk(source), source
  else:
    return source
  folder = temporary_folder()
  if source.is_dir():
    folder /= source.name
  elif beside:
    objects += _beside(source)
  targets = [folder / path.relative_to(root).as_posix() for path in objects]
  for target in targets:
    target.parent.mkdir(parents=True, exist_ok=True)
  with futures.ThreadPoolExecutor(places.THREADS) as pool:
    list(pool.map(buckets.download, objects, targets))
  return folder / source.name if objects[:1] == [source] else folder


def _beside(weights: pathlib.Path) -> list[pathlib.Path]:
  """The files of the same folder that a file of weights is read with."""
  shards = set()
  if weights.name.endswith(".index.json"):
    with contextlib.suppress(
      ValueError, KeyError, TypeError, AttributeError
    ):  # whoever reads it says what is wrong
      shards = set(json.loads(weights.read_text())["weight_map"].values())
  near = [path for path in weights.parent.iterdir() if path != weights and not path.is_dir()]
  return [
    path
    for path in near
    if path.name in shards or (path.suffix in _SETTINGS and path.stat().st_size <= _MOST_SETTINGS)
  ]
