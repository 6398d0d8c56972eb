"""What a language model answered, as descriptions or a caption; what is neither is told by reason.

A model asked for lines writes lines, bullets, numbers, JSON, JSON in a fence, an introduction, an
apology, the same line forty times, or half of one of these. Nothing here raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

MOST = 10  # descriptions a picture (GRAIN, arXiv 2412.04429)
LONGEST, LONGEST_WORDS = 120, 20  # of a description: what is longer is run-on text
LONGEST_WORD = 40  # characters: a longer one is an address, a picture, or letters gone wild
LONGEST_CAPTION = 400  # characters; also of the long description of a region
_SHOWN = 50_000  # characters of a reply that are read at all

# Why a line is dropped.
REFUSAL, TOO_LONG, DUPLICATE, TOO_MANY = "refusal", "too_long", "duplicate", "too_many"
EMPTY, HEADING, NOT_TEXT, CUT_OFF = "empty", "heading", "not_text", "cut_off"
OTHER_SCRIPT = "other_script"  # most of its letters are not Latin ones
# Why a whole reply cannot be used.
EMPTY_REPLY, NOTHING_USABLE = "empty_reply", "nothing_usable"
REPEATS_ITSELF = "repeats_itself"

_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[\w-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BULLET = re.compile(
  r"^(?:[-*+•‣◦▪–—·>#]+\s+|[•‣◦▪·]+\s*|\(?\d{1,3}(?:[.)]+(?!\d)\s*|:\s+)|\(?[a-zA-Z][.)]\s+)+"
)
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?', re.DOTALL)
_OPEN = re.compile(r'"(?:[^"\\]|\\.)*\Z', re.DOTALL)
_EMPHASIS = re.compile(r"\*\*|__|`")
_WRAPS = ('""', "''", "“”", "‘’", "«»", "**", "__")
_REFUSAL = re.compile(
  r"^(?:i['’]?m (?:sorry|afraid|unable|not able)|i am (?:sorry|afraid|unable|not able)|"
  r"sorry[,.! ]|i apologi[sz]e|apologies|"
  r"(?:unfortunately|however), i |i (?:cannot|can['’]?t|can not|won['’]?t|will not|could not|"
  r"couldn['’]?t|don['’]?t|do not|am not) |"
  r"as an ai\b|as a (?:large )?language model\b|"
  r"(?:there is )?no (?:image|picture) (?:was |is |has been )?(?:provided|attached|given|shown)|"
  r"please (?:provide|upload|share|attach) (?:the |an? )?(?:image|picture))",
  re.IGNORECASE,
)
_LABEL = re.compile(r"^(?:caption|description|answer|sentence)\s*:\s*", re.IGNORECASE)


class Lines(NamedTuple):
  """What a reply says: kept and dropped are all of its lines."""

  kept: list[str]
  dropped: list[str]  # why, of each line that was


def lines(text: str, *, most: int = MOST, any_script: bool = False, commas: bool = False) -> Lines:
  """The descriptions in a reply, in their order.

  Args:
    text: the reply.
    most: of them.
    any_script: keep what is not in Latin letters.
    commas: a single line is a list with commas (of short names).
  """
  kept, dropped = [], []
  seen: set[str] = set()
  for given in _candidates(_without_thinking(text), commas=commas):
    found = given if isinstance(given, _Dropped) else _one(given, any_script=any_script)
    if isinstance(found, _Dropped):
      dropped.append(found.why)
    elif found.casefold() in seen:
      dropped.append(DUPLICATE)
    elif len(kept) == most:
      dropped.append(TOO_MANY)
    else:
      kept.append(found)
      seen.add(found.casefold())
  return Lines(kept, dropped)


def failure_of_lines(found: Lines) -> str | None:
  """Why a reply cannot be used; None: it can."""
  if found.kept:
    return None
  reasons = set(found.dropped) - {EMPTY, HEADING}
  if REFUSAL in reasons:
    return REFUSAL
  return reasons.pop() if len(reasons) == 1 else (NOTHING_USABLE if reasons else EMPTY_REPLY)


def sentence(text: str, *, any_script: bool = False) -> tuple[str | None, str | None]:
  """(the caption in a reply, None) or (None, why there is none)."""
  text = _without_thinking(text)
  given = text
  if _json_of(text) is not None or text[:1] in ("[", "{", "`"):
    given = next((t for t in _candidates(text, commas=False) if isinstance(t, str)), "")
  rows = [_plain(row) for row in re.split(r"[\r\n]+", given)]
  rows = [_LABEL.sub("", row) for row in rows if row and not row.endswith(":")]
  found = _plain(rows[0]) if rows else ""
  if not any(letter.isalnum() for letter in found):
    return None, EMPTY_REPLY
  if _REFUSAL.match(found):
    return None, REFUSAL
  words = found.casefold().split()
  if len(found) > LONGEST_CAPTION or max(map(len, words)) > LONGEST_WORD:
    return None, TOO_LONG
  if len(words) > 12 and len(set(words)) * 3 < len(words):
    return None, REPEATS_ITSELF
  if not any_script and not _is_latin(found):
    return None, OTHER_SCRIPT
  return found, None


class _Dropped(NamedTuple):
  why: str


def _one(given: str, *, any_script: bool) -> str | _Dropped:
  text = _plain(given)
  if text.endswith(":"):
    return _Dropped(HEADING)
  while (found := _plain(text.rstrip("."))) != text:
    text = found
  if not any(letter.isalnum() for letter in text):
    return _Dropped(EMPTY)
  if _REFUSAL.match(text):
    return _Dropped(REFUSAL)
  words = text.split()
  if len(text) > LONGEST or len(words) > LONGEST_WORDS or max(map(len, words)) > LONGEST_WORD:
    return _Dropped(TOO_LONG)
  return text if any_script or _is_latin(text) else _Dropped(OTHER_SCRIPT)


def _plain(text: str) -> str:
  """One line without bullets, numbering, marks of emphasis and what no file can hold."""
  text = text.encode("utf-8", "replace").decode()  # halves of characters
  text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
  while (found := _unwrapped(_BULLET.sub("", _EMPHASIS.sub("", text)).strip())) != text:
    text = found
  return text


def _unwrapped(text: str) -> str:
  text = text.rstrip(",;").rstrip()
  if text.count('"') == 1 and '"' in (text[0], text[-1]):
    return text.strip('"').strip()
  wrapped = any(text[:1] == a and text[-1:] == b for a, b in _WRAPS)
  return text[1:-1].strip() if wrapped else text


def _is_latin(text: str) -> bool:
  letters = [letter for letter in text if letter.isalpha()]
  return not letters or sum(letter < "ɐ" for letter in letters) * 2 >= len(letters)


def _without_thinking(text: str) -> str:
  return _THINKING.sub("", text[:_SHOWN]).strip()


def _json_of(text: str) -> Any:
  """The JSON that a reply is, or has in a fence; None: it has none."""
  fenced = _FENCE.search(text)
  for part in (text, fenced[1] if fenced else ""):
    if part.strip()[:1] in tuple('[{"'):
      try:
        return json.loads(part)
      except (ValueError, RecursionError):
        pass
  return None


def _candidates(text: str, *, commas: bool) -> Iterator[str | _Dropped]:
  value = _json_of(text)
  if value is not None:
    yield from _texts(value)
    return
  fenced = _FENCE.search(text)
  body = fenced[1].strip() if fenced else text
  if body[:1] in ("[", "{") and '"' in body:  # JSON that is cut off, or almost JSON
    for found in _STRING.finditer(body):
      if not found[2]:
        yield _unescaped(found[1])
    if _OPEN.search(_STRING.sub("", body)):
      yield _Dropped(CUT_OFF)
    return
  rows = [row for row in re.split(r"[\r\n]+", body) if row.strip()]
  if commas and len(rows) == 1:
    rows = rows[0].split(",")
  yield from rows


def _unescaped(text: str) -> str:
  try:
    return json.loads(f'"{text}"')
  except ValueError:
    return text


def _texts(value: Any) -> Iterator[str | _Dropped]:
  """All texts of a JSON value, a list after the other."""
  todo = [value]
  while todo:
    found = todo.pop(0)
    if isinstance(found, str):
      yield found
    elif isinstance(found, list):
      todo = found + todo
    elif isinstance(found, dict):
      todo = list(found.values()) + todo
    else:
      yield _Dropped(NOT_TEXT)
