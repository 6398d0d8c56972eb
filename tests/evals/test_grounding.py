"""Grounding against DETR's loss functions in transformers, brute force and hand-worked numbers."""

import itertools
import types

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers.loss import loss_for_object_detection as detr

from grain_jax.evals import grounding

fractions = st.floats(0, 1, width=32)
TINY = np.array([1, 1, 1e-12, 1e-12], np.float32)  # lost in the rounding of its corners


def random_boxes(rng, n):
  size = rng.uniform(0.05, 0.6, (n, 2))
  return np.concatenate([rng.uniform(size / 2, 1 - size / 2), size], 1).astype(np.float32)


def corners(boxes):
  """(cx, cy, w, h) -> torch (x0, y0, x1, y1)."""
  boxes = torch.as_tensor(boxes, dtype=torch.float64)
  return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)


def test_iou_and_generalized_iou_are_those_of_detr():
  rng = np.random.default_rng(0)
  a, b = random_boxes(rng, 40), random_boxes(rng, 30)
  giou = detr.generalized_box_iou(corners(a), corners(b)).numpy()
  iou = detr.box_iou(corners(a), corners(b))[0].numpy()
  np.testing.assert_allclose(grounding.generalized_iou(a[:, None], b[None]), giou, atol=1e-6)
  np.testing.assert_allclose(grounding.iou(a[:, None], b[None]), iou, atol=1e-6)
  assert (giou < -0.3).any() and (iou > 0.3).any()  # the boxes are of every kind


@settings(max_examples=100, deadline=None)
@given(
  a=hnp.arrays(np.float32, 4, elements=fractions), b=hnp.arrays(np.float32, 4, elements=fractions)
)
@example(a=TINY, b=TINY)
def test_no_box_is_bad_enough_for_nan(a, b):
  iou, giou = grounding.iou(a, b), grounding.generalized_iou(a, b)
  assert 0 <= iou <= 1 + 1e-6 and -1 <= giou <= iou + 1e-6
  assert giou == pytest.approx(grounding.generalized_iou(b, a))


def test_boxes_without_area():
  point = np.array([0.5, 0.5, 0, 0], np.float32)
  other = np.array([0.2, 0.2, 0, 0], np.float32)
  assert grounding.generalized_iou(point, point) == grounding.generalized_iou(point, other) == -1
  assert grounding.iou(point, point) == 0


@pytest.mark.parametrize("seed", range(8))
def test_matching_costs_what_the_best_of_all_assignments_costs(seed):
  rng = np.random.default_rng(seed)
  predicted, true = random_boxes(rng, 5), random_boxes(rng, 1 + seed % 5)
  cost = 5 * torch.cdist(torch.tensor(predicted).double(), torch.tensor(true).double(), p=1)
  cost = (cost - 2 * detr.generalized_box_iou(corners(predicted), corners(true))).numpy()
  regions = np.arange(len(true))
  best = min(cost[list(q), regions].sum() for q in itertools.permutations(range(5), len(true)))
  found = grounding.match(predicted, true)
  assert len(set(found.tolist())) == len(true)
  assert cost[found, regions].sum() == pytest.approx(best)


def test_matching_follows_its_weights():
  true = np.array([[0.5, 0.5, 0.8, 0.8]], np.float32)
  # The first is nearer by numbers, the second overlaps more.
  predicted = np.array([[0.5, 0.5, 0.55, 0.55], [0.5, 0.5, 1.0, 1.2]], np.float32)
  assert grounding.match(predicted, true, l1_cost=1, giou_cost=0) == [0]
  assert grounding.match(predicted, true, l1_cost=0, giou_cost=1) == [1]


def unit(values):
  values = np.asarray(values, np.float32)
  return values / np.linalg.norm(values, axis=-1, keepdims=True)


# Descriptions along the axes. Two queries more than regions; the last two lie far off.
TEXTS = {
  name: np.eye(4, dtype=np.float32)[i] for i, name in enumerate(["cat", "dog", "hen", "cow"])
}
LEFT, RIGHT = (0.25, 0.5, 0.4, 0.8), (0.75, 0.5, 0.4, 0.8)
HALF = (0.25, 0.5, 0.2, 0.8)  # covers half of LEFT: IoU 0.5
SLIM = (0.75, 0.5, 0.1, 0.8)  # covers a quarter of RIGHT: IoU 0.25
AWAY = (0.05, 0.05, 0.01, 0.01)


