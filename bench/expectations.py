"""What the ablation was expected to show, written down before it was run, and what it showed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from bench import statistics

_COMPOSITION = "composition/average"
_ZERO_SHOT = "zero_shot/top1"
_UNSEEN = "zero_shot/unseen/top1"
_MIOU = "segmentation/miou"


class Expectation(NamedTuple):
  """A sentence, what was found, and whether it holds; None: runs are missing."""

  expected: str
  found: str
  holds: bool | None


def _above(table: statistics.Measured, a: str, b: str, metric: str, sentence: str) -> Expectation:
  found = statistics.difference(table, a, b, metric)
  if found is None or math.isnan(found.low):
    return Expectation(sentence, "not measured yet", None)
  return Expectation(sentence, f"{statistics.percent(found, sign=True)} points", found.low > 0)


def _anchor(table: statistics.Measured) -> Expectation:
  sentence = "where CE-CLIP's zero-shot price exceeds its interval, loss.anchor at least halves it"
  price = statistics.difference(table, "clip", "ce_clip", _ZERO_SHOT)
  held = statistics.difference(table, "clip", "ce_clip_anchor", _ZERO_SHOT)
  if price is None or held is None or math.isnan(price.low):
    return Expectation(sentence, "not measured yet", None)
  said = f"price {statistics.percent(price, sign=True)} points, with the anchor "
  said += f"{statistics.percent(held, sign=True)}"
  if price.low <= 0:
    return Expectation(sentence, f"{said}: no price beyond its interval", True)
  return Expectation(sentence, said, held.mean <= price.mean / 2)


def _plus(table: statistics.Measured, metrics: tuple[str, ...]) -> Expectation:
  sentence = "GRAIN+ is not below the best arm in any column by more than the interval"
  if "grain_plus" not in table:
    return Expectation(sentence, "not measured yet", None)
  below = []
  for metric in metrics:
    best = statistics.best_control(table, treated="grain_plus", metric=metric)
    found = best and statistics.difference(table, "grain_plus", best, metric)
    if not found or math.isnan(found.high):
      return Expectation(sentence, "not measured yet", None)
    if found.high < 0:
      below.append(f"{metric} {statistics.percent(found, sign=True)} to {best}")
  return Expectation(sentence, "; ".join(below) or f"below none of {len(table) - 1}", not below)


def _spoilt(table: statistics.Measured) -> Expectation:
  sentence = "jittered and missing boxes cost less than half of GRAIN's lead over CLIP"
  lead = statistics.difference(table, "grain", "clip", _UNSEEN)
  cost = statistics.difference(table, "grain", "grain_spoilt", _UNSEEN)
  if lead is None or cost is None or math.isnan(lead.low):
    return Expectation(sentence, "not measured yet", None)
  said = f"lead {statistics.percent(lead, sign=True)}, cost {statistics.percent(cost, sign=True)}"
  return Expectation(sentence, f"{said} points", lead.mean > max(0, 2 * cost.mean))


def check(table: statistics.Measured) -> list[Expectation]:
  """All of them, for {arm: {seed: metrics}}."""
  columns = (
    _UNSEEN, _ZERO_SHOT, "retrieval/image_to_text/r1", "retrieval/text_to_image/r1", _COMPOSITION,
    "grounding/mean_iou", _MIOU,
  )  # fmt: skip
  return [
    _above(table, "ce_clip", "clip", _COMPOSITION, "CE-CLIP is above CLIP in composition"),
    _anchor(table),
    _above(table, "clippy", "clip", _MIOU, "max pooling is above the class token in mIoU"),
    _plus(table, columns),
    _spoilt(table),
  ]


def lines(table: statistics.Measured) -> list[str]:
  """A line of each, for the report."""
  words = {True: "holds", False: "does not hold", None: "open"}
  return [f"expected: {e.expected}; found: {e.found}; {words[e.holds]}." for e in check(table)]


def to_json(table: statistics.Measured) -> list[dict[str, Any]]:
  return [e._asdict() for e in check(table)]
