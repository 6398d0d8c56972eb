"""Average precision against COCOeval used directly, lvis-api and hand-worked cases."""

import contextlib
import importlib
import io
import sys
import types

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from grain_jax.evals import detection

STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
STATS += ("ar100_small", "ar100_medium", "ar100_large")


def random_case(seed, *, images=12, categories=5, side=300, crowds=True):
  """Objects of all sizes and detections near them, some of the wrong category; with ties."""
  rng = np.random.default_rng(seed)
  count = 60
  size = np.exp(rng.uniform(np.log(6), np.log(250), (count, 2)))
  corner = rng.uniform(0, side - size)
  box = np.concatenate([corner, size], 1)
  image, category = rng.integers(1, images + 1, count), rng.integers(1, categories + 1, count)
  objects = detection.Objects(
    image,
    category,
    box,
    box[:, 2] * box[:, 3] * rng.uniform(0.5, 1, count),
    rng.random(count) < (0.15 if crowds else 0),
  )
  which = rng.integers(0, count, 150)
  moved = box[which] + rng.normal(0, 0.1, (150, 4)) * size[which].mean(1, keepdims=True)
  moved[:, 2:] = np.maximum(moved[:, 2:], 2)
  wrong = rng.random(150) < 0.3
  found = detection.Detections(
    image[which],
    np.where(wrong, rng.integers(1, categories + 1, 150), category[which]),
    moved,
    rng.integers(0, 30, 150) / 30,
  )
  return objects, found


def as_dicts(objects, found):
  truth = [
    {
      "id": n,
      "image_id": int(i),
      "category_id": int(c),
      "bbox": b.tolist(),
      "area": float(a),
      "iscrowd": int(crowd),
    }
    for n, (i, c, b, a, crowd) in enumerate(zip(*objects, strict=True), 1)
  ]
  results = [
    {"image_id": int(i), "category_id": int(c), "bbox": b.tolist(), "score": float(s)}
    for i, c, b, s in zip(*found, strict=True)
  ]
  return truth, results


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_cocoeval(seed):
  objects, found = random_case(seed)
  truth, results = as_dicts(objects, found)
  with contextlib.redirect_stdout(io.StringIO()):
    coco = COCO()
    coco.dataset = {
      # Images and categories without anything are there too.
      "images": [{"id": i} for i in range(1, 20)],
      "categories": [{"id": i} for i in range(1, 9)],
      "annotations": truth,
    }
    coco.createIndex()
    direct = COCOeval(coco, coco.loadRes(results), "bbox")
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
  ours = detection.average_precision(objects, found).summary()
  assert set(ours) == set(STATS) and 0.05 < ours["ap"] < 0.95
  np.testing.assert_allclose([ours[name] for name in STATS], direct.stats, atol=1e-6)


def test_a_category_takes_little_room():
  """Built data has one for each description: 65,000 of CC3M's val would be 6 GB of full tables."""
  objects, found = random_case(0, categories=40)
  tables = detection.average_precision(objects, found)
  categories = len(tables.categories)
  assert categories > 25 and tables.precision.nbytes + tables.recall.nbytes <= 2000 * categories


def lvis_api(monkeypatch):
  """lvis-api, which needs OpenCV to draw and a NumPy that still has np.float."""
  monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))
  monkeypatch.setattr(np, "float", float, raising=False)
  try:
    return importlib.import_module("lvis")
  except ModuleNotFoundError:
    pytest.skip("lvis-api is not installed: pip install --no-deps lvis==0.5.3")


def federation_of(objects, seed, *, images, categories):
  rng = np.random.default_rng(seed)
  absent, not_exhaustive = {}, {}
  for image in range(1, images + 1):
    present = set(objects.category[objects.image == image].tolist())
    others = [c for c in range(1, categories + 1) if c not in present]
    absent[image] = frozenset(c for c in others if rng.random() < 0.4)
    not_exhaustive[image] = frozenset(c for c in sorted(present) if rng.random() < 0.5)
  return detection.Federation(absent, not_exhaustive)


