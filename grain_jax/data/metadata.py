"""TFDS's metadata of a dataset, written by TFDS without TensorFlow, which takes seconds to load."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from grain_jax import schema
from grain_jax.data.sources import base


def _datasets() -> Any:
  """The module tensorflow_datasets, which loads TensorFlow where it needs it: not for metadata."""
  import tensorflow_datasets

  if "tensorflow" in sys.modules:  # another TFDS does, or somebody else did
    from grain_jax.data import host_tensorflow  # noqa: F401  hides the GPUs from it
  return tensorflow_datasets


def features(*, with_mask: bool, with_label: bool):
  """The TFDS FeaturesDict of a dataset.

  TFDS has one specification for all splits: a split without masks or labels holds a mask of one
  pixel, 0, and the label -1.
  """
  tfds = _datasets()

  text = tfds.features.Text()
  spec: dict[str, Any] = {
    schema.RECORD_KEY: text,
    schema.RECORD_IMAGE: tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
    schema.RECORD_CAPTIONS: tfds.features.Sequence(text),
    schema.RECORD_REGIONS: tfds.features.Sequence(
      {
        "description": text,
        "box": tfds.features.BBoxFeature(),
        "score": tfds.features.Scalar(np.float32),
        "negatives": tfds.features.Sequence(text),
      }
    ),
    schema.RECORD_NEGATIVES: tfds.features.Sequence({"caption": text, "kind": text}),
  }
  if with_mask:
    spec[schema.RECORD_MASK] = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
  if with_label:
    spec[schema.RECORD_LABEL] = tfds.features.Scalar(np.int64)
  return tfds.features.FeaturesDict(spec)


def write(source: base.Source, directory: pathlib.Path, splits: Mapping[str, Any]) -> None:
  """Writes TFDS's metadata beside the shards; `splits` as in the manifest."""
  tfds = _datasets()

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
    features=features(with_mask=source.with_mask, with_label=source.with_label),
    split_infos=infos,
    filename_template=template,
    check_data=False,
    description=f"Images with captions and described regions, from the source {source.name}.",
    license=source.about.get("licence") or "unknown",
  )
