"""Runs with T5's tower and a SentencePiece tokenizer: from Sentence-T5, moved, gone on, refused."""

import shutil

import numpy as np
import pieces
import pytest
from numpy.testing import assert_allclose

import grain_jax
from bench import kills
from grain_jax import config as configs
from grain_jax import sentencepiece
from grain_jax.convert import convert
from grain_jax.training import loop

pytestmark = pytest.mark.slow  # each trains a few steps


@pytest.fixture
def config(scenes_dir):
  """Four steps of GRAIN, evaluated and saved after the last."""
  c = configs.load(f"configs/quickstart.py:{kills.TINY}")
  c.loss.matcher = "device"  # whose program is found in the cache by the second run
  c.data.dir, c.steps, c.save_every, c.evals = str(scenes_dir), 4, 100, ("zero_shot", "retrieval")
  c.mesh.update(data=-1)
  return c


def test_a_run_from_sentence_t5_is_whole_without_it(config, tmp_path):
  pieces.save_sentence_t5(tmp_path / "st5", context=24)
  convert.convert("sentence_t5", str(tmp_path / "st5"), out=str(tmp_path / "tower"))
  config.init.update(text=str(tmp_path / "tower"), adopt=True)
  whole, moved = tmp_path / "whole", tmp_path / "moved"
  results = loop.train(config, str(whole))
  assert 0 < results["retrieval/image_to_text/r10"] <= 1
  before = grain_jax.load(whole).encode_text(pieces.TEXTS)

  shutil.rmtree(tmp_path / "st5")
  shutil.rmtree(tmp_path / "tower")
  whole.rename(moved)
  model = grain_jax.load(moved)
  tokens = sentencepiece.SentencePiece(moved / "tokenizer", 24)
  assert model.tokenize(["A red Cat"]).tolist() == tokens.tokenize(["A red Cat"]).tolist()
  assert_allclose(model.encode_text(pieces.TEXTS), before, atol=1e-6)
  assert np.isfinite(before).all() and np.ptp(before, axis=0).max() > 0.01

  config.steps = 8
  loop.train(config, str(moved), continue_as=("steps",))
  assert kills.saved_steps(moved)[-1] == 8


def test_a_tokenizer_that_does_not_fit_ends_before_training(config, tmp_path):
  config.model.text.update(kind="t5", activation="relu", vocab_size=32128)
  with pytest.raises(ValueError, match="vocab_size = 32128 is fewer than the 49408 tokens of CLIP"):
    loop.train(config, str(tmp_path / "run"))
  pieces.save(tmp_path / "pieces")
  config.model.text.update(tokenizer=str(tmp_path / "pieces"), vocab_size=5)
  with pytest.raises(ValueError, match="vocab_size = 5 is fewer than the"):
    loop.train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_clips_tower_takes_a_tokenizer_of_pieces_and_t5s_clips(config, tmp_path):
  """Any tower with any tokenizer, trained from nothing; a run with another one does not go on."""
  config.model.text.update(kind="t5", activation="relu")  # and CLIP's tokenizer
  loop.train(config, str(tmp_path / "t5"))
  pieces.save(tmp_path / "pieces")
  config.model.text.update(kind="clip", tokenizer=str(tmp_path / "pieces"), vocab_size=100)
  loop.train(config, str(tmp_path / "clip"))
  pieces.save(tmp_path / "others", size=50)
  config.model.text.tokenizer = str(tmp_path / "others")
  with pytest.raises(ValueError, match="tokenizer"):
    loop.train(config, str(tmp_path / "clip"))