def worked_example():
  """Four rows: two regions, one region, none, and a masked one whose outputs are NaN.

  Row 0: cat on the left (IoU 0.5, retrieved: cat), dog on the right (IoU 0.25, retrieved: hen, of
  the two in its image: dog). Row 1: hen on the left (IoU 1), retrieved: cat.
  """
  nan = [np.nan] * 4
  boxes = [[SLIM, AWAY, HALF], [AWAY, LEFT, AWAY], [AWAY] * 3, [nan] * 3]
  regions = np.array(
    [
      [unit([0, 1, 2, 0]), TEXTS["cow"], TEXTS["cat"]],
      [TEXTS["hen"], unit([2, 0, 1, 0]), TEXTS["hen"]],
      [TEXTS["cow"]] * 3,
      [nan] * 3,
    ],
    np.float32,
  )
  image = np.zeros((4, 2, 2, 3), np.uint8)
  image[:, 0, 0, 0] = np.arange(4)
  batch = {
    "image": image,
    "example_mask": np.array([True, True, True, False]),
    "boxes": np.array([[LEFT, RIGHT], [LEFT, AWAY], [AWAY] * 2, [LEFT, RIGHT]], np.float32),
    "region_mask": np.array([[True, True], [True, False], [False] * 2, [True, True]]),
  }
  extras = {
    "key": list("abcd"),
    "descriptions": [["cat", "dog"], ["hen", "ghost"], ["", ""], ["ghost", "ghost"]],
  }
  return batch, extras, (regions, np.array(boxes, np.float32))


def encode_text(texts):
  return np.stack([TEXTS[text] for text in texts])


def test_worked_example():
  batch, extras, output = worked_example()
  result = grounding.evaluate(lambda images: output, encode_text, [(batch, extras)], keep=1)
  assert result.metrics == {
    "grounding/mean_iou": pytest.approx((0.5 + 0.25 + 1) / 3, abs=1e-6),
    "grounding/recall@0.5": pytest.approx(2 / 3),
    "grounding/description_top1": pytest.approx(1 / 3),
    "grounding/description_top1_in_image": 1.0,
    "grounding/regions": 3,
    "grounding/described_regions": 3,
    "grounding/descriptions": 3,
    "grounding/examples": 3,
    "grounding/rows": 4,
  }
  (example,) = result.examples
  assert example.key == "a" and example.descriptions == ("cat", "dog")
  assert example.retrieved == ("cat", "hen")
  np.testing.assert_allclose(example.predicted, [HALF, SLIM])
  np.testing.assert_allclose(example.iou, [0.5, 0.25], atol=1e-6)


def test_the_order_of_queries_and_the_cut_into_batches_change_nothing():
  batch, extras, (regions, boxes) = worked_example()
  whole = grounding.evaluate(lambda images: (regions, boxes), encode_text, [(batch, extras)])
  parts = [
    ({k: v[i : i + 1] for k, v in batch.items()}, {k: v[i : i + 1] for k, v in extras.items()})
    for i in range(4)
  ]

  def one(images):
    i = int(images[0, 0, 0, 0])
    return regions[i : i + 1, ::-1], boxes[i : i + 1, ::-1]

  assert grounding.evaluate(one, encode_text, parts).metrics == whole.metrics


def test_regions_without_description_count_for_boxes_alone():
  batch, extras, output = worked_example()
  extras["descriptions"] = [["", "dog"], ["", ""], ["", ""], ["", ""]]
  metrics = grounding.evaluate(lambda images: output, encode_text, [(batch, extras)]).metrics
  assert metrics["grounding/regions"] == 3 and metrics["grounding/described_regions"] == 1
  assert metrics["grounding/description_top1"] == 1  # one description: nothing to confuse it with
  assert "grounding/description_top1_in_image" not in metrics
  extras["descriptions"] = [["", ""]] * 4
  result = grounding.evaluate(lambda images: output, encode_text, [(batch, extras)], keep=9)
  assert "grounding/description_top1" not in result.metrics
  assert [e.retrieved for e in result.examples] == [("", ""), ("",)]


def test_wrong_input_is_one_clear_line():
  batch, extras, (regions, boxes) = worked_example()

  def run(regions=regions, boxes=boxes, batch=batch, extras=extras):
    grounding.evaluate(lambda images: (regions, boxes), encode_text, [(batch, extras)])

  with pytest.raises(ValueError, match="2 regions but 1 queries"):
    run(regions[:, :1], boxes[:, :1])
  with pytest.raises(ValueError, match="none of the 3 images"):
    run(batch=batch | {"region_mask": np.zeros((4, 2), bool)})
  with pytest.raises(ValueError, match="'a' has 1 entries for 2 regions"):
    run(extras=extras | {"descriptions": [["cat"]] * 4})
  with pytest.raises(ValueError, match="boxes are not finite"):
    run(boxes=np.full_like(boxes, np.nan))
  with pytest.raises(ValueError, match="not finite"):
    run(regions=np.full_like(regions, np.nan))
  with pytest.raises(ValueError, match="cannot ground"):
    run(regions=regions[:, 0])
  with pytest.raises(ValueError, match="not 'descriptions'"):
    run(extras={"key": list("abcd")})


