"""ARO: attribution, relation and order (Yuksekgonul et al., ICLR 2023, arXiv 2210.01936).

Annotations and protocol are those of github.com/mertyg/vision-language-models-are-bows (MIT):
images are cropped to the box around the two objects, relations are averaged over those that are
neither symmetric nor rare, attributes over pairs with 25 items or more.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Callable, Sequence

from grain_jax.evals.composition import Crop, Item, Verdicts, by_kind
from grain_jax.evals.inputs import annotations
from grain_jax.evals.inputs.annotations import field
from grain_jax.evals.inputs.options import Options, find

GET = (
  "Get visual_genome_relation.json, visual_genome_attribution.json and the pictures "
  "(vgr_vga_images.zip) as github.com/mertyg/vision-language-models-are-bows says, into DIR/aro."
)
LEAST_ITEMS = 25  # of a pair of attributes that counts in the macro average
MAX_WORDS = 30  # of a caption in the order sets
# Relations that the macro average leaves out, as the notebook of ARO names them: symmetric or rare.
_LEFT_OUT = """
adjusting, attached to, between, bigger than, biting, boarding, brushing, chewing, cleaning,
climbing, close to, coming from, coming out of, contain, crossing, dragging, draped over,
drinking, drinking from, driving, driving down, driving on, eating from, eating in, enclosing,
exiting, facing, filled with, floating in, floating on, flying, flying above, flying in,
flying over, flying through, full of, going down, going into, going through, grazing in,
growing in, growing on, guiding, hanging from, hanging in, hanging off, hanging over,
higher than, holding onto, hugging, in between, jumping off, jumping on, jumping over, kept in,
larger than, leading, leaning over, leaving, licking, longer than, looking in, looking into,
looking out, looking over, looking through, lying next to, lying on top of, making, mixed with,
mounted on, moving, on the back of, on the edge of, on the front of, on the other side of,
opening, painted on, parked at, parked beside, parked by, parked in, parked in front of,
parked near, parked next to, perched on, petting, piled on, playing, playing in, playing on,
playing with, pouring, reaching for, reading, reflected on, riding on, running in, running on,
running through, seen through, sitting behind, sitting beside, sitting by, sitting in front of,
sitting near, sitting next to, sitting under, skiing down, skiing on, sleeping in, sleeping on,
smiling at, sniffing, splashing, sprinkled on, stacked on, standing against, standing around,
standing behind, standing beside, standing in front of, standing near, standing next to,
staring at, stuck in, surrounding, swimming in, swinging, talking to, topped with, touching,
traveling down, traveling on, tying, typing on, underneath, wading in, waiting for,
walking across, walking by, walking down, walking next to, walking through, working in,
working on, worn on, wrapped around, wrapped in, by, of, near, next to, with, beside,
on the side of, around
"""
LEFT_OUT = frozenset(re.split(r",\s+", _LEFT_OUT.strip()))


def read_relation(options: Options, what: str) -> list[Item]:
  """Items of visual_genome_relation.json; their kind is the relation."""
  return _read_visual_genome(
    options, "relation", what, lambda entry, where: field(entry, "relation_name", str, where)
  )


def read_attribution(options: Options, what: str) -> list[Item]:
  """Items of visual_genome_attribution.json; their kind is the pair of attributes."""

  def kind(entry: dict, where: str) -> str:
    pair = annotations.texts(entry, "attributes", where)
    if len(pair) != 2:
      raise ValueError(f"{where}: attributes = {list(pair)}: two are needed. Is it the right file?")
    return "_".join(pair)

  return _read_visual_genome(options, "attribution", what, kind)


def relation_results(items: Sequence[Item], verdicts: Verdicts) -> dict[str, float | int]:
  """`macro` over the relations that are not left out, `micro` over all items, `relations`."""
  return _macro(items, verdicts, "relations", lambda kind, _: kind not in LEFT_OUT)


def attribution_results(items: Sequence[Item], verdicts: Verdicts) -> dict[str, float | int]:
  """`macro` over pairs with `LEAST_ITEMS` items or more, `micro` over all items, `pairs`."""
  return _macro(items, verdicts, "pairs", lambda _, examples: examples >= LEAST_ITEMS)


def order_reader(dataset: str) -> Callable[[Options, str], list[Item]]:
  """Reads the order set of "coco" or "flickr30k".

  The published sets shuffle each caption in four ways, two of which need a tagger: nouns and
  adjectives, all but those, words within trigrams, trigrams. With them at hand, put
  ROOT/aro/{dataset}_order.json, a list of {"image": file name, "caption": text, "perturbations":
  [text, ...]}: its items are of kind 'given'. Without that file the last two are made of
  Karpathy's test split; those items are of kind 'trigrams', and easier.
  """

  def read(options: Options, what: str) -> list[Item]:
    given = options.root / "aro" / f"{dataset}_order.json" if options.root else None
    if given is None or not given.exists():
      return [
        Item(captioned.image, (clean(caption),), false, "trigrams")
        for captioned in annotations.karpathy(options, dataset, what)
        for caption in captioned.captions
        if (false := trigram_perturbations(caption))
      ]
    assert options.root is not None
    items = []
    for where, entry in annotations.entries(annotations.read_json(given), given):
      name = pathlib.PurePosixPath(field(entry, "image", str, where)).name
      image = options.root / "flickr30k" / "images" / name
      if dataset == "coco":
        image = annotations.coco_2014(options.root, name)
      caption = field(entry, "caption", str, where)
      false = tuple(
        text for text in annotations.texts(entry, "perturbations", where) if text != caption
      )
      if false:  # a shuffle of equal words changes nothing
        items.append(Item(image, (caption,), false, "given"))
    return items

  return read


def order_results(items: Sequence[Item], verdicts: Verdicts) -> dict[str, float | int]:
  """`accuracy` of items of kind 'given', or `accuracy_trigrams` of those made here."""
  results: dict[str, float | int] = {}
  for kind, score in by_kind([item.kind for item in items], verdicts).items():
    results["accuracy" if kind == "given" else f"accuracy_{kind}"] = score.accuracy
  results["perturbations"] = max(len(item.false) for item in items)
  return results


def clean(caption: str) -> str:
  """A caption as the order sets spell it: lower case, no .!"()*#:;~, at most 30 words."""
  return " ".join(re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()[:MAX_WORDS])


