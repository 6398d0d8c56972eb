"""A directory written by `grain_jax.data.build`: opened, checked, read by index."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from grain_jax import places as named_places
from grain_jax.data import records

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest; raised when older readers would misread a directory
_READER = "readahead_buffer_size:0,max_parallelism:0"  # for random access


def shard_name(name: str, split: str, shard: int, shards: int) -> str:
  """TFDS's file name of a shard."""
  return f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"


class Dataset:
  """A built dataset.

  Attributes:
    directory: where it lies.
    manifest: what `data.build` wrote about it.
  """

  def __init__(self, directory: pathlib.Path, manifest: Mapping[str, Any]):
    self.directory = directory
    self.manifest = manifest
    self._splits = {name: _Split(directory, s) for name, s in manifest["splits"].items()}

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

  def num_records(self, split: str) -> int:
    return self._split(split).starts[-1]

  def fingerprint(self, split: str) -> str:
    """sha256 of a split's records in their order, wherever they lie, whenever they were built."""
    self._split(split)
    shards = [[s["records"], s["sha256"]] for s in self.manifest["splits"][split]["shards"]]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

  def read(self, split: str, indices: Sequence[int]) -> list[bytes | ValueError]:
    """Serialised records; in the place of one that cannot be read, the error that says why."""
    return self._split(split).read(indices)

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


class _Split:
  """The shards of a split, opened when first read."""

  def __init__(self, directory: pathlib.Path, entry: Mapping[str, Any]):
    self.paths = [directory / shard["file"] for shard in entry["shards"]]
    self.starts = [0, *itertools.accumulate(shard["records"] for shard in entry["shards"])]
    self._readers: list[Any] = [None] * len(self.paths)
    self._lock = threading.Lock()

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

  def _read_shard(self, shard: int, inside: list[int]) -> list[bytes | ValueError]:
    try:
      return self._reader(shard).read(inside)
    except Exception as error:  # array_record raises several kinds
      if len(inside) > 1:  # one bad record fails the whole call: find it
        return [self._read_shard(shard, [place])[0] for place in inside]
      reason = " ".join(str(error).split())[:200]
      return [ValueError(f"{self.paths[shard]}, record {inside[0]}: cannot be read ({reason}).")]

  def _reader(self, shard: int):
    with self._lock:
      if self._readers[shard] is None:
        from array_record.python import array_record_module

        self._readers[shard] = array_record_module.ArrayRecordReader(
          str(self.paths[shard]), _READER
        )
      return self._readers[shard]


def open_dataset(directory: str | pathlib.Path) -> Dataset:
  """Opens a directory that `grain_jax.data.build` has finished.

  Raises:
    ValueError: one line, where it is missing, half-built, of another format, or a shard is missing
      or cut short.
  """
  how = "Build it: python -m grain_jax.data.build --source=scenes --out="
  if not str(directory):
    raise ValueError(f"config.data.dir is empty: no data to read. {how}DIR, and set it to DIR.")
  named_places.check(directory, "data directory")
  path = pathlib.Path(directory).expanduser()
  file = path / MANIFEST
  if not file.is_file():
    parts = sorted(p.name for p in path.parent.glob(path.name + ".tmp-*"))
    if parts:
      why = f"only an unfinished build ({', '.join(parts)}) lies beside it"
    elif path.exists():
      why = f"it has no {MANIFEST}, so it is half-built or something else"
    else:
      why = "there is no such directory"
    raise ValueError(f"data directory {path} cannot be opened: {why}. {how}{path}")
  try:
    manifest = json.loads(file.read_text())
    version = manifest["format"]
    if version == FORMAT:
      _check_shards(path, manifest)
      return Dataset(path, manifest)
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
    raise ValueError(
      f"{file} is not a manifest of this program ({type(error).__name__}: {error}). {how}{path}"
    ) from None
  raise ValueError(f"{file} has format {version}, this program reads {FORMAT}. {how}{path}")


def _check_shards(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  for entry in manifest["splits"].values():
    for shard in entry["shards"]:
      file = path / shard["file"]
      size = file.stat().st_size if file.is_file() else None
      if size != shard["bytes"]:
        why = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
        raise ValueError(
          f"shard {file} {why} (manifest.json): the copy is incomplete or damaged. Copy it again, "
          "or build the directory again with --overwrite."
        )
