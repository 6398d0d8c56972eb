"""How an imported model sees an image: as its own files say, by every road, and as CLIP's image
processor of `transformers` makes it."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import stock_models as stock
import torch
import transformers
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import grain_jax
from grain_jax import config as configs
from grain_jax import embed, export
from grain_jax.convert import convert, hf_processor, start
from grain_jax.data import build, dataset, examples, transforms
from grain_jax.data.sources import base
from grain_jax.evals import built
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import classification
from grain_jax.schema import RECORD_CAPTIONS, RECORD_IMAGE, RECORD_KEY, RECORD_REGIONS

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SIZES = [(53, 70), (70, 53), (24, 24), (37, 24), (100, 31), (25, 24), (12, 19)]
# OpenCLIP's words, and the same for CLIPImageProcessor.
HOW = {
  "shortest": {"size": {"shortest_edge": 24}, "do_center_crop": True},
  "squash": {"size": {"height": 24, "width": 24}, "do_center_crop": False},
}
RESAMPLE = {"bicubic": 3, "bilinear": 2}
CROP = {"height": 24, "width": 24}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Pictures with edges and noise in a folder of one class, by path."""
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp("pictures") / "mine" / "thing"
  folder.mkdir(parents=True)
  for i, (width, height) in enumerate(SIZES):
    ramp = np.linspace(0, 200, height * width * 3).reshape(height, width, 3)
    ramp += rng.integers(0, 56, ramp.shape)
    ramp[height // 3 :, : width // 2] = rng.integers(0, 256, 3)
    Image.fromarray(ramp.astype(np.uint8)).save(folder / f"{i}.png")
  return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def state():
  return stock.randomize(stock.Clip()).state_dict()


def open_clip_config(**preprocess):
  return {
    "model_cfg": {
      "embed_dim": 24,
      "vision_cfg": {
        "image_size": 24, "layers": 2, "width": 128, "patch_size": 8, "mlp_ratio": 0.75,
      },
      "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3,
        "mlp_ratio": 1.5,
      },
    },
    "preprocess_cfg": preprocess,
  }  # fmt: skip


def seen_by_all_roads(config, params, files, tmp_path):
  """u8 images by the name of the road; each in the order of the files."""
  model = grain_jax.load(tmp_path / "run")
  roads = {"load": model.preprocess(files)}
  encoders, _ = embed.open_encoders(config, params, batch_size=8)
  seen = images_lib.encode(lambda x: x.reshape(len(x), -1), files, encoders, what="x").values
  roads["embed"] = seen.reshape(roads["load"].shape)
  batches = []

  def spy(images):
    batches.append(images)
    return np.ones((len(images), 1), np.float32)

  spying = dataclasses.replace(
    encoders, image=spy, text=lambda texts: np.ones((len(texts), 1), np.float32), templates=("{}",)
  )
  spying = dataclasses.replace(spying, fingerprint=lambda: "")
  classification.run(spying, "mine", Options(root=files[0].parents[2]))
  roads["an outside set"] = np.concatenate(batches)
  records = [
    {RECORD_KEY: p.name, RECORD_IMAGE: jpeg(p), RECORD_CAPTIONS: ["a"], RECORD_REGIONS: []}
    for p in files
  ]
  source = base.Source(
    name="x", read=lambda: iter([("val", r) for r in records]), about={}, settings={}
  )
  build.build(source, tmp_path / "data", shard_size=8, workers=1, say=lambda line: None)
  config.eval_batch_size = 8
  data = dataset.open_dataset(tmp_path / "data")
  (batch,) = (b for b, _ in built._batches(config, encoders, data, "val", whole=True))
  roads["built"] = batch["image"][: len(files)]
  return roads


def jpeg(path):
  """The picture as a file of built data, which `as_jpeg` names."""
  with Image.open(path) as image:
    image.save(as_jpeg(path), quality=100, subsampling=0)
  return as_jpeg(path).read_bytes()


def as_jpeg(path):
  return path.parents[2] / f"{path.stem}.jpg"


