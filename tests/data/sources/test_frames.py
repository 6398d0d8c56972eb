"""Frames of pixel boxes, against what PIL shows."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from grain_jax.data.sources import frames


def marked(orientation):
  """An image of 60 x 40 with a bright rectangle: x 6 to 24, y 4 to 10."""
  pixels = np.zeros((40, 60), np.uint8)
  pixels[4:10, 6:24] = 255
  image = Image.fromarray(pixels)
  image.getexif()[0x0112] = orientation
  return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("of_stored", [True, False])
def test_a_box_lies_where_the_image_as_shown_has_it(tmp_path, orientation, of_stored):
  path = tmp_path / "a.png"
  marked(orientation).save(path, exif=marked(orientation).getexif())
  shown = np.asarray(ImageOps.exif_transpose(Image.open(path)))
  rows, columns = np.nonzero(shown)
  height, width = shown.shape
  seen = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
  want = np.divide(seen, [height, width, height, width])
  if of_stored and orientation >= 5:  # the sizes say so
    frame, box = frames.frame_of(path, 60, 40), [6, 4, 18, 6]
  else:
    frame = frames.frame_of(path, width, height)
    box = [seen[1], seen[0], seen[3] - seen[1], seen[2] - seen[0]]
    assert frames.frame_of(path) == frame == (width, height, 1)
  np.testing.assert_allclose(frame.fractions(box, "xywh"), want, atol=1e-12)


def test_a_frame_without_a_file_or_a_size(tmp_path):
  gone, broken = tmp_path / "gone.jpg", tmp_path / "broken.jpg"
  broken.write_bytes(b"no image")
  for path in (gone, broken):
    assert frames.frame_of(path, 20, 10) == (20, 10, 1)
    for size in [(None, None), (0, 10), (float("nan"), 10), ("20", 10), (True, 10)]:
      assert frames.frame_of(path, *size) is None
  frame = frames.Frame(20, 10)
  assert frame.fractions([5, 1, 10, 5], "xywh") == (0.1, 0.25, 0.6, 0.75)
  for bad in ("1234", None, [1, 2, 3], [1, 2, 3, None], {"x": 1}, 5):
    assert frame.fractions(bad, "xywh") is None
