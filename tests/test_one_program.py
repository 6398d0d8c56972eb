"""A model in Python: one program an encoder, whatever the number of inputs, and what Flax sees."""

import logging
import re
import threading
import time

import drawn
import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

import grain_jax
from grain_jax import inference
from grain_jax.runtime import compile_cache

COUNTS = (1, 2, 5, 16, 17, 33)


@pytest.fixture
def compiled():
  """Durations of the compilations so far, as JAX tells them."""
  durations = []

  def listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      durations.append(duration)

  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield durations
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def make():
  """`make(tiny)` -> a model with random parameters."""
  return lambda config: inference.Model(config, drawn.params(config))


@pytest.fixture
def images(rng):
  return rng.integers(0, 256, (33, 32, 32, 3)).astype(np.uint8)


@pytest.mark.parametrize("batch", [1, 32])
def test_an_encoder_is_compiled_once_for_any_number(
  make, tiny, images, compiled, batch, monkeypatch
):
  monkeypatch.setattr(inference, "_BATCH", {"cpu": batch})
  model = make(tiny)
  encoders = {
    "image": model.encode_image,
    "patches": model.encode_patches,
    "text": lambda x: model.encode_text([f"the number {i} of {len(x)}" for i in range(len(x))]),
  }
  for name, encode in encoders.items():
    before = len(compiled)
    for count in COUNTS:
      assert len(encode(images[:count])) == count
    assert len(compiled) - before == 1, name
  before = len(compiled)
  for texts in (["a"], ["a", "b"], [f"thing {i}" for i in range(40)]):
    model.describe_regions(images[0], texts)
    model.classify(images[: len(texts)], texts)
  assert len(compiled) - before == 1  # that of the regions
  for rows in (model.encode_image(images), model.encode_patches(images)):
    assert rows.dtype == np.float32


@pytest.mark.parametrize("batch", [1, 32])
def test_an_embedding_does_not_depend_on_its_neighbours(make, tiny, images, batch, monkeypatch):
  monkeypatch.setattr(inference, "_BATCH", {"cpu": batch})
  model = make(tiny)
  alone = jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode_image"))
  want = np.concatenate([alone(model.params, image[None]) for image in images])
  for count in COUNTS:
    assert_allclose(model.encode_image(images[:count]), want[:count], atol=1e-6)
  white = np.full_like(images[:5], 255)
  assert_allclose(model.encode_image([*white, images[7]])[-1], want[7], atol=1e-6)
  texts = ["a red apple", "x", "two dogs under a table"] * 11
  beside = model.encode_text(texts)
  for i in range(3):
    assert_allclose(model.encode_text(texts[i])[0], beside[i], atol=1e-6)


def test_models_of_one_architecture_share_their_programs(make, tiny, images, compiled):
  one = make(tiny)
  want = one.encode_image(images[:2])
  before = len(compiled)
  other = inference.Model(tiny, drawn.params(tiny, seed=2))
  got = other.encode_image(images[:2])
  assert len(compiled) == before
  assert abs(got - want).max() > 0.1
  assert_allclose(one.encode_image(images[:2]), want, atol=1e-6)


def test_threads_that_ask_at_once_wait_for_one_program(make, tiny, images, compiled):
  model = make(tiny)
  found, before = [], len(compiled)
  run = lambda: found.append(model.encode_image(images[:3]))  # noqa: E731
  threads = [threading.Thread(target=run) for _ in range(4)]
  [t.start() for t in threads]
  [t.join() for t in threads]
  assert len(compiled) - before == 1
  for other in found:
    assert_allclose(other, found[0], atol=1e-6)


def test_it_says_that_it_compiles_once_an_encoder(make, tiny, images, caplog, monkeypatch):
  monkeypatch.setattr(compile_cache, "PATIENCE", 0)
  model = make(tiny)
  with caplog.at_level(logging.WARNING):
    model.encode_image(images[:2])
    time.sleep(0.05)
    model.encode_image(images)
    model.encode_text("a")
    time.sleep(0.05)
  lines = [record.message for record in caplog.records if "compiling" in record.message]
  folder = jax.config.jax_compilation_cache_dir
  assert lines == [
    f"compiling the image encoder for batches of 1: once, kept in {folder}",
    f"compiling the text encoder for batches of 1: once, kept in {folder}",
  ]


def test_a_user_of_flax_has_module_and_parameters(make, tiny, images):
  model = make(tiny)
  pixels = model.preprocess(images[:2])

  def loss(params):
    return model.apply({"params": params}, pixels, method="encode_image").sum()

  gradient = jax.jit(jax.grad(loss))(model.params)
  assert jax.tree.structure(gradient) == jax.tree.structure(model.params)
  assert np.isfinite(jax.tree.leaves(gradient)[0]).all()
  encode = jax.jit(model.module.apply, static_argnames="method")
  got = encode({"params": model.params}, pixels, method="encode_image")
  assert_allclose(got, model.encode_image(images[:2]), atol=1e-6)


def test_repr_says_what_the_model_is(make, tiny, tiny_clip):
  count = sum(x.size for x in jax.tree.leaves(drawn.params(tiny)))
  assert repr(make(tiny)) == (
    "<grain_jax model, grain: ViT 2 x 32, patches of 16 in 32 px; text 2 x 32, 32 tokens; "
    f"decoder 2 x 32, 5 region queries; embeddings of 16; {count:,} parameters>"
  )
  clip = inference.Model(tiny_clip, drawn.params(tiny_clip), source="step 1,300 of runs/a")
  assert "decoder" not in repr(clip) and "<grain_jax model, clip: " in repr(clip)
  assert repr(clip).endswith("; step 1,300 of runs/a>")


@pytest.mark.parametrize(
  ("call", "line"),
  [
    (lambda m: m.encode_text(None), "texts is None. Give a text or a list of texts."),
    (lambda m: m.encode_text(b"a dog"), "texts is a bytes. Give a text or a list of texts."),
    (lambda m: m.encode_text(3), "texts is a int. Give a text or a list of texts."),
    (lambda m: m.tokenize({"a": "dog"}), "texts is a dict. Give a text or a list of texts."),
    (lambda m: m.encode_text(["a", None]), "texts[1] is None, not a text."),
    (lambda m: m.classify([], None), "classes is None. Give a text or a list of texts."),
    (lambda m: m.describe_regions(None, "a"), "images is None: give u8 [H, W, 3] with values of 0"),
    (lambda m: m.describe_regions([], "a"), "describe_regions takes one image, not 0."),
    (lambda m: grain_jax.load(None), "load: path is None. Give the folder of a run or of weig"),
    (lambda m: grain_jax.load(b"runs/a"), "load: path is a bytes. Give the folder of a run or of"),
    (lambda m: grain_jax.load("https://host/a"), "path = https://host/a is an address (https://),"),
  ],
)
def test_what_is_no_text_or_folder_is_one_line(make, tiny, call, line):
  with pytest.raises(ValueError, match=f"^{re.escape(line)}") as caught:
    call(make(tiny))
  assert "\n" not in str(caught.value)
