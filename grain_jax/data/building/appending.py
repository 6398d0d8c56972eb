"""Shards written while blocks are still read, by a thread of the process that plans them.

Else the last shards, one a process, are written while the other cores wait: a tenth of the time of
a build of one shard.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable

from grain_jax.data.building import shards, tasks

_MOST = 8  # shards that are open at once
_CHUNK = 512  # records copied between looks at whether to stop


class Appender:
  """Copies records from blocks to shards in their order, and finishes the shards that are full.

  A context, with whose end the thread ends. A shard that was begun and is not finished leaves
  nothing, as if it had never been begun.
  """

  def __init__(self, place: tasks.Place, *, most: int = _MOST):
    """Args: place: of the build. most: shards that are open at once; 0: it writes none."""
    self._place, self._most = place, most
    self._parts: queue.SimpleQueue[shards.Part | None] = queue.SimpleQueue()
    self._finished: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    self._open: dict[str, shards.Writer] = {}  # by split
    self._beginning = threading.Lock()
    self._begins, self._stopped = True, False
    self._error: BaseException | None = None
    self._thread = threading.Thread(target=self._work, daemon=True)

  def __enter__(self) -> Appender:
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._stopped = True
    self._parts.put(None)
    self._thread.join()

  def add(self, parts: Iterable[shards.Part]) -> None:
    """Has records copied, some time."""
    for part in parts if self._most else ():
      self._parts.put(part)

  def finished(self) -> list[tuple[str, int]]:
    """(split, number) of shards finished since the last call; raises what went wrong."""
    if self._error is not None:
      raise self._error
    return [self._finished.get() for _ in range(self._finished.qsize())]

  def begin_no_more(self) -> set[tuple[str, int]]:
    """From now on no shard is begun; (split, number) of those that are and are not finished."""
    with self._beginning:
      self._begins = False
      begun = {(writer.split, writer.number) for writer in self._open.values()}
    self._parts.put(None)
    return begun

  def wait(self) -> list[tuple[str, int]]:
    """`finished`, after those that are begun are."""
    self._thread.join()
    return self.finished()

  def _work(self) -> None:
    try:
      while (part := self._parts.get()) is not None and not self._stopped:
        self._append(part)
      for split in [] if self._stopped else list(self._open):
        self._close(split)
    except BaseException as error:  # raised where the caller looks next
      self._error = error
    finally:
      for writer in self._open.values():
        writer.abandon()

  def _append(self, part: shards.Part) -> None:
    if part.is_first and part.split in self._open:  # the one before is full
      self._close(part.split)
    if part.is_first:
      self._begin(part)
    writer = self._open.get(part.split)
    if writer is None or writer.number != part.number:
      return  # somebody else writes it
    for start in range(part.run.start, part.run.stop, _CHUNK):
      if not self._stopped:
        stop = min(start + _CHUNK, part.run.stop)
        writer.append(shards.Run(part.run.block, start, stop))

  def _begin(self, part: shards.Part) -> None:
    place, shard = self._place, (part.split, part.number)
    with self._beginning:
      room = self._begins and len(self._open) < self._most
      if room and shards.read_facts(place.facts, *shard) is None:
        self._open[part.split] = shards.Writer(
          *shard, folder=place.dataset, facts=place.facts, blocks=place.blocks
        )

  def _close(self, split: str) -> None:
    writer = self._open[split]
    writer.close()
    self._finished.put((split, writer.number))
    with self._beginning:
      del self._open[split]
