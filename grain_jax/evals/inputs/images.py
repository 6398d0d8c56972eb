"""Images of any origin at the size a model sees, in batches; what cannot be read is counted.

Every evaluation on files goes through here: images are decoded ahead by threads, one that cannot
be read is left out and named in `Unreadable`, and results say how many of how many were used.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from grain_jax import failures, places
from grain_jax.data import decoding, transforms
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.process_shard import SINGLE_PROCESS, ProcessShard

# The path of a file, its bytes, a PIL image, or u8 [H, W, 3] (or [H, W], [H, W, 1]: grey).
Source = str | os.PathLike | bytes | Image.Image | np.ndarray


# An image u8 [size, size, 3] with its original (height, width), or why it cannot be read.
_Loaded = tuple[np.ndarray, tuple[int, int]] | str


@dataclasses.dataclass
class Unreadable:
  """Images that could not be read."""

  reasons: dict[int, str] = dataclasses.field(default_factory=dict)  # index of the image -> why

  def __len__(self) -> int:
    return len(self.reasons)

  def line(self, total: int) -> str:
    """One line for the user; empty where all could be read."""
    if not self.reasons:
      return ""
    index = min(self.reasons)
    return (
      f"{len(self)} of {total} pictures cannot be read and are left out; the first, number "
      f"{index}: {self.reasons[index]}"
    )


class Batch(NamedTuple):
  """Images that could be read, in order."""

  index: np.ndarray  # of each in the images given, i64 [b]
  image: np.ndarray  # u8 [b, size, size, 3]
  original_size: np.ndarray  # (height, width) in pixels, i64 [b, 2]


class Encoded(NamedTuple):
  """Results of the images that could be read."""

  index: np.ndarray  # of each in the images given, rising, i64 [n]
  values: Any  # arrays of n rows, as the encoder gave them
  total: int  # images given


def open_image(source: Source, *, max_pixels: int = decoding.MAX_PIXELS) -> Image.Image:
  """An image as it is shown, RGB: see `decoding.decode`.

  Raises:
    ValueError: there is none, or what is there is none; one line.
    failures.TransientError: the storage of its file fails; that says nothing of the image.
  """
  if isinstance(source, (bytes, Image.Image, np.ndarray)):
    return decoding.decode(source, max_pixels=max_pixels)
  path = places.find_file(source)
  try:
    data = failures.retry_read(path.read_bytes, path)
    return decoding.decode(data, max_pixels=max_pixels)
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}") from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def batches(
  images: Iterable[Source],
  *,
  size: int,
  resize: str,
  batch_size: int,
  unreadable: Unreadable,
  interpolation: str = "bicubic",
  shard: ProcessShard = SINGLE_PROCESS,
  threads: int = 0,
  max_pixels: int = decoding.MAX_PIXELS,
) -> Iterator[Batch]:
  """Batches of `batch_size` images (the last may be smaller) of those that can be read.

  Args:
    images: may be a generator; it is read as the batches are asked for, a little ahead.
    size: side of the images in pixels.
    resize: one of `transforms.RESIZES`.
    batch_size: images a batch.
    unreadable: filled in on the way.
    interpolation: one of `transforms.INTERPOLATIONS`.
    shard: of the images, that this process reads; all processes get all batches.
    threads: that decode; 0 for one a core.
    max_pixels: of the largest image that is read.
  """

  def load(numbered: tuple[int, Source]) -> _Loaded | None:
    index, source = numbered
    if not shard.holds(index % batch_size, batch_size):
      return None
    try:
      image = open_image(source, max_pixels=max_pixels)
    except ValueError as error:
      return str(error)
    pixels = transforms.resize(image, size, resize, interpolation=interpolation)
    return pixels, (image.height, image.width)

  waiting: list[tuple[int, np.ndarray, tuple[int, int]]] = []
  threads = threads or os.cpu_count() or 1
  with futures.ThreadPoolExecutor(threads) as pool:
    ahead = 4 * threads * shard.count + batch_size
    local = _ahead(pool, load, enumerate(images), ahead=ahead)
    for index, loaded in enumerate(_all_gather_loaded(local, shard, batch_size, size)):
      if isinstance(loaded, str):
        unreadable.reasons[index] = loaded
        continue
      waiting.append((index, *loaded))
      if len(waiting) == batch_size:
        yield _stack(waiting)
        waiting = []
  if waiting:
    yield _stack(waiting)


def encode(
  encode_images: Callable[[np.ndarray], Any],
  images: Iterable[Source],
  encoders: Encoders,
  *,
  what: str,
  resize: str | None = None,
  warn: Callable[[str], None] = print,
) -> Encoded:
  """The results of an encoder for all images that can be read.

  Args:
    encode_images: `encoders.image`, `encoders.regions`, or what takes their place: u8
      [b, size, size, 3] -> an array, or a tuple of arrays, of b rows.
    images: in any form.
    encoders: whose images they are.
    what: name of the evaluation, for messages.
    resize: in the place of `encoders.resize`.
    warn: gets one line where images could not be read.

  Raises:
    ValueError: there is no image, or none that can be read.
    failures.TransientError: the storage of an image fails.
  """
  unreadable, index, parts = Unreadable(), [], []
  for batch in batches(
    images,
    size=encoders.size,
    resize=resize or encoders.resize,
    interpolation=encoders.interpolation,
    batch_size=encoders.batch_size,
    unreadable=unreadable,
    shard=encoders.shard,
    max_pixels=encoders.max_pixels,
  ):
    index.append(batch.index)
    parts.append(encode_images(batch.image))
  total = sum(map(len, index)) + len(unreadable)
  if not total:
    raise ValueError(f"{what}: there is no picture in it. Check the folder or the split.")
  if not index:
    raise ValueError(f"{what}: {unreadable.line(total)}.")
  if unreadable:
    warn(f"{what}: {unreadable.line(total)}")
  if isinstance(parts[0], tuple):
    values: Any = tuple(np.concatenate(column) for column in zip(*parts, strict=True))
  else:
    values = np.concatenate(parts)
  return Encoded(np.concatenate(index), values, total)


def png(image: np.ndarray) -> bytes:
  """u8 [H, W] or [H, W, 3] as a PNG file."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="png")
  return buffer.getvalue()


