"""Boxes against a coloured rectangle in the image; resizing against PIL and TensorFlow."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grain_jax.data import transforms

UNIT = st.floats(0, 1, exclude_max=True)


def picture(width, height, box):
  """Black with a white rectangle (top, left, bottom, right) in pixels."""
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[box[0] : box[2], box[1] : box[3]] = 255
  return Image.fromarray(pixels)


def rectangle(pixels):
  """Where the white part of a square image is, as fractions (ymin, xmin, ymax, xmax)."""
  inside = pixels[..., 0] > 127
  rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
  return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / len(pixels)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(UNIT, min_size=4, max_size=4), st.booleans(), st.booleans())
def test_box_is_where_the_rectangle_is(data, draws, cropped, flipped):
  width, height = data.draw(st.integers(40, 90)), data.draw(st.integers(40, 90))
  top, left = data.draw(st.integers(0, height - 20)), data.draw(st.integers(0, width - 20))
  bottom = data.draw(st.integers(top + 15, height))
  right = data.draw(st.integers(left + 15, width))
  image = picture(width, height, (top, left, bottom, right))
  box = np.array([top / height, left / width, bottom / height, right / width], np.float32)
  size, visible = 64, True
  if cropped:
    window = transforms.random_window(width, height, np.array(draws), min_area=0.3)
    x0, y0, x1, y1 = window
    fractions = np.array([y0 / height, x0 / width, y1 / height, x1 / width])
    pixels = transforms.crop(image, window, size)
    box, visible = transforms.crop_boxes(box, fractions)
    shown = max(min(bottom, y1) - max(top, y0), 0) * max(min(right, x1) - max(left, x0), 0)
    part = shown / ((bottom - top) * (right - left))
    assert visible == (part >= 0.5) or part == pytest.approx(0.5)
  else:
    pixels = transforms.squash(image, size)
  if flipped:
    pixels, box = transforms.flip(pixels), transforms.flip_boxes(box)
  if visible:
    np.testing.assert_allclose(box, rectangle(pixels), atol=1.1 / size)


@given(
  st.integers(1, 500),
  st.integers(1, 500),
  st.lists(UNIT, min_size=4, max_size=4),
  st.floats(0.05, 1),
)
def test_window_lies_in_the_image(width, height, draws, least):
  left, top, right, bottom = transforms.random_window(
    width, height, np.array(draws), min_area=least
  )
  assert 0 <= left < right <= width and 0 <= top < bottom <= height
  w, h = right - left, bottom - top
  assert (w + 0.5) * (h + 0.5) >= least * width * height - 0.5  # sides are rounded


def test_window_covers_every_place_and_area():
  draws = np.random.default_rng(0).random((2000, 4))
  windows = np.array([transforms.random_window(100, 100, d, min_area=0.25) for d in draws])
  area = (windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1]) / 1e4
  assert scipy.stats.kstest(area, "uniform", (0.25, 0.75)).statistic < 0.05
  assert windows[:, :2].min() == 0 and windows[:, 2:].max() == 100


def test_squash_is_pils_bicubic_and_near_tensorflows():
  tf = pytest.importorskip("tensorflow")
  rng = np.random.default_rng(0)
  small = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
  image = small.resize((120, 90), Image.Resampling.BILINEAR)
  ours = transforms.squash(image, 32)
  np.testing.assert_array_equal(ours, np.asarray(image.resize((32, 32), Image.BICUBIC)))
  theirs = tf.image.resize(np.asarray(image), (32, 32), method="bicubic", antialias=True).numpy()
  assert np.abs(ours - theirs).max() < 2
  same = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
  np.testing.assert_array_equal(transforms.squash(Image.fromarray(same), 32), same)


def test_random_numbers_are_uniform_and_belong_to_the_record():
  draws = transforms.uniforms(seed=3, epoch=1, indices=np.arange(5000), count=4)
  assert draws.min() >= 0 and draws.max() < 1
  for column in draws.T:
    assert scipy.stats.kstest(column, "uniform").pvalue > 1e-3
  correlation = np.corrcoef(np.concatenate([draws[:-1].T, draws[1:].T]))
  assert np.abs(correlation - np.eye(8)).max() < 0.06
  chosen = np.array([4000, 7, 7, 123])
  again = transforms.uniforms(seed=3, epoch=1, indices=chosen, count=2)
  np.testing.assert_array_equal(again, draws[chosen, :2])
  for seed, epoch in ((3, 2), (4, 1), (1, 3)):
    other = transforms.uniforms(seed=seed, epoch=epoch, indices=np.arange(5000), count=4)
    assert abs(np.corrcoef(draws[:, 0], other[:, 0])[0, 1]) < 0.06
    assert not (draws == other).any()


@pytest.mark.parametrize(
  "text, names",
  [
    ("a dog left of a cat", True),
    ("Its RIGHT hand.", True),
    ("the leftmost one", True),
    ("a bright copyright light", False),
    ("cleft lefty upright", False),
  ],
)
def test_words_for_sides(text, names):
  assert transforms.names_a_side([b"a cat", text.encode()]) == names


@given(
  st.tuples(st.integers(1, 400), st.integers(1, 400)),
  st.lists(UNIT, min_size=4, max_size=4),
  st.sampled_from([1, 2, 4, 8]),
)
def test_a_window_in_a_smaller_image_lies_in_it_where_it_lay(shape, draws, less):
  window = transforms.random_window(*shape, np.array(draws), min_area=0.2)
  width, height = (-(-side // less) for side in shape)  # as JPEG decoders round
  left, top, right, bottom = transforms.scale_window(window, width / shape[0], width, height)
  assert 0 <= left < right <= width and 0 <= top < bottom <= height
  near = np.array([left, top, right, bottom]) - np.array(window) / less
  assert np.abs(near).max() <= 2  # half a pixel of rounding; a pixel or so where sides are tiny
