"""Rules of words for false texts: which may be changed, into what, and which phrases exchanged.

They see a text as spaCy tagged it (`Doc`), and change whole words at their places alone.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Collection
from typing import Any, NamedTuple

# Kind -> part of speech of the word that it changes.
POS = {"attribute": "ADJ", "object": "NOUN", "action": "VERB"}
# Kind -> why there is no negative of it.
NO_WORD = {"attribute": "no_adjective", "object": "no_noun", "action": "no_verb"}
NO_TWO_NOUNS = "no_two_nouns"
NO_RELATION = "no_relation_between_nouns"


def _words(text: str) -> frozenset[str]:
  return frozenset(text.split())


# True of nearly every picture, or not of what is in it: neither changed nor put in.
_GENERIC = _words(
  "one ones thing things something object objects item items animal animals person people someone "
  "image images picture pictures photo photos photograph photographs view views scene shot stuff "
  "other others another same different various several many few more own real such certain first "
  "last next visible seen shown show shows showing depicted pictured featuring be is are was were "
  "being been have has had having do does did get gets got make makes made see sees appear appears "
  "seem seems including"
)
# Families of adjectives that exclude each other; words of one group mean the same. An adjective of
# a family is changed into one of another group of it: "a big dog" is not false of a brown dog.
_FAMILIES = tuple(
  {word: number for number, group in enumerate(family.split(",")) for word in group.split()}
  for family in (
    "red crimson scarlet,blue navy,green,yellow golden,orange,purple violet,pink,brown tan beige,"
    "black,white,grey gray silver,turquoise teal cyan",
    "big large huge enormous giant massive,small little tiny miniature",
    "tall high,short low",
    "long,short",
    "wide broad,narrow",
    "thick,thin",
    "old elderly aged ancient,young new modern",
    "wooden,metal metallic,plastic,glass,concrete,leather,stone,brick,paper,ceramic",
    "round circular,square,rectangular,triangular,oval",
    "open,closed shut",
    "wet,dry",
    "clean,dirty",
    "full,empty",
    "happy,sad,angry",
    "bright light,dark dim",
    "hot warm,cold cool",
    "male,female",
    "sunny,cloudy,rainy,snowy",
  )
)
# Between two nouns these say the same both ways: "a dog near a cat".
_SYMMETRIC = _words(
  "and or nor & of with near nearby next to beside besides alongside by along around opposite "
  "versus like resembling facing meeting touching adjacent is are was were"
)
# Words that say where: neither changed nor exchanged, but between two nouns a direction.
_PLACES = _words(
  "left right top bottom front back side sides middle center centre corner edge background "
  "foreground end inside outside"
)
_UNTOUCHED = _GENERIC | _PLACES
_ENDS = frozenset(".!?;:")
_POSSESSIVES = _words("my your his her its our their")
_JOINERS = frozenset(("'s", "’s", "'", "’"))
_IN_PHRASE = frozenset(("DET", "ADJ", "NUM", "NOUN", "PROPN"))
_VOWELS = frozenset("aeiou")
# Words that sound otherwise than they are written: "a uniform", "an hour".
_AS_CONSONANT = re.compile(
  r"uni(?!n|m|d)|us[aeu]|ut[ei]|ub[io]|uk|ur(?:an|et|in)|eu|ew|once$|ones?$"
)
_AS_VOWEL = re.compile(r"hour|honou?r|honest|heir")


class Target(NamedTuple):
  """A word that may be changed."""

  index: int  # of the token
  start: int  # in characters
  end: int
  word: str
  pos: str
  tag: str
  lemma: str


def targets(doc: Any, kind: str) -> list[Target]:
  """The whole words of a kind's part of speech, in their order."""
  return [
    Target(t.i, t.idx, t.idx + len(t.text), t.text, t.pos_, t.tag_, t.lemma_)
    for t in doc
    if t.pos_ == POS[kind]
    and _is_word(t.text)
    and t.text.casefold() not in _UNTOUCHED
    and is_whole(doc.text, t.idx, t.idx + len(t.text))
  ]


def is_whole(text: str, start: int, end: int) -> bool:
  """Whether no letter, digit or hyphen touches a stretch of a text."""
  return not (start and _joins(text[start - 1]) or end < len(text) and _joins(text[end]))


def _joins(character: str) -> bool:
  return unicodedata.category(character)[0] in "LNM" or character in "-_‐‑"


