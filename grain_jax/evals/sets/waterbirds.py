"""Waterbirds: does a model look at the bird, or at what is behind it?

Land birds and water birds cut out of CUB and pasted on land and water (Sagawa et al., ICLR 2020).
In the test split, half of each kind stands before the background it does not live on.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from grain_jax import places, textfiles
from grain_jax.evals import retrieval, segmentation
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options, find

BIRDS = ("landbird", "waterbird")  # by `y` of the metadata
PLACES = ("land", "water")  # by `place`
_SPLITS = {"train": "0", "val": "1", "test": "2"}
_FOLDER = "waterbird_complete95_forest2water2"  # inside the archive
_COLUMNS = ("img_filename", "y", "place", "split")
_HOW = (
  f"Get {_FOLDER}.tar.gz as https://github.com/kohpangwei/group_DRO says and unpack it in "
  "DIR/waterbirds."
)


@dataclasses.dataclass(frozen=True)
class Set:
  """A split of the dataset."""

  title: str
  split: str  # its number in the metadata


class Row(NamedTuple):
  """An image of the metadata."""

  path: pathlib.Path
  bird: int  # index into BIRDS
  place: int  # index into PLACES


SETS: Mapping[str, Set] = {
  name: Set(f"Waterbirds, {name}", number) for name, number in _SPLITS.items() if name != "train"
}


def check(name: str, options: Options) -> None:
  """Raises a one-line ValueError where the metadata or an image is missing or malformed."""
  rows = _rows(name, options)
  missing = [row.path for row in rows if not places.find_file(row.path).exists()]
  if missing:
    raise ValueError(
      f"waterbirds:{name}: {len(missing)} of {len(rows)} pictures are missing, the first "
      f"{missing[0]}. Unpack the archive again."
    )


def contents(name: str, options: Options) -> tuple[Any, ...]:
  """What is read of a set, the items first: all processes must have the same."""
  return (_rows(name, options),)


def run(encoders: Encoders, name: str, options: Options) -> dict[str, float | int]:
  """Zero-shot classification of the birds: "a photo of a landbird" or "a photo of a waterbird".

  CLIPpy (arXiv 2210.09996, sec. 4.4) asks for three classes at 448 pixels, with prompts that this
  project does not know: its drops (32.1 points for CLIP, 2.0 for CLIPpy, water birds) are near to
  `drop_waterbird`, not equal.

  Returns:
    Fractions: `waterbirds/NAME/accuracy` over all images; `.../BIRD_on_PLACE`: of one group;
    `.../worst_group`: the lowest of these; `.../drop_BIRD`: how much lower the accuracy is of that
    bird on the other background than on its own, in [-1, 1]. Counts: `.../BIRD_on_PLACE/examples`,
    `.../examples` of `.../rows`. A figure over nothing is left out.
  """
  rows = _rows(name, options)
  texts = retrieval.encode_texts(encoders.text, segmentation.photo_prompts(BIRDS))
  encoded = images_lib.encode(
    encoders.image,
    [row.path for row in rows],
    encoders,
    what=f"waterbirds:{name}",
    warn=options.warn,
  )
  images = retrieval.check_embeddings(encoded.values, name="encoders.image")
  counted = [rows[i] for i in encoded.index]
  birds = np.array([row.bird for row in counted])
  groups = birds * len(PLACES) + [row.place for row in counted]
  right = (images @ texts.T).argmax(axis=1) == birds
  return {
    f"waterbirds/{name}/{key}": value for key, value in group_results(right, groups).items()
  } | {f"waterbirds/{name}/examples": len(counted), f"waterbirds/{name}/rows": len(rows)}


def group_results(right: np.ndarray, groups: np.ndarray) -> dict[str, float | int]:
  """Accuracy over all and of each group, the worst of them, and what a foreign background costs.

  Args:
    right: whether each of n images was classified correctly, bool [n].
    groups: 2 * bird + place of each, i64 [n].
  """
  results: dict[str, float | int] = {"accuracy": float(np.mean(right))}
  accuracy = {}
  for group in range(len(BIRDS) * len(PLACES)):
    bird, place = divmod(group, len(PLACES))
    key = f"{BIRDS[bird]}_on_{PLACES[place]}"
    own = right[groups == group]
    results[f"{key}/examples"] = len(own)
    if len(own):
      results[key] = accuracy[bird, place] = float(np.mean(own))
  results["worst_group"] = min(accuracy.values())
  for bird, name in enumerate(BIRDS):
    if (bird, 0) in accuracy and (bird, 1) in accuracy:
      results[f"drop_{name}"] = accuracy[bird, bird] - accuracy[bird, 1 - bird]
  return results


def _rows(name: str, options: Options) -> list[Row]:
  """The rows of the split, the first `options.limit` of them."""
  what = f"waterbirds:{name}"
  if options.root is not None and (options.root / "waterbirds" / _FOLDER).exists():
    path = find(options, "waterbirds", _FOLDER, "metadata.csv", what=what, how=_HOW)
  else:
    path = find(options, "waterbirds", "metadata.csv", what=what, how=_HOW)
  found = []
  columns, rows = textfiles.read_table(path)
  lacking = [column for column in _COLUMNS if column not in columns]
  if lacking:
    raise ValueError(f"{path} has no column {', '.join(lacking)}. {_HOW}")
  for number, row, surplus in rows:
    if surplus or any(row[column] is None for column in _COLUMNS):
      why = "has more fields than columns" if surplus else "is cut short"
      raise ValueError(f"{path}, line {number} {why}. {_HOW}")
    if row["split"] != SETS[name].split:
      continue
    if row["y"] not in ("0", "1") or row["place"] not in ("0", "1"):
      raise ValueError(
        f"{path}, line {number}: y = {row['y']!r} and place = {row['place']!r} must be "
        f"0 or 1. {_HOW}"
      )
    found.append(Row(path.parent / row["img_filename"], int(row["y"]), int(row["place"])))
  if not found:
    raise ValueError(f"{path} has no row of split {SETS[name].split} ({name}). {_HOW}")
  return found[: options.limit or None]
