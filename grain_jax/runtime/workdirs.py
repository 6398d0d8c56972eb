"""The folder of a run: held by one run at a time, and one and the same for all of its processes."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import filelock
from absl import logging

from grain_jax import failures, places
from grain_jax.runtime import checkpoint, distributed

_LOCK = ".lock"
_HOLDER = ".lock.json"
_PROBE = ".probe"  # how folders of `save_probe` begin
_DATA = ("annotations.jsonl", "annotations.csv", "manifest.json")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tar", ".parquet")
# Seconds that a run waits for one that is ending: a launcher may be quicker than its predecessor.
LOCK_SECONDS = 30.0
# Seconds until a network file system shows what another machine has written: it may remember for a
# while that a file was not there.
SHARED_SECONDS = 60.0


def make(folder: pathlib.Path) -> None:
  """Makes the workdir, if it is not there.

  Raises:
    ValueError: it cannot be made, or pictures or data lie there and no run; one line.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    names = set() if (folder / "config.json").exists() else _names(folder)
  except OSError as error:
    if failures.is_transient(error):
      raise
    raise ValueError(
      f"--workdir={folder} cannot be a run's folder: {error.strerror or error}. Name another."
    ) from None
  data = sorted(n for n in names if n in _DATA or n.lower().endswith(_PICTURES))
  if data:
    raise ValueError(
      f"--workdir={folder} holds {data[0]}{' and more' * (len(data) > 1)}: a run would write its "
      "checkpoints among your data. Name a folder of its own, such as runs/mine."
    )


def _names(folder: pathlib.Path) -> set[str]:
  try:
    return {path.name for path in folder.iterdir()}
  except FileNotFoundError:  # a bucket has no empty folders
    return set()


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
  """Holds the workdir for this run, which process 0 does for all.

  The lock is the operating system's, so a dead process holds nothing. Where the file system has
  none it is a file, which a dead process may leave: the error then says which to remove. A bucket
  has no locks: there a line says so, and who has written last.

  Raises:
    ValueError: another run holds it; one line that names it.
  """
  if distributed.process_index() != 0:
    yield
    return
  if places.is_bucket(folder):
    told = f" ({_holder(folder)} began one)" if (folder / _HOLDER).exists() else ""
    line = f"{folder} is in a bucket, which has no locks: start no second run there{told}"
    print(line, flush=True)
    with _note(folder):
      yield
    return
  lock = filelock.FileLock(folder / _LOCK)
  try:
    lock.acquire(timeout=0)
  except filelock.Timeout:
    print(f"{folder} is held by {_holder(folder)}; waiting for its end", flush=True)
    try:
      lock.acquire(timeout=LOCK_SECONDS)
    except filelock.Timeout:
      stays = (
        f" If it is gone, remove {folder / _LOCK}: this file system has no locks, and that file "
        "stands for one."
      )
      raise ValueError(
        f"{folder} is held by {_holder(folder)}. Wait for its end, or use another --workdir."
        + (stays if _is_marker(folder / _LOCK) else "")
      ) from None
  try:
    with _note(folder):
      yield
  finally:
    lock.release()


def _is_marker(path: pathlib.Path) -> bool:
  """Whether the file itself is the lock: it then says who holds it."""
  try:
    return path.stat().st_size > 0
  except OSError:
    return False


@contextlib.contextmanager
def _note(folder: pathlib.Path) -> Iterator[None]:
  """Notes in a workdir that this process holds it."""
  holder = {"host": socket.gethostname(), "pid": os.getpid()}
  holder["since"] = datetime.now().astimezone().isoformat(timespec="seconds")
  (folder / _HOLDER).write_text(json.dumps(holder) + "\n")
  try:
    yield
  finally:
    (folder / _HOLDER).unlink(missing_ok=True)


def _holder(folder: pathlib.Path) -> str:
  """Who holds a workdir, in words."""
  try:
    holder = json.loads((folder / _HOLDER).read_text())
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
  except (OSError, ValueError, KeyError, TypeError):
    return "another run"


def prove_shared(folder: pathlib.Path, *, seconds: float | None = None) -> None:
  """Checks that every process sees in `folder` what process 0 writes there; all must call it.

  Raises:
    ValueError: a process does not, within `seconds` (SHARED_SECONDS); the same line on all.
  """
  if distributed.process_count() == 1:
    return
  seconds = SHARED_SECONDS if seconds is None else seconds
  name = distributed.broadcast("proof", f".shared-{secrets.token_hex(8)}")
  if distributed.process_index() == 0:
    (folder / name).write_text(name)
  distributed.broadcast("proof written", "")
  until = time.monotonic() + seconds
  while not (seen := _reads(folder / name, name)) and time.monotonic() < until:
    time.sleep(min(1.0, seconds / 10))
  all_seen = distributed.gather("proof", str(seen), seconds=seconds + 600)
  if distributed.process_index() == 0:
    (folder / name).unlink(missing_ok=True)
  blind = [i for i, value in enumerate(all_seen) if value != "True"]
  if blind:
    raise ValueError(
      f"--workdir={folder} is not one folder for all processes: what process 0 writes there, "
      f"process {', '.join(map(str, blind[:8]))} of {distributed.process_count()} does not see "
      f"within {seconds:.0f} s. Name a folder that all machines share."
    )


def _reads(path: pathlib.Path, content: str) -> bool:
  try:
    return path.read_text() == content
  except OSError:
    return False


def prove_saving(folder: pathlib.Path, save: Callable[[], None]) -> None:
  """Calls `save`, which writes a checkpoint and waits for it; all must call it.

  Raises:
    ValueError: rights are missing; one line.
    TransientError: there is no room, or the storage fails; one line.
  """
  try:
    save()
  except checkpoint.SaveError as error:
    line = f"--workdir={folder} takes no checkpoint: {error}. Make room, or name another folder."
    if failures.is_transient(error.__cause__):
      raise failures.TransientError(line) from None
    raise ValueError(line) from None


def save_probe(folder: pathlib.Path, state: Any) -> None:
  """Writes `state` as a checkpoint beside the run's own, and removes it; all must call it.

  Each start has a name of its own: one that was killed may have left what it wrote, which goes too.
  """
  name = distributed.broadcast("probe", f"{_PROBE}{secrets.token_hex(8)}")
  probe = checkpoint.Checkpoints(folder / name)
  probe.save(0, state, {"step": 0})
  probe.close()
  distributed.broadcast("probe written", "")
  if distributed.process_index() == 0:
    for place in [path for path in folder.iterdir() if path.name.startswith(_PROBE)]:
      places.remove_tree(place)
      if place.exists():
        logging.warning("%s could not be removed; it is no part of the run", place)
