"""Lines of an annotation file of one's own, and what in them is spelled otherwise than is read.

The format stands at the head of `sources.folder`.
"""

from __future__ import annotations

import difflib
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from grain_jax import failures, textfiles
from grain_jax.data import records

MISSPELT_KEY = "misspelt_key"  # what stands under a key that is not read
# What other formats call the same; how near a key must be to one that is read to be meant as it.
_ALIASES = {
  "image": ("filename", "filepath", "file", "path", "img", "imagepath", "picture"),
  "captions": ("text", "texts", "sentences", "captionlist"),
  "regions": ("objects", "boxes", "bboxes", "annotations", "instances"),
  "split": ("subset", "partition"),
  "negatives": ("hardnegatives",),
  "box": ("bbox", "boundingbox", "bndbox", "rect", "coordinates"),
  "description": ("desc", "phrase", "text", "caption", "label", "name", "category", "class"),
  "score": ("confidence", "conf", "logit"),
}
_NEAR = 0.8
_MOST_KEYS = 200  # that are counted one by one: a file may have as many as it has images
_EVERY_KEY = "(other keys)"
LINE, REGION = "lines", "regions"  # where a key stands
_KNOWN = {
  LINE: ("image", "captions", "caption", "regions", "split", "negatives"),
  REGION: ("description", "box", "score", "negatives"),
}
_CSV_KNOWN = ("image", "caption", "split")


class Key(NamedTuple):
  """A key that is not read."""

  where: str  # LINE | REGION
  name: str
  meant: str  # the key that it is near to; '' if there is none


class Oddities:
  """Counts, over the lines of a file, keys that are not read and values of another kind."""

  def __init__(self) -> None:
    self.keys: dict[Key, list[Any]] = {}  # -> [how many, the first one's image]
    self.values: dict[str, list[Any]] = {}  # 'regions is an object, not a list' -> the same

  def add_key(self, key: Key, first: str) -> None:
    if key not in self.keys and len(self.keys) >= _MOST_KEYS:
      key = Key(key.where, _EVERY_KEY, "")
    self._count(self.keys, key, first)

  def add_value(self, words: str, first: str) -> None:
    self._count(self.values, words, first)

  @staticmethod
  def _count(counts: dict[Any, list[Any]], name: Any, first: str) -> None:
    counts.setdefault(name, [0, first])[0] += 1

  def take(self) -> dict[str, Any]:
    """What was counted since it was last taken, as JSON."""
    found = {
      "keys": [[*key, count, first] for key, (count, first) in self.keys.items()],
      "values": [[words, count, first] for words, (count, first) in self.values.items()],
    }
    self.keys.clear()
    self.values.clear()
    return found

  def merge(self, taken: Mapping[str, Any]) -> None:
    """Adds what another one has counted."""
    for where, name, meant, count, first in taken["keys"]:
      key = Key(where, name, meant)
      if key not in self.keys and len(self.keys) >= _MOST_KEYS:
        key = Key(where, _EVERY_KEY, "")
      self.keys.setdefault(key, [0, first])[0] += count
    for words, count, first in taken["values"]:
      self.values.setdefault(words, [0, first])[0] += count


def check_file(file: pathlib.Path) -> None:
  """Raises the line for a file that is JSON or text, but not lines of JSON in UTF-8."""
  if not file.is_file():
    return  # what opens it says what it is
  head = failures.retry_read(lambda: _head(file), file).lstrip()
  if head.startswith((b"\xff\xfe", b"\xfe\xff")):
    raise ValueError(f"{file} is UTF-16 (a byte order mark says so). Save it as UTF-8.")
  head = head.removeprefix(b"\xef\xbb\xbf")
  what = program = None
  if re.match(rb"\[\s*[{\]]", head):
    what, program = "a JSON array, not lines", ".[]"
  elif re.match(rb'\{\s*"(info|images|annotations|licenses|categories)"\s*:\s*[\[{]', head):
    raise ValueError(
      f"{file} is a COCO file, one object with images and annotations, not lines. Write an object "
      "for each of its images on a line of its own (the format: python -m grain_jax.data.build "
      "--source=folder --help)."
    )
  elif re.match(rb"\{\s*\n", head):
    what, program = "a JSON object over several lines, not an object a line", "."
  elif not _is_csv(file) and re.match(rb'["\w]+[,;\t][^{}]*\n', head):
    raise ValueError(f"{file} looks like CSV and is not named so. Name it annotations.csv.")
  if what:
    raise ValueError(
      f"{file} is {what}. Write each image's object on a line of its own, into another file: "
      f"jq -c '{program}' {file} > lines.jsonl does it, and --annotations=lines.jsonl reads it."
    )


def _head(file: pathlib.Path) -> bytes:
  with file.open("rb") as opened:
    return opened.read(4096)


