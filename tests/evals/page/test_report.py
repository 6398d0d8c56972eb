"""The report: what is drawn, where, and that no text meets another."""

import itertools

import numpy as np
import pytest
from PIL import Image

from grain_jax.evals import grounding
from grain_jax.evals.page import curves, page, report


def make_history(n):
  return [
    {
      "step": 50 * i,
      "train/loss": 9 / (i + 1),
      "train/loss_box": 2 / (i + 1),
      "train/samples_per_second": 200.0,
      "grounding/mean_iou": i / n,
    }
    for i in range(n)
  ]


def make_example(regions, *, retrieved="a small green apple $x$ " * 4, shape=(96, 96, 3)):
  rng = np.random.default_rng(regions)
  boxes = rng.uniform(0.2, 0.8, (regions, 4)).astype(np.float32)
  return grounding.Example(
    key="k",
    image=np.zeros(shape, np.uint8),
    boxes=boxes,
    descriptions=tuple(f"thing {i}" for i in range(regions)),
    predicted=boxes + 0.05,
    iou=np.full(regions, 0.5),
    retrieved=tuple("thing 0" if i == 0 else retrieved for i in range(regions)),
  )


@pytest.mark.parametrize("points", [1, 20, 300])
def test_write_draws_both_figures_whole(tmp_path, points):
  paths = report.write(
    tmp_path / "figures", make_history(points), examples=[make_example(2), make_example(5)]
  )
  assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(p.name for p in paths)
  assert [p.name for p in paths] == ["loss_curves.png", "contact_sheet.png"]
  for path in paths:
    with Image.open(path) as picture:
      assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 5


def test_write_draws_only_what_there_is(tmp_path):
  assert report.write(tmp_path, [{"step": 1, "grounding/mean_iou": 0.1}]) == []
  assert [p.name for p in report.write(tmp_path, make_history(3))] == ["loss_curves.png"]


@pytest.mark.parametrize("count", [1, 3, 6])
def test_contact_sheet_texts_stay_apart_and_on_the_sheet(count):
  sheet = report.contact_sheet([make_example(1 + i % 5) for i in range(count)])
  renderer = sheet.canvas.get_renderer()
  texts = [(t.get_text(), t.get_window_extent(renderer)) for t in sheet.texts]
  pictures = [ax.get_window_extent(renderer) for ax in sheet.axes]
  for text, box in texts:
    assert box.x0 >= 0 and box.y0 >= 0, text
    assert box.x1 <= sheet.bbox.x1 and box.y1 <= sheet.bbox.y1, text
  boxes = [box.padded(-1) for _, box in texts] + [box.padded(-1) for box in pictures]
  assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_contact_sheet_says_what_was_retrieved_and_what_is_true():
  sheet = report.contact_sheet([make_example(3, retrieved="a hen")])
  texts = [t.get_text() for t in sheet.texts]
  assert texts.count("a hen") == 2 and texts.count("thing 0") == 1
  assert not any(t.get_parse_math() for t in sheet.texts)  # a dollar sign is a dollar sign
  assert "true: thing 1" in texts and "true: thing 2" in texts and "true: thing 0" not in texts


def test_contact_sheet_draws_each_box_where_it_lies():
  example = make_example(1, shape=(50, 100, 3))
  sheet = report.contact_sheet([example], side=200)
  drawn = [patch.get_bbox().bounds for patch in sheet.axes[0].patches]
  for cx, cy, w, h in (example.boxes[0], example.predicted[0]):
    wanted = ((cx - w / 2) * 200, (cy - h / 2) * 100, w * 200, h * 100)
    assert any(np.allclose(wanted, bounds, atol=1e-2) for bounds in drawn)


def test_loss_curves_plot_the_values(tmp_path):
  history = make_history(10)
  ax = curves.loss_curves(history).axes
  lines = {line.get_label(): line for line in ax[0].get_lines()}
  assert set(lines) == {"total", "box"}
  np.testing.assert_allclose(lines["box"].get_ydata(), [e["train/loss_box"] for e in history])
  np.testing.assert_allclose(lines["box"].get_xdata(), [e["step"] for e in history])
  assert [a.get_title(loc="left") for a in ax] == ["loss", "evaluation, %", "samples a second"]
  np.testing.assert_allclose(ax[1].get_lines()[0].get_ydata(), np.arange(10) * 10.0)


