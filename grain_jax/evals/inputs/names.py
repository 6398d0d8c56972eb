"""Names of classes, as one file or folder spells them and another one: which mean the same.

Spellings differ in case, underscores, hyphens, white space, forms of accents (macOS writes them as
characters of their own), and in what a bracket adds: "lock_chamber (canal)", "lock chamber".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

# Names of ImageNet's classes that were mended after descriptors of them had been published.
FORMERLY = {"newt": "eft", "tights": "maillot"}
_BRACKETS = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")


def nfc(name: str) -> str:
  """One form of accents."""
  return unicodedata.normalize("NFC", name)


def spell(name: str) -> str:
  """A name without what spellings differ in: "British_Shorthair" -> "british shorthair"."""
  return " ".join(re.findall(r"[^\W_]+", nfc(nfc(name).casefold())))


def bare(name: str) -> str:
  """The spelling without what stands in brackets: "arcade (passageway)" -> "arcade"."""
  return spell(_BRACKETS.sub(" ", nfc(name)))


def _words(name: str) -> str:
  """As `spell`, with signs kept: "C++" and "C#" are two."""
  return " ".join(nfc(nfc(name).casefold()).replace("_", " ").split())


def find_keys(keys: Sequence[str], classes: Sequence[Sequence[str]]) -> list[str | None]:
  """The key that means each class; None where there is none.

  The first of these that finds one: the name itself; the same words; the same spelling; and, of
  keys and classes that are left over by then, a name of `FORMERLY` or the spelling without brackets
  where it means one key and one class alone.

  Args:
    keys: different names.
    classes: the names of each class, the better ones first.

  Raises:
    ValueError: two keys mean one class, and neither is better; one line.
  """
  exact = set(keys)
  found = [next((name for name in own if name in exact), None) for own in classes]
  for form in (_words, spell):
    index = _index(keys, form)
    for i, own in enumerate(classes):
      if found[i] is None:
        candidates = next((index[f] for f in map(form, own) if f and f in index), [None])
        if len(candidates) > 1:
          raise ValueError(
            f"{' and '.join(map(repr, candidates))} both mean class {own[0]!r}. Leave one of them."
          )
        found[i] = candidates[0]
  left = _without(keys, found)
  lacking = [i for i, key in enumerate(found) if key is None]
  former = _index(left, spell)
  for i in lacking:
    names = (FORMERLY.get(spell(name)) for name in classes[i])
    found[i] = next((former[name][0] for name in names if name in former), None)
  index = _index(_without(left, found), bare)
  meant: dict[str, set[str]] = {}
  for i in lacking:
    for form in {bare(name) for name in classes[i]}:
      meant.setdefault(form, set()).add(spell(classes[i][0]))
  for i in lacking:
    if found[i] is None:
      forms = [f for f in map(bare, classes[i]) if f and len(meant[f]) == 1]
      found[i] = next((index[f][0] for f in forms if len(index.get(f, ())) == 1), None)
  return found


def _without(keys: Sequence[str], used: Iterable[str | None]) -> list[str]:
  gone = set(used)
  return [key for key in keys if key not in gone]


def _index(keys: Sequence[str], form: Callable[[str], str]) -> dict[str, list[str]]:
  index: dict[str, list[str]] = {}
  for key in keys:
    index.setdefault(form(key), []).append(key)
  return index
