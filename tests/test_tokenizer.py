"""Ids against those of OpenAI's own tokenizer; packing against unpacking by the masks."""

import hashlib
import html
import re
import time

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_jax import tokenizer

# Made once by clip/simple_tokenizer.py of OpenAI's CLIP, without start and end.
OPENAI = {
  "A photo of a CAT": [320, 1125, 539, 320, 2368],
  "it's  a dog's\tlife\n": [585, 568, 320, 1929, 568, 970],
  "&lt;b&gt;Tom &amp;amp; Jerry&lt;/b&gt;": [283, 321, 285, 2435, 261, 9164, 34308, 321, 285],
  "café naïve Ünïcode": [15304, 1097, 35689, 563, 6522, 77, 35689, 3217],
  "cafe\u0301": [15304],
  "🐶 a dog 👩\u200d👩\u200d👧 2,000": [
    *[10631, 320, 1929, 26304, 26304, 964, 356, 273, 267, 271, 271, 271]
  ],
  "schÃ¶n": [844, 7255, 333],
  "“quotes” — dash…": [257, 5808, 257, 2005, 10206, 959],
  "日本語のテキスト": [39121, 44353, 34002, 252, 21575, 2429, 228, 47121, 32421, 486],
  "İstanbul ΣΑΣ": [328, 16384, 11231, 139, 225, 138, 109, 139, 480],
  "<|endoftext|> x": [49407, 343],
  "a\xa0b\u200bc": [320, 321, 9844, 322],
  "": [],
  "!!!???": [11194, 3824],
  "½ ² ①": [33613, 41175, 158, 239, 510],
  "\x1b[31mred\x07": [736],
  "don't we'll they're I'VE": [847, 713, 649, 1342, 889, 982, 328, 1200],
  "३ १२": [7410, 358, 7410, 356, 7410, 357],
  "&hearts; 5 &lt 6": [3405, 276, 283, 277],
  " ".join(["word"] * 100): [2653] * 75,
}
WORDS = st.lists(
  st.sampled_from(["a", "red", "Octopus", "42", "naïve", "☃", "."]), min_size=1, max_size=12
).map(" ".join)


@pytest.fixture(scope="module")
def tok():
  return tokenizer.Tokenizer()


def test_vocabulary_is_openais():
  digest = hashlib.sha256(tokenizer.VOCABULARY.read_bytes()).hexdigest()
  assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
  assert "OpenAI" in (tokenizer.VOCABULARY.parent / "LICENSE.txt").read_text()


@pytest.mark.parametrize("text", OPENAI, ids=range(len(OPENAI)))
def test_ids_are_openais(tok, text):
  assert tok.encode(text).tolist() == [49406, *OPENAI[text], 49407]
  assert tok.encode(text.encode()).tolist() == [49406, *OPENAI[text], 49407]


def test_tokenize_pads_with_zeros(tok):
  rows = tok.tokenize(["a photo of a cat", "word " * 100])
  assert rows.shape == (2, 77) and rows.dtype == np.int32
  assert rows[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 70
  assert rows[1].tolist() == [49406] + [2653] * 75 + [49407]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30) | st.text("ab &;<#\n\t'\"amplt39", max_size=20))
def test_clean_is_clips(text):
  theirs = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  assert tokenizer.clean(text) == re.sub(r"\s+", " ", theirs).strip().lower()


def test_decode(tok):
  assert tok.decode(tok.encode("A small  green apple.")) == "a small green apple ."
  assert tok.decode(tok.tokenize(["café"])[0]) == "café"


def test_hash_depends_on_the_settings(tok):
  assert tok.hash == tokenizer.Tokenizer().hash != tokenizer.Tokenizer(64).hash
  assert len(tok.hash) == 64


def test_cached_text_is_cheap(tok):
  text = "a small green apple left of a red bicycle"
  tok.encode(text)
  best = min(_seconds(lambda: [tok.encode(text) for _ in range(100)]) for _ in range(5))
  assert best / 100 < 30e-6


