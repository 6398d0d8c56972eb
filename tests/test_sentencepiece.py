"""SentencePiece ids against transformers' T5 tokenizer; where its files are and what fits."""

import importlib.util
import pathlib
import shutil

import numpy as np
import pieces
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from grain_jax import config as configs
from grain_jax import sentencepiece, tokenizer, tokenizing

WORDS = st.lists(
  st.sampled_from(["a", "A", "Dog", "dog", "apples,", "☃", "the", "<extra_id_0>", " ", "\n"]),
  max_size=20,
).map(" ".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Not to be written to."""
  folder = tmp_path_factory.mktemp("pieces") / "t5"
  pieces.save(folder)
  return folder


@pytest.fixture(scope="module")
def theirs(folder):
  import transformers

  return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@given(WORDS)
def test_ids_are_those_of_transformers(folder, theirs, text):
  ours = sentencepiece.SentencePiece(folder, 12)
  want = theirs(text, truncation=True, max_length=12)["input_ids"]
  assert ours.encode(text).tolist() == want
  assert ours.encode(text.encode()).tolist() == want
  row = ours.tokenize([text])[0]
  assert_array_equal(row, np.pad(want, (0, 12 - len(want))))  # <pad> is 0


def test_case_is_kept_and_the_end_too(folder):
  ours = sentencepiece.SentencePiece(folder, 8)
  assert ours.encode("a dog").tolist() != ours.encode("A Dog").tolist()
  whole = ours.with_context(64)
  assert whole.decode(whole.encode("A red Cat")) == "A red Cat"
  long = ours.encode("the garden of a photo " * 9)
  assert (len(long), long[-1]) == (8, 1)
  assert ours.encode("").tolist() == [1]


def test_a_row_packs_ids_of_each_text_with_its_end(folder):
  ours = sentencepiece.SentencePiece(folder, 16)
  packed = ours.pack(["a dog", None, "Red apples"], row_length=32, regions=2)
  for slot, text in ((0, "a dog"), (2, "Red apples")):
    at = packed.segments == slot + 1
    assert_array_equal(packed.tokens[at], ours.encode(text))
    assert_array_equal(packed.positions[at], np.arange(at.sum()))
    assert packed.tokens[packed.ends[slot]] == 1
  assert packed.text_mask.tolist() == [True, False, True]


def test_hash_is_of_the_vocabulary_and_not_of_its_place(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "same")
  pieces.save(tmp_path / "other", size=60)
  ours = sentencepiece.SentencePiece(folder, 16)
  assert sentencepiece.SentencePiece(tmp_path / "same", 16).hash == ours.hash
  assert sentencepiece.SentencePiece(tmp_path / "other", 16).hash != ours.hash
  assert ours.with_context(17).hash != ours.hash
  assert ours.with_context(17).vocabulary_hash == ours.vocabulary_hash


def test_the_configuration_chooses(tiny, folder):
  assert type(tokenizing.make(tiny)) is tokenizer.Tokenizer
  tiny.model.text.update(tokenizer=str(folder), context=20)
  made = tokenizing.make(tiny)
  assert (type(made), made.context) == (sentencepiece.SentencePiece, 20)


def test_a_tokenizer_that_does_not_fit_ends_in_one_line(tiny, folder, tmp_path):
  def line():
    with pytest.raises(ValueError) as error:
      tokenizing.make(tiny)
    assert "\n" not in str(error.value)
    return str(error.value)

  tiny.model.text.update(vocab_size=32128)  # T5's, read with CLIP's tokenizer
  assert "model.text.vocab_size = 32128 is fewer than the 49408 tokens of CLIP's" in line()
  size = sentencepiece.SentencePiece(folder).vocabulary_size
  tiny.model.text.update(tokenizer=str(folder), vocab_size=size - 1)
  assert f"fewer than the {size} tokens of {folder}" in line()
  tiny.model.text.vocab_size = size
  tokenizing.make(tiny)
  tiny.model.text.tokenizer = str(tmp_path / "none")
  assert "there is no tokenizer.json or spiece.model" in line()
  broken = tmp_path / "broken"
  broken.mkdir()
  (broken / "tokenizer.json").write_text("{}")
  tiny.model.text.tokenizer = str(broken)
  assert "is not read as a SentencePiece vocabulary" in line()
  (broken / "tokenizer.json").unlink()
  (broken / "spiece.model").write_bytes(b"nonsense")
  installed = importlib.util.find_spec("sentencepiece") is not None
  assert ("is not read as a" if installed else "pip install sentencepiece, or put the") in line()
  (broken / "tokenizer.json").write_text(tokenizer.vocabulary_json())
  assert "has no token </s>" in line()


def test_a_folder_has_its_tokenizer_with_it_and_may_be_moved(tiny, folder, tmp_path):
  tiny.model.text.tokenizer = str(folder)
  run = tmp_path / "run"
  run.mkdir()
  (run / "config.json").write_text(configs.to_json(tokenizing.into_folder(tiny, run)))
  assert "/" not in configs.from_json((run / "config.json").read_text()).model.text.tokenizer
  moved = run.rename(tmp_path / "moved")
  config = configs.read(moved / "config.json")
  assert pathlib.Path(config.model.text.tokenizer) == moved / "tokenizer"
  assert tokenizing.make(config).hash == tokenizing.make(tiny).hash
  shutil.rmtree(moved / "tokenizer")
  with pytest.raises(ValueError, match=f"tokenizer = '{moved}/tokenizer': there is no"):
    tokenizing.make(configs.read(moved / "config.json"))
  shutil.copytree(folder, moved / "tokenizer")
  again = tokenizing.into_folder(config, moved)  # as a run does that goes on
  assert again.model.text.tokenizer == "tokenizer"
  pieces.save(tmp_path / "other", size=60)
  tiny.model.text.tokenizer = str(tmp_path / "other")
  with pytest.raises(ValueError, match="is another tokenizer than"):
    tokenizing.into_folder(tiny, moved)
