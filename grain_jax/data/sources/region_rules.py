"""Which regions of an image are worth keeping: rules by flag, the same for every source.

They apply to a record that `records.check` has passed, in this order: area, score, equal spans,
overlap (non-maximum suppression), number; then whether the image may stand without regions. The
regions that are kept stay in their order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from grain_jax import schema
from grain_jax.data.sources import base

# Why a rule drops something. It is what the user asked for: no sign that the data is bad.
SMALL = "area_under_min_area"
LOW_SCORE = "score_under_min_score"
EQUAL_SPAN = "equal_span_merged"
OVERLAP = "overlaps_a_better_region"
SURPLUS = "over_max_regions"
UNGROUNDED = "record_without_regions"
REASONS = frozenset({SMALL, LOW_SCORE, EQUAL_SPAN, OVERLAP, SURPLUS, UNGROUNDED})

FLAGS = (
  base.Flag("min_score", "regions of a lower score are left out", 0.0, float),
  base.Flag("max_regions", "of an image: those of highest score; 0: all", 0, int),
  base.Flag(
    "nms",
    "IoU above which, of two regions, the one of lower score is left out; 0: none",
    0.0,
    float,
  ),
  base.Flag("min_area", "regions of a smaller part of the image are left out", 0.0, float),
  base.Flag("drop_ungrounded", "leave out images without a region", False, bool),
  base.Flag(
    "merge_equal_spans",
    "of regions of an image with the same description keep the one of best score",
    False,
    bool,
  ),
)

Loss = tuple[str, str]  # (what: records | regions, why)


@dataclasses.dataclass(frozen=True)
class Rules:
  """Rules for the regions of an image; those of the defaults change nothing."""

  min_score: float = 0.0  # 0: all, whatever the scale of the scores
  max_regions: int = 0  # 0: all
  nms: float = 0.0  # IoU; 0: no suppression
  min_area: float = 0.0  # part of the image
  drop_ungrounded: bool = False
  merge_equal_spans: bool = False

  def __post_init__(self) -> None:
    for name in ("nms", "min_area"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"--{name} = {getattr(self, name)}: not a fraction. Use [0, 1).")
    if not math.isfinite(self.min_score):
      raise ValueError(f"--min_score = {self.min_score}: no number. Use the scores' own scale.")
    if self.max_regions < 0:
      raise ValueError(f"--max_regions = {self.max_regions}: fewer than none. Use 0 for all.")

  def settings(self) -> dict[str, Any]:
    """The rules that are not the default, for a build's settings: {} where none is."""
    return {
      f.name: getattr(self, f.name)
      for f in dataclasses.fields(self)
      if getattr(self, f.name) != f.default
    }

  def apply(
    self, record: Mapping[str, Any], spans: Sequence[Hashable] | None = None
  ) -> tuple[dict[str, Any] | None, list[Loss]]:
    """The record with the regions that the rules keep, and what they drop.

    Args:
      record: as `records.check` gives it: boxes (ymin, xmin, ymax, xmax) as fractions, scores.
        It is not changed.
      spans: of each region, what tells equal ones; default: the descriptions.

    Returns:
      (record, [(what, why)]); None in its place where `drop_ungrounded` drops it.
    """
    regions = record[schema.RECORD_REGIONS]
    names = [r["description"] for r in regions] if spans is None else list(spans)
    if len(names) != len(regions):
      raise ValueError(f"{len(names)} spans of {len(regions)} regions: give one for each.")
    fates: dict[int, str] = {}
    for i, region in enumerate(regions):
      if area(region["box"]) < self.min_area:
        fates[i] = SMALL
      elif self.min_score and region["score"] < self.min_score:
        fates[i] = LOW_SCORE
    order = sorted(range(len(regions)), key=lambda i: -regions[i]["score"])  # stable
    seen: set[Hashable] = set()
    kept: list[int] = []
    for i in (i for i in order if i not in fates):
      box = regions[i]["box"]
      if self.merge_equal_spans and names[i] in seen:
        fates[i] = EQUAL_SPAN
      elif self.nms and any(iou(box, regions[j]["box"]) > self.nms for j in kept):
        fates[i] = OVERLAP
      elif self.max_regions and len(kept) >= self.max_regions:
        fates[i] = SURPLUS
      else:
        kept.append(i)
      seen.add(names[i])
    dropped = [("regions", fates[i]) for i in sorted(fates)]
    if self.drop_ungrounded and not kept:
      return None, [*dropped, ("records", UNGROUNDED)]
    return {**record, schema.RECORD_REGIONS: [regions[i] for i in sorted(kept)]}, dropped


def area(box: Sequence[float]) -> float:
  """Of a box (ymin, xmin, ymax, xmax)."""
  return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(a: Sequence[float], b: Sequence[float]) -> float:
  """Intersection over union of two boxes (ymin, xmin, ymax, xmax), in [0, 1]."""
  inner = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
  shared = area(inner)
  union = area(a) + area(b) - shared
  return shared / union if union > 0 else 0.0
