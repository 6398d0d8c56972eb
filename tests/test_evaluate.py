"""Evaluations of a finished run, and encoders over any number of rows."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bench import kills
from grain_jax import evaluate, steps, trees
from grain_jax import mesh as meshes
from grain_jax import tokenizer as tokenizers
from grain_jax.models import grain


def run(*flags):
  environment = {**os.environ, "XLA_FLAGS": kills.XLA_FLAGS}
  command = [sys.executable, "-m", "grain_jax.evaluate", *flags]
  return subprocess.run(command, cwd=kills.ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_gives_the_results_of_the_run(finished_run, tmp_path):
  workdir = shutil.copytree(finished_run, tmp_path / "run")
  (workdir / "results.json").unlink()
  done = run(f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  assert (workdir / "results.json").read_text() == (finished_run / "results.json").read_text()
  assert "unseen/top1" in done.stdout


@pytest.mark.slow
def test_load_gives_the_parameters_of_a_step_on_eight_devices(finished_run):
  state = kills.final_state(finished_run)
  config, params, step = evaluate.load(str(finished_run))
  assert step == kills.STEPS and config.model.image.width == 32
  for name, value in trees.named_leaves(params):
    assert len(value.sharding.device_set) == 8
    assert_array_equal(value, state[f"params/{name}"])
  _, older, step = evaluate.load(str(finished_run), step=kills.STEPS - 3)
  assert step == kills.STEPS - 3
  assert np.any(
    older["query_decoder"]["query_embedding"] != params["query_decoder"]["query_embedding"]
  )


def test_encoders_take_any_number_of_rows(tiny, rng):
  """Against the model applied to one row at a time, each text in a row of its own."""
  tiny.model.image.depth = tiny.model.text.depth = tiny.model.decoder.depth = 1
  model = grain.build(tiny)
  params = trees.map_with_name(
    lambda name, leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32),
    jax.eval_shape(lambda: steps.init_params(model, tiny)),
  )
  tokenizer = tokenizers.Tokenizer(context=tiny.model.text.context)
  images = rng.integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)  # batches of 8: one and a part
  texts = [f"a photo of {n} red apples" + ", and more" * (n % 5) for n in range(43)]
  mesh = meshes.create(tiny)
  with jax.set_mesh(mesh):
    encoders = evaluate.make_encoders(tiny, model, params, mesh=mesh, tokenizer=tokenizer)
    image, text, (regions, boxes) = (
      encoders.image(images), encoders.text(texts), encoders.regions(images)
    )  # fmt: skip
  assert image.shape == (11, 16) and boxes.shape == (11, 5, 4)

  apply = jax.jit(lambda m, *a: model.apply({"params": params}, *a, method=m), static_argnums=0)
  for i in (0, 7, 10):
    one = apply("encode_regions", images[i : i + 1])
    assert_allclose(image[i], one[0][0], atol=1e-5)
    assert_allclose(regions[i], one[1][0], atol=1e-5)
    assert_allclose(boxes[i], one[2][-1][0], atol=1e-5)
  for i in (0, 20, 42):
    ids = tokenizer.encode(texts[i])
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, : len(ids)] = ids
    segments = (tokens > 0).astype(np.int32)
    positions = segments * np.arange(40, dtype=np.int32)
    ends = np.array([[len(ids) - 1]], np.int32)
    assert_allclose(
      text[i], apply("encode_text", tokens, segments, positions, ends)[0, 0], atol=1e-5
    )
