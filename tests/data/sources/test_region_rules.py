"""Rules for regions, against hand-worked cases and pycocotools."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from grain_jax.data.sources import region_rules


def region(description, box, score=1.0):
  return {"description": description, "box": box, "score": score, "negatives": []}


def names(record):
  return [r["description"] for r in record["regions"]]


# Quarter of the image, shifted right by 1/8 of it: 3/8 x 1/2 of 5/8 x 1/2 is shared, IoU 3/5.
LEFT, SHIFTED, FAR = (0, 0, 0.5, 0.5), (0, 0.125, 0.5, 0.625), (0.5, 0.5, 1, 1)


def test_rules_that_are_not_set_change_nothing():
  record = {"key": "k", "regions": [region("a", LEFT, -3), region("a", LEFT, 0)]}
  assert region_rules.Rules().apply(record) == (record, [])
  assert region_rules.Rules().settings() == {}


def test_suppression_of_a_hand_worked_case():
  assert region_rules.iou(LEFT, SHIFTED) == pytest.approx(3 / 5)
  record = {"regions": [region("a", LEFT, 0.5), region("b", SHIFTED, 0.9), region("c", FAR, 0.1)]}
  kept, lost = region_rules.Rules(nms=0.59).apply(record)
  assert names(kept) == ["b", "c"] and lost == [("regions", "overlaps_a_better_region")]
  kept, lost = region_rules.Rules(nms=0.61).apply(record)
  assert names(kept) == ["a", "b", "c"] and lost == []
  # Greedy: the middle one goes for the first, so the third, which only it overlaps, stays.
  third = (0, 0.25, 0.5, 0.75)  # IoU 3/5 with the middle, 1/3 with the first
  chain = {"regions": [region("a", LEFT, 0.9), region("b", SHIFTED, 0.8), region("c", third, 0.7)]}
  assert names(region_rules.Rules(nms=0.5).apply(chain)[0]) == ["a", "c"]


def test_area_score_and_number():
  regions = [region("a", LEFT, 0.3), region("b", FAR, 0.9), region("c", (0, 0, 0.1, 0.1), 0.8)]
  record = {"regions": regions}
  rules = region_rules.Rules(min_area=0.25)
  assert rules.apply(record)[1] == [("regions", "area_under_min_area")]
  assert names(rules.apply(record)[0]) == ["a", "b"]  # a quarter is no less than a quarter
  kept, lost = region_rules.Rules(min_score=0.8).apply(record)
  assert names(kept) == ["b", "c"] and lost == [("regions", "score_under_min_score")]
  logits = {"regions": [region("a", LEFT, -1.5), region("b", FAR, -0.5)]}
  assert names(region_rules.Rules(min_score=-1).apply(logits)[0]) == ["b"]
  kept, lost = region_rules.Rules(max_regions=2).apply(record)
  assert names(kept) == ["b", "c"] and lost == [("regions", "over_max_regions")]
  even = {"regions": [region(n, LEFT) for n in "abc"]}  # as without scores: the first ones
  assert names(region_rules.Rules(max_regions=2).apply(even)[0]) == ["a", "b"]


def test_equal_spans_become_the_one_of_best_score():
  regions = [region("a dog", LEFT, 0.3), region("a cat", LEFT, 0.1), region("a dog", FAR, 0.9)]
  kept, lost = region_rules.Rules(merge_equal_spans=True).apply({"regions": regions})
  assert kept["regions"] == regions[1:] and lost == [("regions", "equal_span_merged")]
  kept, _ = region_rules.Rules(merge_equal_spans=True).apply({"regions": regions}, spans=[1, 1, 2])
  assert kept["regions"] == [regions[0], regions[2]]


def test_an_image_without_regions_may_be_dropped():
  rules = region_rules.Rules(drop_ungrounded=True, min_score=0.5)
  assert rules.apply({"regions": []}) == (None, [("records", "record_without_regions")])
  lost = [("regions", "score_under_min_score"), ("records", "record_without_regions")]
  assert rules.apply({"regions": [region("a", LEFT, 0.4)]}) == (None, lost)
  assert rules.apply({"regions": [region("a", LEFT, 0.5)]})[0]["regions"]


def test_flags_are_the_rules():
  flags = {flag.name: flag.default for flag in region_rules.FLAGS}
  assert region_rules.Rules(**flags) == region_rules.Rules()
  assert flags.keys() == dataclasses.asdict(region_rules.Rules()).keys()
  rules = region_rules.Rules(nms=0.5, drop_ungrounded=True)
  assert rules.settings() == {"nms": 0.5, "drop_ungrounded": True}
  assert region_rules.Rules(**rules.settings()) == rules


@pytest.mark.parametrize(
  "wrong", [{"nms": 1.5}, {"min_area": -0.1}, {"max_regions": -1}, {"min_score": float("nan")}]
)
def test_a_rule_that_cannot_be_is_one_line_with_its_flag(wrong):
  with pytest.raises(ValueError, match=rf"^--{next(iter(wrong))} = .*\.$"):
    region_rules.Rules(**wrong)


sides = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 50), st.integers(1, 50))


@given(
  st.lists(st.tuples(sides, st.floats(0, 1, width=32)), max_size=12), st.sampled_from([0.3, 0.5])
)
def test_suppression_is_greedy_over_the_overlaps_of_pycocotools(drawn, limit):
  boxes = np.array([box for box, _ in drawn], np.float64).reshape(-1, 4)  # x, y, w, h
  ious = coco_mask.iou(boxes, boxes, [0] * len(boxes)) if len(boxes) else boxes
  regions = [
    region(str(i), (y / 100, x / 100, (y + h) / 100, (x + w) / 100), score)
    for i, ((x, y, w, h), score) in enumerate(drawn)
  ]
  left, want = sorted(range(len(drawn)), key=lambda i: (-drawn[i][1], i)), []
  while left:
    want.append(left.pop(0))
    left = [i for i in left if not ious[want[-1], i] > limit + 1e-9]
  kept, lost = region_rules.Rules(nms=limit + 1e-9).apply({"regions": regions})
  assert names(kept) == [str(i) for i in sorted(want)]
  assert len(kept["regions"]) + len(lost) == len(regions)
