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
MORE_THAN_ASKED = "more_than_asked"  # lines beyond the one paragraph of a caption
OTHER_SCRIPT = "other_script"  # most of its letters are not Latin ones
# Why a whole reply cannot be used.
EMPTY_REPLY, NOTHING_USABLE = "empty_reply", "nothing_usable"
REPEATS_ITSELF = "repeats_itself"

_THOUGHT = re.compile(r".*</think(?:ing)?>", re.DOTALL)  # its opening tag may stand in the prompt
_THINKING = re.compile(r"<think(?:ing)?>.*", re.DOTALL)  # that came to no end
_FENCE = re.compile(r"```[\w-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BULLET = re.compile(
  r"^(?:[-*+•‣◦▪–—·>#]+\s+|[•‣◦▪·]+\s*|\(?\d{1,3}(?:[.)]+(?!\d)\s*|:\s+)|\(?[a-zA-Z]\)\s+)+"
)
_LETTER = re.compile(r"\s*([a-zA-Z])\.\s+")  # of a list, or of a name: "T. rex"
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?', re.DOTALL)
_OPEN = re.compile(r'"(?:[^"\\]|\\.)*\Z', re.DOTALL)
# As Python writes a list: in either quotes, with an apostrophe here and there.
_PYTHON = re.compile(
  r"""(?:"((?:[^"\\]|\\.)*)"|(?<=[\[{,:\s])'((?:[^'\\]|\\.|'(?!\s*[,\]}:])){0,1000})'(?=\s*[,\]}:]))"""
  r"(\s*:)?",
  re.DOTALL,
)
_ESCAPES = re.compile(r'\\.|"', re.DOTALL)
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
# Between paragraphs, and before each entry of a list.
_PARAGRAPHS = re.compile(r"(?:\r?\n[ \t]*){2,}|\n(?=[ \t]*(?:[-*•]|\(?\d{1,2}[.)])[ \t])")
# What a model says around its answer.
_TITLE = re.compile(
  r"(?:(?:the|main|visual|short|long|brief|detailed|image|picture)\s+)*"
  r"(?:caption|description|answer|sentence|subject|feature)s?",
  re.IGNORECASE,
)
_AGREES = re.compile(
  r"^(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|alright|no problem|got it|"
  r"understood)(?:[!.,:]+\s*|$)",
  re.IGNORECASE,
)
_INTRODUCES = re.compile(r"^here(?:['’]s|\s+(?:is|are|you go))\b", re.IGNORECASE)
_INTRODUCED = re.compile(r"^here(?:['’]s|\s+(?:is|are))\b[^:]{0,80}:\s+", re.IGNORECASE)
_OFFERS = re.compile(
  r"^(?:here you go\b|let me know\b|i hope th|hope th|feel free\b|is there anything\b|note:)",
  re.IGNORECASE,
)


class Lines(NamedTuple):
  """What a reply says: kept and dropped are all of its lines."""

  kept: list[str]
  dropped: list[str]  # why, of each line that was


def lines(
  text: str,
  *,
  most: int = MOST,
  any_script: bool = False,
  commas: bool = False,
  cut: bool = False,
) -> Lines:
  """The descriptions in a reply, in their order.

  Args:
    text: the reply.
    most: of them.
    any_script: keep what is not in Latin letters.
    commas: a single line is a list with commas (of short names).
    cut: the reply ended at the most tokens that it might have, maybe within a line.
  """
  kept, dropped = [], []
  seen: set[str] = set()
  answer = _without_thinking(text)
  cut = len(answer) > _SHOWN or (cut and not text.rstrip(" \t").endswith("\n"))
  for given in _candidates(answer[:_SHOWN], commas=commas, cut=cut):
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


class Sentence(NamedTuple):
  """A caption, or the description of a region."""

  text: str | None  # in a line
  why: str | None  # there is none
  left_out: int = 0  # lines of the reply beyond it


def sentence(text: str, *, any_script: bool = False) -> Sentence:
  """The caption in a reply: its first paragraph, without what the model says around it."""
  text = _without_thinking(text)[:_SHOWN]
  given = text
  if _json_of(text) is not None or text[:1] in ("[", "{", "`"):
    given = next((t for t in _candidates(text, commas=False) if isinstance(t, str)), "")
  paragraphs = [_answer_rows(part) for part in _PARAGRAPHS.split(given)]
  paragraphs = [rows for rows in paragraphs if rows]
  # "Here is a dog." is a caption where nothing comes after it.
  if sum(map(len, paragraphs)) > 1 and _INTRODUCES.match(paragraphs[0][0]):
    paragraphs[0].pop(0)
    paragraphs = [rows for rows in paragraphs if rows]
  rows = paragraphs[0] if paragraphs else []
  found = _plain(" ".join(rows))
  why = _fault_of_sentence(found, any_script=any_script)
  if why:
    return Sentence(None, why)
  return Sentence(found, None, sum(map(len, paragraphs)) - len(rows))


