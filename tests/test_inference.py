"""`grain_jax.load` on a finished run, against the model applied by hand and by torch."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import grain_jax
from grain_jax.convert import weights
from grain_jax.models import grain

pytestmark = pytest.mark.slow  # they share one finished run


@pytest.fixture(scope="module")
def model(finished_run):
  return grain_jax.load(finished_run)


@pytest.fixture
def images(rng):
  return rng.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)


def test_texts_are_the_tokenizers_ids_and_the_models_embeddings(model, finished_run):
  texts = ["a red apple", "two dogs under a table", "x"]
  ids = model.tokenize(texts)
  assert ids.dtype == np.int32 and ids.shape == (3, model.config.model.text.context)
  assert [row[row > 0][[0, -1]].tolist() for row in ids] == [[49406, 49407]] * 3
  lengths = (ids > 0).sum(1)

  config, params, _ = weights.load_run(str(finished_run))
  tower = grain.build(config)
  positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (3, 1))
  segments = (positions < lengths[:, None]).astype(np.int32)
  want = tower.apply(
    {"params": params}, ids, segments, positions, lengths[:, None] - 1, method="encode_text"
  )[:, 0]
  got = model.encode_text(texts)
  assert got.dtype == np.float32 and isinstance(got, np.ndarray)
  assert_allclose(got, want, atol=1e-5)
  assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
  assert_array_equal(model.encode_text("x"), model.encode_text(["x"]))
  assert model.encode_text([]).shape == (0, config.model.embed_dim)


def test_token_ids_and_a_mask_are_the_text(model):
  texts = ["a red apple", "two dogs under a table", "x"]
  ids = model.tokenize(texts)
  mask = ids > 0
  want = model.encode_text(texts)
  assert_allclose(model.encode_token_ids(ids, mask), want, atol=1e-6)
  width = int(mask.sum(1).max())
  garbage = np.where(mask, ids, 7)[:, :width]  # what the mask hides does not matter
  assert_allclose(model.encode_token_ids(garbage, mask[:, :width]), want, atol=1e-6)
  assert model.encode_token_ids(ids[:0], mask[:0]).shape == (0, want.shape[1])
  for wrong, line in (
    ((ids, mask[:2]), "a mask of the same shape"),
    ((ids.astype(float), mask), "give integers"),
    ((ids, mask[:, ::-1]), "pad on the right"),
    ((ids, np.zeros_like(mask)), "pad on the right"),
    ((np.where(mask, 60_000, 0), mask), "another model's tokenizer"),
    ((np.tile(ids, 4), np.tile(mask, 4)), "more than the model's context"),
  ):
    with pytest.raises(ValueError, match=line) as error:
      model.encode_token_ids(*wrong)
    assert "\n" not in str(error.value)


def test_all_kinds_of_pictures_give_the_same_embedding(model, images, tmp_path):
  paths = [tmp_path / f"{i}.png" for i in range(len(images))]
  for path, image in zip(paths, images, strict=True):
    Image.fromarray(image).save(path)
  want = model.encode_image(images)
  assert want.shape == (5, model.config.model.embed_dim) and want.dtype == np.float32
  for given in (paths, [str(p) for p in paths], [Image.open(p) for p in paths], list(images)):
    assert_allclose(model.encode_image(given), want, atol=1e-6)
  assert_allclose(model.encode_image(images[0]), want[:1], atol=1e-5)
  transparent = Image.fromarray(images[0]).convert("RGBA")
  assert_allclose(model.encode_image(transparent), want[:1], atol=1e-5)


def test_pictures_of_any_size_are_squashed(model, rng):
  wide = rng.integers(0, 256, (50, 90, 3)).astype(np.uint8)
  small = np.asarray(Image.fromarray(wide).resize((32, 32), Image.Resampling.BICUBIC))
  assert_array_equal(model.preprocess(wide)[0], small)


def test_more_images_than_fit_one_call_are_no_different(model, rng):
  images = rng.integers(0, 256, (67, 32, 32, 3)).astype(np.uint8)
  assert_allclose(
    model.encode_image(images)[[0, 66]], model.encode_image(images[[0, 66]]), atol=1e-5
  )


def test_descriptions_find_the_query_that_is_nearest(model, finished_run, images):
  descriptions = ["a red apple", "a small green dog", "a blue car"]
  boxes, scores = model.describe_regions(images[0], descriptions)
  assert boxes.shape == (3, 4) and scores.shape == (3,)
  config, params, _ = weights.load_run(str(finished_run))
  _, regions, all_boxes = grain.build(config).apply(
    {"params": params}, jnp.asarray(images[:1]), method="encode_regions"
  )
  similarity = torch.nn.functional.cosine_similarity(
    torch.tensor(model.encode_text(descriptions))[:, None],
    torch.tensor(np.array(regions))[0],
    dim=-1,
  ).numpy()
  assert_allclose(scores, similarity.max(1), atol=1e-5)
  for box, query in zip(boxes, similarity.argmax(1), strict=True):
    cx, cy, w, h = np.asarray(all_boxes)[-1, 0, query]
    want = np.clip([cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2], 0, 1)
    assert_allclose(box, want, atol=1e-5)
  one = model.describe_regions(images[0], "a blue car")
  assert_allclose(one.scores[0], scores[2], atol=1e-5)


def test_classes_are_softmax_of_mean_prompts(model, images):
  classes = ["apple", "dog", "sea lion"]
  descriptors = {"Apple": ["a stem", "red skin"], "dog": ["four legs"], "cat": ["claws"]}
  descriptors["Sea_Lion"] = []  # the name alone
  probabilities = model.classify(images, classes, descriptors)
  template = model.config.zero_shot.templates[0].rstrip(".")
  prompts = {
    "apple": [f"{template.format('apple')}, which is a stem",
              f"{template.format('apple')}, which has red skin"],
    "dog": [f"{template.format('dog')}, which has four legs"],
    "sea lion": [model.config.zero_shot.templates[0].format("sea lion")],
  }  # fmt: skip
  means = np.stack([model.encode_text(prompts[c]).mean(0) for c in classes])
  scale = np.exp(np.asarray(jax.device_get(model.params["logit_scale"])))
  logits = scale * model.encode_image(images) @ means.T  # as the evaluation by descriptors
  assert_allclose(probabilities, torch.softmax(torch.tensor(logits), 1).numpy(), atol=1e-4)
  assert_allclose(model.classify(images, classes).sum(1), 1, rtol=1e-5)
  assert model.classify([], classes).shape == (0, 3)


@pytest.mark.parametrize(
  ("call", "line"),
  [
    (lambda m: m.encode_image("nowhere.png"), r"images\[0\]: there is no file nowhere.png"),
    (lambda m: m.encode_image(np.zeros((2, 8, 8, 3))), r"images\[0\] is float64 \[8, 8, 3\]"),
    (lambda m: m.encode_image(np.zeros((8, 8, 4), np.uint8)), r"uint8 \[8, 8, 4\]"),
    (lambda m: m.encode_text(["a", 3]), r"texts\[1\] is a int, not a text"),
    (lambda m: m.classify(np.zeros((1, 8, 8, 3), np.uint8), []), "needs class names"),
    (
      lambda m: m.describe_regions(np.zeros((2, 8, 8, 3), np.uint8), ["a"]),
      "describe_regions takes one image, not 2",
    ),
  ],
)
def test_wrong_input_is_one_line(model, call, line):
  with pytest.raises(ValueError, match=line) as caught:
    call(model)
  assert "\n" not in str(caught.value)


def test_a_file_that_is_no_picture_is_named(model, tmp_path):
  (tmp_path / "a.jpg").write_bytes(b"not a picture")
  with pytest.raises(ValueError, match=r"images\[0\], .*a\.jpg"):
    model.encode_image(tmp_path / "a.jpg")


def test_a_folder_without_a_model_says_what_to_give(tmp_path):
  with pytest.raises(ValueError, match="holds no model: there is no config.json"):
    grain_jax.load(tmp_path)


def test_an_export_loads_as_the_run_itself(model, finished_run, images, tmp_path):
  from grain_jax import export

  export.export(str(finished_run), format="safetensors", out=str(tmp_path / "out"))
  again = grain_jax.load(tmp_path / "out")
  assert_array_equal(again.encode_image(images), model.encode_image(images))
  with pytest.raises(ValueError, match="has no step 3"):
    grain_jax.load(tmp_path / "out", step=3)


def test_clip_has_no_regions(finished_run, images, tmp_path, tiny):
  tiny.method = "clip"
  from grain_jax import inference

  model = inference.Model(tiny, drawn.params(tiny))
  assert model.encode_image(images).shape == (5, 16)
  with pytest.raises(ValueError, match="has no region queries"):
    model.describe_regions(images[0], ["a"])