def _is_word(word: str) -> bool:
  return len(word) > 1 and word.isalpha()


def fill(text: str, target: Target, word: str) -> str:
  """The text with a word in the place of another, in the other's case."""
  old = target.word
  if old.isupper():
    word = word.upper()
  elif old[0].isupper():
    word = word[:1].upper() + word[1:]
  return text[: target.start] + word + text[target.end :]


def words_of(doc: Any) -> frozenset[str]:
  """The words of a text, casefolded."""
  return frozenset(token.text.casefold() for token in doc)


def may_replace(
  doc: Any,
  target: Target,
  word: str,
  *,
  kind: str,
  there: Collection[str],
  known: Collection[str] = (),
) -> bool:
  """Whether a word may stand in the place of another, as far as can be said without tags.

  Args:
    doc: the text.
    target: the word that goes.
    word: that comes.
    kind: of the negative.
    there: `words_of` the text.
    known: words, casefolded, that may be true of the picture, as may their other forms.
  """
  new, old = word.casefold(), target.word.casefold()
  if not _is_word(word) or new in _UNTOUCHED:
    return False
  if same_word(new, old):
    return False
  if any(not _stems(new).isdisjoint(_stems_of(frozenset(words))) for words in (there, known)):
    return False
  if kind == "attribute" and not _excludes(old, new):
    return False
  before = doc[target.index - 1].text.casefold() if target.index else ""
  return before not in ("a", "an") or _takes_an(new) == (before == "an")


def _takes_an(word: str) -> bool:
  """Whether a casefolded word begins with the sound of a vowel."""
  if _AS_VOWEL.match(word):
    return True
  return word[0] in _VOWELS and not _AS_CONSONANT.match(word)


def _excludes(old: str, new: str) -> bool:
  """Whether an adjective that is true makes another false, as far as the families tell."""
  families = [family for family in _FAMILIES if old in family]
  return not families or any(new in f and f[new] != f[old] for f in families)


def same_word(a: str, b: str) -> bool:
  """Whether two words, casefolded, are forms of one, by their endings: "dog" and "dogs"."""
  return a == b or not _stems(a).isdisjoint(_stems(b))


@functools.lru_cache(maxsize=100_000)
def _stems(word: str) -> frozenset[str]:
  """What a word may be a form of."""
  stems = {word}
  for ending in ("s", "es", "ed", "d", "ing", "er", "est", "ly", "'s", "r", "st"):
    stem = word.removesuffix(ending)
    if stem == word or len(stem) < 3:
      continue
    stems |= {stem, stem + "e"} if ending in ("ing", "ed", "er", "est") else {stem}
    if stem[-1] == stem[-2]:
      stems.add(stem[:-1])  # sit-t-ing
    if stem[-1] == "i":
      stems.add(stem[:-1] + "y")  # pupp-i-es
  if word.endswith("ves") and len(word) > 4:
    stems |= {word[:-3] + "f", word[:-3] + "fe"}
  return frozenset(stems | _IRREGULAR.get(word, set()))


@functools.lru_cache(maxsize=1000)
def _stems_of(words: frozenset[str]) -> frozenset[str]:
  """What any of the words of a picture may be a form of: asked for hundreds of proposals."""
  return frozenset().union(*map(_stems, words))


def _irregular() -> dict[str, set[str]]:
  groups = (
    "man men,woman women,child children,person people,foot feet,tooth teeth,goose geese,mouse mice,"
    "sit sat,stand stood,run ran,ride rode ridden,eat ate eaten,lie lay lying lain,hold held,"
    "wear wore worn,fly flew flown,go went gone,take took taken,sleep slept,drive drove driven,"
    "throw threw thrown,catch caught,swim swam swum,build built,hang hung,lead led,drink drank"
  )
  return {word: {g.split()[0]} for g in groups.split(",") for word in g.split()}


_IRREGULAR = _irregular()


def is_as_meant(before: Any, target: Target, after: Any) -> bool:
  """Whether a filled text, tagged, has the same words but one, of the same class and another lemma.

  Args:
    before: the text that was changed.
    target: the word in it that went.
    after: the changed text.
  """
  if len(before) != len(after):
    return False
  others = (i for i in range(len(before)) if i != target.index)
  if any(before[i].text != after[i].text for i in others):
    return False
  new = after[target.index]
  if new.pos_ != target.pos or (target.tag and new.tag_ != target.tag):
    return False
  lemmas = target.lemma.casefold(), new.lemma_.casefold()
  return not lemmas[0] or lemmas[0] != lemmas[1]


