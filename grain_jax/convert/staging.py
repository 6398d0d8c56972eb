"""Output that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from grain_jax import local_files, places


def refuse_existing(out: pathlib.Path) -> None:
  """Raises where `--out` is taken; said before anything is read."""
  if out.exists() or out.is_symlink():
    raise ValueError(f"--out={out} exists already. Name another place, or remove it.")


@contextlib.contextmanager
def staged(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path beside `out` to write a file or folder to; it becomes `out` when the block has ended.

  After an error nothing is left of it. For a bucket it is on the local disk and is uploaded then:
  config.json, without which a folder is no model, as the last of its files.
  """
  refuse_existing(out)
  if places.is_bucket(out):
    temporary = local_files.temporary_folder() / out.name
    yield temporary
    refuse_existing(out)
    places.upload(temporary, out, last=("config.json",))
    return
  out.parent.mkdir(parents=True, exist_ok=True)
  temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
  try:
    yield temporary
    refuse_existing(out)
    temporary.rename(out)
  finally:
    if temporary.is_dir():
      shutil.rmtree(temporary, ignore_errors=True)
    else:
      temporary.unlink(missing_ok=True)