@pytest.mark.parametrize("resize", HOW)
@pytest.mark.parametrize("interpolation", RESAMPLE)
def test_open_clips_config_is_obeyed_by_every_road(state, files, tmp_path, resize, interpolation):
  torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
  how = {"mean": MEAN, "std": STD, "interpolation": interpolation, "resize_mode": resize}
  (tmp_path / "open_clip_config.json").write_text(json.dumps(open_clip_config(**how)))
  convert.convert("open_clip", str(tmp_path), out=str(tmp_path / "run"))
  config, params, _ = stock.run_of(tmp_path / "run")
  processor = transformers.CLIPImageProcessorPil(
    image_mean=MEAN, image_std=STD, resample=RESAMPLE[interpolation], crop_size=CROP, **HOW[resize]
  )
  roads = seen_by_all_roads(config, params, files, tmp_path)
  for road, seen in roads.items():
    pictures = [Image.open(as_jpeg(p) if road == "built" else p) for p in files]
    want = processor(pictures, return_tensors="pt")["pixel_values"]
    assert_allclose(stock.pixels(config, seen), want, atol=1e-5, err_msg=road)
  # Through the model, pixels and weights together.
  model = stock.Clip()
  model.load_state_dict(state)
  want = processor([Image.open(p) for p in files], return_tensors="pt")["pixel_values"]
  got = grain_jax.load(tmp_path / "run").encode_image(files)
  assert_allclose(got, stock.unit(model.eval().encode_image(want)), atol=2e-5)


PROCESSORS = {
  "clips own": {"size": {"shortest_edge": 24}},
  "bilinear": {"size": {"shortest_edge": 24}, "resample": 2},
  "squash": {**HOW["squash"], "resample": 2, "image_mean": MEAN, "image_std": STD},
  "squash, cropped to the same": {"size": CROP, "do_center_crop": True},
  "not normalised": {"size": {"shortest_edge": 24}, "do_normalize": False},
  "in old words": {"size": 24, "crop_size": 24},
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_processors_of_transformers_are_obeyed(files, tmp_path, kind):
  own = transformers.CLIPImageProcessorPil(**{"crop_size": CROP, **PROCESSORS[kind]})
  own.save_pretrained(tmp_path)
  if kind == "in old words":
    held = json.loads((tmp_path / "preprocessor_config.json").read_text())
    held |= PROCESSORS[kind] | {"feature_extractor_type": "CLIPFeatureExtractor"}
    del held["image_processor_type"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(held))
    own = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
  facts = hf_processor.read(tmp_path, size=24)
  mean, std = facts["model.image.mean"], facts["model.image.std"]
  for file in files:
    image = Image.open(file)
    seen = transforms.resize(
      image, 24, facts["data.eval_resize"], interpolation=facts["model.image.interpolation"]
    )
    want = own(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert_allclose((seen / 255 - np.array(mean)) / np.array(std), want, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"resample": 1}, "resample = 1 is not built here"),
    ({"size": {"shortest_edge": 32}}, "crop_size = 24 is not built here: images of 24 x 24"),
    ({"size": {"longest_edge": 24}}, "size = {'longest_edge': 24}"),
    ({"size": {"height": 24, "width": 32}}, "'width': 32"),
    ({"do_center_crop": False}, "do_center_crop = false"),
    ({"crop_size": {"height": 24, "width": 20}}, "crop_size = {'height': 24, 'width': 20}"),
    ({"crop_size": 32}, "crop_size = 32"),
    ({"do_resize": False}, "do_resize = false"),
    ({"do_rescale": False}, "do_rescale = False"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
    ({"image_std": [0.1, 0.0, 0.1]}, "image_std = .* not positive"),
    ({"image_mean": 0.5}, "image_mean = 0.5 is not 3 numbers"),
    ({"do_pad": True}, "do_pad = True is not built here"),
    ({"image_processor_type": "ViTImageProcessor"}, "is of a ViTImageProcessor"),
  ],
)
def test_what_a_processor_does_and_we_do_not_is_one_line(tmp_path, change, says):
  own = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=CROP)
  own.save_pretrained(tmp_path)
  file = tmp_path / "preprocessor_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(ValueError, match=says) as error:
    hf_processor.read(tmp_path, size=24)
  assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize("resize", ["squash", "center_crop"])
