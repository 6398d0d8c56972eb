"""Token ids in the shards: those of transformers, and the same batches with them as without."""

import json
import shutil

import numpy as np
import pieces
import pytest
import toy_data
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grain_jax import tokenizer, tokenizing
from grain_jax.data import build, dataset, mixture, pipeline, records, token_ids
from grain_jax.data.building import inputs

WORDS = ["a dog", "LEFT", "é", "☃ snow", "&amp; more", "12:30", "'s", "the red box of " * 9, "\x00"]
NEGATIVES = ["", "  ", "a cat", "the red box"]


def texts(count):
  """So many records with long, odd and blank texts, negatives among them."""
  rng = np.random.default_rng(count)

  def text(number):
    return " ".join(rng.choice(WORDS, int(rng.integers(1, 7)))) + f" {number}"

  for i in range(count):
    made = toy_data.record(i, captions=[text(i) for _ in range(int(rng.integers(1, 4)))])
    for region in made["regions"]:
      region["description"] = text(i)
      region["negatives"] = rng.choice(NEGATIVES, int(rng.integers(0, 4))).tolist()
    kinds = ("relation", "attribute", "object", "action", "object")
    negatives = [{"caption": str(rng.choice(NEGATIVES)), "kind": kind} for kind in kinds]
    yield {**made, "negatives": negatives[: int(rng.integers(0, 6))]}


def built(folder, tokens, *, context=77, count=13):
  source = toy_data.source(list(texts(count)))
  options = dict(shard_size=5, workers=0, say=toy_data.quiet, allow_dropped=1.0)
  build.build(source, folder, tokenizer=tokens, context=context, **options)
  return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """(with CLIP's ids, without ids)."""
  root = tmp_path_factory.mktemp("tokens")
  return built(root / "ids", ""), built(root / "bare", "none")


def batches(folder, **changes):
  c = toy_data.config(folder)
  data = {"negatives": 3, "negatives_per_region": 2, "row_length": 200, "resize": "crop"}
  c.data.update(data | {k: v for k, v in changes.items() if k in c.data})
  c.model.text.update({k: v for k, v in changes.items() if k in c.model.text})
  return pipeline.train_batches(folder, c)


def assert_equal(ours, theirs, count=7):
  for _ in range(count):
    a, b = next(ours), next(theirs)
    for name in b:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  ours.close()
  theirs.close()


def forbid_encoding(monkeypatch):
  def encode(self, texts):
    raise AssertionError(f"encoded anew: {texts}")

  monkeypatch.setattr(tokenizer.Tokenizer, "_encode_missing", encode)


def test_ids_in_the_shard_are_those_of_transformers(folders):
  vocabulary = json.loads(tokenizer.vocabulary_json())["model"]
  merges = [tuple(pair) for pair in vocabulary["merges"]]
  theirs = transformers.CLIPTokenizer(vocab=vocabulary["vocab"], merges=merges)
  opened = dataset.open_dataset(folders[0])
  parsed = [opened.parse("train", i) for i in range(13)]
  assert opened.tokens["vocabulary"] == tokenizer.Tokenizer().vocabulary_hash
  assert opened.tokens["hash"] == tokenizer.Tokenizer(77).hash
  assert dataset.open_dataset(folders[1]).tokens is None
  compared = 0
  for record in parsed:
    told = [*record.captions, *record.descriptions, *(text for text, _ in record.negatives)]
    told += [text for several in record.region_negatives for text in several]
    assert record.token_ids.keys() == set(told)
    for text, stored in record.token_ids.items():
      ids = np.frombuffer(stored, "<u2").tolist()
      assert len(ids) <= 77 and ids[0] == tokenizer.START and ids[-1] == tokenizer.END
      if text.isascii() and b"&" not in text and b"\x00" not in text:
        want = theirs(text.decode(), truncation=True, max_length=77)["input_ids"]
        assert ids == want, text
        compared += 1
  assert compared > 30


@pytest.mark.parametrize("context", [77, 32, 5, 2])
@pytest.mark.parametrize("caption", ["half", "original"])
def test_batches_with_ids_are_those_without_and_nothing_is_encoded(
  folders, context, caption, monkeypatch
):
  theirs = batches(folders[1], context=context, caption=caption)
  wanted = [next(theirs) for _ in range(7)]
  theirs.close()
  forbid_encoding(monkeypatch)
  assert_equal(batches(folders[0], context=context, caption=caption), _Given(wanted))


