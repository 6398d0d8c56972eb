"""What may be wrong with annotations, guessed from the pattern of what a build could not use.

A hint is a line that says how many of what are odd, and how they would fit.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from grain_jax import places, schema
from grain_jax.data import box_formats, decoding, records
from grain_jax.data.building import tally
from grain_jax.data.sources import base, folder_lines

_SAMPLE = 5_000  # boxes that are looked at of those kept, and as many of those dropped
_MISSING = 1_000  # missing images that are looked for elsewhere
_MANY = 20  # boxes of which the largest number says where all end
_ENOUGH = 3  # dropped boxes from which a pattern is one
_MENDED, _SPARED = 0.5, 0.95  # of dropped and of kept boxes that another format must fit
_EDGE = 0.05  # how far outside a box still looks like one that reaches over the edge
_SCALES = {100: "percent", 1000: "thousandths"}  # of the image, as some tools and models write
_BOX_REASONS = {
  records.BOX_OUTSIDE: "lie outside the image",
  records.BOX_NO_AREA: "have no area",
  records.BOX_UNDER_A_PIXEL: "lie within one pixel",
}


class _Box(NamedTuple):
  """A box as it was written, of an image that was read."""

  numbers: tuple[float, ...]
  size: tuple[int, int]  # (width, height) of its image
  why: str  # why it was dropped; '' if it was not


class Hints:
  """Collects evidence while a build runs."""

  def __init__(self, source: base.Source):
    self._source = source
    self._boxes: list[_Box] = []
    self._sampled = {True: 0, False: 0}  # boxes by whether they were dropped
    self._missing: list[pathlib.Path] = []
    self._lost_images = 0
    self._duplicates = 0
    self._refused: dict[str, int] = {}  # records that could not be read, by reason
    self._splits: dict[str, int] = {}
    self._oddities = folder_lines.Oddities()
    self._odd_scores = 0
    self._lines = {True: 0, False: 0}  # images by whether --annotated has a line of them
    self._without = ""  # key of the first image that has none
    self.respelt = 0  # keys that are, as paths, other keys
    self.unmet_names = 0  # in --exclude_ids, where no image is of any of them
    self.unread_lines = 0  # in --annotated, after one of the same key

  def take(self) -> dict[str, Any]:
    """The evidence, as JSON, with what the source found odd in its annotations."""
    oddities = self._source.oddities
    return {
      "boxes": [[list(box.numbers), list(box.size), box.why] for box in self._boxes],
      "missing": list(map(str, self._missing)),
      "lost_images": self._lost_images,
      "refused": self._refused,
      "splits": self._splits,
      "oddities": None if oddities is None else oddities.take(),
      "odd_scores": self._odd_scores,
      "annotated": [*self._lines.values(), self._without],
    }

  def merge(self, taken: Mapping[str, Any]) -> None:
    """Adds the evidence of another part of the source, after its own."""
    for numbers, size, why in taken["boxes"]:
      if self._sampled[bool(why)] < _SAMPLE:
        self._boxes.append(_Box(tuple(numbers), tuple(size), why))
        self._sampled[bool(why)] += 1
    room = _MISSING - len(self._missing)
    self._missing += [pathlib.Path(path) for path in taken["missing"][:room]]
    self._lost_images += taken["lost_images"]
    for own, theirs in ((self._refused, taken["refused"]), (self._splits, taken["splits"])):
      for name, count in theirs.items():
        own[name] = own.get(name, 0) + count
    if taken["oddities"] is not None:
      self._oddities.merge(taken["oddities"])
    self._odd_scores += taken["odd_scores"]
    there, absent, first = taken["annotated"]
    self._lines = {True: self._lines[True] + there, False: self._lines[False] + absent}
    self._without = self._without or first

  def duplicate(self) -> None:
    """Takes in that a record has the key of an earlier one."""
    self._duplicates += 1

  def add(self, split: str, given: Any, checked: records.Checked) -> None:
    """Takes in a record as the source gave it and as it was checked."""
    self._splits[split] = self._splits.get(split, 0) + 1
    if isinstance(given, records.Refused):
      if given.what == "records":
        self._refused[given.why] = self._refused.get(given.why, 0) + 1
      return
    if checked.has_line is not None:
      self._lines[checked.has_line] += 1
    if checked.has_line is False:
      self._without = self._without or given[schema.RECORD_KEY]
    if ("records", records.MISSING_IMAGE) in checked.dropped:
      self._lost_images += 1
      if len(self._missing) < _MISSING:
        self._missing.append(given[schema.RECORD_IMAGE])
    if checked.record is None:
      return
    for region, why in zip(given.get(schema.RECORD_REGIONS) or (), checked.fates, strict=False):
      there = not why and region.get("score") is not None
      self._odd_scores += there and not records.is_score(float(region["score"]))
    if self._source.flags_for_boxes:
      self._add_boxes(given, checked)

  def _add_boxes(self, given: Mapping[str, Any], checked: records.Checked) -> None:
    size = None
    for region, why in zip(given.get(schema.RECORD_REGIONS) or (), checked.fates, strict=False):
      lost = bool(why)
      if self._sampled[lost] >= _SAMPLE or (lost and why not in _BOX_REASONS):
        continue
      size = size or decoding.size_as_shown(checked.record[schema.RECORD_IMAGE])
      self._boxes.append(_Box(tuple(map(float, region["box"])), size, why))
      self._sampled[lost] += 1

  def lines(self) -> list[str]:
    """The hints, those on keys and values first."""
    found = list(_oddities(self._oddities))
    found += [line for line in (self._box_line(), *self._record_lines()) if line]
    found += self._annotated_lines()
    found += missing_images(self._missing, self._lost_images)
    return [tally.one_line(line) for line in found]

  def check_annotated(self) -> None:
    """Raises where --annotated has no line of any image: it was made of others."""
    if self._without and not self._lines[True]:
      folder, theirs = self._source.annotated.folder, self._source.annotated.first_key()
      like = "it is empty" if theirs is None else f"its keys are like {theirs!r}"
      raise ValueError(
        tally.one_line(
          f"--annotated={folder} has no line of any of the {self._lines[False]:,} images: {like}, "
          f"theirs like {self._without!r}. Give the source and flags with which it was made."
        )
      )

  def _annotated_lines(self) -> Iterator[str]:
    if count := self._lines[False]:
      yield (
        f"{count:,} of {sum(self._lines.values()):,} images have no line in --annotated, so that "
        f"nothing was added to them (the first: {self._without})"
      )
    if self.unread_lines:
      yield (
        f"{self.unread_lines:,} lines in --annotated repeat the key of an earlier one, which counts"
      )

  def _record_lines(self) -> Iterator[str]:
    if self._duplicates >= _ENOUGH:
      yield (
        f"{self._duplicates:,} lines repeat an image of an earlier line: one line holds all "
        "captions of an image (in CSV, lines of one image stand next to each other)"
      )
    if self._odd_scores:
      yield f"{self._odd_scores:,} regions have a score that is NaN or infinite: it becomes 0"
    if self.unmet_names:
      yield (
        f"none of the {self.unmet_names:,} names in --exclude_ids is a key or COCO's id of an "
        "image here: are they spelled otherwise?"
      )
    if self.respelt:
      yield (
        f"{self.respelt:,} images are there twice, their paths spelled in two ways (a.jpg, "
        "./a.jpg): spell them alike, and one line holds all captions"
      )
    if (count := self._refused.get(base.OUTSIDE, 0)) >= _ENOUGH:
      yield f"{count:,} paths lead out of the folder: another --input, or --allow_outside?"
    if self._splits.get("train"):
      return
    for split, count in self._splits.items():
      if folder_lines.nearest(split, ["train"]) or split.lower() in ("training", "trn"):
        yield f"split is {split!r} in {count:,} lines, which training does not read: 'train'?"

  def _box_line(self) -> str:
    lost = [box for box in self._boxes if box.why]
    kept = [box for box in self._boxes if not box.why]
    if not lost or (len(lost) < _ENOUGH and kept):
      return ""
    whys = [box.why for box in lost]
    most = max(_BOX_REASONS, key=whys.count)
    how_many = f"all of {len(lost):,}" if not kept else f"{len(lost):,} of {len(lost + kept):,}"
    begin = f"{how_many} boxes {_BOX_REASONS[most]}" + " or do not fit" * (set(whys) != {most})
    now = (self._source.box_format, self._source.box_units)
    fits = {
      way: ([self._fits(box, *way) for box in lost], [self._fits(box, *way) for box in kept])
      for way in ((f, u) for u in box_formats.UNITS for f in box_formats.FORMATS)
      if way != now
    }
    good = {
      way: sum(a) + sum(b)
      for way, (a, b) in fits.items()
      if sum(a) >= _MENDED * len(a) and sum(b) >= _SPARED * len(b)
    }
    if not good:
      return self._no_way(begin, lost, fits)
    best = max(good.values())
    # Those that fit as well; of them first what changes least.
    ways = sorted(
      (way for way in good if good[way] >= 0.98 * best),
      key=lambda way: (way[1] != now[1], good[way] < best, way[0] != now[0]),
    )
    way, total = ways[0], len(lost + kept)
    others = [f"{f} in {u} ({good[f, u]:,})" for f, u in ways[1:]]
    scale = _scale(self._boxes)
    if scale and way[1] == "pixels" != now[1]:
      others.append(f"{_SCALES[scale]}, for no number is above {scale}")
    return (
      f"{begin}: {_question(now, way)} As {way[0]} in {way[1]} {good[way]:,} of {total:,} fit: "
      f"{_flags(now, way)}" + f" (so they do as {', '.join(others)}: look at them)" * bool(others)
    )

  def _no_way(self, begin: str, lost: list[_Box], fits) -> str:
    """The hint where no other format fits all boxes."""
    for (box_format, units), (mended, _) in fits.items():
      other = units != self._source.box_units and box_format == self._source.box_format
      if other and units == "pixels" and sum(mended) >= 0.9 * len(mended):
        return f"{begin}: pixels among fractions? Write all boxes of the file in one unit"
    scale = _scale(self._boxes)
    if scale and self._source.box_units == "fractions":
      return f"{begin}: {_SCALES[scale]}? No number is above {scale}: divide them by it"
    source, wide = self._source, self._source.tolerance + _EDGE
    near = sum(self._fits(b, source.box_format, source.box_units, tolerance=wide) for b in lost)
    if near >= _MENDED * len(lost):
      return f"{begin}, {near:,} of them by less than {_EDGE:.0%}: --tolerance={_EDGE:g} clips them"
    return ""

  def _fits(
    self, box: _Box, box_format: str, units: str, *, tolerance: float | None = None
  ) -> bool:
    to_fractions = units == "fractions" and self._source.box_units == "pixels"
    if to_fractions and not box_formats.is_under_a_pixel(box.numbers):
      return False
    found = records.check_box(
      box.numbers,
      tolerance=self._source.tolerance if tolerance is None else tolerance,
      box_format=box_format,
      size=box.size if units == "pixels" else None,
    )
    return not isinstance(found, str)


def _scale(boxes: list[_Box]) -> int:
  """The number that boxes of images of other sizes end at, as a part of the image; 0 if none."""
  most = max(max(box.numbers) for box in boxes)
  sides = {max(box.size) for box in boxes}
  for scale in _SCALES:
    if 0.9 * scale < most <= scale and len(boxes) >= _MANY and not 0.9 < max(sides) / scale < 1.5:
      return scale
  return 0


def _question(now: tuple[str, str], way: tuple[str, str]) -> str:
  words = []
  if way[1] != now[1]:
    words.append(f"{way[1]}?")
  if {now[0], way[0]} == {"yxyx", "xyxy"} and not words:
    words.append("x and y exchanged?")
  elif way[0] == "xywh" and not words:
    words.append("width and height, not a second corner?")
  elif way[0] == "cxcywh" and not words:
    words.append("a centre, not a corner?")
  return " ".join(words) or "another format?"


def _flags(now: tuple[str, str], way: tuple[str, str]) -> str:
  changes = zip(("box_format", "box_units"), now, way, strict=True)
  return " ".join(f"--{name}={new}" for name, old, new in changes if new != old)


def _oddities(oddities: folder_lines.Oddities) -> Iterator[str]:
  unread = []
  for key, (count, first) in oddities.keys.items():
    if key.meant:
      yield (f"unknown key {key.name} in {count:,} {key.where}: {key.meant}? (first: {first})")
    else:
      unread.append(f"{key.name} ({count:,} {key.where})")
  for words, (count, first) in oddities.values.items():
    yield f"{words}, {count:,} times (first: {first})"
  if unread:
    more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
    yield f"keys that are not read: {', '.join(unread[:8])}{more}"


def missing_images(paths: Iterable[pathlib.Path], total: int | None = None) -> list[str]:
  """Where images that are not there lie instead.

  Args:
    paths: of missing images, or of all of them: those that are there are passed over, and no more
      than the first thousand missing ones are looked for.
    total: how many are missing; None: as many as are looked at.
  """
  seen = 0
  found: dict[str, tuple[int, str]] = {}
  for path in paths:
    if seen == _MISSING:
      break
    if not isinstance(path, pathlib.Path) or _is_file(places.find_file(path)):
      continue
    seen += 1
    for words, spell in _ELSEWHERE.items():
      other = next((p for p in spell(path) if p != path and _is_file(p)), None)
      if other is not None:
        count, first = found.get(words, (0, f"{path} -> {other}"))
        found[words] = (count + 1, first)
        break
  of = f" of the first {seen:,}" if total is not None and total > seen else ""
  return [
    tally.one_line(f"{words}? {count:,}{of} missing images are there otherwise: {first}")
    for words, (count, first) in found.items()
  ]


def _is_file(path: pathlib.Path) -> bool:
  try:
    return path.is_file()
  except (OSError, ValueError):  # no path
    return False


def _other_endings(path: pathlib.Path) -> Iterator[pathlib.Path]:
  for ending in (".jpg", ".jpeg", ".png", ".webp"):
    yield path.with_name(path.name + ending)
    for spelled in (ending, ending.upper()):
      if path.suffix:
        yield path.with_suffix(spelled)


def _in_other_case(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """The path whose last two names differ in capitals alone, if there is one."""
  folders = [path.parent]
  with contextlib.suppress(OSError):
    if not path.parent.is_dir():
      name = path.parent.name.casefold()
      folders = [p for p in path.parent.parent.iterdir() if p.name.casefold() == name]
  for folder in folders:
    yield folder / path.name
    yield folder / path.name.lower()
    for spelled in (path.suffix.lower(), path.suffix.upper()):
      yield folder / (path.stem + spelled)


# What a path may have been written with -> where its image is looked for.
_ELSEWHERE: dict[str, Callable[[pathlib.Path], Iterable[pathlib.Path]]] = {
  "backslashes": lambda p: [pathlib.Path(str(p).replace("\\", "/"))],
  "another ending": _other_endings,
  "capitals": _in_other_case,
  "a folder named twice": lambda p: [
    pathlib.Path(*p.parts[:i], *p.parts[i + 1 :])
    for i in range(1, len(p.parts) - 1)
    if p.parts[i] == p.parts[i - 1]
  ],
  "a folder left out": lambda p: [p.parent / "images" / p.name],
}
