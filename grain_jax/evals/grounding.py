"""Grounding: how well region queries find the boxes, and which description each of them means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from grain_jax.evals import retrieval

# u8 [b, H, W, 3] -> (regions f32 [b, Q, E], L2-normalised; boxes f32 [b, Q, 4], (cx, cy, w, h))
EncodeRegions = Callable[[np.ndarray], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Example:
  """One image with its R true regions and what was found for each of them."""

  key: str
  image: np.ndarray  # u8 [H, W, 3]
  boxes: np.ndarray  # true, (cx, cy, w, h) as fractions of the image, f32 [R, 4]
  descriptions: tuple[str, ...]  # true, R of them; "" where a region has none
  predicted: np.ndarray  # the matched query's box, f32 [R, 4]
  iou: np.ndarray  # of the two, f32 [R]
  retrieved: tuple[str, ...]  # nearest description of the whole split, R of them


@dataclasses.dataclass(frozen=True)
class Result:
  """Metrics by flat name, and the first `keep` images for a contact sheet."""

  metrics: dict[str, float | int]
  examples: list[Example]


class GroundingTargets(NamedTuple):
  """What is to be found in one image: N descriptions, each with every box that it names."""

  descriptions: Sequence[str]  # N
  boxes: Sequence[np.ndarray]  # N of (cx, cy, w, h) as fractions of the image, [B, 4], B >= 1


@dataclasses.dataclass(frozen=True)
class _Matched:
  """An image whose boxes are matched and whose descriptions are not looked up yet."""

  key: str
  image: np.ndarray | None  # None beyond the first `keep`
  boxes: np.ndarray  # [R, 4]
  descriptions: tuple[str, ...]
  predicted: np.ndarray  # [R, 4]
  regions: np.ndarray  # the matched queries' embeddings, [R, E]


def evaluate(
  encode_regions: EncodeRegions,
  encode_text: retrieval.EncodeText,
  batches: retrieval.Batches,
  *,
  iou_threshold: float = 0.5,
  l1_cost: float = 5.0,
  giou_cost: float = 2.0,
  keep: int = 0,
  texts_per_call: int = 8192,
) -> Result:
  """Matches predicted boxes with true ones as training does, then measures boxes and descriptions.

  Args:
    encode_regions: images -> (region embeddings, boxes) of Q queries.
    encode_text: texts -> embeddings.
    batches: (batch, extras) with extras "descriptions" (R strings a row, "" where there is none)
      and "key"; see `retrieval`. The batch's `boxes` and `region_mask` say which regions exist.
    iou_threshold: IoU from which a box counts as found.
    l1_cost, giou_cost: of the matching (`match`).
    keep: how many images, the first that have a region, come back as `Result.examples`.
    texts_per_call: most texts handed to `encode_text` at once.

  Returns:
    Metrics, fractions in [0, 1]:
    `grounding/mean_iou`: mean over true boxes of the IoU with their matched prediction;
    `grounding/recall@{iou_threshold}`: share of true boxes whose matched IoU is at least that;
    `grounding/description_top1`: share of matched queries whose nearest description, among all
      distinct ones of the split, reads as their own region's does;
    `grounding/description_top1_in_image`: the same among the distinct descriptions of their own
      image, over images that have two or more (with one, any query would be right).
    Counts: `grounding/regions` (true boxes), `grounding/described_regions` of them have a
    description, `grounding/descriptions` (distinct), `grounding/examples` of `grounding/rows` rows.
    A figure over nothing (no descriptions) is left out.

  Raises:
    ValueError: no regions at all, fewer queries than regions, boxes or embeddings not finite.
  """
  matched: list[_Matched] = []
  examples = rows = 0
  for batch, extras in batches:
    counted = retrieval.counted_rows(batch, extras, ("key", "descriptions"))
    rows += len(batch["example_mask"])
    examples += len(counted)
    region_mask = np.asarray(batch["region_mask"])
    with_regions = [i for i in counted if region_mask[i].any()]
    if not with_regions:
      continue
    regions, boxes = check_regions(*encode_regions(batch["image"]), batch, with_regions)
    for i, own_regions, own_boxes in zip(with_regions, regions, boxes, strict=True):
      descriptions = extras["descriptions"][i]
      if len(descriptions) != len(region_mask[i]):
        raise ValueError(
          f"extras['descriptions'] of {extras['key'][i]!r} has {len(descriptions)} entries for "
          f"{len(region_mask[i])} regions. Give one each, '' where there is none."
        )
      true = np.asarray(batch["boxes"][i], np.float32)[region_mask[i]]
      query = match(own_boxes, true, l1_cost=l1_cost, giou_cost=giou_cost)
      matched.append(
        _Matched(
          key=extras["key"][i],
          image=np.array(batch["image"][i]) if len(matched) < keep else None,
          boxes=true,
          descriptions=tuple(
            text.strip() for text, real in zip(descriptions, region_mask[i], strict=True) if real
          ),
          predicted=own_boxes[query],
          regions=own_regions[query],
        )
      )
  if not matched:
    raise ValueError(
      f"grounding: none of the {examples} images ({rows} rows) has a region. Check the split."
    )
  overlap = [iou(image.predicted, image.boxes) for image in matched]
  flat = np.concatenate(overlap)
  names, metrics, retrieved = _descriptions(matched, encode_text, texts_per_call)
  metrics = {
    "grounding/mean_iou": float(flat.mean()),
    f"grounding/recall@{iou_threshold:g}": float(np.mean(flat >= iou_threshold)),
    **metrics,
    "grounding/regions": len(flat),
    "grounding/described_regions": sum(bool(d) for image in matched for d in image.descriptions),
    "grounding/descriptions": len(names),
    "grounding/examples": examples,
    "grounding/rows": rows,
  }
  kept = [
    Example(m.key, m.image, m.boxes, m.descriptions, m.predicted, found_iou, texts)
    for m, found_iou, texts in zip(matched, overlap, retrieved, strict=True)
    if m.image is not None
  ]
  return Result(metrics, kept)


def evaluate_given(
  encode_regions: EncodeRegions,
  encode_text: retrieval.EncodeText,
  batches: Iterable[tuple[np.ndarray, Sequence[GroundingTargets]]],
  *,
  iou_threshold: float = 0.5,
  texts_per_call: int = 8192,
) -> dict[str, float | int]:
  """Boxes for given descriptions: the box of the query that is most similar to each of them.

  Args:
    encode_regions: images -> (region embeddings, boxes) of Q queries.
    encode_text: texts -> embeddings.
    batches: (images u8 [b, H, W, 3], what is to be found in each of them).
    iou_threshold: IoU from which a box counts as found.
    texts_per_call: most texts handed to `encode_text` at once.

  Returns:
    Fractions in [0, 1], over descriptions:
    `mean_iou`, `recall@{iou_threshold}`: of the box found with the nearest of the boxes that the
      description names (of Flickr30k Entities: the protocol 'any box');
    `any_query_recall@{...}`: some query has such a box: what a better choice could reach.
    Where a description has several boxes also
    `merged_recall@{...}`: with the smallest box around all of its boxes ('merged boxes');
    `box_recall@{...}`: over boxes, those that the query of their description finds.
    Counts: `descriptions`, `boxes`.

  Raises:
    ValueError: no descriptions, boxes or embeddings that are not finite.
  """
  nearest, merged, reachable, every = [], [], [], []
  for images, given in batches:
    regions, boxes = check_regions(*encode_regions(images), {"image": images}, range(len(given)))
    texts = [text for own in given for text in own.descriptions]
    if not texts:
      continue
    embeddings = retrieval.encode_texts(encode_text, texts, texts_per_call=texts_per_call)
    parts = np.split(embeddings, np.cumsum([len(own.descriptions) for own in given])[:-1])
    for own, part, own_regions, own_boxes in zip(given, parts, regions, boxes, strict=True):
      queries = (part @ own_regions.T).argmax(axis=1)
      for query, true in zip(queries, own.boxes, strict=True):
        overlap = iou(own_boxes[:, None], true[None])  # [Q, B]
        nearest.append(overlap[query].max())
        reachable.append(overlap.max())
        every.append(overlap[query])
        merged.append(iou(own_boxes[query], _enclosing_box(true)))
  if not nearest:
    raise ValueError("grounding: there are no descriptions with boxes. Check the annotations.")

  def recall(values: Any) -> float:
    return float(np.mean(np.asarray(values) >= iou_threshold))

  results: dict[str, float | int] = {
    "mean_iou": float(np.mean(nearest)),
    f"recall@{iou_threshold:g}": recall(nearest),
    f"any_query_recall@{iou_threshold:g}": recall(reachable),
  }
  flat = np.concatenate(every)
  if len(flat) > len(nearest):
    results[f"merged_recall@{iou_threshold:g}"] = recall(merged)
    results[f"box_recall@{iou_threshold:g}"] = recall(flat)
  return results | {"descriptions": len(nearest), "boxes": len(flat)}


def match(
  predicted: np.ndarray, true: np.ndarray, *, l1_cost: float = 5.0, giou_cost: float = 2.0
) -> np.ndarray:
  """The query for each true box: the cheapest one-to-one assignment (Carion et al., ECCV 2020).

  cost(q, r) = l1_cost * |b_q - b_r|_1 - giou_cost * GIoU(b_q, b_r)

  Args:
    predicted: boxes (cx, cy, w, h) of Q queries, [Q, 4].
    true: boxes of R regions, [R, 4], R <= Q.
    l1_cost: weight of the distance.
    giou_cost: weight of the overlap.

  Returns:
    Distinct indices of queries, i64 [R].
  """
  if len(true) > len(predicted):
    raise ValueError(
      f"{len(true)} regions but {len(predicted)} queries: every region needs a query. "
      "Raise num_queries or lower max_regions."
    )
  distance = np.abs(predicted[:, None] - true[None]).sum(axis=-1)
  overlap = generalized_iou(predicted[:, None], true[None])
  queries, regions = linear_sum_assignment(l1_cost * distance - giou_cost * overlap)
  return queries[np.argsort(regions)]


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """|A∩B| / |A∪B| of boxes (cx, cy, w, h), [..., 4] each, in [0, 1]; 0 where neither has area."""
  inter, union, _ = _areas(a, b)
  return inter / np.maximum(union, np.finfo(np.float32).tiny)


def generalized_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Generalized IoU of boxes (cx, cy, w, h), [..., 4] each, in [-1, 1].

  GIoU = |A∩B| / |A∪B| - |C \\ (A∪B)| / |C|, with C the smallest box around both
  (Rezatofighi et al., CVPR 2019). Pairs without area give -1, never NaN.
  """
  inter, union, hull = _areas(a, b)
  tiny = np.finfo(np.float32).tiny
  # 1 - union/hull, written so, is 1 where the hull has no area.
  return inter / np.maximum(union, tiny) - (1 - union / np.maximum(hull, tiny))


