"""Several built datasets as one to train on, each with its weight: `config.data.sources`.

An epoch has as many images as all of them together (in whole batches), and of each source its
weight's part, shuffled. The k-th image that a source gives in the whole run is the k-th of its own
shuffled passes, so that none is seen again before all others were, and each pass has crops,
captions and negatives of its own: what a step reads is a function of seed and step alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from grain_jax import schema
from grain_jax.data import dataset as dataset_lib
from grain_jax.data import records, sampler

_KEYS = ("dir", "weight", "split", "name", "regions")


@dataclasses.dataclass(frozen=True)
class Part:
  """A source of a mixture."""

  name: str
  dataset: dataset_lib.Dataset
  split: str
  weight: float
  regions: bool  # off: its regions are not looked at
  records: int
  draws: int  # images in an epoch of as many as there are records
  offset: int  # its first record among all


def check(sources: Any) -> None:
  """Raises a one-line ValueError for what `config.data.sources` cannot be."""
  for number, entry in enumerate(sources):
    where = f"config.data.sources[{number}]"
    if not isinstance(entry, (Mapping, ml_collections.ConfigDict)):
      raise ValueError(f"{where} = {entry!r} is not {{'dir': FOLDER, 'weight': NUMBER}}.")
    unknown = [key for key in entry if key not in _KEYS]
    if unknown or "dir" not in entry:
      raise ValueError(
        f"{where} has the keys {', '.join(entry)}: dir is needed, {', '.join(_KEYS[1:])} may be."
      )
    weight = entry.get("weight", 1.0)
    number_ = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number_ or not 0 < weight < float("inf"):
      raise ValueError(f"{where}: weight = {weight!r} is no positive number.")
  names = schema.source_names(sources)
  if len(set(names)) < len(names):
    raise ValueError(
      f"config.data.sources: the names {', '.join(names)} are not all different, and metrics go by "
      "them. Give each a 'name'."
    )


def open_training(config: ml_collections.ConfigDict) -> dataset_lib.Dataset | Mixture:
  """What `config.data` trains on: the mixture of its sources, or the dataset in its folder."""
  sources = config.data.sources
  if not sources:
    return dataset_lib.open_dataset(config.data.dir, local_copy=config.data.local_copy)
  check(sources)
  return Mixture(
    sources,
    split=config.data.split,
    seed=config.seed,
    local_copy=config.data.local_copy,
  )


def _shares(total: int, weights: Sequence[float]) -> list[int]:
  """`total` in whole parts as the weights have them, by the largest remainders."""
  exact = np.asarray(weights, np.float64) / sum(weights) * total
  parts = np.floor(exact).astype(np.int64)
  order = np.argsort(-(exact - parts), kind="stable")
  parts[order[: total - int(parts.sum())]] += 1
  return parts.tolist()


class Mixture:
  """What training reads of a dataset, of several at once.

  A record's index is its place in all sources one after the other; its place in an epoch is another
  number (`choose`). It has the methods of `dataset.Dataset` that training uses.

  Attributes:
    parts: the sources.
    names: of them, in the order of `sources_of`.
  """

  def __init__(
    self,
    sources: Sequence[Mapping[str, Any]],
    *,
    split: str,
    seed: int,
    opened: Sequence[dataset_lib.Dataset] | None = None,
    local_copy: str = "",
  ):
    """Opens all of them; see `check` for what they are.

    Args:
      sources: `config.data.sources`.
      split: of each that names none.
      seed: of the order of each source.
      opened: the datasets of the sources; None: they are opened here.
      local_copy: see `dataset.Dataset`.
    """
    self.sources = [dict(entry) for entry in sources]
    self.split, self.seed = split, seed
    if opened is None:
      opened = [dataset_lib.open_dataset(entry["dir"], local_copy=local_copy) for entry in sources]
    splits = [entry.get("split") or split for entry in sources]
    counts = [data.num_records(s) for data, s in zip(opened, splits, strict=True)]
    weights = [float(entry.get("weight", 1.0)) for entry in sources]
    draws = _shares(sum(counts), weights)
    self.parts: list[Part] = []
    for i, (entry, name) in enumerate(zip(sources, schema.source_names(sources), strict=True)):
      part = Part(
        name=name, dataset=opened[i], split=splits[i], weight=weights[i],
        regions=bool(entry.get("regions", True)), records=counts[i], draws=draws[i],
        offset=sum(counts[:i]),
      )  # fmt: skip
      self.parts.append(part)
    self._check_shares(draws)
    self.names = [part.name for part in self.parts]
    # Two of each, which is what neighbouring steps read.
    self._order = functools.lru_cache(2 * len(self.parts))(
      lambda number, turn: sampler.permutation([seed, 1 + number, turn], self.parts[number].records)
    )
    self._epoch = functools.lru_cache(2)(self._make_epoch)
    self._offsets = np.array([part.offset for part in self.parts])

  def num_records(self, split: str) -> int:
    """Images of an epoch, which are as many as the records of all sources."""
    return sum(part.records for part in self.parts)

  def num_regions(self, split: str) -> int | None:
    """Regions of all sources that are looked at; None where one does not count them."""
    counts = [part.dataset.num_regions(part.split) if part.regions else 0 for part in self.parts]
    return None if None in counts else sum(filter(None, counts))

  def num_negatives(self, split: str, *, of_regions: bool = False) -> int | None:
    """False captions, or descriptions, of all sources; None where one does not count them."""
    counts = [p.dataset.num_negatives(p.split, of_regions=of_regions) for p in self.parts]
    return None if None in counts else sum(filter(None, counts))

  def fingerprint(self, split: str) -> str:
    """Of all sources, their weights and their order."""
    told = [[p.dataset.fingerprint(p.split), p.draws, p.regions] for p in self.parts]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()

  def choose(self, places: np.ndarray, epoch: int, *, images: int) -> tuple[np.ndarray, np.ndarray]:
    """What stands at places of an epoch, in the order of time.

    Args:
      places: [n], below `images`.
      epoch: epochs completed.
      images: of an epoch, those of its whole batches.

    Returns:
      Records i64 [n], and which pass over its source each is of, i64 [n].

    Raises:
      ValueError: an epoch has no image of a source.
    """
    shares, numbers, ranks = self._epoch(epoch, images)
    numbers, draws = numbers[places], ranks[places].astype(np.int64)
    found, passes = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
    for number in np.unique(numbers):
      part, mine = self.parts[number], numbers == number
      turns, inside = np.divmod(epoch * shares[number] + draws[mine], part.records)
      for turn in np.unique(turns):
        of_turn = turns == turn
        inside[of_turn] = self._order(int(number), int(turn))[inside[of_turn]]
      found[mine], passes[mine] = part.offset + inside, turns
    return found, passes

  def _make_epoch(self, epoch: int, images: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Images of each source, the source of each place, and how many of it stand before there."""
    shares = _shares(images, [part.weight for part in self.parts])
    self._check_shares(shares)
    numbers = np.repeat(np.arange(len(shares), dtype=np.int16), shares)
    numbers = numbers[sampler.permutation([self.seed, 0, epoch], images)]
    ranks = np.empty(images, np.int32)
    for number, share in enumerate(shares):
      ranks[numbers == number] = np.arange(share)
    return shares, numbers, ranks

  def _check_shares(self, shares: Sequence[int]) -> None:
    for i, (part, share) in enumerate(zip(self.parts, shares, strict=True)):
      if not share:
        raise ValueError(
          f"config.data.sources[{i}]: with weight {part.weight:g} an epoch of {sum(shares)} images "
          f"has none of {self.sources[i]['dir']}. Raise its weight, or leave it out."
        )

  def sources_of(self, indices: np.ndarray) -> np.ndarray:
    """Which source each record is of, i32 [n]; 0 for padding."""
    numbers = np.searchsorted(self._offsets, indices, side="right") - 1
    return np.maximum(numbers, 0).astype(np.int32)

  def read(self, split: str, indices: Sequence[int]) -> list[bytes | ValueError]:
    """See `dataset.Dataset.read`."""
    numbers = self.sources_of(np.asarray(indices, np.int64))
    found: list[Any] = [None] * len(indices)
    for number in np.unique(numbers):
      part = self.parts[number]
      places = np.flatnonzero(numbers == number)
      data = part.dataset.read(part.split, [int(indices[i]) - part.offset for i in places])
      for place, value in zip(places, data, strict=True):
        found[place] = value
    return found

  def as_seen(self, index: int, record: records.Parsed) -> records.Parsed:
    """A record without its regions where its source's are not looked at."""
    if self.parts[int(self.sources_of(np.array([index]))[0])].regions:
      return record
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    return record._replace(
      descriptions=[], boxes=nothing[0], scores=nothing[1], region_negatives=[]
    )

  def reads(self, split: str) -> dataset_lib.ReadCounts:
    """See `dataset.Dataset.reads`."""
    counts = [part.dataset.reads(part.split) for part in self.parts]
    return dataset_lib.ReadCounts(sum(c.records for c in counts), sum(c.opens for c in counts))

  def locate(self, split: str, index: int) -> str:
    """See `dataset.Dataset.locate`."""
    part = self.parts[int(self.sources_of(np.array([index]))[0])]
    return f"{part.name}: {part.dataset.locate(part.split, index - part.offset)}"
