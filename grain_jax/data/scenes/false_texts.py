"""False texts of a scene, from its structure: one thing exchanged, all else as it is.

The kinds are CE-CLIP's (arXiv 2306.08832): the place (relation), the colour (attribute), the thing
(object). Nothing happens in a scene, so there is no false action. Colours and things of a caption
are half of the time exchanged between two that it names, as NegCLIP has it: a model can tell what
is nowhere in the image without knowing what belongs together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

import numpy as np

from grain_jax.data.scenes import texts

Choose = Callable[[int], int]  # n -> random integer in [0, n)
_POSITIONS = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
_POSITIONS += tuple(
  f"at the {row} {side}" for row in ("top", "bottom") for side in ("left", "right")
)


def of_description(
  thing: tuple[str, str],
  *,
  description: str,
  present: set[tuple[str, str]],
  barred: Collection[tuple[str, str]] = (),
  colors: Sequence[str],
  names: Sequence[str],
  choose: Choose,
) -> dict[str, str]:
  """{'attribute': another colour, 'object': another thing} in the place of a description's own.

  Args:
    thing: (colour, name) of what is described.
    description: as `texts.describe` made it.
    present: (colour, name) of all that the scene holds: none of it is used.
    barred: (colour, name) pairs that are not used either. Of pairs that no image shows a model that
      is trained on such texts would learn that they are always false.
    colors: to choose from.
    names: to choose from.
    choose: random.
  """
  color, name = thing
  size = _size(description)
  others = [c for c in colors if c != color and (c, name) not in {*present, *barred}]
  there = {p for _, p in present}
  things = [n for n in names if n not in there and (color, n) not in barred]
  found = {}
  if others:
    found["attribute"] = texts.describe(name, others[choose(len(others))], size)
  if things:
    found["object"] = texts.describe(things[choose(len(things))], color, size)
  return found


def of_caption(
  caption: str,
  things: Sequence[tuple[str, str]],
  descriptions: Sequence[str],
  boxes: Sequence[texts.Box],
  *,
  barred: Collection[tuple[str, str]] = (),
  colors: Sequence[str],
  names: Sequence[str],
  choose: Choose,
) -> list[dict[str, str]]:
  """[{'caption', 'kind'}] of the caption that says where something is (the first of a scene).

  The caption names all things, by their descriptions.
  """
  found = []
  if (moved := _moved(caption, descriptions, boxes, choose)) is not None:
    found.append({"caption": moved, "kind": "relation"})
  index = choose(len(things))
  false = of_description(
    things[index], description=descriptions[index], present=set(things), barred=barred,
    colors=colors, names=names, choose=choose,
  )  # fmt: skip
  for kind, phrase in false.items():
    text = _replace(caption, descriptions[index], phrase)
    exchanged = _exchanged(kind, caption, things, descriptions, barred=barred, choose=choose)
    if exchanged and choose(2):
      text = exchanged
    found.append({"caption": text, "kind": kind})
  return [entry for entry in found if entry["caption"] != caption]


def _exchanged(
  kind: str,
  caption: str,
  things: Sequence[tuple[str, str]],
  descriptions: Sequence[str],
  *,
  barred: Collection[tuple[str, str]],
  choose: Choose,
) -> str | None:
  """The caption with the colours, or the things, of two descriptions exchanged; None: of no two."""
  pairs = []
  for j, (color_b, name_b) in enumerate(things):
    for i, (color_a, name_a) in enumerate(things[:j]):
      a, b = descriptions[i], descriptions[j]
      differ = color_a != color_b and name_a != name_b and a not in b and b not in a
      if differ and not {(color_a, name_b), (color_b, name_a)} & {*barred, *things}:
        pairs.append((i, j))
  if not pairs:
    return None
  i, j = pairs[choose(len(pairs))]
  (color_a, name_a), (color_b, name_b) = things[i], things[j]
  if kind == "attribute":
    color_a, color_b = color_b, color_a
  else:
    name_a, name_b = name_b, name_a
  text = _replace(caption, descriptions[i], "\0")
  text = _replace(text, descriptions[j], texts.describe(name_b, color_b, _size(descriptions[j])))
  return text.replace("\0", texts.describe(name_a, color_a, _size(descriptions[i])), 1)


def _find(caption: str, phrase: str) -> re.Match[str] | None:
  """Where a phrase first stands as whole words: "a gray car" is not in "a gray carrot"."""
  return re.search(rf"\b{re.escape(phrase)}\b", caption)


def _replace(caption: str, phrase: str, other: str) -> str:
  found = _find(caption, phrase)
  return caption if found is None else caption[: found.start()] + other + caption[found.end() :]


def _size(description: str) -> str:
  return next((s for s in ("small", "large") if f" {s} " in f" {description} "), "")


def _moved(
  caption: str, descriptions: Sequence[str], boxes: Sequence[texts.Box], choose: Choose
) -> str | None:
  """The caption with the first two things in each other's place, or one thing in another.

  None where that would not be false: of two things next to each other, or equal ones.
  """
  if len(descriptions) == 1:
    here = texts.position_of(boxes[0])
    others = [p for p in _POSITIONS if p != here]
    return caption.replace(here, others[choose(len(others))], 1) if here in caption else None
  places = {i: found.start() for i, d in enumerate(descriptions) if (found := _find(caption, d))}
  first, second = sorted(places, key=places.__getitem__)[:2]
  a, b = descriptions[first], descriptions[second]
  if a == b or a in b or b in a or texts.relation_of(boxes[first], boxes[second]) == "near":
    return None
  start, end = places[first], places[second]
  between = caption[start + len(a) : end]
  return caption[:start] + b + between + a + caption[end + len(b) :]


def of_scene(
  things: Sequence[tuple[str, str]],
  *,
  caption: str,
  descriptions: Sequence[str],
  boxes: Sequence[texts.Box],
  barred: Collection[tuple[str, str]] = (),
  colors: Sequence[str],
  names: Sequence[str],
  rng: np.random.Generator | None,
) -> tuple[list[dict[str, str]], list[list[str]]]:
  """(false captions with their kinds, false descriptions of each thing); none without `rng`.

  Args:
    things: (colour, name) of each.
    caption: the one that says where something is.
    descriptions: of the things.
    boxes: of the things.
    barred: (colour, name) pairs that no false text names.
    colors: that there are.
    names: of things that there are.
    rng: random numbers.
  """
  if rng is None:
    return [], [[] for _ in descriptions]
  options = {
    "barred": barred, "colors": colors, "names": names, "choose": lambda n: int(rng.random() * n),
  }  # fmt: skip
  of_things = []
  for thing, description in zip(things, descriptions, strict=True):
    drawn = [
      text
      for _ in range(2)
      for text in of_description(
        thing, description=description, present=set(things), **options
      ).values()
    ]
    of_things.append(list(dict.fromkeys(drawn)))
  return of_caption(caption, things, descriptions, boxes, **options), of_things
