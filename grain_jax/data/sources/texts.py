"""Captions among the columns of a data set or the keys of an image's JSON, by their usual names.

The one that came with the image first, then what models wrote (`DREAMLIP`: in the order of the
published columns). A list of texts is so many captions, but where its name says that it is a long
text split into sentences (DreamLIP's and FLAIR's columns), it is one caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Of the caption that came with the image: the first that holds a text.
ORIGINAL = ("caption", "captions", "raw_caption", "text", "TEXT", "txt", "sentences", "title")
DREAMLIP = (
  "shortIB_captions", "longIB_captions", "shortSV_captions", "longSV_captions",
  "shortLLA_captions", "longLLA_captions",
)  # fmt: skip
_LONG = re.compile(r"raw_caption|(short|long)\w*_captions?")
_END_OF_TEXT = "</s>"  # that some describers left


def find_names(names: Iterable[str]) -> list[str]:
  """Those of some columns that hold captions, the original's first; [] where none does."""
  names = list(names)
  originals = [name for name in ORIGINAL if name in names]
  others = [name for name in names if _LONG.fullmatch(name) and name not in ORIGINAL]
  order = {name: i for i, name in enumerate(DREAMLIP)}
  return originals + sorted(others, key=lambda name: order.get(name, len(order)))


def captions(
  values: Mapping[str, Any], *, names: Sequence[str] = (), long: Sequence[str] = ()
) -> list[Any]:
  """The captions of an image; what is no text stays among them, for `records.check` to count.

  Args:
    values: of one image, by column or key.
    names: of those that are captions, in their order; empty: by their usual names.
    long: further names whose lists are the sentences of one text.
  """
  if names:
    return [text for name in names for text in texts(name, values.get(name), long=long)]
  found: list[Any] = []
  original: list[Any] = []
  for name in find_names(values):
    own = texts(name, values[name], long=long)
    if name not in ORIGINAL:
      found += own
    elif not any(isinstance(text, str) and text.strip() for text in original):
      original = own or original
  return original + found


def texts(name: str, value: Any, *, long: Sequence[str] = ()) -> list[Any]:
  """The captions that one column or key holds: none, one, or one for each item of a list."""
  if value is None:
    return []
  if not isinstance(value, (list, tuple)):
    return [_clean(value)]
  if not (name in long or _LONG.fullmatch(name)):
    return [_clean(text) for text in value]
  if not all(isinstance(text, str) for text in value):
    return [value]
  return [join_sentences(value)] if value else []


def join_sentences(sentences: Iterable[str]) -> str:
  """Sentences as one text; between two of them stands a full stop where there is no other sign."""
  joined = ""
  for sentence in filter(None, (_clean(text) for text in sentences)):
    if joined:
      joined += " " if re.search(r"""[.!?…。！？:;,]["'”’)\]]*$""", joined) else ". "
    joined += sentence
  return joined


def _clean(text: Any) -> Any:
  if isinstance(text, str) and _END_OF_TEXT in text:
    text = text.replace(_END_OF_TEXT, " ")
  return text.strip() if isinstance(text, str) else text
