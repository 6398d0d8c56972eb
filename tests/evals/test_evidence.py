"""What results rest on: the interval is SciPy's; counts and chance of every family, by hand."""

import itertools

import numpy as np
import pytest
from scipy import stats

from grain_jax.evals import evidence


@pytest.mark.parametrize(
  ("right", "count"), [(0, 1), (1, 1), (0, 40), (12, 40), (39, 40), (5000, 9999)]
)
def test_the_interval_is_scipys(right, count):
  theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
  found = evidence.interval(right / count, count)
  np.testing.assert_allclose(found, [theirs.low, theirs.high], atol=1e-7)


BUILT = {
  "zero_shot/seen/top1": 0.4, "zero_shot/seen/top5": 0.8, "zero_shot/unseen/top1": 0.1,
  "zero_shot/descriptors/unseen/top1": 0.2, "zero_shot/top1": 0.3, "zero_shot/mean_per_class": 0.2,
  "zero_shot/seen/examples": 300, "zero_shot/unseen/examples": 40, "zero_shot/examples": 340,
  "zero_shot/classes": 50, "zero_shot/rows": 341, "zero_shot/average11/top1": 0.5,
  "zero_shot/dtd/top1": 0.1, "zero_shot/dtd/regions/alpha=0.3/top5": 0.4,
  "zero_shot/dtd/name/mean_per_class": 0.1, "zero_shot/dtd/examples": 20,
  "zero_shot/dtd/rows": 21, "zero_shot/dtd/classes": 47,
  "retrieval/image_to_text/r5": 0.5, "retrieval/text_to_image/r5": 0.5, "retrieval/pairs": 200,
  "retrieval/images": 40, "retrieval/rows": 41, "retrieval/examples": 41,
  "composition/swap_att": 0.5, "composition/swap_att/pairs": 12, "composition/average": 0.5,
  "composition/examples": 400, "composition/rows": 400, "composition/images": 400,
  "composition/aro_coco_order/accuracy": 0.3, "composition/aro_coco_order/perturbations": 4,
  "composition/aro_coco_order/examples": 900, "composition/aro_coco_order/rows": 900,
  "grounding/recall@0.5": 0.5, "grounding/mean_iou": 0.5, "grounding/description_top1": 0.02,
  "grounding/regions": 60, "grounding/described_regions": 50, "grounding/descriptions": 25,
  "grounding/examples": 30, "grounding/rows": 30,
  "grounding/mine/recall@0.5": 0.5, "grounding/mine/box_recall@0.5": 0.5,
  "grounding/mine/descriptions": 70, "grounding/mine/boxes": 90, "grounding/mine/examples": 80,
  "grounding/mine/rows": 80,
  "detection/ap": 0.1, "detection/examples": 7, "detection/rows": 7,
  "region_classification/crop/top5": 0.1, "region_classification/boxes": 500,
  "region_classification/classes": 50, "region_classification/examples": 100,
  "region_classification/rows": 100,
  "fine_grained/fg_ovd_hard/crop/accuracy": 0.1, "fine_grained/fg_ovd_hard/crop/boxes": 1000,
  "fine_grained/fg_ovd_hard/chance": 1 / 11, "fine_grained/fg_ovd_hard/examples": 500,
  "fine_grained/fg_ovd_hard/rows": 500,
  "segmentation/miou": 0.1, "segmentation/images": 9, "segmentation/rows": 9,
  "grouping/voc2012/jaccard": 0.1, "grouping/voc2012/segments": 30,
  "grouping/voc2012/examples": 12, "grouping/voc2012/rows": 12,
  "waterbirds/test/landbird_on_water": 0.5, "waterbirds/test/landbird_on_water/examples": 30,
  "waterbirds/test/landbird_on_land": 0.9, "waterbirds/test/landbird_on_land/examples": 300,
  "waterbirds/test/accuracy": 0.85, "waterbirds/test/worst_group": 0.5,
  "waterbirds/test/examples": 330, "waterbirds/test/rows": 330,
  "linear_probe/top1": 0.5, "linear_probe/c": 0.3, "linear_probe/examples": 12,
  "linear_probe/classes": 2, "linear_probe/rows": 12,
}  # fmt: skip


