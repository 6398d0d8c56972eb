"""Every reader of pictures (build, training, evaluations, `load`, `embed`) shows a file alike."""

import io
import struct
import zlib

import numpy as np
import pytest
import toy_data
from numpy.testing import assert_array_equal
from PIL import Image, ImageCms

from grain_jax import embed, inference
from grain_jax.data import dataset, examples, sources
from grain_jax.evals.inputs import files
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

SIZE = 48
Y, X = np.mgrid[0:40, 0:56]
RGB = np.stack([X * 4, Y * 6, 240 - X * 2 - Y], -1).astype(np.uint8)  # as it is to be seen
GREY = RGB[..., 0]
ALPHA = (Y * 6).astype(np.uint8)
COLORS = np.array([[16 * i, 255 - 16 * i, 128] for i in range(16)], np.uint8)

# What EXIF's numbers mean (CIPA DC-008, tag 274): the pixels of the file -> as they are shown.
ORIENTATIONS = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: np.swapaxes(x, 0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: np.swapaxes(x, 0, 1)[::-1, ::-1],
  8: lambda x: np.rot90(x, 1),
}


def save(image, kind, **options):
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def exif(orientation):
  tags = Image.Exif()
  tags[274] = orientation
  return tags


def gray(values):
  return np.repeat(np.asarray(values, np.uint8)[..., None], 3, -1)


def on_white(color, alpha):
  share = alpha[..., None] / 255
  return np.rint(color * share + 255 * (1 - share)).astype(np.uint8)


