"""Detection on outside data: COCO's average precision, `detection:SET`.

COCO, LVIS, and one's own DIR/NAME/instances.json in COCO's format. LVIS is evaluated by its own
federated protocol where the file says which categories were looked for (`detection.Federation`);
that is exactly lvis-api's for models of up to 300 queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grain_jax.evals import detection, grounding, zero_shot
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs import instances
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options

SETS = instances.SETS
_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
_LIMITS = (1, 10, 100)  # detections of a category in an image
_LVIS_LIMITS = (1, 10, 300)


def check(name: str, options: Options) -> None:
  """Raises a one-line ValueError where annotations or all images are missing or malformed."""
  content = instances.check(name, options, what=f"detection:{name}")
  if not content.names:
    raise ValueError(f"detection:{name}: the annotations have no categories. Name them.")


def contents(name: str, options: Options) -> tuple[Any, ...]:
  """What is read of a set, the items first: all processes must have the same."""
  found = instances.load(name, options, what=f"detection:{name}")
  return found.images, found.names, found.frequency, found.federated


def run(encoders: Encoders, name: str, options: Options) -> dict[str, float | int]:
  """Average precision of the region queries, each as the class that it means most.

  The prompts of a class are `encoders.templates`.

  Returns:
    `detection/{name}/...`: `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, `ar1`,
    `ar10`, `ar100`, `ar100_small`, ... (see `detection.Precision.summary`), for LVIS `ar300` in the
    place of `ar100`, and `ap_rare`, `ap_common`, `ap_frequent`; counts: `classes`, `boxes` (without
    those around crowds), `queries` an image, `examples` images of `rows`, `clipped_boxes`,
    `dropped_boxes`.
  """
  what = f"detection:{name}"
  encoders.require_regions(what)
  own, content = instances.spec(name), instances.load(name, options, what=what)
  ids = np.asarray(list(content.names))
  prompts = zero_shot.class_prompts(list(content.names.values()), encoders.templates)
  heads = zero_shot.class_embeddings(encoders.text, prompts)
  unreadable = images_lib.Unreadable()
  files = [own.file(options.root, image.name) for image in content.images]
  parts: list[detection.Detections] = []
  read: list[instances.AnnotatedImage] = []
  queries = 0
  for batch in instances.batches(encoders, files, what=what, unreadable=unreadable):
    regions, boxes = grounding.check_regions(
      *encoders.regions(batch.image), {"image": batch.image}, range(len(batch.image))
    )
    labels, scores = detection.classify(regions, heads)
    queries = boxes.shape[1]
    for i, image_labels, image_scores, found in zip(
      batch.index, labels, scores, boxes, strict=True
    ):
      image = content.images[i]
      read.append(image)
      parts.append(
        detection.Detections(
          np.full(queries, image.id),
          ids[image_labels],
          detection.to_pixels(found, image.width, image.height),
          image_scores.astype(np.float64),
        )
      )
  instances.warn(what, len(files), unreadable, options.warn)
  objects = _objects(read)
  federation = None
  if content.federated:
    federation = detection.Federation(
      {image.id: image.absent for image in read},
      {image.id: image.not_exhaustive for image in read},
    )
  tables = detection.average_precision(
    objects,
    detection.Detections(*map(np.concatenate, zip(*parts, strict=True))),
    federation=federation,
    limits=_LIMITS if federation is None else _LVIS_LIMITS,
  )
  results: dict[str, float | int] = dict(tables.summary())
  for letter, word in _FREQUENCIES.items():
    of = [category for category, f in content.frequency.items() if f == letter]
    summary = tables.summary(of)
    if "ap" in summary:
      results[f"ap_{word}"] = summary["ap"]
  results |= {
    "classes": len(ids),
    "boxes": int((~objects.crowd).sum()),
    "queries": queries,
    "examples": len(read),
    "rows": len(files),
    "clipped_boxes": content.clipped,
    "dropped_boxes": content.dropped,
  }
  return {f"detection/{name}/{key}": value for key, value in results.items()}


def _objects(read: list[instances.AnnotatedImage]) -> detection.Objects:
  """The annotated boxes of the images that could be read."""
  return detection.Objects(
    np.repeat([image.id for image in read], [len(image.boxes) for image in read]),
    np.concatenate([image.category for image in read]),
    np.concatenate([detection.to_pixels(p.boxes, p.width, p.height) for p in read]),
    np.concatenate([image.area for image in read]),
    np.concatenate([image.crowd for image in read]),
  )
