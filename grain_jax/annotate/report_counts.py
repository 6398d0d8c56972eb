"""The figures of the report: what stages of the annotation wrote, counted line by line."""

from __future__ import annotations

import collections
import hashlib
import heapq
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from grain_jax import textfiles
from grain_jax.annotate import block_files
from grain_jax.data.sources import annotated

BINS = 20  # of scores in [0, 1]
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # of which the page says what they would leave
_MOST_TEXTS = 1_000_000  # different descriptions that are counted
_NEAR = 0.05  # under the threshold
_TEXT_ONLY = 10  # keys of images without a box that are listed


class Chosen(NamedTuple):
  """An image of the contact sheet."""

  block: int
  key: str
  line: dict[str, Any]


class Chain(NamedTuple):
  """Folders of stages, each given the one before."""

  manifests: list[dict[str, Any]]  # the first stage first; each with its 'folder'
  lost: str  # a folder that the first of them was given, where no stage's manifest is; '' if none


def chain(folder: pathlib.Path) -> Chain:
  """The stages that led to a folder of annotations, as their manifests name each other."""
  found: list[dict[str, Any]] = []
  while (manifest := _manifest(folder)) is not None:
    found.insert(0, {**manifest, "folder": folder})
    before = manifest["source"].get("annotated")
    if before is None:
      return Chain(found, "")
    folder = pathlib.Path(before["path"]).parent
    if any(folder == one["folder"] for one in found):
      break
  return Chain(found, str(folder))


def _manifest(folder: pathlib.Path) -> dict[str, Any] | None:
  """That of a stage; None: there is none."""
  try:
    found = json.loads((folder / annotated.MANIFEST).read_text(encoding="utf-8"))
  except (FileNotFoundError, ValueError):
    return None
  names = ("stage", "settings", "source", "counts", "losses", "totals", "seconds")
  return found if isinstance(found, dict) and all(name in found for name in names) else None


class Counts:
  """What the lines of annotations hold."""

  def __init__(self, images: int):
    """`images`: of the contact sheet, chosen by a hash of their keys."""
    self.images = self.captions = self.descriptions = self.regions = self.negatives = 0
    self.different = self.without_box = 0  # descriptions of an image, equal ones once
    self.descriptions_per_image: collections.Counter[int] = collections.Counter()
    self.boxes_per_image: collections.Counter[int] = collections.Counter()
    self.by_words: dict[str, list[int]] = {}  # words of a description -> [all, without a box]
    self.region_scores = [0] * BINS
    self.text_only, self.text_only_keys = 0, list[str]()
    self.approximate = False  # frequencies of descriptions
    self._frequent: dict[str, list[int]] = {}  # description -> [images, without a box]
    self._count, self._heap = images, list[tuple[int, int, Chosen]]()

  def add(self, block: int, line: dict[str, Any]) -> None:
    """Takes in the line of an image."""
    regions, descriptions = line.get("regions", ()), line.get("descriptions", ())
    self.images += 1
    self.captions += len(line.get("captions", ()))
    self.descriptions += len(descriptions)
    self.regions += len(regions)
    self.negatives += len(line.get("negatives", ()))
    self.descriptions_per_image[len(descriptions)] += 1
    self.boxes_per_image[len(regions)] += 1
    for region in regions:
      self.region_scores[score_bin(region.get("score", 1.0))] += 1
    if not regions:
      self.text_only += 1
      self.text_only_keys += [line["key"]] if len(self.text_only_keys) < _TEXT_ONLY else []
    missing = without_box(line)
    for name in {description.casefold() for description in descriptions}:
      self.different += 1
      self.without_box += name in missing
      for table, key in ((self.by_words, _words(name)), (self._frequent, name)):
        entry = table.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += name in missing
    if len(self._frequent) > _MOST_TEXTS:
      self.approximate = True
      self._frequent = dict(_most(self._frequent, _MOST_TEXTS // 2))
    order = -int.from_bytes(hashlib.blake2b(line["key"].encode(), digest_size=8).digest(), "big")
    entry = (order, self.images, Chosen(block, line["key"], line))
    if len(self._heap) < self._count:
      heapq.heappush(self._heap, entry)
    elif self._heap and order > self._heap[0][0]:
      heapq.heapreplace(self._heap, entry)

  def frequent(self, most: int) -> list[tuple[str, list[int]]]:
    """(description, [images, those in which it has no box]), the most frequent first."""
    return _most(self._frequent, most)

  def chosen(self) -> list[Chosen]:
    return [entry[-1] for entry in sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))]


class Asked:
  """What a detector said of the descriptions, above its threshold or not."""

  def __init__(self, threshold: float):
    self.threshold = threshold
    self.asked = self.found = self.near = self.without_candidate = 0
    self.images = self.images_half = 0  # with descriptions; in which half or more have no box
    self.scores = [0] * BINS  # of the best box of each description
    self.above = dict.fromkeys(THRESHOLDS, 0)

  def add(self, replies: list[dict[str, Any]]) -> None:
    """Takes in the raw entry of an image, as `ground` writes it."""
    found = 0
    for reply in replies:
      self.asked += 1
      score = reply.get("score")
      if score is None:
        self.without_candidate += 1
        continue
      self.scores[score_bin(score)] += 1
      found += score > self.threshold
      self.near += self.threshold - _NEAR < score <= self.threshold
      for threshold in THRESHOLDS:
        self.above[threshold] += score > threshold
    self.found += found
    self.images += 1
    self.images_half += 2 * found <= len(replies)


def count(folder: pathlib.Path, images: int) -> Counts:
  """Counts of all lines of a folder of annotations."""
  counts = Counts(images)
  for path in annotated.Annotated(folder).files():
    for line in _lines(path):
      counts.add(int(path.stem), line)
  return counts


def asked(stages: Chain) -> Asked | None:
  """What the last detector among the stages said; None: there is none."""
  detectors = [manifest for manifest in stages.manifests if manifest["stage"] == "ground"]
  if not detectors:
    return None
  found = Asked(detectors[-1]["settings"]["threshold"])
  for path in sorted(block_files.file_of(detectors[-1]["folder"], "raw", 0).parent.glob("*.jsonl")):
    for line in _lines(path):
      found.add(line["raw"])
  return found


def without_box(line: dict[str, Any]) -> set[str]:
  """Descriptions of a line, without regard to case, that no region has or had before a long one."""
  described = {r.get("of", r["description"]).casefold() for r in line.get("regions", ())}
  return {description.casefold() for description in line.get("descriptions", ())} - described


def score_bin(score: float) -> int:
  return min(max(int(score * BINS + 1e-9), 0), BINS - 1)


def _words(text: str) -> str:
  words = len(text.split())
  return next((name for most, name in ((2, "1-2"), (4, "3-4"), (8, "5-8")) if words <= most), "9+")


def _most(table: dict[str, list[int]], most: int) -> list[tuple[str, list[int]]]:
  return heapq.nsmallest(most, table.items(), key=lambda entry: (-entry[1][0], entry[0]))


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  for line in textfiles.iterate_lines(path):
    yield json.loads(line.data)
