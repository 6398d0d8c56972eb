"""The scenes of the ablation: with false texts as made from their structure, and two spoilt forms.

Validation and single objects are the same in all three; what differs is what is trained on.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from grain_jax import schema
from grain_jax.data import build
from grain_jax.data.scenes import scenes
from grain_jax.data.sources import scenes as scenes_source

MISSING = 0.3  # part of the regions that the spoilt annotations lack
JITTER = 0.1  # each side of their boxes moves by up to this part of the box's extent
_WINDOW = 512  # images among whose captions random negatives are drawn


def random_negatives(
  records: Iterator[dict[str, Any]], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
  """Each false caption is another image's true one, its kind kept; images come in their order."""
  window: list[dict[str, Any]] = []

  def exchange() -> Iterator[dict[str, Any]]:
    for place, record in enumerate(window):
      false = []
      for negative in record[schema.RECORD_NEGATIVES]:
        other = int(rng.integers(len(window) - 1))
        other += other >= place
        false.append({**negative, "caption": window[other]["captions"][0]})
      yield {**record, schema.RECORD_NEGATIVES: false}

  for record in records:
    window.append(record)
    if len(window) == _WINDOW:
      yield from exchange()
      window.clear()
  if len(window) > 1:
    yield from exchange()
  else:
    yield from window


def spoilt_regions(
  records: Iterator[dict[str, Any]], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
  """`MISSING` of the regions are gone, and the boxes of the others are off by up to `JITTER`."""
  for record in records:
    kept = []
    for region in record[schema.RECORD_REGIONS]:
      if rng.random() < MISSING:
        continue
      top, left, bottom, right = region["box"]
      sides = np.array([bottom - top, right - left] * 2)
      box = np.array(region["box"]) + JITTER * sides * rng.uniform(-1, 1, 4)
      kept.append({**region, "box": [float(x) for x in np.clip(box, 0, 1)]})
    yield {**record, schema.RECORD_REGIONS: kept}


VARIANTS: dict[str, Callable[..., Iterator[dict[str, Any]]] | None] = {
  "plain": None,
  "random_negatives": random_negatives,
  "spoilt_regions": spoilt_regions,
}


def build_all(settings: Any, folder: pathlib.Path, *, say: Callable[[str], None]) -> None:
  """Builds FOLDER/VARIANT of each, or leaves what is there already.

  Args:
    settings: a `scenes.SceneSettings` with negatives.
    folder: to build in.
    say: takes lines of progress.
  """
  whole = scenes_source.source(settings)
  for name, change in VARIANTS.items():

    def read(change: Any = change) -> Iterator[tuple[str, dict[str, Any]]]:
      for split in scenes.SPLITS:
        drawn = scenes.iterate(settings, split)
        if split == "train":
          drawn = change(drawn, np.random.default_rng(settings.seed))
        for record in drawn:
          yield split, record

    source = dataclasses.replace(whole, settings={**whole.settings, "variant": name})
    if change is not None:
      source = dataclasses.replace(source, read=read, blocks=None, recipe=None)
    build.build(source, folder / name, say=say)
