"""`python -m bench.long_texts [--json]`: the host's work for a record, the more texts it has seen.

A run on CC12M reads 60 million distinct texts an epoch. The other benches of the host see a few
hundred or thousand texts again and again, so they cannot show a cache that fills up. This one does
the pipeline's work (parse, decode, transform, choose, tokenise, pack) on records whose texts are
all new, after 0, 100,000 and 500,000 distinct texts, and tells

  record_us       CPU time of a record, median of the rounds, microseconds
  texts_us        of which for its texts (tokenise and pack), measured apart
  slot_writes     writes to the cache of texts for each text inserted, counted
  slot_reads      reads of it for each text asked for, counted
  flat            whether both times stay within 20 % of those at the start
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench import input_pipeline_sides
from configs import common
from grain_jax import helptext, schema, tokenizer
from grain_jax.data import examples, records

SEEN = (0, 100_000, 500_000)  # distinct texts before each measurement
REGIONS = 5  # so six texts a record
WITHIN = 1.2  # of the time at the start
_CHUNK = 32  # records a call, as in the pipeline


class NewTexts:
  """Stands in for a dataset whose texts never come again; its records have one image."""

  tokens = None  # no ids beside them

  def __init__(self, image: bytes):
    self._image = image
    self._made = 0
    self._ready: list[bytes] = []

  def texts(self, count: int) -> list[bytes]:
    """So many new texts, in length between a caption and a description."""
    start, self._made = self._made, self._made + count
    return [
      f"a small green thing, number {i}, on a table by the window".encode()
      for i in range(start, start + count)
    ]

  def records(self, count: int) -> list[bytes]:
    """So many records as a shard holds them."""
    made = []
    for _ in range(count):
      caption, *descriptions = (text.decode() for text in self.texts(1 + REGIONS))
      regions = [
        {"description": text, "box": (0.1, 0.2, 0.6, 0.9), "score": 0.5, "negatives": []}
        for text in descriptions
      ]
      record = {
        schema.RECORD_KEY: caption,
        schema.RECORD_IMAGE: self._image,
        schema.RECORD_CAPTIONS: [caption],
        schema.RECORD_REGIONS: regions,
        schema.RECORD_NEGATIVES: [],
      }
      made.append(records.encode(record))
    return made

  def prepare(self, count: int) -> None:
    """Makes the records that the next `read` gives, so that it takes no time."""
    self._ready = self.records(count)

  def read(self, split: str, indices: Sequence[int]) -> list[bytes]:
    """The records made by `prepare`."""
    del split
    return self._ready[: len(indices)]


class CountingSlots(list):
  """The slots of a cache; counts what is done to them."""

  reads = writes = 0

  def __getitem__(self, place: Any) -> Any:
    self.reads += 1
    return super().__getitem__(place)

  def __setitem__(self, place: Any, value: Any) -> None:
    self.writes += 1
    super().__setitem__(place, value)


def slot_work(tokens: tokenizer.Tokenizer, texts: Sequence[bytes]) -> tuple[float, float]:
  """(writes, reads) of the cache's slots for each of `texts`, all new."""
  cache = tokens._cache  # the count is of its own work
  counted = cache._slots = CountingSlots(cache._slots)
  tokens.encode_batch(texts)
  cache._slots = list(counted)
  return counted.writes / len(texts), counted.reads / len(texts)


def measure(
  *, seen: Sequence[int] = SEEN, rounds: int = 9, chunks: int = 4, side: int = 224
) -> dict[str, Any]:
  """The work for a record after so many distinct texts.

  Args:
    seen: distinct texts before each measurement, rising.
    rounds: of which the median counts.
    chunks: of 32 records in a round.
    side: of the model's images in pixels; the JPEGs are twice as large.
  """
  config = common.get_config()
  config.model.image.size, config.data.max_regions = side, REGIONS
  source = NewTexts(input_pipeline_sides.draw(0, 2 * side, 2 * side))
  made = examples.Examples(source, "train", config, training=True)
  scores, indices = np.ones((_CHUNK, REGIONS)), np.arange(_CHUNK)

  def record_seconds() -> float:
    source.prepare(_CHUNK)
    began = time.thread_time()
    made.chunk(indices, 0)
    return time.thread_time() - began

  def texts_seconds() -> float:
    texts = source.texts(_CHUNK * (1 + REGIONS))
    rows = [texts[i::_CHUNK] for i in range(_CHUNK)]
    began = time.thread_time()
    made.tokenizer.pack_batch(rows, row_length=config.data.row_length, scores=scores)
    return time.thread_time() - began

  record_seconds(), texts_seconds()  # imports and the vocabulary
  result: dict[str, Any] = {"after": []}
  told = 0
  for wanted in seen:
    while told < wanted:
      told += len(made.tokenizer.encode_batch(source.texts(min(1024, wanted - told))))
    times = {
      kind: statistics.median(sum(run() for _ in range(chunks)) for _ in range(rounds))
      for kind, run in (("record_us", record_seconds), ("texts_us", texts_seconds))
    }
    writes, reads = slot_work(made.tokenizer, source.texts(1000))
    told += (2 * rounds * chunks * _CHUNK) * (1 + REGIONS) + 1000
    row = {kind: round(s / chunks / _CHUNK * 1e6, 1) for kind, s in times.items()}
    result["after"].append({"texts": wanted, **row, "slot_writes": writes, "slot_reads": reads})
  first = result["after"][0]
  ratios = [row[k] / first[k] for row in result["after"] for k in ("record_us", "texts_us")]
  result |= {"largest_ratio": round(max(ratios), 3), "flat": max(ratios) <= WITHIN}
  return result


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m bench.long_texts", description=__doc__)
  parser.formatter_class = helptext.ArgparseFormatter
  parser.add_argument("--rounds", type=int, default=9, help="of which the median counts")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  flags = parser.parse_args(arguments)
  result = measure(rounds=flags.rounds)
  if flags.json:
    print(json.dumps(result))
  else:
    for row in result["after"]:
      print(", ".join(f"{name} {value:,}" for name, value in row.items()))
    print(f"largest ratio {result['largest_ratio']}, flat {result['flat']}")
  sys.exit(not result["flat"])


if __name__ == "__main__":
  main()