def blocks(file: pathlib.Path, size: int) -> Iterator[dict[str, Any]]:
  """Parts of a file for `read`, of so many lines or a few more: one image's lines stay together."""
  start, count = textfiles.Place(), 0
  if not _is_csv(file):
    for line in textfiles.iterate_lines(file):
      if count == size:
        place = textfiles.Place(line.offset, line.number - 1)
        yield {"start": list(start), "stop": place.offset}
        start, count = place, 0
      count += 1
  else:
    columns, _ = textfiles.read_table(file)
    at = columns.index("image") if "image" in columns else 0
    before: tuple[textfiles.Place | None, str | None] = (None, None)
    for _, fields, after in textfiles.csv_places(file):
      image = fields[at] if at < len(fields) else None
      if count >= size and before[0] is not None and image != before[1]:
        yield {"start": list(start), "stop": before[0].offset}
        start, count = before[0], 0
      before, count = (after, image), count + 1
  if count:
    yield {"start": list(start), "stop": None}


def read(
  file: pathlib.Path,
  oddities: Oddities | None = None,
  *,
  block: Mapping[str, Any] | None = None,
) -> Iterator[Mapping[str, Any] | records.Refused]:
  """The lines of a JSONL or CSV file; what cannot be read is a `records.Refused` in its place.

  Args:
    file: JSONL or CSV.
    oddities: takes what is spelled otherwise.
    block: the part of the file, one of `blocks`; None: all of it.
  """
  start = textfiles.Place() if block is None else textfiles.Place(*block["start"])
  stop = None if block is None else block["stop"]
  if _is_csv(file):
    return _csv_lines(file, oddities, start, stop)
  return _json_lines(file, oddities, start, stop)


def find(root: pathlib.Path) -> pathlib.Path:
  """The annotation file of a folder; a one-line ValueError where it has none."""
  if root.is_file():
    raise ValueError(
      f"{root} is a file, not a folder: give its folder, or --annotations={root} beside it."
    )
  for name in ("annotations.jsonl", "annotations.csv"):
    if (root / name).is_file():
      return root / name
  others = (path.name for path in sorted(root.glob("*.*")))
  near = [n for n in others if re.search(r"\.(jsonl?|csv|tsv|ndjson|txt)$", n.lower())]
  there = f" (there is {', '.join(near[:3])})" if near else ""
  raise ValueError(
    f"{root} holds neither annotations.jsonl nor annotations.csv{there}: no captions to read. "
    "Write one (the format: python -m grain_jax.data.build --source=folder --help) or give "
    "--annotations."
  )


def misspelt(
  entry: Mapping[str, Any], where: str, oddities: Oddities | None, first: str
) -> dict[str, str]:
  """Counts the keys of a line or region that are not read.

  Returns:
    {key that is read and absent: key that stands for it}.
  """
  known = _KNOWN[where]
  meant: dict[str, str] = {}
  for name in entry:
    if name in known:
      continue
    near = nearest(name, [key for key in known if not _has(entry, key)])
    if near:
      meant.setdefault(near, name)
    if oddities is not None:
      oddities.add_key(Key(where, name, near), first)
  return meant


def nearest(name: str, known: Iterable[str]) -> str:
  """The known key that a name is spelled like or is another word for; '' if there is none."""
  plain = re.sub(r"[\W_]", "", name).lower()
  choices = {key: (key, *_ALIASES.get(key, ())) for key in known}
  for key, spellings in choices.items():
    if plain in spellings:
      return key
  scores = {key: difflib.SequenceMatcher(None, plain, key).ratio() for key in choices}
  best = max(scores, key=scores.__getitem__, default="")
  return best if best and scores[best] >= _NEAR else ""


def _has(entry: Mapping[str, Any], key: str) -> bool:
  """Whether a key is there, "caption" standing for "captions" too."""
  return key in entry or (key in ("caption", "captions") and not entry.keys().isdisjoint(_TEXTS))


_TEXTS = ("caption", "captions")


def parts(
  line: Mapping[str, Any], oddities: Oddities | None = None
) -> tuple[dict[str, Any], list[records.Refused]] | records.Refused:
  """({image, captions, regions, negatives, split}, what is lost under misspelt keys), or why not.

  Args:
    line: an object of the file.
    oddities: takes what is spelled otherwise, or is of another kind.
  """
  image = line.get("image")
  first = image if isinstance(image, str) else str(line)[:80]
  meant = misspelt(line, LINE, oddities, first)
  if not isinstance(image, str) or not image:
    return records.Refused(str(line)[:80], "records", records.MALFORMED)
  original, captions = (
    [value] if isinstance(value, str) else value or []
    for value in (line.get("caption"), line.get("captions"))
  )
  if isinstance(original, list) and isinstance(captions, list):
    captions = [*original, *(text for text in captions if text not in original)]
  elif not isinstance(original, list):
    captions = original
  regions, negatives = line.get("regions") or [], line.get("negatives") or []
  found = {"captions": captions, "regions": regions, "negatives": negatives}
  odd = [name for name, value in found.items() if not isinstance(value, list)]
  if odd:
    for name in odd:
      _add_value(oddities, f"{name} is {_kind(found[name])}, not a list", image)
    return records.Refused(image, "records", records.MALFORMED)
  lost = []
  for name in {"regions", "negatives"} & meant.keys():
    value = line[meant[name]]
    count = max(1, len(value)) if isinstance(value, list) else 1
    lost += [records.Refused(image, name, MISSPELT_KEY)] * count
  for region in regions:
    _check_region(region, oddities, image)
  return {"image": image, "split": str(line.get("split") or "train"), **found}, lost


