"""Boxes as people write them, against TFDS, transformers, and a picture that was drawn."""

import json

import hypothesis
import numpy as np
import pytest
import toy_data
from hypothesis import strategies as st
from PIL import ExifTags, Image

from grain_jax.data import box_formats, build, dataset, decoding, records
from grain_jax.data.building import flags as build_flags

SIDES = st.integers(2, 2000)
FORMATS = st.sampled_from(box_formats.FORMATS)


@st.composite
def corners(draw, *, width, height):
  """(ymin, xmin, ymax, xmax) of whole pixels inside an image."""
  ymin, xmin = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
  return ymin, xmin, draw(st.integers(ymin + 1, height)), draw(st.integers(xmin + 1, width))


def written(box, box_format):
  """Corners as a person writes them in a format."""
  ymin, xmin, ymax, xmax = box
  return {
    "yxyx": (ymin, xmin, ymax, xmax),
    "xyxy": (xmin, ymin, xmax, ymax),
    "xywh": (xmin, ymin, xmax - xmin, ymax - ymin),
    "cxcywh": ((xmin + xmax) / 2, (ymin + ymax) / 2, xmax - xmin, ymax - ymin),
  }[box_format]


def test_a_worked_box():
  # 20 wide and 30 high, its left upper corner at x = 10, y = 40.
  for box_format, box in {
    "yxyx": (40, 10, 70, 30),
    "xyxy": (10, 40, 30, 70),
    "xywh": (10, 40, 20, 30),
    "cxcywh": (20, 55, 20, 30),
  }.items():
    assert box_formats.to_corners(box, box_format) == (40, 10, 70, 30)
    assert written((40, 10, 70, 30), box_format) == box
    got = records.check_box(box, box_format=box_format, size=(40, 100))
    assert got == pytest.approx((0.4, 0.25, 0.7, 0.75))


@hypothesis.given(st.data(), SIDES, SIDES, FORMATS)
def test_formats_round_trip_and_pixels_agree_with_fractions(data, width, height, box_format):
  box = data.draw(corners(width=width, height=height))
  assert box_formats.to_corners(written(box, box_format), box_format) == box  # halves are exact
  hypothesis.assume(max(written(box, box_format)) > 1)  # else it reads as fractions
  pixels = records.check_box(written(box, box_format), box_format=box_format, size=(width, height))
  fractions = box_formats.to_fractions(box, (width, height))
  want = records.check_box(written(fractions, box_format), box_format=box_format)
  assert pixels == pytest.approx(want, abs=1e-6)
  assert pixels == pytest.approx(fractions, abs=1e-6)


@hypothesis.given(st.data(), SIDES, SIDES, st.sampled_from(("yxyx", "xyxy", "xywh")))
def test_formats_are_those_of_tfds(data, width, height, box_format):
  utils = pytest.importorskip("tensorflow_datasets.core.features.bounding_boxes_utils")
  box = written(data.draw(corners(width=width, height=height)), box_format)
  want = utils.convert_coordinates_to_bbox(np.array(box), box_format.upper(), (height, width))
  got = box_formats.to_fractions(box_formats.to_corners(box, box_format), (width, height))
  assert got == pytest.approx(tuple(want))


@hypothesis.given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_centre_is_that_of_transformers(box):
  transforms = pytest.importorskip("transformers.image_transforms")
  xmin, ymin, xmax, ymax = transforms.center_to_corners_format(np.array([box]))[0]
  want = (ymin, xmin, ymax, xmax)
  assert box_formats.to_corners(box, "cxcywh") == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("box", ["1234", {"0.1": 1, "0.2": 1, "0.5": 1, "0.6": 1}, b"1234"])
def test_what_only_looks_like_four_numbers_is_no_box(box):
  assert records.check_box(box, box_format="yxyx") == records.MALFORMED
  assert records.check_box(box, size=(50, 50)) == records.MALFORMED


@pytest.mark.parametrize("box_format", box_formats.FORMATS)
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_boxes_in_pixels_are_of_the_picture_as_it_is_shown(tmp_path, box_format, turn):
  """A red box drawn into the upright picture, which the file holds turned, as a phone does."""
  upright = np.full((60, 100, 3), 255, np.uint8)
  upright[10:40, 20:90] = toy_data.COLORS["red"]
  quarter_turns = {1: 0, 3: 2, 6: 1, 8: 3}[turn]  # that undo what a viewer does
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = turn
  stored = Image.fromarray(np.rot90(upright, quarter_turns))
  stored.save(tmp_path / "a.jpg", quality=95, subsampling=0, exif=exif)
  box = written((10, 20, 40, 90), box_format)
  entry = {"image": "a.jpg", "caption": "c", "regions": [{"description": "red", "box": box}]}
  (tmp_path / "annotations.jsonl").write_text(json.dumps(entry) + "\n")
  flags = ["--source=folder", f"--input={tmp_path}", f"--out={tmp_path / 'out'}"]
  flags += [f"--box_format={box_format}", "--box_units=pixels"]
  source = build_flags.source(build_flags.parse(flags, description=""))
  build.build(source, tmp_path / "out", say=toy_data.quiet)
  parsed = dataset.open_dataset(tmp_path / "out").parse("train", 0)
  pixels = np.asarray(decoding.decode(parsed.image), int)
  assert pixels.shape == (60, 100, 3)
  assert parsed.boxes[0] == pytest.approx([10 / 60, 0.2, 40 / 60, 0.9])
  top, left, bottom, right = np.rint(parsed.boxes[0] * [60, 100, 60, 100]).astype(int)
  inside = np.zeros((60, 100), bool)
  inside[top:bottom, left:right] = True
  red = np.abs(pixels - toy_data.COLORS["red"]).max(-1) < 40
  assert (red == inside).mean() > 0.98