def _stack(rows: list[tuple[int, np.ndarray, tuple[int, int]]]) -> Batch:
  index, image, original = zip(*rows, strict=True)
  return Batch(np.asarray(index), np.stack(image), np.asarray(original))


def _all_gather_loaded(
  local: Iterator[_Loaded | None], shard: ProcessShard, batch_size: int, size: int
) -> Iterator[_Loaded]:
  """All-gathers what the processes loaded, `batch_size` images at a time; None: another's."""
  if shard.count == 1:
    yield from local  # none of them is another's
    return
  shard_size = shard.shard_size(batch_size)
  while loaded := list(itertools.islice(local, batch_size)):
    mine = loaded[shard.index * shard_size : (shard.index + 1) * shard_size]
    images = np.zeros((shard_size, size, size, 3), np.uint8)
    facts: list[Any] = [None] * shard_size  # why it cannot be read, or its original size
    for row, one in enumerate(mine):
      if isinstance(one, str):
        facts[row] = one
      else:
        images[row], facts[row] = one
    all_images, all_facts = (
      shard.gather_rows(images, batch_size),
      shard.gather_lists(facts, batch_size),
    )
    for image, fact in zip(all_images[: len(loaded)], all_facts[: len(loaded)], strict=True):
      yield fact if isinstance(fact, str) else (image, tuple(fact))


def _ahead(
  pool: futures.Executor, load: Callable[[Any], Any], items: Iterable[Any], *, ahead: int
) -> Iterator[Any]:
  """load(item) in order, so many begun before the first is asked for."""
  begun: collections.deque[futures.Future] = collections.deque()
  try:
    for item in items:
      begun.append(pool.submit(load, item))
      if len(begun) > ahead:
        yield begun.popleft().result()
    while begun:
      yield begun.popleft().result()
  finally:
    for future in begun:
      future.cancel()
