"""Detection: COCO's average precision of region queries, each with the class that it means most.

Every query is one detection: its box, the class whose prompt is most similar to its embedding, and
that cosine as its score (there is no class 'nothing' to be more sure of, and no suppression of
boxes that overlap: queries are trained one to an object). So an image has at most Q detections, and
recall is bounded by the number of queries. The figures themselves are pycocotools'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from grain_jax.evals import grounding, retrieval

_SIZES = ("", "_small", "_medium", "_large")  # up to 32^2, 96^2 pixels and above, as pycocotools
_EVERYWHERE = np.array([-1e6, -1e6, 2e6, 2e6])  # a box around any image, in pixels


class Objects(NamedTuple):
  """G annotated boxes."""

  image: np.ndarray  # id, i64 [G]
  category: np.ndarray  # id, i64 [G]
  box: np.ndarray  # (x, y, w, h) in pixels, f64 [G, 4]
  area: np.ndarray  # of the object in pixels, which decides whether it is small, f64 [G]
  crowd: np.ndarray  # around many objects: what it covers is neither right nor wrong, bool [G]


class Detections(NamedTuple):
  """D boxes found."""

  image: np.ndarray  # id, i64 [D]
  category: np.ndarray  # id, i64 [D]
  box: np.ndarray  # (x, y, w, h) in pixels, f64 [D, 4]
  score: np.ndarray  # f64 [D]


@dataclasses.dataclass(frozen=True)
class Federation:
  """Which categories were looked for where, by id of the image (LVIS)."""

  absent: Mapping[int, frozenset[int]]  # known not to be in the image
  not_exhaustive: Mapping[int, frozenset[int]]  # in the image, but not all of them annotated


@dataclasses.dataclass(frozen=True)
class Precision:
  """pycocotools' tables; -1 where a category has no object to be found.

  Of the precision the means over its 101 recalls: all that is asked for, and 2 kB a category in the
  place of 98, of which built data has one for each description.
  """

  categories: np.ndarray  # ids that have objects, i64 [K]
  precision: np.ndarray  # [10 IoUs, K, 4 sizes, 3 limits]
  recall: np.ndarray  # [10 IoUs, K, 4 sizes, 3 limits]
  limits: tuple[int, int, int]  # most detections of a category in an image

  def summary(self, categories: Sequence[int] | None = None) -> dict[str, float]:
    """ap (over IoUs of .5 to .95), ap50, ap75, ap_small, ..., ar1, ar10, ar100, ar100_small, ...

    Fractions; what there is no object for is left out.

    Args:
      categories: ids of those to average over; None for all.
    """
    of = slice(None) if categories is None else np.isin(self.categories, list(categories))
    precision, recall = self.precision[:, of], self.recall[:, of]
    figures = {"ap": precision[..., 0, -1], "ap50": precision[0, ..., 0, -1]}
    figures["ap75"] = precision[5, ..., 0, -1]
    figures |= {f"ap{size}": precision[..., i, -1] for i, size in enumerate(_SIZES) if i}
    figures |= {f"ar{limit}": recall[..., 0, i] for i, limit in enumerate(self.limits)}
    figures |= {
      f"ar{self.limits[-1]}{size}": recall[..., i, -1] for i, size in enumerate(_SIZES) if i
    }
    known = {name: values[values > -1] for name, values in figures.items()}
    return {name: float(values.mean()) for name, values in known.items() if values.size}


def average_precision(
  objects: Objects,
  found: Detections,
  *,
  federation: Federation | None = None,
  limits: tuple[int, int, int] = (1, 10, 100),
) -> Precision:
  """COCO's AP and AR of boxes, by pycocotools' COCOeval, one category after the other.

  Categories are apart from each other in it, and images without an object or a detection of a
  category change nothing; so LVIS with its 1,203 fits in memory too.

  With `federation` it is the protocol of lvis-api (Gupta et al., CVPR 2019): detections count only
  in images that have the category or are known not to; where the category is not annotated
  exhaustively, a detection that matches no object is neither right nor wrong.

  Args:
    objects: annotated.
    found: detected; of those of a category in an image the best `limits[-1]` are used.
    federation: None if all categories were looked for in all images.
    limits: of detections for the three recalls; the last is that of the precision.

  Raises:
    ValueError: no object.
  """
  if not np.sum(~objects.crowd):
    raise ValueError("average precision: there is no object to be found. Check the annotations.")
  if not np.isfinite(found.box).all() or not np.isfinite(found.score).all():
    raise ValueError("average precision: boxes or scores are not finite. Use another checkpoint.")
  by_category = {int(c): rows for c, rows in _groups(found.category)}
  categories, precision, recall = [], [], []
  for category, rows in _groups(objects.category):
    own = Objects(*(column[rows] for column in objects))
    mine = by_category.get(int(category), np.zeros(0, np.int64))
    own_found = Detections(*(column[mine] for column in found))
    if federation is not None:
      own, own_found = _filter_federated(own, own_found, int(category), federation)
    tables = _precision_and_recall(own, own_found, limits)
    categories.append(category)
    precision.append(tables[0].mean(axis=1))  # a category has -1 at all recalls, or at none
    recall.append(tables[1])
  return Precision(
    np.asarray(categories), np.concatenate(precision, 1), np.concatenate(recall, 1), limits
  )


def classify(regions: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The class of each query and how similar they are: i64 [b, Q], f32 [b, Q].

  Args:
    regions: [b, Q, E], L2-normalised.
    classes: [C, E], L2-normalised; equal similarities give the class of lower index.
  """
  first, _ = retrieval.distinct_rows(classes)
  return _classify(regions, classes[first], first)


