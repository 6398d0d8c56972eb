"""Compiled programs, kept in the user's cache folder for the next process.

For processes that use a model; a training run keeps its own in `config.compile_cache`. What a
process has set itself, by `JAX_COMPILATION_CACHE_DIR` or `jax.config`, stays: JAX takes one folder
a process, the one set when it first compiles. The key of a program holds the versions, XLA_FLAGS,
the number of devices and the processor's instructions, so machines may share the folder. It may be
removed at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator

import jax

from grain_jax import places
from grain_jax.runtime import distributed

PATIENCE = 1.0  # seconds of compiling before it is said; to read a kept program takes 0.2
_SHORTEST = 0.1  # seconds of compiling that are worth a file; JAX's default is 1
_MIN_TIME = "jax_persistent_cache_min_compile_time_secs"
_said: set[str] = set()


def default_folder() -> pathlib.Path:
  """`grain_jax/jax` in $XDG_CACHE_HOME, or in ~/.cache where that is no absolute path."""
  return places.user_cache() / "jax"


def use() -> None:
  """Lets JAX keep what this process compiles, unless the process has said itself what to keep.

  A folder that cannot be used is named once, in a warning, and nothing is kept.
  """
  asked = jax.config.jax_compilation_cache_dir is not None  # '' too: the user wants none
  if asked or not jax.config.jax_enable_compilation_cache or distributed.process_count() > 1:
    return
  if sys.platform == "darwin" and jax.__version_info__ < (0, 10):
    return  # it crashes there when it reads a large program back
  try:
    folder = default_folder()
    _open(folder)
  except (OSError, RuntimeError) as error:  # RuntimeError: no home
    reason = getattr(error, "strerror", None) or error
    _say_once(
      f"compiled programs are not kept ({reason}), and each process compiles anew. Set "
      "XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR to a folder of yours."
    )
    return
  keep_in(str(folder))


def keep_in(folder: str) -> None:
  """What this process compiles is kept in `folder` (`config.compile_cache` of a run), if it is set.

  Short programs too, such as those that try what a GPU takes: a start has a dozen of them.
  """
  if not folder:
    return
  jax.config.update("jax_compilation_cache_dir", str(places.at(folder)))
  if _MIN_TIME.upper() not in os.environ and getattr(jax.config, _MIN_TIME) == 1:
    jax.config.update(_MIN_TIME, _SHORTEST)


def _open(folder: pathlib.Path) -> None:
  """Makes the folder; OSError where it cannot be written, or others could put programs into it."""
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  if os.name == "posix":
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
      raise OSError(0, f"others may write to {folder}")  # what is read from there is run
  try:
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise OSError(error.errno, f"{folder} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
  """Around a compilation: where it takes long, says that `what` is compiled, and where kept."""

  def say() -> None:
    folder = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
    kept = f"kept in {folder}" if folder else "for this process"
    logging.getLogger(__name__).warning("compiling %s: once, %s", what, kept)

  timer = threading.Timer(PATIENCE, say)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _say_once(line: str) -> None:
  if line not in _said:
    _said.add(line)
    logging.getLogger(__name__).warning(line)