def palette_image():
  image = Image.fromarray(GREY // 16)
  image.putpalette(COLORS.tobytes())
  return image


def lab_image():
  profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
  return ImageCms.profileToProfile(Image.fromarray(RGB), *profiles, outputMode="LAB")


def sixteen_bits(values):
  return np.asarray(values, np.uint16) * 257


def png_of_16_bits(values, transparent):
  """Grey, with the one value that is shown as nothing: PIL does not write it."""
  height, width = values.shape
  lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
  return png(header, (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", zlib.compress(lines)))


def png(header, *chunks):
  found = b"\x89PNG\r\n\x1a\n"
  for name, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
    found += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
  return found


def bomb(side):
  """The header of a PNG of side x side, and nothing behind it."""
  header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  return png(header, (b"IDAT", zlib.compress(b"")))


def pictures():
  """name -> (file, as it is shown; largest difference: 0 equal, 1 rounded, None 2 in the mean)."""
  whole, pal = Image.fromarray(RGB), palette_image()
  rgba = Image.fromarray(np.dstack([RGB, ALPHA]))
  la = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
  one, frames = Image.fromarray(GREY > 127), [Image.fromarray(255 - RGB)]
  indices = GREY // 16
  holed = np.where((indices == 3)[..., None], 255, COLORS[indices]).astype(np.uint8)
  corner = np.where((RGB[5, 7] == RGB).all(-1)[..., None], 255, RGB)
  hole16 = gray(np.where(GREY == 40, 255, GREY))
  thin = np.stack([np.linspace(0, 255, 12_000)] * 3, -1).astype(np.uint8)[None].repeat(2, 0)
  found = {
    "1.png": (save(one, "PNG"), gray((GREY > 127) * 255), 0),
    "L.png": (save(GREY, "PNG"), gray(GREY), 0),
    "LA.png": (save(la, "PNG"), on_white(gray(GREY), ALPHA), 1),
    "P.png": (save(pal, "PNG"), COLORS[indices], 0),
    "P_transparent.png": (save(pal, "PNG", transparency=3), holed, 0),
    "RGB.png": (save(RGB, "PNG"), RGB, 0),
    "RGB_transparent.png": (
      save(RGB, "PNG", transparency=tuple(map(int, RGB[5, 7]))), corner.astype(np.uint8), 0),
    "RGBA.png": (save(rgba, "PNG"), on_white(RGB, ALPHA), 1),
    "I;16.png": (save(sixteen_bits(GREY), "PNG"), gray(GREY), 0),
    "I;16_transparent.png": (png_of_16_bits(sixteen_bits(GREY), 40 * 257), hole16, 0),
    "animated.png": (save(whole, "PNG", save_all=True, append_images=frames), RGB, 0),
    "I;16.tif": (save(sixteen_bits(GREY), "TIFF"), gray(GREY), 0),
    "I.tif": (save(sixteen_bits(GREY).astype(np.int32), "TIFF"), gray(GREY), 0),
    "F.tif": (save((GREY / 255).astype(np.float32), "TIFF"), gray(GREY), 0),
    "CMYK.tif": (save(whole.convert("CMYK"), "TIFF"), RGB, 1),
    "LAB.tif": (save(lab_image(), "TIFF"), RGB, None),
    "RGBA.tif": (save(rgba, "TIFF"), on_white(RGB, ALPHA), 1),
    "P.gif": (save(pal, "GIF"), COLORS[indices], 0),
    "P_transparent.gif": (save(pal, "GIF", transparency=3), holed, 0),
    "animated.gif": (
      save(pal, "GIF", save_all=True, append_images=[pal.rotate(180)]), COLORS[indices], 0),
    "RGB.webp": (save(RGB, "WEBP", lossless=True), RGB, 0),
    "RGBA.webp": (save(rgba, "WEBP", lossless=True, exact=True), on_white(RGB, ALPHA), 1),
    "animated.webp": (
      save(whole, "WEBP", lossless=True, save_all=True, append_images=frames), RGB, 0),
    "RGB.bmp": (save(RGB, "BMP"), RGB, 0),
    "P.bmp": (save(pal, "BMP"), COLORS[indices], 0),
    "1x1.png": (save(RGB[5:6, 5:6], "PNG"), RGB[5:6, 5:6], 0),
    "12000x2.png": (save(thin, "PNG"), thin, 0),
  }  # fmt: skip
  jpegs = {"RGB": whole, "L": Image.fromarray(GREY), "1x1": Image.fromarray(RGB[5:6, 5:6])}
  for name, image in {**jpegs, "12000x2": Image.fromarray(thin)}.items():
    data = save(image, "JPEG")
    found[f"{name}.jpg"] = (data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), 0)
  found["CMYK.jpg"] = (save(whole.convert("CMYK"), "JPEG", quality=95, subsampling=0), RGB, None)
  found["MPO.jpg"] = (save(whole, "MPO", save_all=True, append_images=frames), RGB, None)
  for number, turn in ORIENTATIONS.items():
    data = save(RGB, "JPEG", exif=exif(number))
    found[f"exif{number}.jpg"] = (data, turn(np.asarray(Image.open(io.BytesIO(data)))), 0)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
      data = save(RGB, kind, exif=exif(number), **options)
      found[f"exif{number}.{kind.lower()}"] = (data, turn(RGB), 0)
  return found


def refused():
  """name -> file that no reader takes."""
  whole = {"jpg": ("JPEG", {}), "png": ("PNG", {}), "gif": ("GIF", {}), "bmp": ("BMP", {}),
           "tif": ("TIFF", {}), "webp": ("WEBP", {"lossless": True})}  # fmt: skip
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, RGB.shape, dtype=np.uint8)
  cut = {}
  for suffix, (kind, options) in whole.items():
    data = save(noise, kind, **options)
    cut[f"cut.{suffix}"] = data[: len(data) // 2]
  return {
    **cut,
    "page.jpg": b"<html>not found</html>",
    "empty.jpg": b"",
    "bomb.png": bomb(9_500),  # 90 million pixels
    "bomb_of_pil.png": bomb(20_000),
  }


PICTURES, REFUSED = pictures(), refused()
# The build stores these as they are: JPEG, RGB or grey, upright. All others it encodes anew.
AS_THEY_ARE = ("RGB.jpg", "L.jpg", "1x1.jpg", "12000x2.jpg", "exif1.jpg")


def seen(shown):
  return np.asarray(Image.fromarray(shown).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def mean_difference(got, want):
  return float(np.abs(got.astype(int) - want).mean())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  c = toy_data.config(tmp_path_factory.mktemp("none"), reduced_decode=False)
  c.model.image.size = SIZE
  return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("pictures")
  for name, data in {**{k: v[0] for k, v in PICTURES.items()}, **REFUSED}.items():
    (path / name).write_bytes(data)
  return path


def training(opened, config):
  """name -> pixels in training, and name -> why it is bad."""
  reader = examples.Examples(opened, "train", config, training=True)
  count = opened.num_records("train")
  chunk = reader.chunk(np.arange(count), 0)
  keys = [record.key.decode() for record in opened_records(opened)]
  good = {k: chunk.arrays[0][i] for i, k in enumerate(keys) if chunk.arrays[-1][i]}
  return good, {keys[i]: why for i, why in reader.bad.items()}


def opened_records(opened):
  return [opened.parse("train", i) for i in range(opened.num_records("train"))]


@pytest.fixture(scope="module")
def by_reader(folder, config, tmp_path_factory):
  """reader -> (name -> pixels, name -> why it is refused)."""
  names = [*PICTURES, *REFUSED]
  paths = [folder / name for name in names]
  found = {}

  rows = [("train", toy_data.record(0, regions=0, key=n, image=folder / n)) for n in names]
  built = toy_data.built(tmp_path_factory.mktemp("built") / "d", rows, shard_size=100)
  opened = dataset.open_dataset(built)
  good, bad = training(opened, config)
  assert not bad
  dropped = opened.manifest["splits"]["train"]["dropped"]["records"]
  found["build"] = (good, {n: why for why, of in dropped.items() for n in of["first"]})
  found["build"][1]["count"] = sum(of["count"] for of in dropped.values())

  rows = [("train", toy_data.record(0, regions=0, key=n, image=(folder / n).read_bytes()))
          for n in names]  # fmt: skip
  foreign = tmp_path_factory.mktemp("foreign") / "d"
  toy_data.built(foreign, rows, shard_size=100, check_image=False)
  found["training"] = training(dataset.open_dataset(foreign), config)

  unreadable = images_lib.Unreadable()
  batches = images_lib.batches(
    paths, size=SIZE, resize="squash", batch_size=16, unreadable=unreadable, threads=2
  )
  good = {names[i]: x for batch in batches for i, x in zip(batch.index, batch.image, strict=True)}
  found["evaluation"] = (good, {names[i]: why for i, why in unreadable.reasons.items()})

  model = object.__new__(inference.Model)
  model.config = config
  good, bad = {}, {}
  for name, path in zip(names, paths, strict=True):
    try:
      good[name] = model.preprocess(path)[0]
    except ValueError as error:
      bad[name] = str(error)
  found["load"] = (good, bad)

  pixels = []

  def image(x):
    pixels.extend(x)
    return np.ones((len(x), 1), np.float32)

  encoders = Encoders(image=image, text=None, regions=None, size=SIZE, batch_size=16)
  arrays, _ = embed.embed_images(encoders, files.Inputs(paths, names), warn=lambda line: None)
  good = dict(zip(arrays["paths"].tolist(), pixels, strict=True))
  found["embed"] = (good, {n: "left out" for n in names if n not in good})
  return found


@pytest.mark.parametrize("reader", ["training", "evaluation", "load", "embed", "build"])
@pytest.mark.parametrize("name", PICTURES)
def test_every_reader_shows_a_picture_as_it_is(by_reader, reader, name):
  good, bad = by_reader[reader]
  assert name in good, bad.get(name)
  _, shown, most = PICTURES[name]
  want = seen(shown)
  anew = reader == "build" and name not in AS_THEY_ARE
  if anew or most is None:
    assert mean_difference(good[name], want) <= 2
  elif most:
    assert np.abs(good[name].astype(int) - want).max() <= most + 1  # and the resize's rounding
  else:
    assert_array_equal(good[name], want)
  if not anew:
    assert_array_equal(good[name], by_reader["evaluation"][0][name])


@pytest.mark.parametrize("reader", ["training", "evaluation", "load", "embed", "build"])
def test_every_reader_refuses_the_same(by_reader, reader):
  good, bad = by_reader[reader]
  assert not set(REFUSED) & set(good)
  if reader == "build":  # of each reason the manifest names the first few
    assert bad.pop("count") == len(REFUSED)
    assert {why for name, why in bad.items() if "bomb" in name} == {"image_too_large"}
    assert {why for name, why in bad.items() if "bomb" not in name} == {"corrupt_image"}
    return
  assert set(bad) == set(REFUSED)
  if reader != "embed":
    assert all("pixels: more than" in why for name, why in bad.items() if "bomb" in name)
    assert all("corrupt image: " in why for name, why in bad.items() if "bomb" not in name)
    assert not any("\n" in why for why in bad.values())


@pytest.mark.parametrize("name", ["RGB.jpg", "exif6.jpg", "L.jpg", "CMYK.jpg", "MPO.jpg"])
def test_reduced_decoding_shows_the_same(name, config, tmp_path):
  """Ten times as large, so that the JPEG decoder leaves out seven of eight lines."""
  size = RGB.shape[1] * 10, RGB.shape[0] * 10
  large = Image.fromarray(RGB).resize(size, Image.Resampling.BICUBIC)
  shown = np.asarray(large)
  options = {"exif": exif(6)} if name == "exif6.jpg" else {}
  if name == "exif6.jpg":
    shown = ORIENTATIONS[6](shown)
  elif name == "L.jpg":
    large = large.getchannel(0)
    shown = gray(np.asarray(large))
  elif name == "CMYK.jpg":
    large = large.convert("CMYK")
  elif name == "MPO.jpg":
    options = {"save_all": True, "append_images": [large]}
  kind = "MPO" if name == "MPO.jpg" else "JPEG"
  row = toy_data.record(0, regions=0, key=name, image=save(large, kind, quality=95, **options))
  out = toy_data.built(tmp_path / "d", [("train", row)], check_image=False)
  for crop in ("squash", "crop"):
    pixels = {}
    for reduced in (False, True):
      config.data.update(reduced_decode=reduced, resize=crop)
      good, _ = training(dataset.open_dataset(out), config)
      pixels[reduced] = good[name]
    config.data.update(reduced_decode=False, resize="squash")
    assert mean_difference(pixels[True], pixels[False]) <= 2
    if crop == "squash":
      assert mean_difference(pixels[True], seen(shown)) <= 2


def test_boxes_lie_on_the_upright_picture(tmp_path, config):
  """A photo taken sideways: its white rectangle is where the box of the picture as shown says."""
  shown = np.zeros((60, 40, 3), np.uint8)
  shown[6:24, 20:36] = 255
  root = tmp_path / "own"
  root.mkdir()
  (root / "a.jpg").write_bytes(save(np.ascontiguousarray(np.rot90(shown, 1)), "JPEG", exif=exif(6)))
  (root / "annotations.jsonl").write_text(
    '{"image": "a.jpg", "captions": ["c"], "regions": [{"description": "white", '
    '"box": [0.1, 0.5, 0.4, 0.9]}]}\n'
  )
  out = tmp_path / "d"
  toy_data.build.build(sources.folder(root), out, shard_size=4, workers=1, say=toy_data.quiet)
  reader = examples.Examples(dataset.open_dataset(out), "train", config, training=True)
  image = reader.chunk(np.arange(1), 0).arrays[0][0]
  white = image[..., 0] > 127
  rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
  got = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / SIZE
  np.testing.assert_allclose(got, [0.1, 0.5, 0.4, 0.9], atol=1.1 / SIZE)


def test_a_picture_in_memory_is_shown_like_its_file(folder):
  for name, (_, shown, most) in PICTURES.items():
    with Image.open(folder / name) as image:
      got = np.asarray(images_lib.open_image(image))
      assert_array_equal(got, np.asarray(images_lib.open_image(folder / name)), err_msg=name)
    if most == 0:
      assert_array_equal(got, shown, err_msg=name)


@pytest.mark.parametrize(
  "mode", ["HSV", "YCbCr", "RGBX", "LA", "La", "PA", "RGBa", "I;16B", "F", "LAB"]
)
def test_every_mode_of_pil_is_shown(mode):
  assert images_lib.open_image(Image.new(mode, (3, 2))).mode == "RGB"


def test_a_picture_without_pixels_is_one_line():
  for empty in (Image.new("RGB", (0, 4)), np.zeros((0, 4, 3), np.uint8)):
    with pytest.raises(ValueError, match="0 x 4 pixels|has no pixels") as error:
      images_lib.open_image(empty)
    assert "\n" not in str(error.value)


def test_what_is_cropped_of_an_upright_picture_is_not_turned_again(folder):
  crop = images_lib.open_image(folder / "exif6.jpg").crop((2, 3, 30, 20))
  assert_array_equal(np.asarray(images_lib.open_image(crop)), np.asarray(crop))


@pytest.mark.parametrize("name", ["cut.jpg", "bomb.png"])
def test_a_picture_in_memory_that_cannot_be_decoded_is_one_line(folder, name):
  words = "corrupt image|more than"
  with Image.open(folder / name) as image, pytest.raises(ValueError, match=words) as error:
    images_lib.open_image(image)
  assert "\n" not in str(error.value)


def test_the_limit_is_the_configs(config, folder, tmp_path):
  limit, config.data.max_pixels = config.data.max_pixels, 1_000
  try:
    model = object.__new__(inference.Model)
    model.config = config
    with pytest.raises(ValueError, match="images.0.*56 x 40 pixels: more than 1000 .config.data"):
      model.preprocess(folder / "RGB.png")
    assert model.preprocess(folder / "1x1.png").shape == (1, SIZE, SIZE, 3)
    row = toy_data.record(0, key="a")
    opened = dataset.open_dataset(toy_data.built(tmp_path / "d", [("train", row)]))
    good, bad = training(opened, config)
    assert not good and "48 x 48 pixels: more than 1000" in bad["a"]
    config.data.max_pixels = 0
    with pytest.raises(ValueError, match=r"config.data.max_pixels = 0 is not in \[1, ") as error:
      training(opened, config)
    assert "\n" not in str(error.value)
  finally:
    config.data.max_pixels = limit
