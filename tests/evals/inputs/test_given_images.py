"""Images as a caller in Python has them: the same pixels by every way, or one line."""

import io
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grain_jax.evals.inputs import given_images


def pixels(images):
  """u8 arrays [H, W, 3] of all of them."""
  return [np.asarray(given_images.to_pil(x, i)) for i, x in enumerate(given_images.split(images))]


def png(array):
  file = io.BytesIO()
  Image.fromarray(array).save(file, "PNG")
  return file.getvalue()


@given(
  count=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 9)
)
def test_every_kind_has_the_same_pixels(count, height, width, seed):
  want = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3)).astype(np.uint8)
  last = torch.tensor(want)
  kinds = [want, list(want), iter(want), [png(x) for x in want], tuple(map(Image.fromarray, want))]
  kinds += [[bytearray(png(x)) for x in want], [memoryview(png(x)) for x in want]]
  kinds += [jnp.asarray(want), list(jnp.asarray(want))]
  first = last.permute(0, 3, 1, 2)
  if height != 3:
    kinds += [last, list(last), last / 255, last.double() / 255]
  if width != 3:
    kinds += [first, list(first), first / 255, (first / 255).requires_grad_()]
  for kind in kinds:
    got = pixels(kind)
    assert len(got) == count
    np.testing.assert_array_equal(got, want)
  for one in (want[0], png(want[0]), Image.fromarray(want[0])):
    np.testing.assert_array_equal(pixels(one), want[:1])


def test_floats_of_half_precision_are_rounded_to_the_nearest():
  values = torch.arange(256, dtype=torch.float32).reshape(1, 16, 16).expand(3, 16, 16) / 255
  np.testing.assert_array_equal(pixels(values.half())[0][..., 0].ravel(), np.arange(256))
  rough = pixels(values.bfloat16())[0][..., 0].ravel().astype(int)
  assert abs(rough - np.arange(256)).max() <= 1  # 8 bits of significand


def test_nothing_is_no_image():
  for nothing in ([], (), np.zeros((0, 8, 8, 3), np.uint8), np.array([]), torch.zeros(0, 3, 8, 8)):
    assert given_images.split(nothing) == []


def test_paths_in_an_array(tmp_path):
  Image.new("RGB", (2, 3), "red").save(tmp_path / "a.png")
  assert pixels(np.array([str(tmp_path / "a.png")] * 2))[1].shape == (3, 2, 3)


U8 = np.uint8
BAD = {
  "None": (None, "images is None: give u8"),
  "number": (3, "images is a int: give u8"),
  "mapping": ({"image": 1}, "images is a dict: give u8"),
  "grey": (np.zeros((4, 5), U8), r"images is uint8 \[4, 5\]: give u8 \[H, W, 3\]"),
  "video": (np.zeros((1, 1, 4, 4, 3), U8), r"images is uint8 \[1, 1, 4, 4, 3\]"),
  "0-d": (np.uint8(3), r"images is uint8 \[\]"),
  "None in a list": (["x", None], r"images\[1\] is None: give u8"),
  "list in a list": ([[[[1, 2, 3]]]], r"images\[0\] is a list: give u8"),
  "0 x 0": (np.zeros((0, 0, 3), U8), r"images\[0\] is uint8 \[0, 0, 3\]: it has no pixels"),
  "0 x 5": (np.zeros((2, 0, 5, 3), U8), r"images\[0\] is uint8 \[0, 5, 3\]: it has no pixels"),
  "0 x 0 of PIL": (Image.new("RGB", (0, 0)), r"images\[0\]: corrupt image: 0 x 0 pixels"),
  "floats": (np.zeros((8, 8, 3)), r"images\[0\] is float64 \[8, 8, 3\].*Floats do not say whether"),
  "integers": (np.zeros((8, 8, 3), int), r"images\[0\] is int64 \[8, 8, 3\]: give u8"),
  "RGBA": (np.zeros((8, 8, 4), U8), r"images\[0\] is uint8 \[8, 8, 4\]"),
  "channels first": (np.zeros((3, 8, 8), U8), r"\[3, 8, 8\].*Channels come last: x.transpose"),
  "no bytes": (b"", r"images\[0\], 0 bytes: corrupt image"),
  "bytes": (b"not an image", r"images\[0\], 12 bytes: corrupt image: no format that PIL knows"),
  "URL": ("https://host/a.jpg", r"images\[0\] = https://host/a.jpg is an address: download it"),
  "URL as a path": (
    pathlib.Path("HTTP://host/a.jpg"),
    r"images\[0\] = HTTP:/host/a.jpg is an addr",
  ),
  "bucket": ("gs://b/a.jpg", r"images\[0\] = gs://b/a.jpg is an address .*Copy it to a local disk"),
  "data": (
    "data:image/png;base64," + "A" * 9999,
    r"images\[0\] = data:image/png.{66}\.\.\. is a data a",
  ),
  "no path": ("", r"images\[0\]: there is no file ''"),
  "base64": ("A" * 9999, r"images\[0\], A{80}\.\.\.: File name too long"),
  "NUL": ("a\0b", r"images\[0\]: there is no file"),
  "folder": ("/", r"images\[0\]: / is a folder. Give the paths of its files"),
  "normalised": (
    torch.full((3, 8, 9), -1.5),
    r"float32 \[3, 8, 9\] with values of -1.5 to -1.5: fl",
  ),
  "floats to 255": (
    torch.full((1, 3, 8, 9), 255.0),
    "with values of 255 to 255: floats are 0 to 1",
  ),
  "NaN": (torch.full((3, 8, 9), torch.nan), "with values of nan to nan"),
  "int64": (
    torch.zeros(8, 9, 3, dtype=torch.int64),
    r"torch.int64 \[8, 9, 3\]: give u8 with values",
  ),
  "bool": (torch.zeros(8, 9, 3, dtype=torch.bool), r"torch.bool \[8, 9, 3\]: give u8 with values"),
  "ambiguous": (torch.zeros(3, 8, 3), r"\[3, 8, 3\]: channels may be first or last"),
  "no channels": (torch.zeros(8, 8), r"images is torch.float32 \[8, 8\]: give \[N, 3, H, W\]"),
  "four channels": ([torch.zeros(4, 8, 9)], r"images\[0\] is torch.float32 \[4, 8, 9\]: give"),
  "0 x 0 of torch": (torch.zeros(3, 0, 0), r"images\[0\] is uint8 \[0, 0, 3\]: it has no pixels"),
}


@pytest.mark.parametrize(("images", "line"), BAD.values(), ids=BAD)
def test_what_is_no_image_is_one_line(images, line, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Image.new("RGB", (2, 2)).save("x", "PNG")
  with pytest.raises(ValueError, match=f"^.*{line}") as caught:
    pixels(images)
  text = str(caught.value)
  assert "\n" not in text and len(text) < 300
