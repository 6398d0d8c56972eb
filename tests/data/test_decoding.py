"""Every reader of pictures (build, training, evaluations, `load`, `embed`) shows a file alike."""

import json
import types

import numpy as np
import pytest
import toy_data
from numpy.testing import assert_array_equal
from odd_pictures import ORIENTATIONS, PICTURES, REFUSED, RGB, SIZE, exif, gray, save
from PIL import Image

import grain_jax
from grain_jax import config as configs
from grain_jax import embed, evaluate, inference
from grain_jax.data import dataset, examples
from grain_jax.data.sources import folder as folder_source
from grain_jax.evals.inputs import files
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

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
  toy_data.build.build(folder_source.source(root), out, shard_size=4, workers=1, say=toy_data.quiet)
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


@pytest.mark.parametrize("limit", [0, -1, 178_956_971, 2.5, True])
def test_a_limit_that_cannot_be_kept_is_one_line_for_all(config, tmp_path, limit):
  """Training, evaluate, load, embed: before a checkpoint is read. PIL opens up to 178,956,970."""
  (tmp_path / "x.jpg").write_bytes(b"")
  flags = {"checkpoint": str(tmp_path), "images": str(tmp_path), "out": str(tmp_path / "o.npz")}
  flags |= {"texts": None, "step": None, "overwrite": False, "labels": "", "regions": False}
  own = config.to_dict()
  own["data"]["max_pixels"] = limit
  (tmp_path / "config.json").write_text(json.dumps(own))
  asked = {
    "train": lambda: configs.check(configs.resolve(configs.read(tmp_path / "config.json"))),
    "evaluate": lambda: evaluate.evaluate(tmp_path, ["zero_shot:mine"]),
    "load": lambda: grain_jax.load(tmp_path),
    "embed": lambda: embed._main(types.SimpleNamespace(**flags)),
  }
  for name, ask in asked.items():
    with pytest.raises(
      ValueError, match=rf"data.max_pixels = {limit} is not in \[1, 178956970"
    ) as e:
      ask()
    assert "\n" not in str(e.value), name


def test_the_limit_of_a_build_is_its_flags(tmp_path):
  root = tmp_path / "in"
  root.mkdir()
  for i, side in enumerate((10, 11)):
    Image.new("RGB", (side, 10)).save(root / f"{i}.png")
  (root / "annotations.csv").write_text("image,caption\n0.png,a\n1.png,b\n")
  source = folder_source.source(root, max_pixels=100)
  manifest = toy_data.build.build(source, tmp_path / "d", allow_dropped=0.5, say=toy_data.quiet)
  train = manifest["splits"]["train"]
  assert train["records"] == 1 and train["dropped"]["records"] == {
    "image_too_large": {"count": 1, "first": ["1.png"]}
  }


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