def test_an_export_says_how_its_model_sees(files, tiny, tmp_path, rng, resize):
  tiny.method, tiny.data.max_regions, tiny.data.row_length = "clip", 0, 32
  tiny.model.image.update(pre_norm=True, qk_norm=False, interpolation="bilinear")
  tiny.data.eval_resize = resize
  stock.random_run(tmp_path / "run", tiny, rng)
  export.export(str(tmp_path / "run"), format="hf_clip", out=str(tmp_path / "hf"))
  processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "hf")
  seen = grain_jax.load(tmp_path / "run").preprocess(files)
  want = processor([Image.open(p) for p in files], return_tensors="pt")["pixel_values"]
  assert_allclose(stock.pixels(tiny, seen), want, atol=1e-5)
  again = convert.convert("hf_clip", str(tmp_path / "hf"), out=str(tmp_path / "again"))
  assert again.model.image.interpolation == "bilinear" and again.data.eval_resize == resize


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_training_resizes_by_the_models_interpolation(files, tiny, tmp_path, resize):
  tiny.data.update(resize=resize, crop_min_area=1.0, reduced_decode=False)
  tiny.model.image.interpolation = "bilinear"
  picture = Image.open(files[0])
  encoded = jpeg(files[0])
  record = {RECORD_KEY: "a", RECORD_IMAGE: encoded, RECORD_CAPTIONS: ["a"], RECORD_REGIONS: []}
  source = base.Source(name="x", read=lambda: iter([("train", record)]), about={}, settings={})
  build.build(source, tmp_path / "data", shard_size=8, workers=1, say=lambda line: None)
  data = dataset.open_dataset(tmp_path / "data")
  made = examples.Examples(data, "train", tiny, training=True)
  (seen,) = made.chunk(np.array([0]), 0).arrays[0]
  shown = Image.open(as_jpeg(files[0]))
  size = tiny.model.image.size
  if resize == "crop":  # the window is drawn; its aspect gives way to the image's only if wider
    draws = transforms.uniforms(seed=tiny.seed, epoch=0, indices=np.array([0]), count=7)
    shown = shown.crop(transforms.random_window(*picture.size, draws[0, 2:6], min_area=1.0))
  want = np.asarray(shown.resize((size, size), Image.Resampling.BILINEAR))
  assert_array_equal(seen, want)
  assert np.any(want != np.asarray(shown.resize((size, size), Image.Resampling.BICUBIC)))


def test_a_run_from_a_tower_that_sees_otherwise(tiny, tiny_clip, tmp_path, rng, caplog):
  """Another interpolation is refused, as another mean is; another crop is said."""
  theirs = configs.from_json(configs.to_json(tiny_clip))
  theirs.data.eval_resize = "center_crop"
  stock.random_run(tmp_path / "clip", theirs, rng)
  tiny.init.image = str(tmp_path / "clip")
  tiny.model.image.interpolation = "bilinear"
  with pytest.raises(ValueError, match="interpolation is 'bicubic' there and 'bilinear' here"):
    start.start_from(tiny, {})
  tiny.model.image.interpolation = "bicubic"
  with caplog.at_level(logging.WARNING):
    start.start_from(tiny, {})
  (line,) = (r.getMessage() for r in caplog.records if "eval_resize" in r.getMessage())
  assert "is 'center_crop' there" in line and "data.resize = 'squash' in training" in line
  caplog.clear()
  tiny.data.update(eval_resize="center_crop", resize="crop")
  start.start_from(tiny, {})
  assert not [r for r in caplog.records if "eval_resize" in r.getMessage()]


def test_a_configuration_from_before_is_bicubic(tiny):
  held = json.loads(configs.to_json(tiny))
  del held["model"]["image"]["interpolation"]
  assert configs.from_json(json.dumps(held)).model.image.interpolation == "bicubic"