def trigram_perturbations(caption: str) -> tuple[str, ...]:
  """The caption with its trigrams shuffled, and with the words within each trigram shuffled.

  Words are what white space separates after `clean`; the published code splits with NLTK, before
  it. Which order comes out follows from the caption alone. A shuffle that leaves the caption as it
  is is tried again, and left out where there is no other.
  """
  words = clean(caption).split()
  trigrams = [words[i : i + 3] for i in range(0, len(words), 3)]
  found = []
  for way in ("trigrams", "within"):
    for attempt in range(20):
      key = f"{way} {attempt} {' '.join(words)}"
      if way == "trigrams":
        shuffled = _shuffle(trigrams, key)
      else:
        shuffled = [_shuffle(trigram, f"{key} {i}") for i, trigram in enumerate(trigrams)]
      text = " ".join(word for trigram in shuffled for word in trigram)
      if text != " ".join(words):
        found.append(text)
        break
  return tuple(dict.fromkeys(found))


def _shuffle(values: Sequence, key: str) -> list:
  """In the order of a hash: the same on every machine and in every version."""
  digests = [hashlib.blake2b(f"{key} {i}".encode()).digest() for i in range(len(values))]
  return [values[i] for i in sorted(range(len(values)), key=digests.__getitem__)]


def _read_visual_genome(
  options: Options, part: str, what: str, kind: Callable[[dict, str], str]
) -> list[Item]:
  path = find(options, "aro", f"visual_genome_{part}.json", what=what, how=GET)
  items = []
  for where, entry in annotations.entries(annotations.read_json(path), path):
    x, y, width, height = (field(entry, f"bbox_{k}", (int, float), where) for k in "xywh")
    if width < 1 or height < 1:
      raise ValueError(f"{where}: a box of {width} x {height} pixels shows nothing. Mend it.")
    image = path.parent / "images" / field(entry, "image_path", str, where)
    true, false = (field(entry, f"{side}_caption", str, where) for side in ("true", "false"))
    crop = Crop(image, (x, y, x + width, y + height))
    items.append(Item(crop, (true,), (false,), kind(entry, where)))
  return items


def _macro(
  items: Sequence[Item], verdicts: Verdicts, name: str, keep: Callable[[str, int], bool]
) -> dict[str, float | int]:
  scores = by_kind([item.kind for item in items], verdicts)
  kept = [s.accuracy for kind, s in scores.items() if s.examples and keep(kind, s.examples)]
  results: dict[str, float | int] = {"micro": float(verdicts.correct[verdicts.counted].mean())}
  if kept:
    results["macro"] = sum(kept) / len(kept)
  results[name] = len(kept)
  return results
