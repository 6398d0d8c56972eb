"""What a build does, task by task: a block read, a shard written; in this process or another.

A task is JSON, and its result is a file that is there or not: whoever does it twice does it once.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from grain_jax import failures
from grain_jax.data import token_ids
from grain_jax.data.building import block, shards
from grain_jax.data.sources import base

Task = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
  """The folders of a build that goes on."""

  root: pathlib.Path

  @property
  def plan(self) -> pathlib.Path:
    """What it is a build of; a folder without it holds nothing that is gone on with."""
    return self.root / "plan.json"

  @property
  def scratch(self) -> pathlib.Path:
    return self.root / "scratch"

  @property
  def blocks(self) -> pathlib.Path:
    return self.root / "blocks"

  @property
  def facts(self) -> pathlib.Path:
    """What is known of finished shards, until the build is."""
    return self.root / "facts"

  @property
  def dataset(self) -> pathlib.Path:
    return self.root / "dataset"

  def discard(self) -> None:
    """Removes all of it; killed from here on, what is left is no build."""
    self.plan.unlink(missing_ok=True)
    shutil.rmtree(self.root, ignore_errors=True)


def perform(
  task: Task,
  source: base.Source,
  place: Place,
  *,
  threads: int = 1,
  tick: Callable[[str], None] = lambda split: None,
) -> None:
  """Does a task.

  Args:
    task: {'do': 'block', 'number', 'block', 'share', 'tokens'} or {'do': 'shard', 'split',
      'number', 'runs'}.
    source: that is built.
    place: where.
    threads: that decode and check images.
    tick: gets the split of each record read.
  """
  if task["do"] == "block":
    block.write(
      source,
      task["block"],
      block.folder_of(place.blocks, task["number"]),
      scratch=place.scratch,
      share=task["share"],
      threads=threads,
      tokens=token_ids.make_writer(**task["tokens"]),
      tick=tick,
    )
  else:
    shards.write(
      task["split"],
      task["number"],
      task["runs"],
      folder=place.dataset,
      facts=place.facts,
      blocks=place.blocks,
    )


def of_a_full_disk(error: OSError) -> failures.TransientError:
  """What ends a build whose disk is full, or a quota."""
  where = f": {error.filename}" if error.filename else ""
  return failures.TransientError(
    f"the disk is full ({error.strerror}{where}). Make room; the same command goes on."
  )


def describe(error: BaseException) -> dict[str, str] | None:
  """An error as JSON, for `raise_described` in another process; None: a fault of the program."""
  if isinstance(error, OSError) and failures.is_no_room(error):
    error = of_a_full_disk(error)
  if isinstance(error, failures.TransientError) or failures.is_storage(error):
    return {"kind": "transient", "line": failures.one_line(error)}
  if isinstance(error, (ValueError, ImportError, OSError)):
    return {"kind": "value", "line": failures.one_line(error)}
  return None


def raise_described(error: Mapping[str, str]) -> None:
  """Raises what `describe` described."""
  if error["kind"] == "transient":
    raise failures.TransientError(error["line"])
  raise ValueError(error["line"])


# (tasks, function called with each that is done) -> None
Executor = Callable[[Iterator[Task], Callable[[Task], None]], None]
