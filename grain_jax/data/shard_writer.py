"""Shards of a dataset directory as `grain_jax.data.build` writes them, and TFDS's metadata."""

from __future__ import annotations

import collections
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from grain_jax import schema
from grain_jax.data import dataset, records

_WRITER = "group_size:1,snappy"  # records are read one by one; zstd costs five times the time


class SplitWriter:
  """Writes the shards of a split and counts what goes into them."""

  def __init__(self, directory: pathlib.Path, name: str, split: str, shard_size: int):
    self.directory, self.name, self.split, self.shard_size = directory, name, split, shard_size
    self.records: list[int] = []  # of each shard
    self.totals = collections.Counter[str]()
    self._writer: Any = None

  def write(self, record: Mapping[str, Any], data: bytes) -> None:
    from array_record.python import array_record_module

    if self._writer is None or self.records[-1] == self.shard_size:
      self.close()
      path = self.directory / f"{self.split}-{len(self.records):05d}"
      self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER)
      self.records.append(0)
    self._writer.write(data)
    self.records[-1] += 1
    self.totals["records"] += 1
    self.totals["bytes"] += len(data)
    self.totals["captions"] += len(record[schema.RECORD_CAPTIONS])
    self.totals["regions"] += len(record[schema.RECORD_REGIONS])
    self.totals["records_without_regions"] += not record[schema.RECORD_REGIONS]
    self.totals["negatives"] += len(record[schema.RECORD_NEGATIVES])
    of_regions = sum(len(r.get("negatives") or ()) for r in record[schema.RECORD_REGIONS])
    self.totals["region_negatives"] += of_regions

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def finish(self) -> list[dict[str, Any]]:
    """Gives the shards their names; returns their entries in the manifest."""
    self.close()
    shards = []
    for i, count in enumerate(self.records):
      name = dataset.shard_name(self.name, self.split, i, len(self.records))
      path = (self.directory / f"{self.split}-{i:05d}").rename(self.directory / name)
      with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
      entry = {"file": name, "records": count, "bytes": path.stat().st_size, "sha256": digest}
      shards.append(entry)
    return shards


def write_metadata(source, directory: pathlib.Path, splits: Mapping[str, Any]) -> None:
  """Writes TFDS's metadata beside the shards; `splits` as in the manifest."""
  from grain_jax.data import host_tensorflow

  tfds = host_tensorflow.datasets()

  template = tfds.core.ShardedFileTemplate(
    data_dir=str(directory),
    dataset_name=source.name,
    filetype_suffix="array_record",
    template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
  )
  infos = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=[shard["records"] for shard in entry["shards"]],
      num_bytes=entry["bytes"],
      filename_template=template,
    )
    for split, entry in splits.items()
  ]
  tfds.folder_dataset.write_metadata(
    data_dir=str(directory),
    features=records.features(with_mask=source.with_mask, with_label=source.with_label),
    split_infos=infos,
    filename_template=template,
    check_data=False,
    description=f"Images with captions and described regions, from the source {source.name}.",
    license=source.about.get("licence") or "unknown",
  )
