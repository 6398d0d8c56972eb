"""From finished blocks to shards: which record goes where, a shard written, all named."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from grain_jax.data import dataset
from grain_jax.data.building import block as block_lib
from grain_jax.data.building import hints as hints_lib
from grain_jax.data.building import on_disk, preview, tally

_WRITER = "group_size:1,snappy"  # records are read one by one; zstd costs five times the time
_READ = 256  # records read at a time
_HASHED = 1 << 20  # bytes


class Run(NamedTuple):
  """Neighbouring records of a split in a block's folder."""

  block: int
  start: int
  stop: int


class Part(NamedTuple):
  """Records that a shard gets of a block."""

  split: str
  number: int  # of the shard
  run: Run
  is_first: bool  # of the shard


class Plan:
  """Takes in the facts of all blocks in their order: which records stay, and their shards.

  A record whose key came before is dropped and counted.
  """

  def __init__(
    self,
    keys: on_disk.SeenKeys,
    *,
    shard_size: int,
    counts: tally.Tally,
    hints: hints_lib.Hints,
    page: preview.Preview,
  ):
    self._keys, self._size = keys, shard_size
    self._counts, self._hints, self._page = counts, hints, page
    self.shards: dict[str, list[list[Run]]] = {}  # of each split
    self.totals: dict[str, collections.Counter[str]] = {}
    self._last: dict[str, int] = {}  # records in the last shard of a split
    self.items = 0  # records met, kept or not

  def add(self, number: int, facts: Mapping[str, Any]) -> list[Part]:
    """Takes in a block, the one after the last; where its records go."""
    last = {split: len(several) - 1 for split, several in self.shards.items()}
    places = collections.Counter[str]()
    again: set[str] = set()
    for split, key, counts, losses in facts["items"]:
      self.items += 1
      if counts is not None:
        place = places[split]
        places[split] += 1
        if not self._keys.add(key):
          counts, losses = None, [("records", tally.DUPLICATE_KEY)]
          again.add(key)
          self._hints.duplicate()
          self._page.duplicate(key)
      for what, why in losses:
        self._counts.drop(split, what, why, key)
      if counts is not None:
        named = dict(zip(block_lib.COUNTED, counts, strict=True))
        self._counts.keep(split, {"records": 1, **named})
        self._place(split, number, place, counts)
    self._hints.merge(facts["hints"])
    self._page.merge(facts["preview"], without=again)
    return [
      Part(split, shard, run, run is runs[0])
      for split, several in self.shards.items()
      for shard, runs in enumerate(several[last.get(split, 0) :], start=last.get(split, 0))
      for run in runs
      if run.block == number
    ]

  def _place(self, split: str, number: int, place: int, counts: list[int]) -> None:
    shards = self.shards.setdefault(split, [])
    if not shards or self._last[split] == self._size:
      shards.append([])
      self._last[split] = 0
    runs = shards[-1]
    if runs and runs[-1].block == number and runs[-1].stop == place:
      runs[-1] = Run(number, runs[-1].start, place + 1)
    else:
      runs.append(Run(number, place, place + 1))
    self._last[split] += 1
    totals = self.totals.setdefault(split, collections.Counter())
    totals.update(dict(zip(block_lib.COUNTED, counts, strict=True)))
    totals["records"] += 1
    totals["records_without_regions"] += not counts[block_lib.COUNTED.index("regions")]


def file_of(folder: pathlib.Path, split: str, number: int) -> pathlib.Path:
  """A shard before it has its name."""
  return folder / f"{split}-{number:05d}"


def _facts_of(facts: pathlib.Path, split: str, number: int) -> pathlib.Path:
  return facts / f"{split}-{number:05d}.json"


def read_facts(facts: pathlib.Path, split: str, number: int) -> dict[str, Any] | None:
  """{records, bytes, sha256} of a shard that is finished; else None."""
  try:
    return json.loads(_facts_of(facts, split, number).read_text())
  except FileNotFoundError:
    return None