class Phrase(NamedTuple):
  """A noun phrase by its tags: determiner, adjectives, numbers, nouns, and what "of" adds to it."""

  first: int  # tokens
  last: int
  noun: int  # its head


def phrases(doc: Any) -> list[Phrase]:
  """The noun phrases of a text, in their order."""
  found: list[Phrase] = []
  start = noun = None
  for i in range(len(doc) + 1):
    token = doc[i] if i < len(doc) else None
    opens = token is not None and (
      token.pos_ == "DET" or token.tag_ == "PRP$" or token.text.casefold() in _POSSESSIVES
    )
    owner = token is not None and noun == i - 1 and noun is not None and token.text in _JOINERS
    inside = token is not None and (token.pos_ in _IN_PHRASE or opens or owner)
    if start is not None and (not inside or (opens and noun is not None)):
      if noun is not None:
        found.append(Phrase(start, noun, noun))
      start = noun = None
    if inside and start is None and not owner:
      start = i
    if inside and token.pos_ == "NOUN":
      noun = i
  joined: list[Phrase] = []
  for phrase in found:
    before = joined[-1] if joined else None
    if before is not None and _is_of(doc, before, phrase):
      joined[-1] = Phrase(before.first, phrase.last, before.noun)
    else:
      joined.append(phrase)
  return [p for p in joined if is_whole(doc.text, *_span(doc, p))]


def _is_of(doc: Any, a: Phrase, b: Phrase) -> bool:
  """Whether they are one: "a cup of coffee", but not "a photo of a dog"."""
  between = b.first == a.last + 2 and doc[a.last + 1].text.casefold() == "of"
  return between and _may_move(doc, a)


def _may_move(doc: Any, phrase: Phrase) -> bool:
  word = doc[phrase.noun].text.casefold()
  return _is_word(word) and not {word, _lemma(doc, phrase)} & _UNTOUCHED


def _lemma(doc: Any, phrase: Phrase) -> str:
  token = doc[phrase.noun]
  return (token.lemma_ or token.text).casefold()


def _span(doc: Any, phrase: Phrase) -> tuple[int, int]:
  last = doc[phrase.last]
  return doc[phrase.first].idx, last.idx + len(last.text)


def exchanges(doc: Any) -> tuple[list[str], str]:
  """(the text with two neighbouring noun phrases exchanged, for each pair; why there is none).

  Whole phrases, so that only the relation is false and articles stay right. The heads must be
  different words, none of them generic, and a relation that has a direction between them.
  """
  found = [phrase for phrase in phrases(doc) if _may_move(doc, phrase)]
  different = [(a, b) for a, b in zip(found, found[1:], strict=False) if _differ(doc, a, b)]
  if not different:
    return [], NO_TWO_NOUNS
  directed = [(a, b) for a, b in different if _has_direction(doc, a, b)]
  # Of the same number where there is a pair, else "a table are on dogs".
  same = [(a, b) for a, b in directed if doc[a.noun].tag_ == doc[b.noun].tag_]
  texts = [_exchange(doc, a, b) for a, b in same or directed]
  return texts, "" if texts else NO_RELATION


def _differ(doc: Any, a: Phrase, b: Phrase) -> bool:
  words = doc[a.noun].text.casefold(), doc[b.noun].text.casefold()
  return _lemma(doc, a) != _lemma(doc, b) and not same_word(*words)


def _has_direction(doc: Any, a: Phrase, b: Phrase) -> bool:
  between = [doc[i] for i in range(a.last + 1, b.first)]
  if any(t.text in _ENDS for t in between):
    return False
  return any(
    t.text.casefold() in _PLACES
    or (t.pos_ in ("VERB", "ADP", "ADV", "SCONJ") and t.text.casefold() not in _SYMMETRIC)
    for t in between
  )


def _exchange(doc: Any, a: Phrase, b: Phrase) -> str:
  text, (a0, a1), (b0, b1) = doc.text, _span(doc, a), _span(doc, b)
  first, second = text[a0:a1], text[b0:b1]
  opening = doc[a.first]
  if opening.text.istitle() and opening.pos_ != "PROPN" and not text[:a0].strip():
    first = first[0].lower() + first[1:]
    second = second[0].upper() + second[1:]
  return text[:a0] + second + text[a1:b0] + first + text[b1:]