@pytest.mark.parametrize("seed", range(3))
def test_federated_figures_are_those_of_lvis_api(seed, monkeypatch):
  lvis = lvis_api(monkeypatch)
  objects, found = random_case(seed, crowds=False)
  found.box[::9, 2:] = 0  # as of queries whose boxes lie outside of the image
  federation = federation_of(objects, seed, images=12, categories=5)
  truth, results = as_dicts(objects, found)
  gt = lvis.LVIS.__new__(lvis.LVIS)
  gt.logger = __import__("logging").getLogger("lvis")
  gt.dataset = {
    "images": [
      {
        "id": i,
        "neg_category_ids": sorted(federation.absent[i]),
        "not_exhaustive_category_ids": sorted(federation.not_exhaustive[i]),
      }
      for i in range(1, 13)
    ],
    "categories": [{"id": i, "frequency": "rcfrc"[i - 1]} for i in range(1, 6)],
    "annotations": [a | {"segmentation": []} for a in truth],
  }
  gt._create_index()
  direct = lvis.LVISEval(gt, results, "bbox")
  direct.run()
  tables = detection.average_precision(objects, found, federation=federation, limits=(1, 10, 300))
  ours, theirs = tables.summary(), direct.get_results()
  names = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium"}
  names |= {"APl": "ap_large", "AR@300": "ar300"}
  for theirs_name, name in names.items():
    assert ours[name] == pytest.approx(theirs[theirs_name], abs=1e-6)
  for theirs_name, of in {"APr": [1, 4], "APc": [2, 5], "APf": [3]}.items():
    assert tables.summary(of)["ap"] == pytest.approx(theirs[theirs_name], abs=1e-6)
  plain = detection.average_precision(objects, found, limits=(1, 10, 300)).summary()
  assert plain["ap"] != pytest.approx(ours["ap"])  # the protocols differ on this case


def objects_at(*boxes, image=1, category=1):
  boxes = np.asarray(boxes, np.float64)
  return detection.Objects(
    np.full(len(boxes), image),
    np.full(len(boxes), category),
    boxes,
    boxes[:, 2] * boxes[:, 3],
    np.zeros(len(boxes), bool),
  )


def found_at(*boxes, scores, images=None):
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
  images = np.ones(len(boxes), int) if images is None else np.asarray(images)
  return detection.Detections(images, np.ones(len(boxes), int), boxes, np.asarray(scores, float))


BOX = (10, 10, 40, 40)


def test_hand_worked_cases():
  def ap(found):
    return detection.average_precision(objects_at(BOX), found).summary()

  assert ap(found_at(BOX, scores=[0.1]))["ap"] == pytest.approx(1)
  # Half as wide: IoU .5 counts at the first of the ten thresholds alone.
  half = ap(found_at((10, 10, 20, 40), scores=[1]))
  assert (half["ap50"], half["ap75"], half["ap"]) == pytest.approx((1, 0, 0.1))
  shifted = ap(found_at((32, 10, 40, 40), scores=[1]))  # IoU 18/62
  assert shifted["ap"] == shifted["ar100"] == 0
  # A false box above the right one: precision 1/2 at every recall.
  assert ap(found_at((90, 90, 9, 9), BOX, scores=[0.9, 0.1]))["ap"] == pytest.approx(0.5)
  assert ap(found_at(scores=[]))["ap"] == 0  # nothing found
  assert "ap_small" not in half and half["ap_medium"] == half["ap"]  # 1,600 square pixels


def test_federation_judges_only_what_is_known():
  objects = objects_at(BOX)  # image 1
  false = (90, 90, 9, 9)

  def ap(absent, not_exhaustive, image):
    federation = detection.Federation(
      {1: frozenset(), 2: frozenset(absent)}, {1: frozenset(not_exhaustive), 2: frozenset()}
    )
    found = found_at(false, BOX, scores=[0.9, 0.1], images=[image, 1])
    return detection.average_precision(objects, found, federation=federation).summary()["ap"]

  assert ap([], [], 2) == pytest.approx(1)  # the category was not looked for in image 2
  assert ap([1], [], 2) == pytest.approx(0.5)  # known not to be there: false
  assert ap([], [], 1) == pytest.approx(0.5)  # image 1 has it, and all of it is annotated
  assert ap([], [1], 1) == pytest.approx(1)  # ... or not all: perhaps it is right