def _enclosing_box(boxes: np.ndarray) -> np.ndarray:
  """The smallest box (cx, cy, w, h) around boxes [B, 4]: [4]."""
  low = (boxes[:, :2] - boxes[:, 2:] / 2).min(axis=0)
  high = (boxes[:, :2] + boxes[:, 2:] / 2).max(axis=0)
  return np.concatenate([(low + high) / 2, high - low])


def _areas(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Areas of the intersection, the union and the smallest box around both, [...] each."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  size_a, size_b = np.maximum(a[..., 2:], 0), np.maximum(b[..., 2:], 0)
  low_a, high_a = a[..., :2] - size_a / 2, a[..., :2] + size_a / 2
  low_b, high_b = b[..., :2] - size_b / 2, b[..., :2] + size_b / 2
  inter = np.maximum(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), 0).prod(axis=-1)
  area_a, area_b = size_a.prod(axis=-1), size_b.prod(axis=-1)
  # Corners of a tiny box far from 0 are rounded: hold the areas to their order nevertheless.
  inter = np.minimum(inter, np.minimum(area_a, area_b))
  union = area_a + area_b - inter
  hull = (np.maximum(high_a, high_b) - np.minimum(low_a, low_b)).prod(axis=-1)
  return inter, union, np.maximum(hull, union)


