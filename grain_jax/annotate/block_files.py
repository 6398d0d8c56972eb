"""The files of a block of annotations, and what of it is done before all of it is.

OUT holds annotations/NNNNNN.jsonl, raw/NNNNNN.jsonl and facts/NNNNNN.json of each block, the facts
last, each written aside and renamed. While a block is done, parts/NNNNNN.HOST-PID.jsonl has a line
for what the stage was given at a time. Where failed pictures are to be done again, the facts of
their block lie in again/ until it is: the other pictures keep what they have.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grain_jax import textfiles
from grain_jax.data.building import block as block_lib
from grain_jax.data.building import tally
from grain_jax.data.sources import annotated

CUT = "cut_lines"  # of pictures that were done, were lost with the process and are done again
_EXAMPLES = 10  # keys of each kind of loss


class Losses:
  """{'what/why': {'count', 'first': some keys}}."""

  def __init__(self):
    self.entries: dict[str, dict[str, Any]] = {}

  def lose(self, key: str, what: str, why: str) -> None:
    self.add({f"{what}/{why}": {"count": 1, "first": [tally.printable(key)]}})

  def add(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
    for name, entry in entries.items():
      own = self.entries.setdefault(name, {"count": 0, "first": []})
      own["count"] += entry["count"]
      own["first"] = (own["first"] + entry["first"])[:_EXAMPLES]


class Saved:
  """What of a block is done: of its files, where failed pictures are done again, and its parts."""

  def __init__(self, out: pathlib.Path, number: int):
    self._out, self._number = out, number
    self.lines: list[dict[str, Any]] = []
    self.raws: list[dict[str, Any]] = []
    self.done: set[str] = set()  # keys
    self.failed: list[str] = []  # keys
    self.kept, self.lost = Losses(), Losses()  # of pictures that are there, and of failed ones
    self.totals, self.seconds = collections.Counter[str](), 0.0
    self._read_again()
    for part in _parts(out, number):
      self._take(part)
    self._mark = time.monotonic()

  def _read_again(self) -> None:
    file = file_of(self._out, "again", self._number)
    if not file.is_file():
      return
    told = json.loads(file.read_text(encoding="utf-8"))
    if "failed" not in told:  # of before it was written down which: all again
      return
    failed = set(told["failed"])
    self.lines, self.raws = (
      [e for e in read_lines(file_of(self._out, what, self._number)) if e["key"] not in failed]
      for what in ("annotations", "raw")
    )
    self.done = {line["key"] for line in self.lines}
    self.kept.add(told["kept"])
    self.totals, self.seconds = collections.Counter(told["totals"]), told["seconds"]

  def add(self, pictures: Sequence[Mapping[str, Any]], totals: Mapping[str, float]) -> None:
    """Takes in, and writes down, what was done since the last time.

    Args:
      pictures: {'key', 'line', 'raw', 'losses': [[what, why]], 'failed'} of each.
      totals: what was spent.
    """
    now = time.monotonic()
    part = {"pictures": pictures, "totals": totals, "seconds": now - self._mark}
    self._mark = now
    file = _part_file(self._out, self._number, f"{socket.gethostname()}-{os.getpid()}")
    append_line(file, part)
    self._take(part)

  def _take(self, part: Mapping[str, Any]) -> None:
    for picture in part["pictures"]:
      key = picture["key"]
      if key in self.done:
        continue
      self.done.add(key)
      self.lines.append(picture["line"])
      self.raws += [{"key": key, "raw": reply} for reply in picture["raw"]]
      for what, why in picture["losses"]:
        (self.lost if picture["failed"] else self.kept).lose(key, what, why)
      self.failed += [key] if picture["failed"] else []
    self.totals.update(part["totals"])  # `+` would leave out what is 0
    self.seconds += part["seconds"]

  def finish(self, counts: Mapping[str, int], losses: Losses) -> None:
    """Writes the block's files.

    Args:
      counts: of the block.
      losses: of pictures that could not be read.
    """
    for own in (self.kept, self.lost):
      losses.add(own.entries)
    write_lines(file_of(self._out, "annotations", self._number), self.lines)
    write_lines(file_of(self._out, "raw", self._number), self.raws)
    facts = {"counts": counts, "losses": losses.entries, "totals": self.totals}
    facts |= {"seconds": self.seconds, "failed": self.failed, "kept": self.kept.entries}
    write_lines(file_of(self._out, "facts", self._number), [facts])
    _remove_parts(self._out, self._number)
    file_of(self._out, "again", self._number).unlink(missing_ok=True)


def redo_failed(out: pathlib.Path, blocks: int) -> None:
  """Has the pictures done again that failed, of blocks that are done and of others."""
  for number in range(blocks):
    facts = file_of(out, "facts", number)
    if not facts.is_file():
      _drop_failed(out, number)
      continue
    if read_facts(out, number)["counts"].get("failed"):
      again = file_of(out, "again", number)
      again.parent.mkdir(exist_ok=True)
      (out / annotated.MANIFEST).unlink(missing_ok=True)  # not finished until all are there
      _remove_parts(out, number)  # of a process that ended before it could
      facts.replace(again)


def _drop_failed(out: pathlib.Path, number: int) -> None:
  for file in _part_files(out, number):
    parts = list(_read_parts(file))
    for part in parts:
      part["pictures"] = [picture for picture in part["pictures"] if not picture["failed"]]
    write_lines(file, parts)


def _part_file(out: pathlib.Path, number: int, process: str) -> pathlib.Path:
  return out / "parts" / f"{number:06d}.{process}.jsonl"


def _part_files(out: pathlib.Path, number: int) -> list[pathlib.Path]:
  return sorted((out / "parts").glob(f"{number:06d}.*.jsonl"))


def _parts(out: pathlib.Path, number: int) -> Iterator[dict[str, Any]]:
  for file in _part_files(out, number):
    yield from _read_parts(file)


def _read_parts(file: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The lines of a file; one not written to its end counts as `CUT` in the totals."""
  *lines, rest = file.read_bytes().split(b"\n")
  for line in [*lines, *filter(None, [rest])]:
    try:
      part = json.loads(line) if line is not rest else None
    except ValueError:
      part = None
    yield part or {"pictures": [], "totals": {CUT: 1}, "seconds": 0.0}


