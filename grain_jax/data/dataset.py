"""A directory written by `grain_jax.data.build`: opened, checked, read by index."""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import itertools
import json
import logging
import pathlib
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grain_jax import failures
from grain_jax import places as named_places
from grain_jax.data import advice, records, shards, token_ids

MANIFEST = "manifest.json"
_MOST_IN_VAIN = 16  # from then on times say nothing, as on some mounts
_LOOK_EVERY = 2.0  # seconds between looks for the local copy of a shard
FORMAT = 1  # of the manifest; raised when older readers would misread a directory


def shard_name(name: str, split: str, shard: int, shards: int) -> str:
  """TFDS's file name of a shard."""
  return f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"


class ReadCounts(NamedTuple):
  """Of a split, since the dataset was opened."""

  records: int  # read
  opens: int  # of shards


class ShardChanged(ValueError):
  """A shard is not any more what the manifest says, so its records are of other data."""


class Dataset:
  """A built dataset.

  Attributes:
    directory: where it lies.
    manifest: what `data.build` wrote about it.
    local_copy: folder of its copy on this machine (`local_copy`), which is read as far as it is
      there; '': there is none.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    manifest: Mapping[str, Any],
    *,
    local_copy: str = "",
    stamps: Mapping[str, named_places.Stamp] | None = None,
  ):
    """`stamps`: of the shards' files, by name, when they were found to be as the manifest says."""
    self.directory = named_places.at(directory)
    self.manifest = manifest
    self.local_copy = local_copy
    self.stamps = dict(stamps or {})
    self._splits = {
      name: _Split(self.directory, s, copy=self.copy_of(name), stamps=self.stamps)
      for name, s in manifest["splits"].items()
    }

  @property
  def splits(self) -> tuple[str, ...]:
    return tuple(self._splits)

  @property
  def class_names(self) -> list[str]:
    """Names that labels index; empty where the dataset has none."""
    return self.manifest.get("class_names", [])

  @property
  def unseen_pairs(self) -> list[int]:
    """Indices into `class_names` of the classes that the training split never shows."""
    return self.manifest.get("unseen_pairs", [])

  @property
  def descriptors(self) -> dict[str, list[str]]:
    """Phrases that describe a class, for zero-shot classification: {class name: [phrase]}."""
    return self.manifest.get("descriptors", {})

  @property
  def mask_names(self) -> list[str]:
    """What a value v > 0 of a segmentation mask is: name v - 1; empty where there are no masks."""
    return self.manifest.get("mask_names", [])

  @property
  def tokens(self) -> Mapping[str, Any] | None:
    """Which tokenizer the ids in the shards are of (`token_ids`); None where there are none."""
    return self.manifest.get(token_ids.KEY)

  def num_records(self, split: str) -> int:
    return self._split(split).starts[-1]

  def num_regions(self, split: str) -> int | None:
    """Regions of all records of a split; None where the manifest does not say."""
    self._split(split)
    return self.manifest["splits"][split].get("regions")

  def num_negatives(self, split: str, *, of_regions: bool = False) -> int | None:
    """False captions, or descriptions, of a split's records; None where it is not counted."""
    self._split(split)
    return self.manifest["splits"][split].get("region_negatives" if of_regions else "negatives")

  def fingerprint(self, split: str) -> str:
    """sha256 of a split's records in their order, wherever they lie, whenever they were built."""
    self._split(split)
    return _fingerprint(self.manifest, split)

  def whole_fingerprint(self) -> str:
    """sha256 of all splits, by their names and `fingerprint`s."""
    parts = [[split, self.fingerprint(split)] for split in sorted(self.splits)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  def copy_of(self, split: str) -> pathlib.Path | None:
    """Folder of a split's copy on this machine: of its content, wherever it was copied from."""
    if not self.local_copy:
      return None
    return pathlib.Path(self.local_copy).expanduser() / _fingerprint(self.manifest, split)[:16]

  def read(self, split: str, indices: Sequence[int]) -> list[bytes | ValueError]:
    """Serialised records; in the place of a damaged one, the error that says why.

    Raises:
      ShardChanged: a shard was written anew, with other records; one line.
      failures.TransientError: a shard is cut short, is gone, or its storage fails, and still does
        after some tens of seconds; one line.
    """
    return self._split(split).read(indices)

  def reads(self, split: str) -> ReadCounts:
    """What was read of a split so far."""
    return self._split(split).counts

  def parse(self, split: str, index: int) -> records.Parsed:
    """One record; a one-line ValueError where it is bad."""
    (data,) = self.read(split, [index])
    if isinstance(data, ValueError):
      raise data
    try:
      return records.parse(data)
    except ValueError as error:
      raise ValueError(f"{self.locate(split, index)}: {error}.") from None

  def locate(self, split: str, index: int) -> str:
    """'PATH, record N' for messages."""
    path, place = self._split(split).locate(index)
    return f"{path}, record {place}"

  def _split(self, split: str) -> _Split:
    if split not in self._splits:
      raise ValueError(
        f"split {split!r} is not in {self.directory}: it holds {', '.join(self._splits)}. Name one "
        "of these, or build the data again with it."
      )
    return self._splits[split]


def _fingerprint(manifest: Mapping[str, Any], split: str) -> str:
  shards = [[s["records"], s["sha256"]] for s in manifest["splits"][split]["shards"]]
  return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


class _Split:
  """The shards of a split, opened when first read."""

  def __init__(
    self,
    directory: pathlib.Path,
    entry: Mapping[str, Any],
    *,
    copy: pathlib.Path | None,
    stamps: Mapping[str, named_places.Stamp],
  ):
    self._origins = [directory / shard["file"] for shard in entry["shards"]]
    self.paths = list(self._origins)  # those that are read
    self._copies = [copy and copy / shard["file"] for shard in entry["shards"]]
    self._looked = [0.0] * len(self.paths)  # for the copy
    self._stamps = [stamps.get(shard["file"]) for shard in entry["shards"]]
    self._vain = 0  # shards read for nothing, because their time had changed
    self._sha256 = [shard["sha256"] for shard in entry["shards"]]
    self.bytes = [shard["bytes"] for shard in entry["shards"]]
    self.starts = [0, *itertools.accumulate(shard["records"] for shard in entry["shards"])]
    self.counts = ReadCounts(0, 0)
    self._lock = threading.Lock()
    self._owner = object()  # a directory that was built anew is another dataset
    weakref.finalize(self, shards.READERS.forget, self._owner).atexit = False

  def locate(self, index: int) -> tuple[pathlib.Path, int]:
    shard = bisect.bisect_right(self.starts, index) - 1
    return self.paths[shard], index - self.starts[shard]

  def read(self, indices: Sequence[int]) -> list[bytes | ValueError]:
    by_shard: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
      if not 0 <= index < self.starts[-1]:
        raise ValueError(f"record {index} is not one of the split's {self.starts[-1]} records.")
      by_shard.setdefault(bisect.bisect_right(self.starts, index) - 1, []).append(place)
    result: list[Any] = [None] * len(indices)
    for shard, places in by_shard.items():
      inside = [int(indices[place]) - self.starts[shard] for place in places]
      for place, data in zip(places, self._read_shard(shard, inside), strict=True):
        result[place] = data
    return result

  def _count(self, *, records: int = 0, opens: int = 0) -> None:
    with self._lock:
      self.counts = ReadCounts(self.counts.records + records, self.counts.opens + opens)

  def _read_shard(self, shard: int, inside: list[int]) -> list[bytes | ValueError]:
    self._count(records=len(inside))
    try:
      data = self._read_once(shard, inside)
      if all(data):
        return data
    except (OSError, RuntimeError):  # of one of them: `_read_record` finds it and says what it is
      pass
    return [self._read_record(shard, place) for place in inside]

  def _read_once(self, shard: int, inside: list[int]) -> list[bytes]:
    with self._reader(shard) as reader:
      return reader.read(inside)

  def _reader(self, shard: int) -> contextlib.AbstractContextManager[Any]:
    self._look_for_copy(shard)
    return shards.READERS.reader(
      self.paths[shard], owner=self._owner, on_open=lambda: self._opened(shard)
    )

  def _look_for_copy(self, shard: int) -> None:
    """Has a shard read from its local copy where that is finished by now."""
    copy, now = self._copies[shard], time.monotonic()
    if copy is None or self.paths[shard] is copy or now - self._looked[shard] < _LOOK_EVERY:
      return
    self._looked[shard] = now
    with contextlib.suppress(OSError):
      if copy.stat().st_size == self.bytes[shard]:
        shards.READERS.discard(self.paths[shard], owner=self._owner)
        self.paths[shard] = copy

  def _forget_copy(self, shard: int) -> None:
    """A copy that is lost is read no more: the shard itself is."""
    logging.warning("%s is lost: %s is read instead", self.paths[shard], self._origins[shard])
    self.paths[shard], self._copies[shard] = self._origins[shard], None

  def _opened(self, shard: int) -> None:
    """Counts, and looks whether a shard was written since the dataset was opened."""
    self._count(opens=1)
    before, path = self._stamps[shard], self.paths[shard]
    if before is None or path is not self._origins[shard]:
      return
    (now,) = named_places.stamps([path])
    if now is None or now.size != before.size:
      raise OSError(errno.EIO, "it has another size", str(path))  # `_lost` says more
    if now != before and digest_of(path) != self._sha256[shard]:
      raise ShardChanged(
        f"shard {path} is not what {MANIFEST} says: it was written anew under the run, or is "
        "damaged. Restore it, or build the data into a new directory."
      )
    self._stamps[shard] = now
    self._vain += now != before
    if self._vain > _MOST_IN_VAIN:
      self._stamps = [None] * len(self.paths)

  def _read_record(self, shard: int, place: int) -> bytes | ValueError:
    """A record; the error of a damaged one. What the storage fails to give is asked for again."""
    where = f"{self.paths[shard]}, record {place}"
    for last in failures.attempts():
      error, path = None, self.paths[shard]
      try:
        (data,) = self._read_once(shard, [place])
        if data:
          return data
      except (OSError, RuntimeError) as raised:
        error = raised
      lost = self._lost(shard, error)
      if self.paths[shard] is not path:  # meanwhile: what was looked at is not what was read
        return self._read_record(shard, place)
      if lost is not None and self.paths[shard] is not self._origins[shard]:
        self._forget_copy(shard)
        return self._read_record(shard, place)
      if lost is None:  # the file is whole, so the record is not
        if error is None:
          return data
        reason = " ".join(str(error).split())[:200]
        return ValueError(f"{where}: cannot be read ({reason}).")
      shards.READERS.discard(self.paths[shard], owner=self._owner)
      if error is not None and shards.has_given_up(error):
        raise failures.TransientError(
          f"{where} cannot be read: {failures.one_line(error, limit=300)} When the bucket answers, "
          "start the same command again."
        )
      if last:
        raise failures.lost(where, lost)
    raise AssertionError("`attempts` ends with a last one")

  def _lost(self, shard: int, error: Exception | None) -> object:
    """Why a failed read (None: it gave no byte) is the storage's; None: the record is damaged.

    array_record gives b"" beyond the end of a file that was cut short after it was opened.
    """
    path = self.paths[shard]
    try:
      size = path.stat().st_size
      if size != self.bytes[shard]:
        return f"the shard has {size} bytes instead of {self.bytes[shard]} (manifest.json)"
      system = None if error is None else shards.system_error(error, path)
      if system is not None:
        return system
      shards.READERS.discard(
        path, owner=self._owner
      )  # so that it is the file of now that is looked at
      with self._reader(shard) as reader:
        held = reader.num_records()
    except OSError as failed:
      return failed
    wanted = self.starts[shard + 1] - self.starts[shard]
    if held != wanted:
      return f"the shard holds {held} records instead of {wanted} (manifest.json)"
    return None


def digest_of(path: pathlib.Path) -> str:
  """SHA-256 of a file, as the manifest has it."""
  digest = hashlib.sha256()
  with named_places.open_raw(path) as file:
    while data := file.read(1 << 22):
      digest.update(data)
  return digest.hexdigest()


def open_dataset(directory: str | pathlib.Path, *, local_copy: str = "") -> Dataset:
  """Opens a directory that `grain_jax.data.build` has finished.

  Args:
    directory: which.
    local_copy: see `Dataset`.

  Raises:
    ValueError: one line, where it is missing, half-built, of another format, or a shard is missing
      or cut short.
    failures.TransientError: the storage fails.
  """
  if not str(directory):
    raise ValueError(
      f"config.data.dir is empty: no data. Build it: {advice.OF_SCENES}DIR, and set it to DIR."
    )
  path = named_places.open_place(directory, "data directory").expanduser()
  return failures.retry_read(lambda: _open(path, local_copy), path)


def _open(path: pathlib.Path, local_copy: str) -> Dataset:
  file, how = path / MANIFEST, advice.how_to_build(path)
  if not file.is_file():
    part = path.with_name(f"{path.name}.part")  # of `grain_jax.data.build`
    if part.exists():
      why = f"only an unfinished build ({part.name}) lies beside it"
    elif path.exists():
      why = f"it has no {MANIFEST}, so it is half-built or something else"
    else:
      why = "there is no such directory"
    raise ValueError(f"data directory {path} cannot be opened: {why}. {how}")
  try:
    manifest = json.loads(file.read_text(encoding="utf-8"))
    version = manifest["format"]
    if version == FORMAT:
      stamps = _check_shards(path, manifest)
      return Dataset(path, manifest, local_copy=local_copy, stamps=stamps)
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
    raise ValueError(
      f"{file} is not a manifest of this program ({type(error).__name__}: {error}). {how}"
    ) from None
  raise ValueError(f"{file} has format {version}, this program reads {FORMAT}. {how}")


def _check_shards(path: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, named_places.Stamp]:
  """The shards' stamps by file name; raises where one is not there as a whole."""
  found = {}
  for entry in manifest["splits"].values():
    files = [path / shard["file"] for shard in entry["shards"]]
    for shard, file, stamp in zip(entry["shards"], files, named_places.stamps(files), strict=True):
      size = None if stamp is None else stamp.size
      if size != shard["bytes"]:
        why = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
        raise ValueError(
          f"shard {file} {why} (manifest.json): the copy is incomplete or damaged. Copy it again, "
          "or build the directory again with --overwrite."
        )
      found[shard["file"]] = stamp
  return found