def test_the_cache_never_mixes_texts_up_and_keeps_the_last_one_of_a_slot():
  cache = tokenizer.TextCache(slots=3)
  for i in range(50):
    for text in (f"text {i}", f"text {i}".encode()):  # equal hashes
      cache.put(text, np.array([i, isinstance(text, bytes)]))
      assert cache.get(text).tolist() == [i, isinstance(text, bytes)]
  kept = [
    i for i in range(50) for t in (f"text {i}", f"text {i}".encode()) if cache.get(t) is not None
  ]
  assert 1 <= len(kept) <= 3
  for i in kept:
    for text in (f"text {i}", f"text {i}".encode()):
      assert cache.get(text) is None or cache.get(text)[0] == i


def _seconds(run):
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def unpack(row):
  """{slot: ids} by segments, after checking positions and ends of a packed row."""
  texts = {}
  for slot in np.unique(row.segments[row.segments > 0]) - 1:
    where = np.flatnonzero(row.segments == slot + 1)
    assert (np.diff(where) == 1).all()
    assert row.positions[where].tolist() == list(range(len(where)))
    assert row.ends[slot] == where[-1]
    texts[int(slot)] = row.tokens[where].tolist()
  padding = row.segments == 0
  assert not row.tokens[padding].any() and not row.positions[padding].any()
  assert set(np.flatnonzero(row.text_mask)) == set(texts)
  assert not row.ends[~row.text_mask].any()
  return texts


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_packing_keeps_what_fits(tok, data):
  regions, negatives = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3))
  absent = st.sampled_from([None, "", "  "])
  texts = [data.draw(WORDS)] + [
    data.draw(absent | WORDS | WORDS) for _ in range(regions + negatives)
  ]
  scores = data.draw(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=regions, max_size=regions))
  length = data.draw(st.integers(4, 60))
  row = tok.pack(texts, row_length=length, scores=scores, regions=regions, negatives=negatives)
  # By hand: drop one after the other until the rest fits.
  want = {i: tok.encode(t).tolist() for i, t in enumerate(texts) if t and t.strip()}
  if len(want[0]) > length:
    want[0] = [*want[0][: length - 1], 49407]
  present = len(want)
  order = sorted(range(1, 1 + regions), key=lambda i: (scores[i - 1], -i))
  order += range(regions + negatives, regions, -1)
  for slot in order:
    if sum(map(len, want.values())) <= length:
      break
    want.pop(slot, None)
  assert unpack(row) == want
  assert row.dropped == present - len(want)
  assert len(row.tokens) == length and len(row.ends) == 1 + regions + negatives


def test_packing_by_hand(tok):
  row = tok.pack(["a cat", "a dog", None], row_length=10, regions=2)
  assert row.tokens.tolist() == [49406, 320, 2368, 49407, 49406, 320, 1929, 49407, 0, 0]
  assert row.segments.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
  assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0]
  assert row.ends.tolist() == [3, 7, 0] and row.text_mask.tolist() == [True, True, False]


def test_too_many_texts_is_one_line(tok):
  with pytest.raises(ValueError, match="3 texts for 2 slots.*raise regions") as error:
    tok.pack(["a", "b", "c"], row_length=20, regions=1)
  assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=30), st.integers(2, 40), st.integers(1, 6))
def test_many_texts_come_back(tok, texts, length, most):
  rows = tok.pack_texts(texts, row_length=length, texts_per_row=most)
  assert rows.tokens.shape[1] == length and rows.ends.shape[1] == most
  found = [
    unpack(tokenizer.Packed(*(value[i] for value in rows[:5]), dropped=0))
    for i in range(len(rows.tokens))
  ]
  for text, row, slot in zip(texts, rows.row, rows.slot, strict=True):
    ids = tok.encode(text).tolist()
    assert found[row][slot] == (ids if len(ids) <= length else [*ids[: length - 1], 49407])
  assert sum(map(len, found)) == len(texts)
  # First fit: no text would have had room in an earlier row when it came.
  free, used = np.full(len(found) + 1, length), np.zeros(len(found) + 1, int)
  for text, row in zip(texts, rows.row, strict=True):
    size = min(len(tok.encode(text)), length)
    assert row == next(r for r in range(len(free)) if free[r] >= size and used[r] < most)
    free[row] -= size
    used[row] += 1