def _remove_parts(out: pathlib.Path, number: int) -> None:
  for file in _part_files(out, number):
    file.unlink()


def file_of(out: pathlib.Path, what: str, number: int) -> pathlib.Path:
  """`what`: annotations, raw, facts or again."""
  return out / what / f"{number:06d}.{'json' if what in ('facts', 'again') else 'jsonl'}"


def read_facts(out: pathlib.Path, number: int) -> dict[str, Any]:
  return json.loads(file_of(out, "facts", number).read_text(encoding="utf-8"))


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  return [json.loads(line.data) for line in textfiles.iterate_lines(path)]


def text_of(values: Iterable[Any]) -> str:
  """A line of JSON for each; escaped where UTF-8 cannot hold it (halves of characters)."""
  return "".join(_line(value) for value in values)


def _line(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    text = json.dumps(value)
  return text + "\n"


def write_lines(path: pathlib.Path, values: Iterable[Any]) -> None:
  """Writes a file that is whole, after a loss of power too, or not there."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = block_lib.aside(path)
  with temporary.open("w", encoding="utf-8") as file:
    file.write(text_of(values))
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def append_line(path: pathlib.Path, value: Any) -> None:
  """Adds a line to a file of this process, or of a killed one of the same number (in a pod: 1)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("ab+") as file:
    if file.tell():
      file.seek(-1, os.SEEK_END)
      cut = file.read() != b"\n"
      file.write(b"\n" * cut)
    file.write(text_of([value]).encode())
