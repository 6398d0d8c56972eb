"""The masked language model, beside transformers' own pipeline."""

import pytest
import tiny_language
import transformers

from grain_jax.annotate import masked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return str(tiny_language.make_masked(tmp_path_factory.mktemp("masked")))


@pytest.fixture(scope="module")
def model(folder):
  return masked.MaskedModel(folder)


def place(text, word, number=0):
  start = -1
  for _ in range(number + 1):
    start = text.index(word, start + 1)
  return masked.Place(text, start, start + len(word))


def test_probabilities_are_those_of_transformers(folder, model):
  """In one batch of texts of different lengths."""
  texts = [
    ("a red dog on a sofa", "a red<mask> on a sofa", "dog", 0),
    ("dog sleeps", "<mask> sleeps", "dog", 0),
    # The second of two, and not the one inside another word, as `str.replace` would have it.
    ("a doghouse, a dog and the dog", "a doghouse, a dog and the<mask>", "dog", 2),
  ]
  pipeline = transformers.pipeline("fill-mask", model=folder, tokenizer=folder)
  found = model.propose([place(text, word, n) for text, _, word, n in texts], top=10_000)
  for (_, with_mask, _, _), proposals in zip(texts, found, strict=True):
    entries = pipeline(with_mask, top_k=len(pipeline.tokenizer))
    want = {entry["token_str"]: entry["score"] for entry in entries}
    assert len(proposals) > 100
    for proposal in proposals[:50]:
      assert proposal.probability == pytest.approx(want[" " + proposal.word], rel=1e-4)
    assert [p.probability for p in proposals] == sorted(
      (p.probability for p in proposals), reverse=True
    )


def test_words_are_whole(model):
  (proposals,) = model.propose([place("a red dog", "dog")], top=10_000)
  words = {p.word for p in proposals}
  assert {"cat", "sofa", "sleeping"} <= words and len(words) == len(proposals)
  assert all(word.isalpha() and len(word) > 1 for word in words)


def test_a_word_is_most_similar_to_itself(model):
  (proposals,) = model.propose([place("a red dog", "dog")], top=10_000)
  by_word = {p.word: p.similarity for p in proposals}
  assert by_word.pop("dog") == pytest.approx(1, abs=1e-5) and max(by_word.values()) < 0.9


def test_a_long_text_is_seen_around_the_word(model):
  text = "cat " * 300 + "dog" + " cat" * 300
  ids, at, word = model._mask(place(text, "dog"))
  assert len(ids) == 64 and ids[at] == model._tokenizer.mask_token_id and len(word) == 1
  for start in (0, len(text) - 3):
    (proposals,) = model.propose([masked.Place(text, start, start + 3)], top=5)
    assert len(proposals) == 5


def test_what_is_not_of_one_word_has_no_proposals(model):
  assert model.propose([masked.Place("a dog", 1, 2), masked.Place("a dog", 3, 5)], top=5)[0] == []
  assert model.propose([], top=5) == []


def test_what_is_no_model_is_told_in_one_line(tmp_path, folder):
  with pytest.raises(ValueError, match="has no config.json. Give the folder of a masked"):
    masked.MaskedModel(str(tmp_path))
  (tmp_path / "config.json").write_text('{"model_type": "clip"}')
  with pytest.raises(ValueError, match="is no masked language model") as error:
    masked.MaskedModel(str(tmp_path))
  assert "\n" not in str(error.value)