class _Given:
  def __init__(self, values):
    self._values = iter(values)

  def __next__(self):
    return next(self._values)

  def close(self):
    pass


def test_joined_descriptions_and_a_longer_context_are_encoded(folders):
  assert_equal(batches(folders[0], caption="joined"), batches(folders[1], caption="joined"))
  assert_equal(batches(folders[0], context=90), batches(folders[1], context=90))


@pytest.mark.parametrize("write, kind", [(pieces.save, "t5"), (pieces.save_siglip, "siglip")])
def test_ids_of_a_folder_s_tokenizer_padded_or_not(tmp_path, monkeypatch, write, kind):
  write(tmp_path / "tokenizer")
  folder = str(tmp_path / "tokenizer")
  ours, bare = built(tmp_path / "ids", folder, context=20), built(tmp_path / "bare", "none")
  options = dict(tokenizer=folder, kind=kind, context=16, row_length=260)
  theirs = batches(bare, **options)
  wanted = [next(theirs) for _ in range(4)]
  theirs.close()
  forbid_encoding(monkeypatch)
  assert_equal(batches(ours, **options), _Given(wanted), count=4)


def test_a_mixture_of_both_is_one_of_none(folders):
  def mixed(first, second):
    c = toy_data.config("")
    c.data.update(negatives=2, row_length=150)
    c.data.sources = ({"dir": str(first), "name": "a"}, {"dir": str(second), "name": "b"})
    return pipeline.train_batches(mixture.open_training(c), c)

  assert_equal(mixed(*folders), mixed(folders[1], folders[1]))


def test_another_tokenizer_or_a_longer_context_is_told_in_a_line(tmp_path, folders, tiny):
  about = dataset.open_dataset(folders[0]).tokens
  made = {context: tokenizing.make(_with(tiny, context=context)) for context in (32, 77, 80)}
  assert token_ids.describe({"d": about}, made[77]) == []
  assert token_ids.describe({"d": about}, made[32]) == []
  assert token_ids.describe({"d": None}, made[77]) == [
    "d: texts are encoded while training, for its shards hold no token ids. Built anew with "
    "--overwrite, --tokenizer and --context as this run has them, it spares that."
  ]
  (line,) = token_ids.describe({"d": about}, made[80])
  assert "its token ids are for 77 tokens a text, not 80" in line
  pieces.save(tmp_path)
  other = tokenizing.make(_with(tiny, context=77, tokenizer=str(tmp_path)))
  (line,) = token_ids.describe({"d": about}, other)
  assert "its token ids are of another tokenizer (CLIP)" in line and "\n" not in line


def _with(config, **text):
  config.model.text.update(text)
  return config


def test_a_record_whose_ids_are_not_of_its_texts_is_bad():
  r = toy_data.record(1, regions=2)
  data = records.encode(r, token_ids=lambda told: [b"\x00\x00"] * (len(told) - 1))
  with pytest.raises(ValueError, match="4 texts and token ids of 3"):
    records.parse(data)


def test_a_build_of_another_tokenizer_is_another_build(tmp_path, folders):
  with pytest.raises(ValueError, match=r"other settings or inputs \(context: 77 -> 32\)"):
    built(folders[0], "", context=32)
  with pytest.raises(ValueError, match=r"\(tokenizer: CLIP's -> none\)"):
    built(folders[0], "none")
  with pytest.raises(ValueError, match=r"\(tokenizer: none -> CLIP's\)"):
    built(folders[1], "")
  built(folders[1], "none")
  older = shutil.copytree(folders[1], tmp_path / "older") / "manifest.json"
  manifest = json.loads(older.read_text())
  del manifest[token_ids.KEY]
  older.write_text(json.dumps(manifest))
  built(older.parent, "")  # one from before ids were written may stay
  assert json.loads(older.read_text()) == manifest
  assert inputs._changed_tokens({}, None) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  st.lists(st.text(max_size=60), min_size=1, max_size=6),
  st.integers(2, 30),
  st.integers(0, 20),
)
def test_ids_cut_to_a_shorter_context_are_those_encoded_for_it(told, context, more):
  writer = token_ids.make_writer("", context + more)
  reader = token_ids.make_reader(writer.about, tokenizer.Tokenizer(context))
  wanted = tokenizer.Tokenizer(context).encode_batch(told)
  for stored, ids in zip(writer.encode(told), wanted, strict=True):
    np.testing.assert_array_equal(reader.read(stored), ids)
