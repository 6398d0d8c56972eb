"""Output that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


def refuse_existing(out: pathlib.Path) -> None:
  """Raises where `--out` is taken; said before anything is read."""
  if out.exists() or out.is_symlink():
    raise ValueError(f"--out={out} exists already. Name another place, or remove it.")


@contextlib.contextmanager
def staged(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path beside `out` to write a file or folder to; it becomes `out` when the block has ended.

  After an error nothing is left of it.
  """
  refuse_existing(out)
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