def test_learning_rate_gradient_norm_and_evaluations_have_curves():
  history = [
    {
      "step": i + 1, "train/loss": 1.0, "train/learning_rate": 1e-3 * i,
      "train/gradient_norm": 10.0**-i,
    }
    for i in range(4)
  ]  # fmt: skip
  history += [
    {"step": 4, "zero_shot/top1": 0.5, "zero_shot/dtd/top1": 0.25, "zero_shot/dtd/rows": 9}
  ]
  ax = {a.get_title(loc="left"): a for a in curves.loss_curves(history).axes}
  assert list(ax) == ["loss", "learning rate", "gradient norm", "evaluation, %"]
  (line,) = ax["learning rate"].get_lines()
  np.testing.assert_allclose(line.get_xydata(), [[1, 0], [2, 1e-3], [3, 2e-3], [4, 3e-3]])
  (line,) = ax["gradient norm"].get_lines()
  np.testing.assert_allclose(line.get_ydata(), [1, 0.1, 0.01, 0.001])
  assert ax["gradient norm"].get_yscale() == "log"
  lines = {line.get_label(): line for line in ax["evaluation, %"].get_lines()}
  assert set(lines) == {"zero-shot", "zero shot · dtd"}
  np.testing.assert_allclose(lines["zero shot · dtd"].get_xydata(), [[4, 25]])


def test_a_gradient_norm_of_zero_is_drawn():
  history = [{"step": i, "train/loss": 1.0, "train/gradient_norm": float(i)} for i in range(3)]
  assert curves.loss_curves(history).axes[1].get_yscale() == "linear"


def test_running_mean_is_not_shifted():
  history = [{"step": i, "train/loss": float(i)} for i in range(301)]
  mean = curves.loss_curves(history).axes[0].get_lines()[1]
  np.testing.assert_allclose(mean.get_ydata(), mean.get_xdata(), atol=0.51)


def test_series_takes_the_last_of_a_step_and_leaves_out_what_is_not_finite():
  history = [
    {"step": 2, "a": 1.0},
    {"step": 1, "a": 5},
    {"step": 3, "a": float("nan")},
    {"step": 4, "b": 1},
    {"step": 5, "a": None},
    {"step": 2, "a": 3.0},
  ]
  assert curves.series(history, "a") == [(1, 5.0), (2, 3.0)]


def test_table():
  table = report.format_table(
    {
      "zero_shot/seen/top1": 0.3231,
      "zero_shot/rows": 1024,
      "retrieval/image_to_text/r10": 1.0,
      "grounding/mean_iou": 0.0,
      "seconds": 533.25,
    }
  )
  assert table.splitlines() == [
    "zero_shot",
    "  seen/top1           32.3 %",
    "  rows               1,024",
    "retrieval",
    "  image_to_text/r10  100.0 %",
    "grounding",
    "  mean_iou             0.0 %",
    "seconds              533.2",
  ]
  assert report.format_table({}) == "no results"
  drops = {"waterbirds/val/drop_waterbird": 0.05, "waterbirds/val/drop_landbird": -0.05}
  assert [row.split()[1:] for row in report.format_table(drops).splitlines()[1:]] == [
    ["5.0", "%"],
    ["-5.0", "%"],
  ]


def test_table_says_what_rests_on_little():
  table = report.format_table(
    {"zero_shot/mine/top1": 0.5, "zero_shot/mine/classes": 2, "zero_shot/mine/examples": 12,
     "zero_shot/mine/rows": 12}
  )  # fmt: skip
  said = "only 12 images; not above chance, 50 %; 95 % interval 25.4 to 74.6 %"
  assert table.splitlines()[1] == f"  mine/top1      50.0 %  ({said})"


def test_a_loss_is_no_share_however_small(tmp_path):
  results = {"validation/loss": 0.75, "validation/loss_box": 1.5, "validation/iou": 0.5}
  lines = [line.split() for line in report.format_table(results).splitlines()]
  assert lines == [["validation"], ["loss", "0.75"], ["loss_box", "1.5"], ["iou", "50.0", "%"]]
  page.write(tmp_path / "p.html", results, title="t", facts={}, figures=[])
  text = (tmp_path / "p.html").read_text()
  assert (
    ">loss</th>" in text and ">IoU, %</th>" in text and "75.0" not in text and "150" not in text
  )