@pytest.mark.parametrize("seed", range(3))
def test_given_descriptions_as_detr_measures_boxes(seed):
  rng = np.random.default_rng(seed)
  images, queries = 6, 5
  regions = unit(rng.normal(size=(images, queries, 4)))
  boxes = np.stack([random_boxes(rng, queries) for _ in range(images)])
  given = [
    grounding.GroundingTargets(
      [str(rng.choice(list(TEXTS))) for _ in range(1 + i % 3)],
      [random_boxes(rng, 1 + (i + j) % 3) for j in range(1 + i % 3)],
    )
    for i in range(images)
  ]
  found = grounding.evaluate_given(
    lambda pixels: (regions[pixels[:, 0, 0, 0]], boxes[pixels[:, 0, 0, 0]]),
    encode_text,
    [
      (
        np.arange(a, b, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8),
        given[a:b],
      )
      for a, b in ((0, 4), (4, 6))
    ],
    iou_threshold=0.2,
  )
  nearest, merged, every, best = [], [], [], []
  for i, own in enumerate(given):
    for text, true in zip(own.descriptions, own.boxes, strict=True):
      query = np.argmax(regions[i] @ TEXTS[text])
      overlap = detr.box_iou(corners(boxes[i]), corners(true))[0]
      around = torch.cat([corners(true)[:, :2].min(0)[0], corners(true)[:, 2:].max(0)[0]])
      nearest.append(overlap[query].max().item())
      best.append(overlap.max().item())
      every += overlap[query].tolist()
      merged.append(detr.box_iou(corners(boxes[i, query][None]), around[None])[0].item())
  assert found == {
    "mean_iou": pytest.approx(np.mean(nearest), abs=1e-6),
    "recall@0.2": pytest.approx(np.mean(np.array(nearest) >= 0.2)),
    "any_query_recall@0.2": pytest.approx(np.mean(np.array(best) >= 0.2)),
    "merged_recall@0.2": pytest.approx(np.mean(np.array(merged) >= 0.2)),
    "box_recall@0.2": pytest.approx(np.mean(np.array(every) >= 0.2)),
    "descriptions": len(nearest),
    "boxes": len(every),
  }
  assert 0 < found["box_recall@0.2"] < found["any_query_recall@0.2"]


def test_given_descriptions_hand_worked():
  regions, boxes = np.stack([[TEXTS["cat"], TEXTS["dog"]]]), np.array([[HALF, RIGHT]], np.float32)
  image = np.zeros((1, 2, 2, 3), np.uint8)

  def run(texts, true):
    given = [grounding.GroundingTargets(texts, [np.array(t, np.float32) for t in true])]
    return grounding.evaluate_given(lambda _: (regions, boxes), encode_text, [(image, given)])

  # The cat's query has half of the left box; the hen's (a tie: the first) has nothing of the right.
  found = run(["cat", "hen"], [[LEFT], [RIGHT]])
  assert found["mean_iou"] == pytest.approx(0.25)
  assert (found["recall@0.5"], found["any_query_recall@0.5"]) == (0.5, 1)
  assert "merged_recall@0.5" not in found and (found["descriptions"], found["boxes"]) == (2, 2)
  # Two dogs: one is found; neither the two boxes together nor the other one.
  found = run(["dog"], [[LEFT, RIGHT]])
  assert (found["recall@0.5"], found["box_recall@0.5"], found["merged_recall@0.5"]) == (1, 0.5, 0)
  with pytest.raises(ValueError, match="no descriptions with boxes"):
    run([], [])


def test_a_run_is_matched_with_its_own_costs(tiny, monkeypatch):
  from grain_jax.evals import built

  seen = {}
  result = types.SimpleNamespace(metrics={}, examples=())
  monkeypatch.setattr(built, "_batches", lambda *args: iter(()))
  monkeypatch.setattr(
    built.grounding, "evaluate", lambda *args, **keys: seen.update(keys) or result
  )
  tiny.loss.update(box_l1_cost=7.0, box_giou_cost=3.0)
  built._grounding(tiny, types.SimpleNamespace(regions=None, text=None), None)
  assert (seen["l1_cost"], seen["giou_cost"]) == (7.0, 3.0)
