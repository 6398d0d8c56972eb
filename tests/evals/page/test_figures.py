"""Figures of masks and of region weights: what is drawn is what was given."""

import numpy as np
import pytest
from matplotlib import colors

from grain_jax.evals import segmentation
from grain_jax.evals.page import figures


def example(key="a"):
  true = np.zeros((6, 6), np.uint8)
  true[:3, :3], true[3:, 3:], true[0, 5] = 7, 2, segmentation.IGNORED
  predicted = np.where(true == 7, 7, 0).astype(np.uint8)
  predicted[5, 0] = 9
  labels = {0: "background", 2: "a name longer than the legend is", 7: "dog", 9: "cow"}
  image = np.full((6, 6, 3), 128, np.uint8)
  return segmentation.Example(key, image, true, predicted, (true % 3).astype(np.uint16), labels)


def test_a_class_has_one_colour_in_both_masks_and_the_legend():
  sheet = figures.mask_sheet([example(), example("b")])
  axes = sheet.get_axes()
  assert len(axes) == 10
  true, predicted = (np.asarray(axes[i].get_images()[0].get_array()) for i in (1, 2))
  legend = {
    text.get_text(): colors.to_rgb(patch.get_facecolor())
    for text, patch in zip(
      axes[4].get_legend().get_texts(), axes[4].get_legend().get_patches(), strict=True
    )
  }
  assert list(legend) == ["background", "a name longer than th…", "dog", "another class"]
  np.testing.assert_allclose(predicted[5, 0], legend["another class"])
  np.testing.assert_allclose(true[0, 0], legend["dog"])
  np.testing.assert_allclose(predicted[0, 0], legend["dog"])
  np.testing.assert_allclose(true[5, 5], legend["a name longer than th…"])
  np.testing.assert_allclose(true[0, 5], colors.to_rgb("#BDBDBD"))
  assert len(set(legend.values())) == 4


def test_the_grey_of_the_masks_is_explained_with_its_count():
  """By hand: of three pixels of a class that is not in the picture one is on an object."""
  one = example()
  one.predicted[5, 0:2] = 9  # true background
  one.predicted[5, 5] = 9  # true 2
  one.predicted[0, 5] = 9  # not annotated: counts nowhere
  said = figures.explain_masks([one])
  assert "another class, one that is not in the picture; 67% of it is background" in said
  assert "lighter grey: not annotated" in said and "groups: colours tell them apart" in said
  (title,) = (t.get_text() for t in [figures.mask_sheet([one])._suptitle])
  assert title == said
  one.predicted[:] = 0
  one.true[one.true == segmentation.IGNORED] = 0
  said = figures.explain_masks([one])
  assert "%" not in said and "not annotated" not in said


def test_nothing_overlaps_in_the_mask_sheet():
  sheet = figures.mask_sheet([example() for _ in range(3)])
  sheet.draw_without_rendering()
  boxes = [ax.get_tightbbox().frozen() for ax in sheet.get_axes()]
  for i, a in enumerate(boxes):
    assert a.x0 >= 0 and a.x1 <= sheet.bbox.width + 0.5
    for b in boxes[i + 1 :]:
      assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1


def test_alpha_curves_draw_each_set_over_the_weights_in_order():
  results = {
    "zero_shot/dtd/regions/alpha=1/top1": 0.5,
    "zero_shot/dtd/regions/alpha=0/top1": 0.1,
    "zero_shot/dtd/regions/alpha=0.5/top1": 0.6,
    "zero_shot/dtd/regions/alpha=0.5/top5": 0.9,
    "zero_shot/dtd/top1": 0.2,
  }
  (line,) = figures.alpha_curves(results).get_axes()[0].get_lines()
  np.testing.assert_allclose(line.get_xydata(), [[0, 10], [0.5, 60], [1, 50]])
  assert figures.alpha_curves({"zero_shot/dtd/top1": 0.2}) is None


@pytest.mark.parametrize("count", [1, 8])
def test_report_writes_the_sheets(tmp_path, count):
  from grain_jax.evals.page import report

  results = {"zero_shot/dtd/regions/alpha=1/top1": 0.5}
  written = report.write(tmp_path, [], segmented=[example()] * count, results=results)
  assert [p.name for p in written] == ["masks.png", "region_weights.png"]
  assert all(p.stat().st_size > 5000 for p in written)