def check_regions(
  regions: Any, boxes: Any, batch: Any, rows: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """The encoder's output for the rows that count; a one-line ValueError where it is no use."""
  rows = list(rows)
  regions, boxes = np.asarray(regions), np.asarray(boxes, np.float32)
  images = len(batch["image"])
  if regions.ndim != 3 or boxes.shape != (*regions.shape[:2], 4) or len(boxes) != images:
    raise ValueError(
      f"encode_regions returned {list(regions.shape)} and {list(boxes.shape)} for {images} images: "
      "[b, Q, E] and [b, Q, 4] are needed. A model without region queries cannot ground."
    )
  if not np.isfinite(boxes[rows]).all():
    raise ValueError("encode_regions: boxes are not finite. Evaluate an earlier checkpoint.")
  return retrieval.check_embeddings(regions[rows], name="encode_regions"), boxes[rows]


def _descriptions(
  matched: list[_Matched], encode_text: retrieval.EncodeText, texts_per_call: int
) -> tuple[list[str], dict[str, float | int], list[tuple[str, ...]]]:
  """Looks up every matched query: distinct descriptions, metrics, retrieved texts an image."""
  names = list(dict.fromkeys(d for image in matched for d in image.descriptions if d))
  if not names:
    return [], {}, [("",) * len(image.boxes) for image in matched]
  index = {name: i for i, name in enumerate(names)}
  texts = retrieval.encode_texts(encode_text, names, texts_per_call=texts_per_call)
  first, of = retrieval.distinct_rows(texts)  # texts that embed equally tie: the first is nearest
  distinct = texts[first]
  hits: list[bool] = []
  hits_in_image: list[bool] = []
  retrieved = []
  for image in matched:
    similarity = (image.regions @ distinct.T)[:, of]  # [R, N]
    best = similarity.argmax(axis=1)
    retrieved.append(tuple(names[i] for i in best))
    own = sorted({index[d] for d in image.descriptions if d})
    for row, description in enumerate(image.descriptions):
      if not description:
        continue
      hits.append(best[row] == index[description])
      if len(own) > 1:
        hits_in_image.append(own[similarity[row, own].argmax()] == index[description])
  metrics: dict[str, float | int] = {"grounding/description_top1": float(np.mean(hits))}
  if hits_in_image:
    metrics["grounding/description_top1_in_image"] = float(np.mean(hits_in_image))
  return names, metrics, retrieved