def _answer_rows(paragraph: str) -> list[str]:
  """The lines of a paragraph that are no heading, agreement or offer."""
  rows = []
  for given in re.split(r"[\r\n]+", paragraph):
    row = _plain(given)
    row = _LABEL.sub("", _INTRODUCED.sub("", _AGREES.sub("", row)))
    if row and not row.endswith(":") and not _TITLE.fullmatch(row.rstrip(".")):
      rows += [] if _OFFERS.match(row) else [row]
  return rows


def _fault_of_sentence(found: str, *, any_script: bool) -> str | None:
  """Why a line is no caption; None: it is one."""
  if not any(letter.isalnum() for letter in found):
    return EMPTY_REPLY
  if _REFUSAL.match(found):
    return REFUSAL
  words = found.casefold().split()
  if len(found) > LONGEST_CAPTION or max(map(len, words)) > LONGEST_WORD:
    return TOO_LONG
  if len(words) > 12 and len(set(words)) * 3 < len(words):
    return REPEATS_ITSELF
  return None if any_script or _is_latin(found) else OTHER_SCRIPT


class _Dropped(NamedTuple):
  why: str


def _one(given: str, *, any_script: bool) -> str | _Dropped:
  text = _plain(given)
  if text.endswith(":") or _AGREES.match(text) or _INTRODUCES.match(text) or _OFFERS.match(text):
    return _Dropped(HEADING)
  while (found := _plain(text.rstrip("."))) != text:
    text = found
  if _TITLE.fullmatch(text):
    return _Dropped(HEADING)
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
  return _THINKING.sub("", _THOUGHT.sub("", text)).strip()


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


def _candidates(text: str, *, commas: bool, cut: bool = False) -> Iterator[str | _Dropped]:
  """What a reply lists; `cut`: the last line of text is half of one."""
  value = _json_of(text)
  if value is not None:
    yield from _texts(value)
    return
  fenced = _FENCE.search(text)
  body = fenced[1].strip() if fenced else text
  if _is_of_python(body):
    yield from _strings(body, _PYTHON, r"""(?<=[\[{,:\s])['"]""")
    return
  if body[:1] in ("[", "{") and '"' in body:  # JSON that is cut off, or almost JSON
    yield from _strings(body, _STRING, _OPEN)
    return
  rows = _without_letters([row for row in re.split(r"[\r\n]+", body) if row.strip()])
  if commas and len(rows) == 1:
    rows = rows[0].split(",")
  if cut and rows and not (fenced and fenced[0].endswith("```")):
    rows[-1:] = [_Dropped(CUT_OFF)]
  yield from rows


def _is_of_python(body: str) -> bool:
  """Whether it is a list as Python prints one, with single quotes."""
  whole = body[:1] in ("[", "{") and body[-1:] in ("]", "}")
  return bool(re.match(r"[\[{]\s*'", body) or (whole and re.search(r"[\[,:]\s*'", body)))


def _strings(
  body: str, string: re.Pattern[str], opening: str | re.Pattern[str]
) -> Iterator[str | _Dropped]:
  """The strings of a list that is no JSON, keys left out, and whether it ends within one."""
  for found in string.finditer(body):
    *texts, colon = found.groups()
    if not colon:
      yield _unescaped(next(text for text in texts if text is not None))
  if re.search(opening, string.sub("", body)):
    yield _Dropped(CUT_OFF)


def _without_letters(rows: list[str]) -> list[str]:
  """Lines without A., B., C. before them; a single "T. rex" keeps its own."""
  found = [match[1].lower() for row in rows if (match := _LETTER.match(row))]
  is_list = len(found) > 1 and found == list("abcdefghijklmnopqrstuvwxyz"[: len(found)])
  return [_LETTER.sub("", row, count=1) for row in rows] if is_list else rows


def _unescaped(text: str) -> str:
  of_json = {"\\'": "'", '"': '\\"'}  # from Python
  try:
    return json.loads(f'"{_ESCAPES.sub(lambda found: of_json.get(found[0], found[0]), text)}"')
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
