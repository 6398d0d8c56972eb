"""Words of a scene: descriptions, captions in two wordings, descriptors of a class.

Whatever a description says stands word for word in both captions, so a model that sees captions
alone is told as much as one that sees regions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# (ymin, xmin, ymax, xmax) as fractions of the image.
Box = Sequence[float]

INTROS = ("", "a photo of ", "a picture of ", "there is ", "{count}: ")
COUNTS = ("no objects", "one object", "two objects", "three objects", "four objects")
COUNTS += ("five objects", "six objects", "seven objects", "eight objects")
RELATIONS = {
  "left": ("left of", "to the left of"),
  "right": ("right of", "to the right of"),
  "above": ("above",),
  "below": ("below",),
  "near": ("next to",),
}
RELATION_MARGIN = 0.15  # least distance of centres along the axis of a relation


def with_article(phrase: str) -> str:
  """ "green apple" -> "a green apple", "orange cat" -> "an orange cat"; plurals stay bare."""
  if re.search("([^suia]|ski|maraca)s$", phrase):
    return phrase
  return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(name: str, color: str, size: str = "") -> str:
  """Description of an object: "a small green apple"; `size` may be empty."""
  return with_article(" ".join(word for word in (size, color, name) if word))


def enumerate_phrases(phrases: Sequence[str]) -> str:
  """["a", "b", "c"] -> "a, b and c"."""
  if len(phrases) < 2:
    return "".join(phrases)
  return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def relation_of(a: Box, b: Box) -> str:
  """The key of `RELATIONS` that places the centre of `a` against that of `b`."""
  dx, dy = ((a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (1, 0))
  if max(abs(dx), abs(dy)) < RELATION_MARGIN:
    return "near"
  if abs(dx) > abs(dy):
    return "left" if dx < 0 else "right"
  return "above" if dy < 0 else "below"


def position_of(box: Box) -> str:
  """Where in the image the centre of `box` lies: "in the middle", "on the left", ..."""
  x, y = (box[1] + box[3]) / 2, (box[0] + box[2]) / 2
  column = "left" if x < 0.4 else "right" if x > 0.6 else ""
  row = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
  if row and column:
    return f"at the {row} {column}"
  return f"on the {column}" if column else f"at the {row}" if row else "in the middle"


def captions(
  descriptions: Sequence[str],
  boxes: Sequence[Box],
  kinds: Sequence[str],
  *,
  choose: Callable[[int], int],
) -> list[str]:
  """Two captions in different wording; the first says where something is.

  Args:
    descriptions: of the objects, one or more.
    boxes: of the objects.
    kinds: categories of the objects, such as "fruit".
    choose: n -> random integer in [0, n).
  """
  count = len(descriptions)
  order = list(range(count))
  for i in range(count - 1, 0, -1):
    j = choose(i + 1)
    order[i], order[j] = order[j], order[i]
  words = [descriptions[i] for i in order]
  if count == 1:
    placed = f"{words[0]} {position_of(boxes[0])}"
    if choose(5) == 0:
      return [placed, f"{words[0]}, a kind of {kinds[0]}"]
  else:
    options = RELATIONS[relation_of(boxes[order[0]], boxes[order[1]])]
    verb = ("", "is ")[choose(2)]
    placed = f"{words[0]} {verb}{options[choose(len(options))]} {words[1]}"
    if count > 2:
      placed += (", with ", ", also ")[choose(2)] + enumerate_phrases(words[2:])
  shift = choose(count)
  listed = enumerate_phrases(words[shift:] + words[:shift])
  intro = INTROS[choose(len(INTROS))].format(count=COUNTS[count])
  return [placed, intro + listed]


def descriptors(name: str, color: str, kind: str) -> list[str]:
  """Short phrases that hold of a class, in words that captions use (Menon and Vondrick, 2023)."""
  return [f"a kind of {kind}", describe(name, color, "small"), describe(name, color, "large")]