@pytest.mark.parametrize(
  ("name", "count", "chance", "share"),
  [
    ("zero_shot/seen/top5", 300, 5 / 50, True),
    ("zero_shot/unseen/top1", 40, 1 / 50, True),
    ("zero_shot/descriptors/unseen/top1", 40, 1 / 50, True),
    ("zero_shot/top1", 340, 1 / 50, True),
    ("zero_shot/mean_per_class", 340, None, False),
    ("zero_shot/average11/top1", None, None, False),
    ("zero_shot/dtd/top1", 20, 1 / 47, True),
    ("zero_shot/dtd/regions/alpha=0.3/top5", 20, 5 / 47, True),
    ("zero_shot/dtd/name/mean_per_class", 20, None, False),
    ("retrieval/text_to_image/r5", 200, 5 / 40, True),
    ("composition/swap_att", 12, 0.5, True),
    ("composition/aro_coco_order/accuracy", 900, 0.2, True),
    ("grounding/recall@0.5", 60, None, True),
    ("grounding/description_top1", 50, 1 / 25, True),
    ("grounding/mine/recall@0.5", 70, None, True),
    ("grounding/mine/box_recall@0.5", 90, None, True),
    ("region_classification/crop/top5", 500, 5 / 50, True),
    ("fine_grained/fg_ovd_hard/crop/accuracy", 1000, 1 / 11, True),
    ("fine_grained/fg_ovd_hard/chance", None, None, False),
    ("waterbirds/test/landbird_on_water", 30, 0.5, True),
    ("waterbirds/test/accuracy", 330, 0.5, True),
    ("linear_probe/top1", 12, 0.5, True),
    ("linear_probe/c", None, None, False),
  ],
)
def test_counts_and_chance_are_those_of_the_protocol(name, count, chance, share):
  found = evidence.find(name, BUILT)
  assert (found.count, found.share) == (count, share)
  assert found.chance == (None if chance is None else pytest.approx(chance))


def test_chance_of_image_to_text_is_that_of_drawing_captions():
  """200 captions, five of each of 40 images: five drawn without an own one, by counting."""
  missed = stats.hypergeom(200, 5, 5).pmf(0)
  found = evidence.find("retrieval/image_to_text/r5", BUILT)
  assert found.count == 40 and found.chance == pytest.approx(1 - missed)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("zero_shot/seen/top1", ""),
    ("zero_shot/dtd/top1", "only 20 images; 95 % interval 2.8 to 30.1 %"),
    ("zero_shot/dtd/name/mean_per_class", "only 20 images"),
    ("retrieval/text_to_image/r5", "only 40 images"),
    ("grounding/description_top1", "only 30 images; not above chance, 4 %"),
    ("detection/ap", "only 7 images"),
    ("segmentation/miou", "only 9 images"),
    ("grouping/voc2012/jaccard", "only 12 images"),
    ("region_classification/crop/top5", "not above chance, 10 %; 95 % interval 7.7 to 12.9 %"),
    ("waterbirds/test/worst_group", "only 30 images in the smallest group"),
    ("waterbirds/test/accuracy", ""),
    ("composition/average", ""),
    ("zero_shot/examples", ""),
  ],
)
def test_what_rests_on_little_is_said(name, words):
  said = evidence.note(name, BUILT)
  assert said.startswith(words) and bool(said) == bool(words), said


def test_a_note_never_fails_whatever_is_missing():
  for name, other in itertools.product(BUILT, BUILT):
    evidence.note(name, {name: BUILT[name], other: BUILT[other]})  # whatever is missing
