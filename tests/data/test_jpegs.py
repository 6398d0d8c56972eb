"""Plain JPEGs by libjpeg-turbo itself against Pillow, which decodes what is not plain."""

import io

import numpy as np
import odd_pictures
import pytest
import toy_data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from grain_jax import failures
from grain_jax.data import decoding, jpegs, pipeline


def encode(seed, width, height, **options):
  rng = np.random.default_rng(seed)
  shape = (height, width) if options.pop("grey", False) else (height, width, 3)
  low = Image.fromarray(rng.integers(0, 256, shape, np.uint8)).resize((5, 5))
  made = np.asarray(low.resize((width, height))).astype(int) + rng.integers(-20, 20, shape)
  return odd_pictures.save(made.clip(0, 255).astype(np.uint8), "JPEG", **options)


OPTIONS = st.fixed_dictionaries(
  {
    "quality": st.sampled_from([30, 90, 100]),
    "subsampling": st.sampled_from([0, 1, 2]),
    "progressive": st.booleans(),
    "grey": st.booleans(),
  }
)
SIDES = st.integers(1, 150)


def decoded(data, **options):
  """Pixels, or the line that says why there are none."""
  try:
    return np.asarray(decoding.decode(data, **options))
  except ValueError as error:
    return np.array(str(error))


def by_pillow(data, **options):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jpegs, "_library", lambda: None)
    return decoded(data, **options)


@given(st.integers(0, 1000), SIDES, SIDES, OPTIONS, SIDES)
@settings(max_examples=150)
def test_pixels_are_pillow_s_whole_and_reduced(seed, width, height, options, side):
  pytest.importorskip("simplejpeg")
  data = encode(seed, width, height, **options)
  assert jpegs.read_header(data) == (width, height)
  for enough in (None, lambda *size: (side, side), lambda w, h: (side, h)):
    seen = []

    def asked(width, height, enough=enough, seen=seen):
      seen.append((width, height))
      return enough(width, height)

    given_ = asked if enough else None
    np.testing.assert_array_equal(
      decoded(data, enough=given_), by_pillow(data, enough=given_), strict=True
    )
    assert seen == [(width, height)] * len(seen)


@given(st.data())
@settings(max_examples=150)
def test_what_is_damaged_is_what_pillow_makes_of_it(data):
  pytest.importorskip("simplejpeg")
  options = data.draw(OPTIONS)
  file = bytearray(encode(data.draw(st.integers(0, 9)), 70, 50, **options))
  for _ in range(data.draw(st.integers(0, 3))):
    file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
  file = bytes(file[: data.draw(st.integers(0, len(file)))] if data.draw(st.booleans()) else file)
  np.testing.assert_array_equal(decoded(file), by_pillow(file))


def test_a_file_cut_before_its_pixels_is_no_image():
  data = encode(0, 16, 16)
  for end in range(data.index(b"\xff\xda") + 2):
    with pytest.raises(ValueError):
      decoding.decode(data[:end])


def test_only_what_is_plain_is_taken(monkeypatch):
  monkeypatch.setattr(jpegs, "_library", lambda: "there")
  plain = encode(0, 64, 48)
  assert jpegs.read_header(plain) == (64, 48)
  icc = odd_pictures.save(Image.new("RGB", (9, 7)), "JPEG", icc_profile=b"x" * 70_000)
  assert jpegs.read_header(icc) == (9, 7)
  two = io.BytesIO()
  Image.new("RGB", (9, 7)).save(two, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 7))])
  for other in (
    odd_pictures.save(Image.new("RGB", (9, 7)), "JPEG", exif=odd_pictures.exif(6)),
    odd_pictures.save(Image.new("RGB", (9, 7)), "JPEG", exif=odd_pictures.exif(1)),
    odd_pictures.save(Image.new("CMYK", (9, 7)), "JPEG"),
    odd_pictures.save(Image.new("RGB", (9, 7)), "PNG"),
    two.getvalue(),
    plain[:100],
    plain[2:],
    b"",
    b"\xff\xd8",
    b"\xff\xd8\xff\xda\x00\x02",
  ):
    assert jpegs.read_header(other) is None
  monkeypatch.setattr(jpegs, "_library", lambda: None)
  assert jpegs.read_header(plain) is None


@pytest.mark.parametrize("form", ['tiff:Orientation="%d"', "<tiff:Orientation>%d<"])
@pytest.mark.parametrize("turn", range(10))
def test_an_image_turned_by_xmp_is_upright(form, turn):
  """As Pillow reads it; an image that is not turned stays plain."""
  pytest.importorskip("simplejpeg")
  plain = encode(0, 64, 48)
  packet = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>" + (form % turn).encode() + b"</x:xmpmeta>"
  data = plain[:2] + b"\xff\xe1" + (len(packet) + 2).to_bytes(2, "big") + packet + plain[2:]
  np.testing.assert_array_equal(decoded(data), by_pillow(data), strict=True)
  assert decoding.decode(data).size == ((48, 64) if turn in (5, 6, 7, 8) else (64, 48))
  assert (jpegs.read_header(data) is None) == (turn in range(2, 9))


def test_without_the_package_pillow_decodes(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
  monkeypatch.setattr(jpegs, "_library", jpegs._library.__wrapped__)
  assert jpegs._library() is None
  assert decoding.decode(encode(1, 64, 48), enough=lambda w, h: (32, 24)).size == (32, 24)


@pytest.mark.parametrize("step", ["open", "load"])
def test_want_of_memory_makes_no_picture_a_bad_one(monkeypatch, tmp_path, step):
  def fail(*arguments, **options):
    raise MemoryError

  data = toy_data.built(tmp_path / "d", [toy_data.record(i) for i in range(4)])
  monkeypatch.setattr(jpegs, "_library", lambda: None)
  monkeypatch.setattr(Image if step == "open" else ImageFile.ImageFile, step, fail)
  with pytest.raises(MemoryError):
    decoding.decode(toy_data.record(0)["image"])
  batches = pipeline.train_batches(data, toy_data.config(data))
  with pytest.raises(failures.TransientError, match="no more memory") as error:
    next(batches)
  assert "\n" not in str(error.value) and not batches.bad
