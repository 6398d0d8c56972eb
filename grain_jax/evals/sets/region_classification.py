"""Classes of given boxes on outside data, `region_classification:SET`.

COCO, LVIS, and one's own DIR/NAME/instances.json in COCO's format. Every way of embedding a box
that the model can do is measured (`region_classification.METHODS`); boxes around crowds are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grain_jax.evals import region_classification, zero_shot
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs import instances
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options

SETS = instances.SETS


def check(name: str, options: Options) -> None:
  """Raises a one-line ValueError where annotations or all images are missing or malformed."""
  content = instances.check(name, options, what=f"region_classification:{name}")
  if not content.names:
    raise ValueError(f"region_classification:{name}: the annotations have no categories.")


def contents(name: str, options: Options) -> tuple[Any, ...]:
  """What is read of a set, the items first: all processes must have the same."""
  found = instances.load(name, options, what=f"region_classification:{name}")
  return found.images, found.names


def run(encoders: Encoders, name: str, options: Options) -> dict[str, float | int]:
  """Accuracy of the class of each annotated box among all categories.

  The prompts of a class are `encoders.templates`.

  Returns:
    `region_classification/{name}/{method}/...`: `top1`, `top5`, `mean_per_class`, `boxes`;
    `region_classification/{name}/...`: counts: `classes`, `examples` images of `rows` with boxes,
    `clipped_boxes`, `dropped_boxes`.
  """
  what = f"region_classification:{name}"
  own, content = instances.spec(name), instances.load(name, options, what=what)
  index = {category: i for i, category in enumerate(content.names)}
  prompts = zero_shot.class_prompts(list(content.names.values()), encoders.templates)
  heads = zero_shot.class_embeddings(encoders.text, prompts)
  kept = [(image, image.single()) for image in content.images]
  kept = [(image, single) for image, single in kept if len(single)]
  labels = np.asarray([index[int(c)] for p, single in kept for c in p.category[single]])
  annotated = [
    region_classification.Annotated(own.file(options.root, p.name), p.boxes[single])
    for p, single in kept
  ]
  results: dict[str, float | int] = {}
  for method in region_classification.methods(encoders):
    unreadable = images_lib.Unreadable()
    blocks = region_classification.embed(
      encoders, method, annotated, what=what, unreadable=unreadable
    )
    found = region_classification.evaluate(blocks, labels, heads, what=what)
    results |= {f"{method}/{key}": value for key, value in found.items()}
  instances.warn(what, len(annotated), unreadable, options.warn)  # the same of each method
  results |= {
    "classes": len(heads),
    "examples": len(annotated) - len(unreadable),
    "rows": len(annotated),
    "clipped_boxes": content.clipped,
    "dropped_boxes": content.dropped,
  }
  return {f"region_classification/{name}/{key}": value for key, value in results.items()}