def are_there(folder: pathlib.Path, facts: pathlib.Path) -> bool:
  """Whether all shards that are finished, as their facts say, lie in the dataset's folder."""
  named = re.compile(r"(?:.*-)?(\w+)\.array_record-(\d+)-of-\d+")  # `file_of` before
  names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
  finished = {"-".join(m.groups()) if (m := named.fullmatch(name)) else name for name in names}
  return all(path.stem in finished for path in facts.glob("*.json"))


class Writer:
  """A shard while it is written: aside, until `close` gives it its name and says what it holds."""

  def __init__(
    self,
    split: str,
    number: int,
    *,
    folder: pathlib.Path,
    facts: pathlib.Path,
    blocks: pathlib.Path,
  ):
    """Args: as of `write`."""
    self.split, self.number = split, number
    self._file, self._facts, self._blocks = file_of(folder, split, number), facts, blocks
    self._temporary = block_lib.aside(self._file)
    self._writer = block_lib.RecordWriter(self._temporary, _WRITER)
    self._count = 0
    self._digest = hashlib.sha256()
    self._written = self._temporary.open("rb", buffering=0)

  def append(self, run: Run) -> None:
    """Copies records of a block."""
    path = block_lib.records_file(block_lib.folder_of(self._blocks, run.block), self.split)
    for data in _read(path, run):
      self._writer.write(data)
      self._count += 1
    self._hash()

  def close(self) -> None:
    """The shard is finished."""
    self._writer.close()
    self._hash()
    size = self._written.tell()
    self._written.close()
    known = {"records": self._count, "bytes": size, "sha256": self._digest.hexdigest()}
    self._temporary.rename(self._file)
    target = _facts_of(self._facts, self.split, self.number)
    aside = block_lib.aside(target)
    aside.write_text(json.dumps(known))
    os.replace(aside, target)

  def abandon(self) -> None:
    """Nothing of the shard stays."""
    self._writer.abandon()
    self._written.close()
    self._temporary.unlink(missing_ok=True)

  def _hash(self) -> None:
    """Takes in what is new in the file, to which array_record only appends."""
    while data := self._written.read(_HASHED):
      self._digest.update(data)


def write(
  split: str,
  number: int,
  runs: list[Run],
  *,
  folder: pathlib.Path,
  facts: pathlib.Path,
  blocks: pathlib.Path,
) -> None:
  """Writes a shard, unless it is finished.

  Args:
    split: of it.
    number: among its split's.
    runs: its records, in their order.
    folder: of the dataset.
    facts: folder of what is known of finished shards.
    blocks: folder of the blocks.
  """
  if read_facts(facts, split, number) is not None:
    return
  writer = Writer(split, number, folder=folder, facts=facts, blocks=blocks)
  for run in map(lambda values: Run(*values), runs):
    writer.append(run)
  writer.close()


def _read(path: pathlib.Path, run: Run) -> Iterator[bytes]:
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    for start in range(run.start, run.stop, _READ):
      yield from reader.read(start, min(start + _READ, run.stop))
  finally:
    reader.close()


def finish(
  folder: pathlib.Path, facts: pathlib.Path, name: str, shards: Mapping[str, list[Any]]
) -> dict[str, list[dict[str, Any]]]:
  """Gives all shards their names; {split: their entries in the manifest}.

  It may be cut off anywhere and called again.
  """
  found: dict[str, list[dict[str, Any]]] = {}
  for split, several in shards.items():
    for number in range(len(several)):
      file = file_of(folder, split, number)
      known = read_facts(facts, split, number)
      assert known is not None, f"{file} is not written: `write` comes first"
      target = folder / dataset.shard_name(name, split, number, len(several))
      if file.exists():
        file.rename(target)
      elif not target.exists():
        raise ValueError(f"{file}, a shard that was finished, is gone. Start the build again.")
      found.setdefault(split, []).append({"file": target.name, **known})
  return found
