"""The bench of many distinct texts: what it counts, and that the host's work stays flat."""

import json

import pytest

from bench import long_texts
from grain_jax import tokenizer


def test_an_insertion_writes_one_slot_whatever_came_before():
  source, tokens = long_texts.NewTexts(b""), tokenizer.Tokenizer()
  tokens._cache = tokenizer.TextCache(slots=256)
  for _ in range(3):
    assert long_texts.slot_work(tokens, source.texts(300)) == (1.0, 1.0)
    tokens.encode_batch(source.texts(1000))
  assert type(tokens._cache._slots) is list and len(tokens._cache._slots) == 256


def test_texts_and_records_never_come_again():
  source = long_texts.NewTexts(b"x")
  texts = source.texts(3) + source.texts(3)
  assert len(set(texts)) == 6 and len(set(source.records(4))) == 4


def test_the_bench_measures_after_so_many_texts(monkeypatch, capsys):
  monkeypatch.setattr(long_texts, "SEEN", (0, 2000))
  found = long_texts.measure(seen=(0, 2000), rounds=1, chunks=1, side=32)
  assert [row["texts"] for row in found["after"]] == [0, 2000]
  for row in found["after"]:
    assert row["record_us"] > row["texts_us"] > 0 and row["slot_writes"] == 1
  monkeypatch.setattr(long_texts, "measure", lambda rounds: {**found, "flat": False})
  with pytest.raises(SystemExit) as end:
    long_texts.main(["--json"])
  assert end.value.code == 1 and json.loads(capsys.readouterr().out)["flat"] is False
