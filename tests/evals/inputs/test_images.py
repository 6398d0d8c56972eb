"""Images of any origin, those that cannot be read counted; CLIP's crop against transformers."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image
from transformers.models.clip import image_processing_pil_clip

from grain_jax.data import transforms
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders


def encoders(size=8, batch_size=4):
  return Encoders(
    image=lambda x: x.reshape(len(x), -1).astype(np.float32),
    text=lambda texts: np.ones((len(texts), 1), np.float32),
    regions=lambda x: (x[:, :1, 0].astype(np.float32), x[:, :1, 0].astype(np.float32)),
    size=size,
    batch_size=batch_size,
  )


@hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=23).filter(any))
def test_readable_pictures_keep_their_places_and_the_rest_is_counted(readable):
  """The value of image i is i: order, batches and places are seen in one."""
  given = [
    np.full((5, 7, 3), i, np.uint8) if ok else b"no picture" for i, ok in enumerate(readable)
  ]
  lines = []
  found = images_lib.encode(encoders().image, iter(given), encoders(), what="x", warn=lines.append)
  places = np.flatnonzero(readable)
  assert_array_equal(found.index, places)
  assert_array_equal(found.values[:, 0], places)
  assert found.total == len(readable)
  bad = len(readable) - len(places)
  assert len(lines) == (bad > 0)
  if bad:
    assert lines[0].startswith(f"x: {bad} of {len(readable)} pictures cannot be read")


def test_tuples_are_joined_column_by_column():
  given = [np.full((8, 8, 3), i, np.uint8) for i in range(6)]
  found = images_lib.encode(encoders().regions, given, encoders(), what="x")
  assert_array_equal(found.values[1][:, 0, 0], np.arange(6))


def test_all_kinds_of_pictures_are_the_same(tmp_path, rng):
  pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  kinds = [
    pixels,
    Image.fromarray(pixels),
    tmp_path / "a.png",
    str(tmp_path / "a.png"),
    (tmp_path / "a.png").read_bytes(),
    images_lib.png(pixels),
  ]
  found = images_lib.encode(encoders().image, kinds, encoders(), what="x").values
  assert_array_equal(found, np.repeat(pixels.reshape(1, -1), len(kinds), 0))
  grey = pixels[..., 0]
  found = images_lib.encode(encoders().image, [grey, grey[..., None]], encoders(), what="x").values
  assert_array_equal(found, np.repeat(np.repeat(grey.reshape(-1), 3)[None], 2, 0))


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ([], "x: there is no picture in it"),
    (["nowhere.png"], "x: 1 of 1 pictures .* nowhere.png: No such file"),
    ([np.zeros((4, 4, 4), np.uint8)], r"uint8 \[4, 4, 4\] is no u8"),
    ([np.zeros((4, 4, 3))], r"float64 \[4, 4, 3\] is no u8"),
  ],
)
def test_nothing_to_read_is_one_line(given, words):
  with pytest.raises(ValueError, match=words) as caught:
    images_lib.encode(encoders().image, given, encoders(), what="x")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (24, 24), (100, 25), (24, 25), (25, 24)])
def test_center_crop_is_clips(shape, rng):
  """CLIP's processor in transformers: shorter side to 24 pixels, bicubic, the middle."""
  image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
  theirs = image_processing_pil_clip.CLIPImageProcessorPil(
    size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
    do_normalize=False, do_rescale=False,
  )(image, return_tensors="np")["pixel_values"][0]  # fmt: skip
  ours = transforms.resize(image, 24, "center_crop")
  assert_array_equal(ours, np.moveaxis(theirs, 0, -1))


@pytest.mark.parametrize("shape", [(2, 12_000), (12_000, 2), (1, 9_001)])
def test_a_thin_picture_is_cropped_before_it_is_resized(shape, monkeypatch):
  """A ramp along its length, against the middle of it by hand; whole it would be 1.2 GiB."""
  largest = []
  resize = Image.Image.resize
  monkeypatch.setattr(
    Image.Image,
    "resize",
    lambda image, size, how: (largest.append(size), resize(image, size, how))[1],
  )
  ramp = np.linspace(0, 255, max(shape)).round().astype(np.uint8).reshape(1, -1)
  pixels = np.broadcast_to(ramp if shape[0] < shape[1] else ramp.T, shape)
  got = transforms.resize(Image.fromarray(pixels).convert("RGB"), 24, "center_crop")
  assert got.shape == (24, 24, 3) and max(map(max, largest)) <= 18 * 24
  # 24 pixels of a crop show as much of the length as the picture is wide: 2 pixels, near grey 128.
  assert np.abs(got.astype(int) - 128).max() <= 1


def test_an_unknown_resize_is_one_line():
  with pytest.raises(ValueError, match="Choose from squash, center_crop"):
    transforms.resize(Image.new("RGB", (4, 4)), 4, "stretch")
