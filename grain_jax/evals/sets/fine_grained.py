"""Descriptions of given boxes among hard negatives on outside data, `fine_grained:SET`.

FG-OVD (Bianchi et al., CVPR 2024): captions of COCO's objects, each with captions that differ in
one, two or three attributes (hard, medium, easy), that belong to other objects (trivial), or in
one kind of attribute. There a detector finds the box first; here it is given, so that figures tell
descriptions apart and nothing else. And one's own DIR/NAME/regions.jsonl (`grounding_sets`), whose
regions have "negatives": [text, ...].
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from grain_jax.evals import region_classification, retrieval
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs import instances
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options, find
from grain_jax.evals.sets import grounding as grounding_sets

_HOW = (
  "Get the JSON files of the benchmark suite of github.com/lorebianchi98/FG-OVD into DIR/fg_ovd, "
  "and COCO's train2017.zip and val2017.zip from cocodataset.org, unpacked into DIR/coco."
)
_FILES = {
  "hard": "1_attributes",
  "medium": "2_attributes",
  "easy": "3_attributes",
  "trivial": "shuffle_negatives",
  "color": "color",
  "material": "material",
  "pattern": "pattern",
  "transparency": "transparency",
}
SETS: dict[str, instances.Set] = {
  f"fg_ovd_{name}": instances.Set(("fg_ovd", f"{file}.json"), ("coco", "val2017"), _HOW)
  for name, file in _FILES.items()
}


@dataclasses.dataclass(frozen=True)
class Choices:
  """Boxes, each with one right description and one or more wrong ones."""

  annotated: Sequence[region_classification.Annotated]
  positive: Sequence[str]  # of every box
  negatives: Sequence[Sequence[str]]
  without: int  # boxes left out because they have no wrong description
  clipped: int
  dropped: int


def check(name: str, options: Options) -> None:
  """Raises a one-line ValueError where annotations or all images are missing or malformed."""
  what = f"fine_grained:{name}"
  choices = load(name, options, what=what)
  if not choices.positive:
    raise ValueError(
      f"{what}: none of its boxes has a wrong description to choose against. Add negatives."
    )
  how = SETS[name].how if name in SETS else "Paths of images start at the folder of the file."
  files = [pathlib.Path(item.source) for item in choices.annotated]
  instances.check_files(files, what=what, how=how)


def contents(name: str, options: Options) -> tuple[Any, ...]:
  """What is read of a set, the items first: all processes must have the same."""
  found = load(name, options, what=f"fine_grained:{name}")
  return found.annotated, found.positive, found.negatives


def run(encoders: Encoders, name: str, options: Options) -> dict[str, float | int]:
  """How often a box is more similar to its description than to all the wrong ones.

  Returns:
    `fine_grained/{name}/{method}/accuracy`, with `.../boxes` chosen for; `fine_grained/{name}/...`:
    `chance`; counts: `without_negatives` boxes left out, `examples` images of `rows`,
    `clipped_boxes`, `dropped_boxes`.
  """
  what = f"fine_grained:{name}"
  choices = load(name, options, what=what)
  texts = list(dict.fromkeys([*choices.positive, *(n for own in choices.negatives for n in own)]))
  index = {text: i for i, text in enumerate(texts)}
  embedded = retrieval.encode_texts(encoders.text, texts)
  positive = np.asarray([index[text] for text in choices.positive])
  negatives = [[index[text] for text in own] for own in choices.negatives]
  results: dict[str, float | int] = {}
  for method in region_classification.methods(encoders):
    unreadable, hits = images_lib.Unreadable(), []
    for block in region_classification.embed(
      encoders, method, choices.annotated, what=what, unreadable=unreadable
    ):
      own = [negatives[i] for i in block.index]
      hits.append(region_classification.choose(block.values, embedded, positive[block.index], own))
    flat = np.concatenate(hits)
    results |= {f"{method}/accuracy": float(flat.mean()), f"{method}/boxes": len(flat)}
  rows = len(choices.annotated)
  instances.warn(what, rows, unreadable, options.warn)  # the same of each method
  results |= {
    "chance": region_classification.chance(negatives),
    "without_negatives": choices.without,
    "examples": rows - len(unreadable),
    "rows": rows,
    "clipped_boxes": choices.clipped,
    "dropped_boxes": choices.dropped,
  }
  return {f"fine_grained/{name}/{key}": value for key, value in results.items()}


def load(name: str, options: Options, *, what: str) -> Choices:
  """What a set holds, `options.limit` applied."""
  if name not in SETS:
    file, lines = grounding_sets.own_lines(name, options, what=what)
    rows = [
      (file.parent / image, [(r.box, r.description, r.negatives) for r in regions])
      for image, regions in lines.rows
    ]
    return _choices(rows, options, lines.clipped, lines.dropped)
  own = SETS[name]
  file = find(options, *own.annotations, what=what, how=own.how)
  content = instances.read(file)
  unknown = {n for p in content.images for of in p.negatives for n in of} - content.names.keys()
  if unknown:
    raise ValueError(f"{file}: neg_category_ids has {min(unknown)}, which is no category.")
  rows = [
    (
      own.file(options.root, image.name),
      [
        (box, content.names[int(category)], [content.names[n] for n in wrong])
        for box, category, wrong in zip(image.boxes, image.category, image.negatives, strict=True)
      ],
    )
    for image in content.images
  ]
  return _choices(rows, options, content.clipped, content.dropped)


def _choices(
  rows: Sequence[tuple[pathlib.Path, list[tuple[np.ndarray, str, Sequence[str]]]]],
  options: Options,
  clipped: int,
  dropped: int,
) -> Choices:
  usable = [(file, [row for row in own if row[2]]) for file, own in rows]
  without = sum(map(len, (own for _, own in rows))) - sum(map(len, (own for _, own in usable)))
  kept = [(file, own) for file, own in usable if own][: options.limit or None]
  return Choices(
    [
      region_classification.Annotated(file, np.stack([box for box, _, _ in own]))
      for file, own in kept
    ],
    [text for _, own in kept for _, text, _ in own],
    [list(wrong) for _, own in kept for _, _, wrong in own],
    without,
    clipped,
    dropped,
  )