def _check_region(region: Any, oddities: Oddities | None, image: str) -> None:
  if not isinstance(region, Mapping):
    return _add_value(oddities, f"a region is {_kind(region)}, not an object", image)
  misspelt(region, REGION, oddities, image)
  box, description = region.get("box"), region.get("description")
  if "box" in region and not isinstance(box, list):
    _add_value(oddities, f"box is {_kind(box)}, not a list of four numbers", image)
  elif isinstance(box, list) and len(box) != 4:
    _add_value(oddities, f"box is a list of {len(box)}, not of four numbers", image)
  elif isinstance(box, list) and not all(isinstance(x, (int, float)) for x in box):
    _add_value(oddities, "box has values that are no numbers", image)
  if "description" in region and not isinstance(description, str):
    _add_value(oddities, f"description is {_kind(description)}, not a text", image)


def _add_value(oddities: Oddities | None, words: str, image: str) -> None:
  if oddities is not None:
    oddities.add_value(words, image)


def _kind(value: Any) -> str:
  if isinstance(value, Mapping):
    return f"an object ({', '.join(map(str, list(value)[:4]))})"
  names = {str: "a text", list: "a list", bool: "true or false", type(None): "null"}
  return names.get(type(value), "a number")


def _is_csv(file: pathlib.Path) -> bool:
  return file.suffix.lower() == ".csv"


def _json_lines(
  file: pathlib.Path, oddities: Oddities | None, start: textfiles.Place, stop: int | None
) -> Iterator[Mapping[str, Any] | records.Refused]:
  # What is no JSON or UTF-8 costs its line alone.
  for line in textfiles.iterate_lines(file, start=start, stop=stop):
    entry, odd = None, ""
    try:
      entry = textfiles.parse_json(line.text())
      odd = "" if isinstance(entry, dict) else "a line is no JSON object"
    except ValueError as error:
      encoded = str(error).startswith("not UTF-8")
      odd = "a line is not UTF-8: save the file as UTF-8" if encoded else "a line is not JSON"
    if odd and oddities is not None:
      oddities.add_value(odd, f"line {line.number}")
    refused = records.Refused(f"line {line.number}", "records", "not_json")
    yield entry if isinstance(entry, dict) else refused


def _csv_lines(
  file: pathlib.Path, oddities: Oddities | None, start: textfiles.Place, stop: int | None
) -> Iterator[Mapping[str, Any] | records.Refused]:
  columns, rows = textfiles.read_table(file, start=start, stop=stop)
  if not {"image", "caption"} <= set(columns):
    raise ValueError(
      f"{file} has the columns {columns}: image and caption are needed{_meant(columns)}. Write "
      "them into its first line."
    )
  surplus_columns = [name for name in columns if name not in _CSV_KNOWN]
  current: dict[str, Any] = {}
  for number, row, surplus in rows:
    if oddities is not None:
      for name in surplus_columns:
        near = nearest(name, [key for key in _CSV_KNOWN if key not in columns])
        oddities.add_key(Key(LINE, name, near), str(row["image"]))
    if surplus:  # a comma outside quotes: the caption would be cut there
      yield records.Refused(f"row {number}", "records", records.MALFORMED)
      continue
    if current and current["image"] == row["image"]:
      if row.get("split") and row["split"] != (current["split"] or "train"):
        words = "split is another one than in the first row of its image, which counts"
        _add_value(oddities, words, str(row["image"]))
      current["captions"].append(row["caption"])
      continue
    if current:
      yield current
    current = {"image": row["image"], "captions": [row["caption"]], "split": row.get("split")}
  if current:
    yield current


def _meant(columns: list[str]) -> str:
  """' (path: image? text: caption?)' of columns that are not read; '' if none is near."""
  if len(columns) == 1 and (found := re.search("[;\t|]", columns[0])):
    return f" (its fields stand between {found.group()!r}: put commas between them)"
  absent = [key for key in ("image", "caption") if key not in columns]
  aliases = {
    name: nearest(name, ["captions" if k == "caption" else k for k in absent]) for name in columns
  }
  near = [f"{name}: {key.removesuffix('s')}?" for name, key in aliases.items() if key]
  return f" ({' '.join(near)})" if near else ""