def test_boxes_in_pixels_are_clipped_to_the_image():
  boxes = [[0.5, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 2.0], [2.0, 0.5, 0.1, 0.1]]
  expected = [[50, 0, 100, 50], [0, 0, 50, 50], [200, 22.5, 0, 5]]
  np.testing.assert_allclose(detection.to_pixels(boxes, 200, 50), expected, atol=1e-9)


def test_the_most_similar_class_wins_and_ties_go_to_the_first():
  classes = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
  labels, scores = detection.classify(np.array([[[0.6, 0.8], [1, 0]]], np.float32), classes)
  assert labels.tolist() == [[1, 0]] and scores[0] == pytest.approx([0.8, 1])


def test_equal_classes_tie_though_their_products_round_otherwise(rng):
  classes = rng.normal(size=(41, 128)).astype(np.float32)
  classes /= np.linalg.norm(classes, axis=1, keepdims=True)
  classes[40] = classes[17] = classes[3]
  near = classes[3] + 0.02 * rng.normal(size=(20, 5, 128)).astype(np.float32)
  assert set(detection.classify(near, classes)[0].flat) == {3}


# Two queries: the first on the left half, the second on the right.
HALVES = np.array([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]], np.float32)
TEXTS = {"a cat": [1, 0, 0], "a dog": [0, 1, 0], "a hen": [0, 0, 1]}


def encode_text(texts):
  return np.asarray([TEXTS[text] for text in texts], np.float32)


def built_batch(*, descriptions, mask=(True, True)):
  batch = {
    "image": np.zeros((2, 96, 96, 3), np.uint8),
    "example_mask": np.array(mask),
    "boxes": np.stack([HALVES, HALVES]),
    "region_mask": np.array([[True, True], [True, False]]),
  }
  return batch, {"key": ["a", "b"], "descriptions": descriptions}


def test_built_scenes_hand_worked():
  batches = [built_batch(descriptions=[["a cat", "a dog"], ["a cat", "not there"]])]
  right = np.asarray([[[1, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 0.6, 0.8]]], np.float32)

  def run(regions, **more):
    output = np.asarray(regions, np.float32), np.stack([HALVES, HALVES])
    return detection.evaluate_built(lambda images: output, encode_text, batches, **more)

  results = run(right)
  # The query of the second image that is nowhere is 'a dog' at .6, below the right one at 1.
  assert results == {
    "detection/ap": pytest.approx(1),
    "detection/ap50": pytest.approx(1),
    "detection/ap75": pytest.approx(1),
    "detection/classes": 2,
    "detection/boxes": 3,
    "detection/examples": 2,
    "detection/rows": 2,
  }
  swapped = run(right[:, ::-1])  # each class on the other side
  assert swapped["detection/ap"] == 0
  assert run(right, classes=list(TEXTS))["detection/classes"] == 3


def test_built_scenes_leave_out_masked_rows():
  text = [["a cat", "a dog"], ["unknown", "unknown"]]
  output = np.stack([[[1, 0, 0], [0, 1, 0]], [[np.nan] * 3] * 2]).astype(np.float32)
  boxes = np.stack([HALVES, np.full_like(HALVES, np.nan)])
  results = detection.evaluate_built(
    lambda images: (output, boxes),
    encode_text,
    [built_batch(descriptions=text, mask=(True, False))],
  )
  assert results["detection/ap"] == pytest.approx(1)
  assert (results["detection/examples"], results["detection/rows"]) == (1, 2)


def test_wrong_input_is_one_clear_line():
  output = np.tile(np.eye(3, dtype=np.float32)[:2], (2, 1, 1)), np.stack([HALVES, HALVES])

  def run(descriptions, **more):
    batches = [built_batch(descriptions=descriptions)]
    detection.evaluate_built(lambda images: output, encode_text, batches, **more)

  with pytest.raises(ValueError, match="none of 2 rows has a described region"):
    run([["", " "], ["", ""]])
  with pytest.raises(ValueError, match="1 descriptions are none of the 1 classes, 'a dog'"):
    run([["a cat", "a dog"], ["a cat", ""]], classes=["a cat"])
  with pytest.raises(ValueError, match="there is no object"):
    detection.average_precision(
      objects_at(BOX)._replace(crowd=np.ones(1, bool)), found_at(BOX, scores=[1])
    )
  with pytest.raises(ValueError, match="not finite"):
    detection.average_precision(objects_at(BOX), found_at(BOX, scores=[np.nan]))
