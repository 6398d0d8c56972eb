"""What a build keeps and what it drops, by reason: counted, shown as a table, limited."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grain_jax.data.sources import deliberate

ALLOWED = 0.2  # of a kind that may be dropped, unless --allow_dropped says otherwise
DUPLICATE_KEY = "duplicate_key"
WITHOUT_BOX = "description_without_box"  # of the published files: nothing that the user can mend
# What is left out because it was asked for, or cannot be mended: no sign that the data is bad.
_LINK_ROT = "failed_to_download"  # of img2dataset: lists of URLs are of years ago
_FINE = deliberate.REASONS | {WITHOUT_BOX}
_KINDS = ("records", "captions", "regions", "negatives")
_TITLES = {"records": "images"}
_EXAMPLES = 10  # keys of each kind of loss that the manifest lists
_EARLY = 1_000  # of a kind, from which a build says that it will end with an error


class Tally:
  """Counts of a build, by split and kind."""

  def __init__(self, allowed: float):
    """Args: allowed: part of the images, captions, regions or negatives that may be dropped."""
    self.allowed = allowed
    self.dropped: dict[str, Any] = {}  # split -> kind -> reason -> {count, first}
    self._kept: dict[str, dict[str, int]] = {}  # split -> kind -> count
    self._totals = {kind: [0, 0] for kind in _KINDS}  # kept, dropped and within the limit's count
    self._warned: set[str] = set()

  def keep(self, split: str, counts: Mapping[str, int]) -> None:
    """Takes in a record that is kept: how many of each kind it is."""
    kept = self._kept.setdefault(split, dict.fromkeys(_KINDS, 0))
    for kind in _KINDS:
      kept[kind] += counts[kind]
      self._totals[kind][0] += counts[kind]

  def drop(self, split: str, kind: str, why: str, key: str) -> None:
    losses = self.dropped.setdefault(split, {name: {} for name in _KINDS})
    entry = losses[kind].setdefault(why, {"count": 0, "first": []})
    entry["count"] += 1
    self._totals[kind][1] += not _is_fine(why)
    if len(entry["first"]) < _EXAMPLES:
      entry["first"].append(printable(key))

  def summary(self) -> dict[str, Any]:
    """{images, captions, regions, negatives: {kept, dropped, reasons}} over all splits."""
    found = {}
    for kind in _KINDS:
      reasons: dict[str, int] = {}
      for losses in self.dropped.values():
        for why, entry in losses[kind].items():
          reasons[why] = reasons.get(why, 0) + entry["count"]
      reasons = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
      kept = sum(split[kind] for split in self._kept.values())
      found[title(kind)] = {"kept": kept, "dropped": sum(reasons.values()), "reasons": reasons}
    return found

  def warn_early(self, say: Callable[[str], None], hints: Callable[[], list[str]]) -> None:
    """Says, once for each kind, that what was read so far is over the limit."""
    for kind, (kept, lost) in self._totals.items():
      total = kept + lost
      if kind in self._warned or total < _EARLY or not _exceeds(lost, total, self.allowed):
        continue
      self._warned.add(kind)
      words = "; ".join(hints()[:1])
      say(
        f"of the first {total:,} {title(kind)} {lost:,} were dropped, more than "
        f"--allow_dropped={self.allowed:g}: if that goes on, this build ends with an error"
        + (f" ({words})" if words else "")
      )

  def check(self, hints: list[str]) -> None:
    """Raises the line where more is dropped than may be, of a kind or of all of a split."""
    parts = []
    for kind, (kept, lost) in self._totals.items():
      if _exceeds(lost, kept + lost, self.allowed):
        parts.append(f"{lost:,} of {kept + lost:,} {title(kind)}{self._most(kind)}")
    for split in self.dropped.keys() - self._kept.keys():
      if self.allowed < 1 and any(self.dropped[split]["records"]):
        parts.append(f"every image of the split {one_line(split)}")
    if parts:
      raise ValueError(too_many(parts, self.allowed, hints))

  def _most(self, kind: str) -> str:
    """' (missing_image 6, corrupt_image 4)'."""
    reasons = self.summary()[title(kind)]["reasons"]
    shown = [f"{why} {n:,}" for why, n in reasons.items() if not _is_fine(why)]
    return f" ({', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})"


def _is_fine(why: str) -> bool:
  """Whether a loss is no sign that the data or the flags are wrong."""
  return why in _FINE or why.startswith(_LINK_ROT)


def _exceeds(lost: int, total: int, allowed: float) -> bool:
  return lost > (allowed + 1e-9) * total  # 29 of 100 are not more than 0.29 of them


def too_many(parts: list[str], allowed: float, hints: list[str]) -> str:
  """The line of an error for what is dropped beyond the limit."""
  return (
    f"{' and '.join(parts)} cannot be used, more than --allow_dropped={allowed:g}."
    f"{perhaps(hints)} Mend the annotations or the flags; nothing was built (--allow_dropped=1 "
    "builds what is left and shows it in preview.html)."
  )


def perhaps(hints: list[str]) -> str:
  """Hints as the sentences of an error."""
  return "".join(f" Perhaps: {hint}." for hint in hints[:2])


def check_missing(images: Mapping[str, Any] | None, allowed: float, hints) -> None:
  """Raises the line, before images are read, where more of them are missing than may be.

  Args:
    images: {files, missing} of all records (`inputs.images`), or None.
    allowed: part of the images that may be dropped.
    hints: () -> lines about the missing ones; called where there are too many.
  """
  if images is None:
    return
  missing, total = images["missing"], images["missing"] + images["files"]
  if _exceeds(missing, total, allowed):
    part = f"{missing:,} of {total:,} images (missing_image {missing:,})"
    raise ValueError(too_many([part], allowed, hints()))


def rows(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """The kinds that a table shows: negatives only where the data has some."""
  return {
    name: entry
    for name, entry in summary.items()
    if name != "negatives" or entry["kept"] + entry["dropped"]
  }


def table(summary: Mapping[str, Any]) -> list[str]:
  """`Tally.summary` as lines for the terminal."""
  cells = [("", "kept", "dropped", "", "")]
  for name, entry in rows(summary).items():
    kept, lost = entry["kept"], entry["dropped"]
    part = f"{100 * lost / (kept + lost):.1f} %" if lost else ""
    reasons = ", ".join(f"{why} {n:,}" for why, n in entry["reasons"].items())
    cells.append((name, f"{kept:,}", f"{lost:,}", part, reasons))
  widths = [max(len(row[i]) for row in cells) for i in range(4)]
  lines = [
    f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  "
    f"{row[3]:>{widths[3]}}  {row[4]}".rstrip()
    for row in cells
  ]
  if summary["images"]["dropped"]:
    lines.append("  (good captions and regions of dropped images are not counted)")
  return lines


def title(kind: str) -> str:
  """What the table calls a kind of loss."""
  return _TITLES.get(kind, kind)


def printable(key: str) -> str:
  """A key as UTF-8 can hold it: JSON can carry halves of a character."""
  return key.encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
  """A text of a user's file as a part of a message."""
  return " ".join(printable(text).split())