def _classify(
  regions: np.ndarray, rows: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """`classify` among distinct rows, of which each is that of the class `first`.

  A matrix product rounds equal columns by where they stand, so that they would not tie.
  """
  similarity = regions @ rows.T
  return first[similarity.argmax(axis=-1)], similarity.max(axis=-1)


def to_pixels(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
  """(cx, cy, w, h) as fractions -> (x, y, w, h) in pixels, clipped to the image: f64 [..., 4]."""
  boxes = np.asarray(boxes, np.float64)
  low = np.clip(boxes[..., :2] - boxes[..., 2:] / 2, 0, 1)
  high = np.clip(boxes[..., :2] + boxes[..., 2:] / 2, 0, 1)
  return np.concatenate([low, high - low], axis=-1) * [width, height, width, height]


def evaluate_built(
  encode_regions: grounding.EncodeRegions,
  encode_text: retrieval.EncodeText,
  batches: retrieval.Batches,
  *,
  classes: Sequence[str] | None = None,
  texts_per_call: int = 8192,
) -> dict[str, float | int]:
  """Average precision where each description is a category: can a region be found by its words?

  Args:
    encode_regions: images -> (region embeddings, boxes) of Q queries.
    encode_text: texts -> embeddings.
    batches: (batch, extras) with extras "descriptions" (R strings a row) and "key"; the batch's
      `boxes` and `region_mask` say which regions exist. Regions without description do not count.
    classes: the categories; None for the distinct descriptions of the split.
    texts_per_call: most texts handed to `encode_text` at once.

  Returns:
    `detection/ap`, `detection/ap50`, `detection/ap75`: fractions in [0, 1]. Counts:
    `detection/classes`, `detection/boxes`, and `detection/examples` of `detection/rows` rows.

  Raises:
    ValueError: no described region, a description that is none of `classes`, boxes or embeddings
      that are not finite.
  """
  seen: list[tuple[np.ndarray, np.ndarray, tuple[int, int]]] = []
  image: list[int] = []
  texts: list[str] = []
  boxes: list[np.ndarray] = []
  rows = 0
  for batch, extras in batches:
    counted = retrieval.counted_rows(batch, extras, ("descriptions",))
    rows += len(batch["example_mask"])
    if not len(counted):
      continue
    height, width = batch["image"].shape[1:3]
    output = grounding.check_regions(*encode_regions(batch["image"]), batch, list(counted))
    for i, regions, own in zip(counted, *output, strict=True):
      for text, box, real in zip(
        extras["descriptions"][i], batch["boxes"][i], batch["region_mask"][i], strict=True
      ):
        if real and text.strip():
          image.append(len(seen))
          texts.append(text.strip())
          boxes.append(to_pixels(box, width, height))
      seen.append((regions, to_pixels(own, width, height), (width, height)))
  if not texts:
    raise ValueError(f"detection: none of {rows} rows has a described region. Check the split.")
  names = list(dict.fromkeys(texts if classes is None else classes))
  index = {name: i for i, name in enumerate(names)}
  unknown = sorted(set(texts) - index.keys())
  if unknown:
    raise ValueError(
      f"detection: {len(unknown)} descriptions are none of the {len(names)} classes, "
      f"{unknown[0]!r} among them. Give the classes of this split."
    )
  heads = retrieval.encode_texts(encode_text, names, texts_per_call=texts_per_call)
  first, _ = retrieval.distinct_rows(heads)
  distinct = heads[first]
  labels, scores = zip(
    *(_classify(regions, distinct, first) for regions, _, _ in seen), strict=True
  )
  box = np.stack(boxes)
  objects = Objects(
    np.asarray(image),
    np.asarray([index[text] for text in texts]),
    box,
    box[:, 2] * box[:, 3],
    np.zeros(len(box), bool),
  )
  found = Detections(
    np.repeat(np.arange(len(seen)), [len(own) for own in labels]),
    np.concatenate(labels),
    np.concatenate([own for _, own, _ in seen]),
    np.concatenate(scores).astype(np.float64),
  )
  summary = average_precision(objects, found).summary()
  return {
    **{f"detection/{name}": summary[name] for name in ("ap", "ap50", "ap75")},
    "detection/classes": len(names),
    "detection/boxes": len(texts),
    "detection/examples": len(seen),
    "detection/rows": rows,
  }


def _groups(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  """Each value with its indices, both rising."""
  order = np.argsort(values, kind="stable")
  distinct, starts = np.unique(values[order], return_index=True)
  if len(distinct):
    yield from zip(distinct, np.split(order, starts[1:]), strict=True)


def _filter_federated(
  objects: Objects, found: Detections, category: int, federation: Federation
) -> tuple[Objects, Detections]:
  """Leaves out detections nobody can judge; a crowd around the image takes those that may be right.

  pycocotools counts what matches a crowd box alone for nothing, and objects go before crowds. A
  detection without area (a query's box outside of the image) is left out, as lvis-api has it; with
  a crowd it would be 0 / 0.
  """
  present = set(objects.image.tolist())
  judged = np.array(
    [
      area > 0 and (i in present or category in federation.absent[i])
      for i, area in zip(found.image.tolist(), found.box[:, 2:].prod(axis=1), strict=True)
    ],
    bool,
  )
  found = Detections(*(column[judged] for column in found))
  open_to_more = [
    i for i in sorted(set(found.image.tolist())) if category in federation.not_exhaustive[i]
  ]
  count = len(open_to_more)
  more = Objects(
    np.asarray(open_to_more, np.int64),
    np.full(count, category),
    np.tile(_EVERYWHERE, (count, 1)),
    np.zeros(count),
    np.ones(count, bool),
  )
  return Objects(*map(np.concatenate, zip(objects, more, strict=True))), found


def _precision_and_recall(
  objects: Objects, found: Detections, limits: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """pycocotools' precision [10, 101, 1, 4, 3] and recall [10, 1, 4, 3]."""
  from pycocotools import coco, cocoeval

  images = np.unique(np.concatenate([objects.image, found.image])).tolist()

  def dataset(columns: dict[str, np.ndarray]) -> coco.COCO:
    made = coco.COCO()
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    made.dataset = {
      "images": [{"id": i} for i in images],
      "categories": [{"id": 1}],
      # Ids start at 1: COCOeval takes a match with 0 for none.
      "annotations": [
        {"id": i, "category_id": 1, **dict(zip(columns, row, strict=True))}
        for i, row in enumerate(rows, 1)
      ],
    }
    made.createIndex()
    return made

  with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
    true = {"image_id": objects.image, "bbox": objects.box, "area": objects.area}
    true["iscrowd"] = objects.crowd.astype(np.int64)
    mine = {"image_id": found.image, "bbox": found.box, "score": found.score}
    mine["area"] = found.box[:, 2] * found.box[:, 3]
    evaluator = cocoeval.COCOeval(dataset(true), dataset(mine), "bbox")
    evaluator.params.maxDets = list(limits)
    evaluator.evaluate()
    evaluator.accumulate()
  return evaluator.eval["precision"], evaluator.eval["recall"]
