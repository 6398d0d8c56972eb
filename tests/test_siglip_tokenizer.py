"""SigLIP's and SigLIP 2's ids against transformers' tokenizers, cut and padded to the context."""

import importlib
import io
import json
import shutil

import numpy as np
import pieces
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from tokenizers import models, normalizers, trainers

from grain_jax import config as configs
from grain_jax import sentencepiece, tokenizing
from grain_jax.evals.sets import retrieval

CONTEXT = 12
PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
PARTS = st.sampled_from(
  ["a", "A", "Dog", "dog,", "the", "☃", " ", "  ", "\n", "\u00a0", "▁", "apple's", "ﬁ", "É", "!!!"]
  + ["x▁y", "１２", "<", ">", "/s", "c-a.t", "Σ", "İ", "\\", "[red]", "{}", "_", "of a", "…"]
)
TEXTS = st.lists(PARTS, max_size=16).flatmap(
  lambda parts: st.sampled_from(["".join(parts), " ".join(parts)])
)


def theirs_of(tokenizer, text):
  return tokenizer(text, padding="max_length", truncation=True, max_length=CONTEXT)["input_ids"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """SiglipTokenizer, its folder with spiece.model, and one with tokenizer.json of the same."""
  package = pytest.importorskip("sentencepiece")
  conversion = importlib.import_module("transformers.convert_slow_tokenizer")

  folder, model = tmp_path_factory.mktemp("siglip"), io.BytesIO()
  package.SentencePieceTrainer.train(
    sentence_iterator=iter([text.lower() for text in pieces.TEXTS] * 20), model_writer=model,
    vocab_size=70, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
  )  # fmt: skip
  (folder / "spiece.model").write_bytes(model.getvalue())
  made = transformers.SiglipTokenizer(vocab_file=str(folder / "spiece.model"))
  made.save_pretrained(folder)
  (folder / "fast").mkdir()
  conversion.SpmConverter(made).converted().save(str(folder / "fast/tokenizer.json"))
  shutil.copyfile(folder / "tokenizer_config.json", folder / "fast/tokenizer_config.json")
  return made, folder, folder / "fast"


@given(TEXTS)
def test_ids_are_those_of_siglip_tokenizer(trained, text):
  theirs, slow, fast = trained
  want = theirs_of(theirs, text)
  for folder in (slow, fast):
    ours = sentencepiece.SentencePiece(folder, CONTEXT, pads=True)
    assert ours.encode(text).tolist() == want
    assert ours.encode(text.encode()).tolist() == want


def test_special_tokens_spelled_out_and_the_size(trained):
  theirs, slow, fast = trained
  ours = sentencepiece.SentencePiece(slow, CONTEXT, pads=True)
  for text in ("a dog </s> a cat", "<unk>", "</s>the end"):
    assert ours.encode(text).tolist() == theirs_of(theirs, text)
  assert ours.vocabulary_size == theirs.vocab_size
  assert sentencepiece.SentencePiece(fast).vocabulary_size == theirs.vocab_size
  assert ours.decode(ours.encode("A Dog, a cat!")) == "a dog a cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("siglip") / "json"
  pieces.save_siglip(folder)
  return folder


@pytest.fixture(scope="module")
def normalizing(folder):
  """The file with SigLIP's form in its own normaliser, as converted tokenizers carry it."""
  backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  backend.normalizer = normalizers.Sequence(
    [
      normalizers.Replace("▁", " "),
      normalizers.Lowercase(),
      normalizers.Replace(tokenizers.Regex(PUNCTUATION), ""),
      normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
      normalizers.Strip(),
    ]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="</s>", eos_token="</s>"
  )


@given(TEXTS.filter(lambda text: "Σ" not in text))  # Rust has one small sigma, Python two
def test_ids_are_those_of_a_file_that_normalises_itself(folder, normalizing, text):
  ours = sentencepiece.SentencePiece(folder, CONTEXT, pads=True)
  want = theirs_of(normalizing, text)
  want = want if len(want) == CONTEXT and want[-1] == 1 else [*want[: CONTEXT - 1], 1]
  assert ours.encode(text).tolist() == want


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
  """(Siglip2Tokenizer of a small vocabulary, its folder as the hub has it)."""
  folder = tmp_path_factory.mktemp("siglip2") / "gemma"
  trained = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
  trained.normalizer = normalizers.Replace(" ", "▁")
  special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
  trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
  trained.train_from_iterator([text.lower() for text in pieces.TEXTS] * 5, trainer)
  model = json.loads(trained.to_str())["model"]
  made = transformers.Siglip2Tokenizer(
    vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]],
    add_bos_token=False, add_eos_token=True, padding_side="right", mask_token="<unk>",
  )  # fmt: skip
  made.save_pretrained(folder)
  file = json.loads((folder / "tokenizer.json").read_text())
  file["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}  # Gemma's
  (folder / "tokenizer.json").write_text(json.dumps(file))
  settings = json.loads((folder / "tokenizer_config.json").read_text())
  settings["tokenizer_class"] = "GemmaTokenizer"
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return made, folder


@given(TEXTS)
def test_ids_are_those_of_siglip2_tokenizer(gemma, text):
  theirs, folder = gemma
  ours = sentencepiece.SentencePiece(folder, CONTEXT, pads=True)
  assert (ours.pad, ours.vocabulary_size) == (0, len(theirs))
  assert ours.encode(text).tolist() == theirs_of(theirs, text)


def test_the_tower_decides_whether_texts_are_padded(tiny, folder, tmp_path):
  tiny.model.text.update(tokenizer=str(folder), context=CONTEXT)
  bare = tokenizing.make(tiny)
  tiny.model.text.kind = "siglip"
  made = tokenizing.make(tiny)
  short = bare.encode("A dog!")
  assert_array_equal(made.encode("A dog!"), np.pad(short, (0, 12 - len(short)), constant_values=1))
  assert made.hash != bare.hash and made.vocabulary_hash == bare.vocabulary_hash
  texts = ["the garden of a photo " * 9, "dog", "a dog"]
  assert retrieval.truncated(texts, CONTEXT, made) == 1  # by another context, whose texts are bare
  assert_array_equal(made.tokenize(["A dog!"])[0], made.encode("a dog"))
  run = tmp_path / "run"
  run.mkdir()
  (run / "config.json").write_text(configs.to_json(tokenizing.into_folder(tiny, run)))
  assert tokenizing.make(configs.read(run / "config.json")).hash == made.hash
  (run / "tokenizer/tokenizer_config.json").unlink()  # then it is T5's
  assert tokenizing.make(configs.read(run / "config.json")).hash != made.hash


def test_a_folder_below_the_users_is_the_same_tokenizer(tiny, folder, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(folder.parent))
  monkeypatch.chdir(tmp_path)
  assert sentencepiece.read_kind("~/json") == sentencepiece.read_kind(folder)
  tiny.model.text.update(tokenizer="~/json", context=CONTEXT, kind="siglip")
  made = tokenizing.make(tiny)
  assert made.hash == sentencepiece.SentencePiece(folder, CONTEXT, pads=True).hash
  for _ in range(2):  # as a run does that goes on
    written = tokenizing.into_folder(tiny, tmp_path)
    (tmp_path / "config.json").write_text(configs.to_json(written))
    assert tokenizing.make(configs.read(tmp_path / "config.json")).hash == made.hash


def test_clips_and_t5s_texts_are_padded_too(tiny, tmp_path):
  tiny.model.text.update(kind="siglip", context=CONTEXT)
  made = tokenizing.make(tiny)
  ids = made.encode("a dog")
  assert ids.shape == (CONTEXT,) and ids[0] == 49406 and (ids[4:] == 0).all()
  assert retrieval.truncated(["dog " * 11, "dog " * 10, "dog"], CONTEXT, made) == 1
  pieces.save(tmp_path / "t5")
  tiny.model.text.tokenizer = str(tmp_path / "t5")
  ids = tokenizing.make(tiny).encode("a dog")
  assert ids.shape == (CONTEXT,) and ids[-1] == 0 and 1 in ids


def test_a_row_has_a_context_for_each_text(folder):
  ours = sentencepiece.SentencePiece(folder, CONTEXT, pads=True)
  packed = ours.pack(["a dog", None, "Red apples", "cat"], row_length=30, regions=3)
  assert packed.text_mask.tolist() == [True, False, True, False] and packed.dropped == 1
  assert packed.ends.tolist() == [11, 0, 23, 0]
  assert_array_equal(packed.tokens[12:24], ours.encode("red apples"))
  rows = ours.pack_texts(["a dog", "a cat", "red"], row_length=30, texts_per_row=8)
  assert rows.row.tolist() == [0, 0, 1]
