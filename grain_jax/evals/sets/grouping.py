"""Grouping without prompts on the sets of `segmentation_sets`: the Jaccard similarity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from grain_jax.evals import segmentation
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import segmentation as segmentation_sets
from grain_jax.evals.sets.segmentation import Item, Set, Vocabulary

SETS: Mapping[str, Set] = {
  name: one for name, one in segmentation_sets.SETS.items() if not one.as_clippy
}


def check(name: str, options: Options) -> None:
  """Raises a one-line ValueError where the set is not there as it should be."""
  items = segmentation_sets.items_of(name, options, family="grouping")
  kind = "instances" if items[0].instances else "mask"
  segmentation_sets.check_files(items, f"grouping:{name}", kind)


def contents(name: str, options: Options) -> tuple[Any, ...]:
  """What is read of a set, the items first: all processes must have the same."""
  return (segmentation_sets.items_of(name, options, family="grouping"),)


def run(encoders: Encoders, name: str, options: Options) -> dict[str, float | int]:
  """Bottom-up grouping: patches by their image's principal components, no text anywhere.

  CLIPpy's protocol, of which no code is published; `segmentation.group_scores` says what its paper
  leaves open and what is chosen here.

  The true segments are the objects one by one where the set tells them apart (VOC), else the
  classes of each image; the background of a set that has one is no segment.

  Returns:
    `grouping/NAME/jaccard`: the mean over segments of the IoU with the best of `GROUPS` groups
    (`segmentation.best_overlaps`), a fraction in [0, 1]; `grouping/NAME/segments`: how many;
    `.../examples`: images counted, of `.../rows`.
  """
  what = f"grouping:{name}"
  words = segmentation_sets.load_vocabulary(SETS[name].vocabulary)
  items = segmentation_sets.items_of(name, options, family="grouping")
  overlaps: list[np.ndarray] = []
  for index, size, patches in segmentation_sets.patches_of(encoders, items, what, options.warn):
    segments = _segments(items[index], words, size)
    groups = segmentation.label_map(segmentation.group_scores(patches), size)
    overlaps.append(segmentation.best_overlaps(segments, groups))
  found = np.concatenate(overlaps)
  results: dict[str, float | int] = {f"grouping/{name}/segments": len(found)}
  if len(found):  # none where all pixels are background or ignored
    results[f"grouping/{name}/jaccard"] = float(found.mean())
  results[f"grouping/{name}/examples"] = len(overlaps)
  results[f"grouping/{name}/rows"] = len(items)
  return results


def _segments(item: Item, words: Vocabulary, size: tuple[int, int]) -> np.ndarray:
  """u8 [H, W]: 0 for no segment, `IGNORED`, else the id of a segment."""
  if item.instances:
    return segmentation_sets.read_png(item.instances, size)  # 0 and 255 mean just that
  mask = words.read(item.mask, size)
  return mask if words.background else np.where(mask == segmentation.IGNORED, mask, mask + 1)
