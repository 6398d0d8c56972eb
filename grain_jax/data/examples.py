"""Records to examples: decode, transform, choose regions and caption, tokenise and pack.

A record is a few hundred microseconds of work, so it is done for some tens of records at a call:
only decoding and resizing (PIL, which frees the interpreter lock) goes record by record.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from grain_jax import config as configs
from grain_jax import failures, schema, tokenizing
from grain_jax.data import dataset as dataset_lib
from grain_jax.data import decoding, false_captions, mixture, records, token_ids, transforms

_WARNINGS = 20  # bad records that are named in the log; all are counted
_KINDS = {kind.encode(): i for i, kind in enumerate(schema.NEGATIVE_KINDS)}


class BadRecord(ValueError):
  """A record that cannot be used, where the config says to stop at one, or one too many."""


class Chunk(NamedTuple):
  """A batch's arrays for a few records, in the order of schema.BATCH, and the regions' origin."""

  arrays: tuple[np.ndarray, ...]
  parsed: list[records.Parsed | None]
  chosen: list[list[int]]  # of each record, its regions in the order of the boxes


def _without_memory(error: Exception) -> Exception:
  if not isinstance(error, MemoryError):
    return error
  return failures.TransientError(
    "the input pipeline finds no more memory for a chunk of records. Give the run more, or lower "
    "config.data.workers, config.data.threads or config.data.prefetch; the same command goes on "
    "from the last checkpoint."
  )


class Examples:
  """Turns record indices into the arrays of a batch. Shared by the pipeline's threads.

  Args:
    dataset: what to read.
    split: of the dataset.
    config: whole configuration.
    training: draw captions, crops and flips at random; else the first caption and `resize`.
    negatives: slots for hard negatives (K).
    resize: of images where not training, one of `transforms.RESIZES`; boxes are of squashed ones.
  """

  def __init__(
    self,
    dataset: dataset_lib.Dataset | mixture.Mixture,
    split: str,
    config: ml_collections.ConfigDict,
    *,
    training: bool,
    negatives: int = 0,
    resize: str = "squash",
  ):
    self.dataset, self.split = dataset, split
    self.mixture = dataset if isinstance(dataset, mixture.Mixture) else None
    self.size = config.model.image.size
    self.row_length = config.data.row_length
    self.regions = config.data.max_regions
    self.negatives = negatives
    self.region_negatives = config.data.negatives_per_region if training else 0
    self.by_kind = config.data.negatives_by == "kind"
    self.of_caption = config.data.negatives_of == "caption"
    self.seed = config.seed
    for key in ("resize", "caption", "on_bad_record"):
      configs.check_choice(f"data.{key}", config.data[key])
    self.resize = "squash" if training else resize
    self.interpolation = config.model.image.interpolation
    self.crop = training and config.data.resize == "crop"
    self.flip = training and config.data.flip
    self.reduced = training and config.data.reduced_decode
    self.min_area = config.data.crop_min_area
    self.max_pixels = config.data.max_pixels
    schema.check_max_pixels(self.max_pixels)
    self.caption = config.data.caption if training else "original"
    self.stop = config.data.on_bad_record == "stop"
    self.tokenizer = tokenizing.make(config)
    parts = [dataset] if self.mixture is None else [part.dataset for part in self.mixture.parts]
    self._readers = [token_ids.make_reader(part.tokens, self.tokenizer) for part in parts]
    self.logs = True  # names the first bad records in the log
    self.bad: dict[int, str] = {}  # index -> why, of the bad records met so far
    self.failure: Exception | None = None  # the first one on which to stop
    self.false_texts = np.zeros(2, np.int64)  # met so far: all, those that did not fit their rows
    self._lock = threading.Lock()
    for key, least in (("row_length", 2), ("max_regions", 0)):
      if config.data[key] < least:
        raise ValueError(f"config.data.{key} = {config.data[key]} is below {least}. Raise it.")
    if not 0 < self.min_area <= 1:
      raise ValueError(
        f"config.data.crop_min_area = {self.min_area} is not a part of the image: use (0, 1]."
      )

  def chunk(
    self, indices: np.ndarray, epoch: int | np.ndarray, image: np.ndarray | None = None
  ) -> Chunk:
    """Examples of the records `indices` i64 [n] (-1: padding) in a pass over the data.

    Args:
      indices: of the records.
      epoch: of the pass, one for all or i64 [n].
      image: u8 [n, size, size, 3] to write the images to; None: a fresh one.

    Raises:
      BadRecord: a record is bad and config.data.on_bad_record is 'stop'.
      dataset.ShardChanged: a shard was written anew.
      failures.TransientError: the storage of the records failed, or there is no more memory.
    """
    if self.failure:  # what is under way in other threads need not wait for lost storage in turn
      raise self.failure
    try:
      return self._chunk(indices, epoch, image)
    except (failures.TransientError, MemoryError, dataset_lib.ShardChanged) as error:
      with self._lock:
        self.failure = self.failure or _without_memory(error)
        raise self.failure from None

  def _chunk(self, indices: np.ndarray, epoch: int | np.ndarray, image: np.ndarray | None) -> Chunk:
    count, size = len(indices), self.size
    parsed = self._parse(indices)
    # Draws: caption (2), crop (4), flip (1), negatives (a number each).
    slots = self.negatives + self.regions * self.region_negatives
    draws = transforms.uniforms(seed=self.seed, epoch=epoch, indices=indices, count=7 + slots)
    image = np.empty((count, size, size, 3), np.uint8) if image is None else image
    windows = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (count, 1))
    flipped = np.zeros(count, bool)
    for i, record in enumerate(parsed):
      if record is not None:
        try:
          flipped[i] = self._view(record, draws[i, 2:], image[i], windows[i])
        except ValueError as error:
          self._refuse(int(indices[i]), str(error))
          record = parsed[i] = None
      if record is None:
        image[i] = 0
    boxes, region_mask, scores, chosen = self._boxes(parsed, windows, flipped)
    texts, kinds = self._texts(parsed, chosen, draws)
    per_region = self.region_negatives
    packed = self.tokenizer.pack_batch(
      texts,
      row_length=self.row_length,
      scores=scores,
      region_negatives=per_region,
      known=self._known_ids(indices, parsed, texts),
    )
    fits = packed.text_mask
    against = fits[:, 1 + self.regions + self.negatives :].reshape(count, self.regions, per_region)
    against = against & fits[:, 1 : 1 + self.regions, None]
    first = 1 + self.regions
    false = np.array([[bool(text) for text in row[first:]] for row in texts], bool)
    with self._lock:
      self.false_texts += (false.sum(), (false & ~fits[:, first:]).sum())
    good = np.array([record is not None for record in parsed], bool)
    centers = schema.corners_to_center(boxes)
    centers[~region_mask] = 0
    arrays = (image, *packed[:5], kinds, against, centers, region_mask, good)
    if self.mixture is not None:
      arrays = (*arrays, self.mixture.sources_of(indices))
    return Chunk(arrays, parsed, chosen)

  def _parse(self, indices: np.ndarray) -> list[records.Parsed | None]:
    wanted = [int(i) for i in indices if i >= 0]
    data = iter(self.dataset.read(self.split, wanted))
    parsed: list[records.Parsed | None] = []
    for index in map(int, indices):
      record = None
      if index >= 0:
        value = next(data)
        try:
          if isinstance(value, ValueError):
            raise value
          record = records.parse(value)
          if self.mixture is not None:
            record = self.mixture.as_seen(index, record)
          if not any(record.captions):
            raise ValueError("no caption")
        except ValueError as error:
          self._refuse(index, str(error))
          record = None
      parsed.append(record)
    return parsed

  def _view(self, record, draws, image: np.ndarray, window: np.ndarray) -> bool:
    """Writes a record's image and its window (ymin, xmin, ymax, xmax); says if it is flipped."""
    shape = box = None  # of the file's image, and the part of it to show

    def enough(width: int, height: int) -> tuple[int, int]:
      nonlocal shape, box
      shape, box = (width, height), (0, 0, width, height)
      if self.crop:
        box = transforms.random_window(width, height, draws[:4], min_area=self.min_area)
      if not self.reduced:
        return shape
      width, height = box[2] - box[0], box[3] - box[1]
      return -(-shape[0] * self.size // width), -(-shape[1] * self.size // height)

    decoded = decoding.decode(record.image, max_pixels=self.max_pixels, enough=enough)
    if self.crop:
      (width, height), factor = decoded.size, decoded.size[0] / shape[0]
      if factor < 1:
        box = transforms.scale_window(box, factor, width, height)
      window[:] = box[1] / height, box[0] / width, box[3] / height, box[2] / width
      pixels = transforms.crop(decoded, box, self.size, interpolation=self.interpolation)
    else:
      pixels = transforms.resize(decoded, self.size, self.resize, interpolation=self.interpolation)
    flipped = bool(self.flip and draws[4] < 0.5)
    if flipped:
      negatives = [caption for caption, _ in record.negatives]
      of_regions = [text for texts in record.region_negatives for text in texts]
      texts = [*record.captions, *record.descriptions, *negatives, *of_regions]
      flipped = not transforms.names_a_side(texts)
    image[:] = transforms.flip(pixels) if flipped else pixels
    return flipped

  def _boxes(self, parsed, windows: np.ndarray, flipped: np.ndarray):
    """The regions of highest score that are visible.

    Returns:
      Corner boxes f32 [n, R, 4], mask bool [n, R], scores f32 [n, R], and of each record the
      indices of its chosen regions.
    """
    count, most = len(parsed), self.regions
    boxes, mask = np.zeros((count, most, 4), np.float32), np.zeros((count, most), bool)
    scores = np.zeros((count, most), np.float32)
    chosen: list[list[int]] = [[] for _ in parsed]
    sizes = np.array([0 if r is None else len(r.boxes) for r in parsed])
    if not sizes.sum() or not most:
      return boxes, mask, scores, chosen
    row = np.repeat(np.arange(count), sizes)
    place = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    flat = np.concatenate([r.boxes for r in parsed if r is not None])
    flat_scores = np.concatenate([r.scores for r in parsed if r is not None])
    # `data.build` has refused boxes that are not finite; shards written by others may hold them.
    with np.errstate(invalid="ignore"):
      flat, visible = transforms.crop_boxes(flat, windows[row])
    flat = np.where(flipped[row, None], transforms.flip_boxes(flat), flat)
    row, place, flat, flat_scores = (x[visible] for x in (row, place, flat, flat_scores))
    order = np.lexsort((place, -flat_scores, row))
    row, place, flat, flat_scores = (x[order] for x in (row, place, flat, flat_scores))
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    top = rank < most
    where = (row[top], rank[top])
    boxes[where], scores[where], mask[where] = flat[top], flat_scores[top], True
    for r, p in zip(where[0].tolist(), place[top].tolist(), strict=True):
      chosen[r].append(p)
    return boxes, mask, scores, chosen

  def _texts(self, parsed, chosen, draws: np.ndarray):
    """Texts [n][1 + R + K + R N] in the order of the slots, and i32 [n, K], their kinds."""
    kinds = np.zeros((len(parsed), self.negatives), np.int32)
    texts: list[list[bytes | None]] = []
    first = 1 + self.regions
    for i, record in enumerate(parsed):
      slots = self.negatives + self.regions * self.region_negatives
      row: list[bytes | None] = [None] * (first + slots)
      if record is not None:
        row[0] = self._caption(record, draws[i, 0], draws[i, 1])
        for slot, place in enumerate(chosen[i], start=1):
          row[slot] = record.descriptions[place]
        if slots:
          drawn = self._negatives(self._false_captions(record, row[0]), draws[i, 7:])
          row[first : first + self.negatives] = [caption for caption, _ in drawn]
          kinds[i] = [kind for _, kind in drawn]
          row[first + self.negatives :] = self._of_regions(record, chosen[i], draws[i, 7:])
      texts.append(row)
    return texts, kinds

  def _known_ids(self, indices: np.ndarray, parsed, texts) -> list[list[np.ndarray | None]]:
    """Ids [n][T] of the texts that the shards hold for this tokenizer; None: to be encoded."""
    parts = np.zeros(len(indices), int)
    if self.mixture is not None:
      parts = self.mixture.sources_of(indices)
    found: list[list[np.ndarray | None]] = []
    for part, record, row in zip(parts.tolist(), parsed, texts, strict=True):
      reader = self._readers[part]
      if reader is None or record is None or not record.token_ids:
        found.append([None] * len(row))
        continue
      stored = map(record.token_ids.get, row)  # of None and of descriptions joined there is nothing
      found.append([None if ids is None else reader.read(ids) for ids in stored])
    return found

  def _false_captions(self, record: records.Parsed, caption: bytes) -> list[tuple[bytes, bytes]]:
    """(text, kind) of the record's false captions; with `negatives_of` those of this caption."""
    if not self.of_caption or record.captions == [caption]:
      return record.negatives
    near = false_captions.nearest(
      [text for text, _ in record.negatives], [caption, *record.captions]
    )
    return [pair for pair, found in zip(record.negatives, near, strict=True) if 0 in found]

  def _negatives(
    self, negatives: Sequence[tuple[bytes, bytes]], draws: np.ndarray
  ) -> list[tuple[bytes | None, int]]:
    """(text, kind) of each slot for a false caption: one of its own kind, or any without repeat."""
    if self.by_kind:
      found: list[tuple[bytes | None, int]] = []
      for slot, draw in zip(range(self.negatives), draws, strict=False):
        of_kind = [text for text, kind in negatives if _KINDS.get(kind) == slot]
        found.append((of_kind[int(draw * len(of_kind))] if of_kind else None, slot))
      return found
    picked = transforms.draw_without_repeat(len(negatives), draws[: self.negatives])
    found = [(negatives[p][0], _KINDS.get(negatives[p][1], 0)) for p in picked]
    return found + [(None, 0)] * (self.negatives - len(found))

  def _of_regions(
    self, record: records.Parsed, chosen: list[int], draws: np.ndarray
  ) -> list[bytes | None]:
    """False descriptions of the chosen regions, N slots each, drawn without repeat."""
    each = self.region_negatives
    found: list[bytes | None] = []
    for slot in range(self.regions):
      start = self.negatives + slot * each
      texts = record.region_negatives[chosen[slot]] if slot < len(chosen) else []
      picked = transforms.draw_without_repeat(len(texts), draws[start : start + each])
      found += [texts[p] for p in picked] + [None] * (each - len(picked))
    return found

  def _caption(self, record: records.Parsed, coin: float, pick: float) -> bytes:
    """The caption of this visit, by `config.data.caption` and two numbers in [0, 1)."""
    if self.caption == "joined":
      if coin < 0.5 and record.descriptions:
        return b", ".join(record.descriptions)
      coin = 2 * coin - 1 if coin >= 0.5 else 2 * coin  # the half that is left, drawn as `half`
    generated = record.captions[1:]
    if generated and (self.caption == "generated" or (self.caption != "original" and coin >= 0.5)):
      return generated[int(pick * len(generated))]
    return record.captions[0]

  def note_bad(self, index: int, why: str) -> str:
    """Counts a bad record, and names it in the log if it is one of the first; where it is, why."""
    where = self.dataset.locate(self.split, index)
    line = f"{where}: {why}" if where not in why else why
    with self._lock:
      first = index not in self.bad
      self.bad[index] = why
    if first and self.logs and not self.stop and len(self.bad) <= _WARNINGS:
      logging.getLogger(__name__).warning("skipped bad record: %s", line)
    return line

  def _refuse(self, index: int, why: str) -> None:
    line = self.note_bad(index, why)
    if not self.stop:
      return
    with self._lock:
      self.failure = self.failure or BadRecord(
        f"bad record in {line.rstrip('.')}. Build the data again, or set "
        "config.data.on_bad_record=skip to leave such records out."
      )
    raise self.failure
