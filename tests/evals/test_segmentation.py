"""Segmentation against torch's interpolation, scikit-learn's metrics and PCA, and cases by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from sklearn.decomposition import PCA

from grain_jax.evals import segmentation
from grain_jax.evals.inputs import images as images_lib

SIZES = [
  ((3, 5), (17, 9)),
  ((14, 14), (50, 37)),
  ((4, 4), (4, 4)),
  ((7, 6), (3, 2)),
  ((1, 1), (5, 4)),
]
IGNORED = segmentation.IGNORED


def unit_rows(values):
  return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def torch_bilinear(values, size):
  """[h, w, C] -> f64 [H, W, C] by torch, which rounds less in double precision."""
  planes = torch.as_tensor(values, dtype=torch.float64).permute(2, 0, 1)[None]
  out = torch.nn.functional.interpolate(planes, size, mode="bilinear", align_corners=False)
  return out[0].permute(1, 2, 0).numpy()


def random_masks(rng, classes, shape=(31, 23)):
  """(true with ignored pixels, predicted)."""
  true = rng.integers(0, classes, shape).astype(np.uint8)
  predicted = np.where(rng.random(shape) < 0.6, true, rng.integers(0, classes, shape))
  true[rng.random(shape) < 0.2] = IGNORED
  return true, predicted.astype(np.uint8)


@pytest.mark.parametrize(("cells", "size"), SIZES)
def test_upsampling_is_that_of_torch(cells, size):
  values = np.random.default_rng(0).standard_normal((*cells, 3)).astype(np.float32)
  found = segmentation.upsample(values, size)
  np.testing.assert_allclose(found, torch_bilinear(values, size), atol=1e-6)


def test_the_label_of_a_pixel_is_the_nearest_class_of_its_upsampled_feature():
  """Features upsampled by torch, their cosines with the classes: the way CLIPpy describes it."""
  rng = np.random.default_rng(1)
  patches = unit_rows(rng.standard_normal((6, 5, 8)))
  texts = unit_rows(rng.standard_normal((30, 8)))
  features = torch.as_tensor(torch_bilinear(patches, (47, 41)))
  cosines = torch.nn.functional.cosine_similarity(
    features[:, :, None], torch.as_tensor(texts, dtype=torch.float64)[None, None], dim=-1
  )
  found = segmentation.label_map(patches @ texts.T, (47, 41))
  assert len(np.unique(found)) > 10
  np.testing.assert_array_equal(found, cosines.argmax(dim=-1).numpy())


def test_blocks_of_rows_change_nothing():
  scores = np.random.default_rng(2).standard_normal((5, 5, 7)).astype(np.float32)
  whole = segmentation.label_map(scores, (33, 20))
  for block in (1, 7 * 20 * 4, 7 * 20 * 32):
    np.testing.assert_array_equal(
      segmentation.label_map(scores, (33, 20), block_elements=block), whole
    )


def test_more_classes_than_a_byte_holds():
  scores = np.zeros((2, 2, 300), np.float32)
  scores[..., 299] = 1
  assert (segmentation.label_map(scores, (4, 4)) == 299).all()


@pytest.mark.parametrize("classes", [2, 9, 40])
def test_confusion_and_its_means_are_those_of_sklearn(classes):
  rng = np.random.default_rng(classes)
  total = np.zeros((classes, classes), np.int64)
  all_true, all_predicted = [], []
  for _ in range(3):
    true, predicted = random_masks(rng, classes)
    total += segmentation.confusion(true, predicted, classes)
    all_true.append(true[true != IGNORED])
    all_predicted.append(predicted[true != IGNORED])
  true, predicted = np.concatenate(all_true), np.concatenate(all_predicted)
  np.testing.assert_array_equal(
    total, metrics.confusion_matrix(true, predicted, labels=range(classes))
  )
  each = metrics.jaccard_score(true, predicted, labels=range(classes), average=None)
  np.testing.assert_allclose(segmentation.iou(total), each, atol=1e-6)
  assert segmentation.mean_iou(total) == pytest.approx(each.mean(), abs=1e-6)
  accuracy = metrics.accuracy_score(true, predicted)
  assert segmentation.pixel_accuracy(total) == pytest.approx(accuracy, abs=1e-6)


def test_a_class_that_never_occurs_is_left_out_and_one_only_predicted_is_not():
  true = np.array([[0, 0, 1, IGNORED]], np.uint8)
  predicted = np.array([[0, 2, 1, 3]], np.uint8)
  counts = segmentation.confusion(true, predicted, 4)
  np.testing.assert_allclose(segmentation.iou(counts), [1 / 2, 1, 0, np.nan])
  assert segmentation.mean_iou(counts) == pytest.approx(1.5 / 3)
  assert segmentation.pixel_accuracy(counts) == pytest.approx(2 / 3)


def test_nothing_but_ignored_pixels():
  counts = segmentation.confusion(np.full((2, 2), IGNORED, np.uint8), np.zeros((2, 2), np.uint8), 3)
  assert np.isnan(segmentation.mean_iou(counts)) and np.isnan(segmentation.pixel_accuracy(counts))


@pytest.mark.parametrize("true", [[[3]], [[0]]])
def test_labels_beyond_the_classes(true):
  predicted = np.array([[0 if true == [[3]] else 5]], np.uint8)
  with pytest.raises(ValueError, match="there are 3 classes"):
    segmentation.confusion(np.array(true, np.uint8), predicted, 3)


@pytest.mark.parametrize("shape", [(60, 12), (9, 30)])
def test_principal_components_are_those_of_sklearn(shape):
  features = np.random.default_rng(3).standard_normal(shape) * np.linspace(1, 3, shape[1]) + 5
  ours = segmentation.principal_components(features, 6)
  theirs = PCA(6, svd_solver="full").fit(features).components_
  np.testing.assert_allclose(np.abs(np.sum(ours * theirs, axis=1)), 1, atol=1e-6)
  along = (features - features.mean(axis=0)) @ ours.T
  assert (along[np.abs(along).argmax(axis=0), range(6)] > 0).all()


@settings(max_examples=50, deadline=None)
@given(rank=st.integers(0, 4), count=st.integers(1, 8), seed=st.integers(0, 99))
def test_there_are_no_more_components_than_the_rank_of_the_features(rank, count, seed):
  rng = np.random.default_rng(seed)
  features = rng.standard_normal((20, rank)) @ rng.standard_normal((rank, 10)) + 1
  found = segmentation.principal_components(features.astype(np.float32), count)
  assert found.shape == (min(rank, count), 10)
  np.testing.assert_allclose(found @ found.T, np.eye(len(found)), atol=1e-6)


def test_patches_belong_to_the_component_of_largest_coordinate_in_sklearns_pca():
  patches = unit_rows(np.random.default_rng(4).standard_normal((7, 6, 16)) + 2)
  scores = segmentation.group_scores(patches)
  assert scores.shape == (7, 6, 8)
  flat = patches.reshape(-1, 16)
  coordinates = PCA(8, svd_solver="full").fit_transform(flat)
  coordinates *= np.sign(coordinates[np.abs(coordinates).argmax(axis=0), range(8)])
  np.testing.assert_array_equal(scores.reshape(-1, 8).argmax(1), coordinates.argmax(axis=1))
  lengths = np.linalg.norm(flat - flat.mean(axis=0), axis=1, keepdims=True)
  np.testing.assert_allclose(scores.reshape(-1, 8), coordinates / lengths, atol=1e-5)


def test_equal_patches_are_one_group():
  scores = segmentation.group_scores(np.full((4, 4, 9), 1 / 3, np.float32))
  assert scores.shape == (4, 4, 1)
  assert (segmentation.label_map(scores, (8, 8)) == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_best_overlaps_are_the_best_of_sklearns_jaccard_scores(seed):
  rng = np.random.default_rng(seed)
  segments, groups = random_masks(rng, 6, (20, 15))
  segments[segments == 3] = 4  # ids need not follow each other
  known = segments != IGNORED
  expected = [
    max(
      metrics.jaccard_score((segments == s)[known], (groups == g)[known]) for g in np.unique(groups)
    )
    for s in np.unique(segments[known])
    if s
  ]
  found = segmentation.best_overlaps(segments, groups)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert len(found) == 4


def test_overlap_worked_by_hand():
  segments = np.array([[1, 1, 1, 0, IGNORED], [2, 0, 0, 0, IGNORED]], np.uint8)
  groups = np.array([[7, 7, 8, 8, 7], [9, 9, 8, 8, 7]], np.uint8)
  np.testing.assert_allclose(segmentation.best_overlaps(segments, groups), [2 / 3, 1 / 2])
  assert not len(segmentation.best_overlaps(np.zeros((2, 2), np.uint8), groups[:, :2]))


def test_similarity_map_is_the_cosine_of_each_patch_upsampled():
  rng = np.random.default_rng(5)
  patches, text = unit_rows(rng.standard_normal((4, 3, 6))), unit_rows(rng.standard_normal(6))
  found = segmentation.similarity_map(patches, text, (20, 15))
  cosine = torch.nn.functional.cosine_similarity(
    torch.as_tensor(patches), torch.as_tensor(text)[None, None], dim=-1
  )
  np.testing.assert_allclose(
    found, torch_bilinear(cosine[..., None].numpy(), (20, 15))[..., 0], atol=1e-6
  )


def test_plane_is_the_two_first_coordinates_of_sklearns_pca():
  features = np.random.default_rng(6).standard_normal((25, 7)) * [5, 3, 1, 1, 1, 1, 1]
  ours, theirs = (
    segmentation.project_to_plane(features),
    PCA(2, svd_solver="full").fit_transform(features),
  )
  theirs *= np.sign(np.sum(ours * theirs, axis=0))
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  np.testing.assert_array_equal(segmentation.project_to_plane(features[:1]), [[0, 0]])


def test_prompts_have_their_article():
  assert segmentation.photo_prompts(["cat", "apple", "Umbrella"]) == [
    "a photo of a cat",
    "a photo of an apple",
    "a photo of an Umbrella",
  ]


# A world in which the red channel of a pixel says which text it shows.

CLASSES = ["cat", "apple", "house"]
TEXTS = ["a plain background", *segmentation.photo_prompts(CLASSES)]
CELL, SIDE = 4, 16


def encode_text(texts):
  return np.stack([np.eye(8, dtype=np.float32)[TEXTS.index(t)] for t in texts])


def encode_patches(images):
  reds = images[:, CELL // 2 :: CELL, CELL // 2 :: CELL, 0]
  return np.eye(8, dtype=np.float32)[reds]


def picture(cells):
  """u8 [SIDE, SIDE, 3] of a grid of ids."""
  ids = np.kron(np.asarray(cells), np.ones((CELL, CELL), int))
  return np.repeat(ids[..., None], 3, axis=-1).astype(np.uint8)


def batch(cells, masks, counts=None):
  images = np.stack([picture(c) for c in cells])
  rows = len(images)
  mask = [True] * rows if counts is None else counts
  png = [b"" if m is None else images_lib.png(np.asarray(m, np.uint8)) for m in masks]
  return (
    {"image": images, "example_mask": np.array(mask)},
    {"key": [f"k{i}" for i in range(rows)], "mask": png},
  )


def evaluate(batches, **options):
  options = {"classes": CLASSES, "background": TEXTS[:1], **options}
  return segmentation.evaluate_built(encode_patches, encode_text, batches, **options)


def test_scenes_against_torch_and_sklearn():
  rng = np.random.default_rng(7)
  patches = unit_rows(rng.standard_normal((5, 4, 4, 8)))
  scores = [torch_bilinear(p[..., :4], (24, 20)) for p in patches]  # texts are axes
  predicted = [s.argmax(axis=-1) for s in scores]
  masks = [np.where(rng.random((24, 20)) < 0.5, p, rng.integers(0, 4, (24, 20))) for p in predicted]
  cells = [np.full((4, 4), i) for i in range(5)]  # the number of the image
  result = segmentation.evaluate_built(
    lambda images: patches[images[:, 0, 0, 0]],
    encode_text,
    [batch(cells[:3], masks[:3]), batch(cells[3:], masks[3:])],
    classes=CLASSES,
    background=TEXTS[:1],
    keep=2,
  )
  true, flat = np.ravel(masks), np.ravel(predicted)
  named = np.ravel([1 + s[..., 1:].argmax(axis=-1) for s in scores])
  found, objects = result.metrics, true > 0
  assert found["segmentation/miou"] == pytest.approx(
    metrics.jaccard_score(true, flat, average="macro"), abs=1e-6
  )
  assert found["segmentation/pixel_accuracy"] == pytest.approx(np.mean(true == flat))
  assert found["segmentation/miou_foreground"] == pytest.approx(
    metrics.jaccard_score(true[objects], named[objects], average="macro"), abs=1e-6
  )
  assert found["segmentation/pixel_accuracy_foreground"] == pytest.approx(
    np.mean(true[objects] == named[objects])
  )
  assert found["segmentation/classes"] == 4 and found["segmentation/rows"] == 5
  assert [e.key for e in result.examples] == ["k0", "k1"]
  example = result.examples[1]
  np.testing.assert_array_equal(example.true, masks[1])
  np.testing.assert_array_equal(example.predicted, predicted[1])
  np.testing.assert_array_equal(example.image, picture(cells[1]))
  assert example.labels == {0: "background", 1: "cat", 2: "apple", 3: "house"}
  assert example.groups.shape == (24, 20)


def test_what_is_predicted_rightly_scores_one():
  cells = [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 2, 2]]
  found = evaluate([batch([cells], [cells])]).metrics
  for name in ("segmentation/miou", "segmentation/miou_foreground", "segmentation/pixel_accuracy"):
    assert found[name] == 1
  # Three features have two components: one object is a group, the other shares one with the rest.
  assert found["grouping/jaccard"] == pytest.approx((1 + 4 / 12) / 2)
  assert found["grouping/segments"] == 2
  assert found["segmentation/classes"] == 3  # nothing shows or is taken for a house


def test_only_rows_that_count_and_have_a_mask_are_segmented():
  right, wrong = np.zeros((4, 4), int), np.ones((4, 4), int)
  counts = [True, False, True]
  found = evaluate([batch([right, wrong, right], [right, right, None], counts)]).metrics
  assert found["segmentation/miou"] == 1 and found["segmentation/images"] == 1
  assert found["segmentation/examples"] == 2 and found["segmentation/rows"] == 3
  assert "grouping/jaccard" not in found and found["grouping/segments"] == 0


def test_several_prompts_for_the_background():
  cells = [[0, 1, 2, 2]] * 4
  mask = [[0, 0, 1, 1]] * 4
  found = evaluate([batch([cells], [mask])], background=TEXTS[:2], classes=CLASSES[1:]).metrics
  assert found["segmentation/miou"] == 1 and found["segmentation/pixel_accuracy"] == 1


def test_templates_of_the_user():
  asked = []

  def remember(texts):
    asked.extend(texts)
    return np.eye(8, dtype=np.float32)[: len(texts)]

  cells = np.zeros((4, 4), int)
  segmentation.evaluate_built(
    encode_patches, remember, [batch([cells], [cells])], classes=["cat"], templates=["my {}"]
  )
  assert asked == [*segmentation.BACKGROUNDS, "my cat"]


@pytest.mark.parametrize(
  ("mask", "match"),
  [
    (np.full((4, 4), 4), "label 4, but there are 3 classes"),
    (np.zeros((4, 4, 3)), "mode RGB"),
    (None, "none of the 1 images"),
  ],
)
def test_masks_that_do_not_fit(mask, match):
  with pytest.raises(ValueError, match=match) as error:
    evaluate([batch([np.zeros((4, 4), int)], [mask])])
  assert "\n" not in str(error.value)


def test_a_mask_that_is_no_picture():
  rows, extras = batch([np.zeros((4, 4), int)], [np.zeros((4, 4))])
  extras["mask"][0] = extras["mask"][0][:40]
  with pytest.raises(ValueError, match="mask of 'k0' cannot be read"):
    evaluate([(rows, extras)])


@pytest.mark.parametrize(
  ("patches", "match"),
  [
    (np.zeros((1, 4, 8)), r"returned \[1, 4, 8\] for 1 images"),
    (np.zeros((2, 4, 4, 8)), r"for 1 images"),
    (np.full((1, 4, 4, 8), np.nan), "not finite"),
    (np.ones((1, 4, 4, 8)), "length 2.83"),
  ],
)
def test_patches_that_are_no_use(patches, match):
  with pytest.raises(ValueError, match=match):
    segmentation.checked_patches(patches, np.zeros((1, SIDE, SIDE, 3), np.uint8))


def test_too_many_classes_for_a_mask():
  with pytest.raises(ValueError, match="room for 1 to 254"):
    evaluate([], classes=[str(i) for i in range(255)])
