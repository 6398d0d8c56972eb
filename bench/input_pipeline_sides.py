"""The sides of `bench.input_pipeline`, each in a process of its own: data, ours, the peer.

A side reads lines 'N' on standard input, makes N batches, and answers with what they took.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from grain_jax.data.sources import base

REGIONS = 5
ROW_LENGTH = 128


def draw(index: int, width: int, height: int) -> bytes:
  """A JPEG with the spectrum of a photograph, more or less: noise at four scales, quality 90."""
  rng = np.random.default_rng(index)
  pixels = np.zeros((height, width, 3))
  for less in (64, 16, 4, 1):
    noise = rng.integers(0, 256, (-(-height // less), -(-width // less), 3), np.uint8)
    layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    pixels += np.asarray(layer.filter(ImageFilter.GaussianBlur(1)), float) * less**0.5
  pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
  encoded = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8)).save(encoded, "JPEG", quality=90)
  return encoded.getvalue()


def make_data(
  folder: pathlib.Path, *, images: int, width: int, height: int, records: int = 0
) -> None:
  """`files/` with JPEGs and records.json for the peer, `shards/` for us: the same records.

  Args:
    folder: to write to.
    images: to draw.
    width: of the images in pixels.
    height: of the images in pixels.
    records: each with texts of its own, and one of the images in turn; 0: one an image.
  """
  from grain_jax import schema
  from grain_jax.data import build

  rng, files = np.random.default_rng(0), folder / "files"
  files.mkdir()
  for i in range(images):
    (files / f"{i}.jpg").write_bytes(draw(i, width, height))
  bare = [_record(i, rng) for i in range(records or images)]

  def read() -> Iterator[Any]:
    for i, record in enumerate(bare):
      data = (files / f"{i % images}.jpg").read_bytes()
      yield "train", {**record, schema.RECORD_IMAGE: data}

  source = base.Source(name="bench", read=read, about={}, settings={})
  build.build(source, folder / "shards", shard_size=512, workers=1, say=lambda line: None)
  (folder / "records.json").write_text(json.dumps(bare))


def _record(number: int, rng: np.random.Generator) -> dict[str, Any]:
  """Without its image; no text comes a second time."""
  from grain_jax import schema

  low = rng.uniform(0, 0.6, (7, 2))
  boxes = np.concatenate([low, low + rng.uniform(0.1, 0.4, (7, 2))], axis=1)
  regions = [
    {
      "description": f"a small green thing, number {number} of kind {kind}",
      "box": tuple(float(x) for x in box),
      "score": float(rng.random()),
      "negatives": [],
    }
    for kind, box in enumerate(boxes)
  ]
  caption = f"picture {number} of seven things on a table in front of a window, with a red curtain"
  return {
    schema.RECORD_KEY: str(number),
    schema.RECORD_CAPTIONS: [caption],
    schema.RECORD_REGIONS: regions,
    schema.RECORD_NEGATIVES: [],
  }


def ours(
  folder: pathlib.Path, *, batch: int, size: int, cores: int, reduced: bool, workers: int = 0
) -> Iterator[Any]:
  """Our batches without end, by worker processes or (0) by as many threads as `cores`."""
  from configs import common
  from grain_jax.data import pipeline

  config = common.get_config()
  config.batch_size, config.model.image.size = batch, size
  config.data.update(dir=str(folder / "shards"), threads=cores, reduced_decode=reduced)
  config.data.update(workers=workers)
  config.data.update(row_length=ROW_LENGTH, max_regions=REGIONS, caption="original", prefetch=2)
  return pipeline.train_batches(config.data.dir, config)


def peer(
  folder: pathlib.Path, *, batch: int, size: int, cores: int, reduced: bool = False
) -> Iterator[Any]:
  """Batches of a DataLoader without end; `reduced` decodes at 1/2, 1/4 or 1/8 as ours does."""
  import torch

  from grain_jax import schema, tokenizer

  records = json.loads((folder / "records.json").read_text())
  tokens = tokenizer.Tokenizer()
  files = sorted((folder / "files").iterdir(), key=lambda path: int(path.stem))

  class Images(torch.utils.data.Dataset):
    """One example at a time: dict of arrays."""

    def __len__(self) -> int:
      return len(records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
      record = records[index]
      with Image.open(files[index % len(files)]) as image:
        if reduced:
          image.draft("RGB", (size, size))
        pixels = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
      regions = sorted(record[schema.RECORD_REGIONS], key=lambda r: -r["score"])
      regions = regions[:REGIONS]
      y0, x0, y1, x1 = np.array([r["box"] for r in regions], np.float32).T
      texts = [record[schema.RECORD_CAPTIONS][0]]
      texts += [r["description"] for r in regions]
      packed = tokens.pack(texts, row_length=ROW_LENGTH, regions=REGIONS, negatives=0)
      boxes = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], axis=-1)
      fields = {k: v for k, v in packed._asdict().items() if isinstance(v, np.ndarray)}
      return {"image": np.array(pixels), "boxes": boxes, **fields}

  loader = torch.utils.data.DataLoader(
    Images(), batch, shuffle=True, num_workers=cores, drop_last=True, persistent_workers=cores > 0
  )
  while True:
    yield from loader


def cpu_seconds() -> float:
  """CPU time of this process and of those of its children that still run."""
  own = resource.getrusage(resource.RUSAGE_SELF)
  total, ticks = own.ru_utime + own.ru_stime, os.sysconf("SC_CLK_TCK")
  while True:
    try:
      return total + sum(_ticks_of_children()) / ticks
    except (FileNotFoundError, ProcessLookupError):
      if not pathlib.Path(f"/proc/self/task/{os.getpid()}/children").exists():
        raise  # this kernel does not say
      # Else a thread or a child ended meanwhile, and what the thread had is another's now.


def _ticks_of_children() -> Iterator[int]:
  for task in pathlib.Path("/proc/self/task").iterdir():
    for child in (task / "children").read_text().split():
      after = pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
      yield int(after[11]) + int(after[12])


def serve(side: str, folder: str, batch: int, size: int, cores: int) -> None:
  """The process of a side: a line 'N' on stdin is N batches more; answers with what they took.

  `side`: torch, torch_reduced, or ours_N, ours_whole_N with N workers (0: threads).
  """
  options = {"batch": batch, "size": size, "cores": cores}
  if side.startswith("torch"):
    batches = peer(pathlib.Path(folder), reduced=side == "torch_reduced", **options)
  else:
    workers, reduced = int(side.rpartition("_")[2]), "whole" not in side
    batches = ours(pathlib.Path(folder), reduced=reduced, workers=workers, **options)
  for line in sys.stdin:
    began, busy, own = time.perf_counter(), cpu_seconds(), time.process_time()
    for _ in range(int(line)):
      next(batches)
    answer = {"wall": time.perf_counter() - began, "cpu": cpu_seconds() - busy}
    print(json.dumps({**answer, "own": time.process_time() - own}), flush=True)
  os._exit(0)  # its threads and workers end with it


def lock_seconds(folder: pathlib.Path, *, batch: int, size: int, batches: int) -> float:
  """CPU time that an image takes with Python's lock held, where threads make the batches.

  Of one thread that makes batches: all but what frees the lock, which is reading from shards,
  decoding, turning and resizing by PIL, and encoding of texts.
  """
  from configs import common
  from grain_jax.data import dataset, examples, shards

  config = common.get_config()
  config.model.image.size = size
  config.data.update(row_length=ROW_LENGTH, max_regions=REGIONS, caption="original")
  opened = dataset.open_dataset(folder / "shards")
  made = examples.Examples(opened, "train", config, training=True)
  free = [0.0]

  def timed(function: Callable) -> Callable:
    def call(*arguments: Any, **options: Any) -> Any:
      began = time.thread_time()
      try:
        return function(*arguments, **options)
      finally:
        free[0] += time.thread_time() - began

    return call

  class Reader:
    """A shard's reader whose reads are timed."""

    def __init__(self, reader: Any):
      self._reader, self.read = reader, timed(reader.read)

    def __getattr__(self, name: str) -> Any:
      return getattr(self._reader, name)

  own = shards.READERS
  shards.READERS = shards.ReaderPool(None, lambda path: Reader(shards._open_reader(path)))
  decoders = examples.decoding
  kept = Image.Image.resize, decoders._load, decoders.jpegs.decode
  Image.Image.resize, decoders._load, decoders.jpegs.decode = map(timed, kept)
  made.tokenizer._encode_missing = timed(made.tokenizer._encode_missing)
  try:
    made.chunk(np.arange(batch), 0)  # imports
    free[0], began = 0.0, time.thread_time()
    for number in range(batches):
      made.chunk(np.arange(number * batch, (number + 1) * batch), 0)
    return (time.thread_time() - began - free[0]) / batches / batch
  finally:
    Image.Image.resize, decoders._load, decoders.jpegs.decode = kept
    shards.READERS = own
