"""Composition: is an image's true caption nearer to it than captions made false on purpose?

An item is right if every true caption scores strictly above every false one. A tie is wrong, so a
model that embeds everything alike gets 0, not the half that an order of comparison would give it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from grain_jax.data import false_captions
from grain_jax.data.scenes import texts as scene_texts
from grain_jax.evals import retrieval
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders

# Colours of `data.scenes`.
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "gray")
KINDS = ("swap_att", "replace_att", "swap_obj")  # of `from_captions`


class Crop(NamedTuple):
  """A crop of an image. Beyond the image's borders it is black."""

  path: pathlib.Path
  box: tuple[float, float, float, float]  # left, upper, right, lower in pixels


@dataclasses.dataclass(frozen=True)
class Item:
  """An image with captions of which some hold and some do not."""

  image: pathlib.Path | Crop
  true: tuple[str, ...]  # one or more
  false: tuple[str, ...]  # one or more
  kind: str = ""  # what the item is counted under


class Verdicts(NamedTuple):
  """What became of N items."""

  correct: np.ndarray  # bool [N]; false where not counted
  counted: np.ndarray  # bool [N]: the image could be read


class Score(NamedTuple):
  """Items of one kind."""

  correct: int
  examples: int  # counted
  rows: int  # out of how many

  @property
  def accuracy(self) -> float:
    """correct / examples, in [0, 1]; NaN without examples."""
    return self.correct / self.examples if self.examples else float("nan")


def evaluate(
  encoders: Encoders,
  items: Sequence[Item],
  *,
  what: str,
  warn: Callable[[str], None] = print,
  texts_per_call: int = 8192,
) -> Verdicts:
  """Which items a model gets right. Each distinct image and each distinct text is encoded once.

  Held in memory: the embeddings of all images, of `texts_per_call` texts, and one score for each
  caption of an item.

  Args:
    encoders: of the model.
    items: N items, N >= 1. Those whose image cannot be read are not counted.
    what: name of the evaluation, for messages.
    warn: gets one line where images could not be read.
    texts_per_call: most texts handed to `encoders.text` at once.

  Raises:
    ValueError: an item without a true or a false caption, no image that can be read, embeddings
      that are not finite unit rows.
  """
  for i, item in enumerate(items):
    if not item.true or not item.false:
      raise ValueError(f"{what}: item {i} lacks a true or a false caption. Give at least one each.")
  order = {image: i for i, image in enumerate(dict.fromkeys(item.image for item in items))}
  opened = (_open(image, encoders.max_pixels) for image in order)
  encoded = retrieval.encode_images(encoders, opened, what=what, warn=warn)
  row = np.full(len(order), -1)
  row[encoded.index] = np.arange(len(encoded.index))
  own = row[[order[item.image] for item in items]]
  counted = own >= 0
  kept = [item for item, there in zip(items, counted, strict=True) if there]
  correct = np.zeros(len(items), bool)
  correct[counted] = judge(
    encoded.values,
    encoders.text,
    own[counted],
    [item.true for item in kept],
    [item.false for item in kept],
    texts_per_call=texts_per_call,
  )
  return Verdicts(correct, counted)


def judge(
  images: np.ndarray,
  encode_text: retrieval.EncodeText,
  own: np.ndarray,
  true: Sequence[Sequence[str]],
  false: Sequence[Sequence[str]],
  *,
  texts_per_call: int = 8192,
) -> np.ndarray:
  """Which of N items have min_t s(image, t) > max_f s(image, f), s the inner product.

  Args:
    images: embeddings, f32 [P, E].
    encode_text: texts -> embeddings.
    own: image of each item, i64 [N].
    true: true captions of each item.
    false: false captions of each item.
    texts_per_call: most texts encoded, and held, at once.

  Returns:
    bool [N].
  """
  texts: dict[str, int] = {}
  item, text, holds = [], [], []
  for i, sides in enumerate(zip(true, false, strict=True)):
    for side, captions in zip((True, False), sides, strict=True):
      for caption in captions:
        item.append(i)
        text.append(texts.setdefault(caption, len(texts)))
        holds.append(side)
  by_text = np.argsort(text, kind="stable")
  item_of, text_of = np.asarray(item, np.int64)[by_text], np.asarray(text, np.int64)[by_text]
  scores = np.empty(len(by_text), np.float32)
  names = list(texts)
  for start in range(0, len(names), texts_per_call):
    chunk = retrieval.encode_texts(encode_text, names[start : start + texts_per_call])
    first, end = np.searchsorted(text_of, (start, start + len(chunk)))
    for low in range(first, end, texts_per_call):
      part = slice(low, min(low + texts_per_call, end))
      # Row by row, so that equal embeddings get equal scores wherever they stand.
      products = images[own[item_of[part]]] * chunk[text_of[part] - start]
      scores[part] = products.sum(axis=1)
  worst_true, best_false = np.full(len(true), np.inf), np.full(len(true), -np.inf)
  held = np.asarray(holds, bool)[by_text]
  np.minimum.at(worst_true, item_of[held], scores[held])
  np.maximum.at(best_false, item_of[~held], scores[~held])
  return worst_true > best_false


def by_kind(kinds: Sequence[str], verdicts: Verdicts) -> dict[str, Score]:
  """The score of each kind, in the order of first appearance.

  Args:
    kinds: kind of each item, [N].
    verdicts: of the items.
  """
  names = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
  index = np.asarray([names[kind] for kind in kinds], np.int64)

  def count(mask: np.ndarray) -> list[int]:
    return np.bincount(index[mask], minlength=len(names)).tolist()

  every = np.ones(len(index), bool)
  totals = (count(verdicts.correct & verdicts.counted), count(verdicts.counted), count(every))
  return {name: Score(*numbers) for name, *numbers in zip(names, *totals, strict=True)}


def evaluate_built(
  encode_image: retrieval.EncodeImage,
  encode_text: retrieval.EncodeText,
  batches: retrieval.Batches,
  *,
  own_negatives: bool = False,
  texts_per_call: int = 8192,
) -> dict[str, float | int]:
  """Share of captions that score above the false ones which `from_captions` makes of them.

  Or, with `own_negatives`, above the false captions that the records have.

  Args:
    encode_image: images -> embeddings.
    encode_text: texts -> embeddings.
    batches: (batch, extras) with extras "captions" and "key", and "negatives" [(text, kind)] of
      each example where they are asked for; see `retrieval`.
    own_negatives: the records' false captions, each against the caption that it was made of (the
      nearest in words, of equally near ones the first), by their kinds.
    texts_per_call: most texts handed to `encode_text` at once.

  Returns:
    `composition/{kind}`: fractions in [0, 1], of `composition/{kind}/pairs` pairs of a caption and
    a false one; a kind without a pair has the count 0 and no fraction. `composition/average`: the
    mean of the kinds, if all have pairs (of `own_negatives`: of those there are, by their own
    names). `composition/images`: images with a pair;
    `composition/examples` of `composition/rows` rows counted.

  Raises:
    ValueError: no caption of which a false one can be made, or embeddings that are not finite
      unit rows.
  """
  images: list[np.ndarray] = []
  pairs: list[Pair] = []
  own: list[int] = []
  examples = rows = count = captions = 0
  for batch, extras in batches:
    keep = retrieval.counted_rows(batch, extras, ("captions",))
    rows += len(batch["example_mask"])
    examples += len(keep)
    captions += sum(len(extras["captions"][i]) for i in keep)
    made = {i: from_captions(extras["captions"][i]) for i in keep}
    if own_negatives:
      made = {i: _own(extras["captions"][i], extras["negatives"][i]) for i in keep}
    used = [i for i in keep if made[i]]
    if not used:
      continue
    encoded = np.asarray(encode_image(batch["image"]))
    retrieval.check_length(encoded, len(batch["image"]), name="encode_image")
    images.append(retrieval.check_embeddings(encoded[used], name="encode_image"))
    for i in used:
      pairs += made[i]
      own += [count] * len(made[i])
      count += 1
  if not count and own_negatives:
    raise ValueError(f"composition: none of the {rows} rows has a caption and a false one.")
  if not count:
    raise ValueError(
      f"composition: none of {captions} captions in {rows} rows names coloured objects as those of "
      "the scenes do ('a red apple above a blue cat'). Evaluate such a split, or leave it out."
    )
  correct = judge(
    np.concatenate(images),
    encode_text,
    np.asarray(own),
    [(pair.true,) for pair in pairs],
    [(pair.false,) for pair in pairs],
    texts_per_call=texts_per_call,
  )
  scores = by_kind([pair.kind for pair in pairs], Verdicts(correct, np.ones(len(pairs), bool)))
  results: dict[str, float | int] = {}
  for kind in sorted(scores) if own_negatives else KINDS:
    if kind in scores:
      results[f"composition/{kind}"] = scores[kind].accuracy
    results[f"composition/{kind}/pairs"] = scores[kind].examples if kind in scores else 0
  if own_negatives or len(scores) == len(KINDS):
    results["composition/average"] = sum(s.accuracy for s in scores.values()) / len(scores)
  results["composition/images"] = count
  results["composition/examples"] = examples
  results["composition/rows"] = rows
  return results


class Pair(NamedTuple):
  """A caption and a false one made of it."""

  kind: str  # one of `KINDS`
  true: str
  false: str


def _own(captions: Sequence[str], negatives: Sequence[tuple[str, str]]) -> list[Pair]:
  """The pairs of a record's false captions, each with the caption that it was made of."""
  if not captions:
    return []
  near = false_captions.nearest([false for false, _ in negatives], captions)
  return [
    Pair(kind or "negative", captions[found[0]], false)
    for (false, kind), found in zip(negatives, near, strict=True)
  ]


class _Phrase(NamedTuple):
  """An object in a caption: "a small red apple"."""

  start: int
  end: int
  article: bool
  size: str  # with the space after it, or ''
  color: str
  name: str

  def text(self) -> str:
    words = f"{self.size}{self.color} {self.name}"
    return (("an " if words[0] in "aeiou" else "a ") if self.article else "") + words


def from_captions(captions: Iterable[str], *, colors: Sequence[str] = COLORS) -> list[Pair]:
  """False captions of captions worded as those of `data.scenes`, at most one of each kind.

  * swap_att: two objects that differ in colour and in concept exchange their colours.
  * replace_att: an object gets a colour that stands nowhere in the caption.
  * swap_obj: two objects that differ in colour and in concept exchange their concepts.

  "a small red apple above a blue cat" gives "a small blue apple above a red cat", "a small red
  apple above a gray cat" and "a small red cat above a blue apple". Which objects and which colour
  follows from the caption alone. A scene's caption names all its objects, so these are false of its
  image. A caption with a colour that belongs to no object gives nothing.

  Args:
    captions: of one image, or of many.
    colors: words for colours.

  Returns:
    Pairs in the order of the captions, and within a caption of `KINDS`.
  """
  pairs = []
  for caption in captions:
    phrases = _parse(caption, tuple(colors))
    if not phrases:
      continue
    draw = zlib.crc32(caption.encode())
    differ = [
      (i, j)
      for i, a in enumerate(phrases)
      for j, b in enumerate(phrases[:i])
      if a.color != b.color and a.name != b.name
    ]
    made: dict[str, dict[int, _Phrase]] = {}  # kind -> the phrases that change
    if differ:
      i, j = differ[draw % len(differ)]
      a, b = phrases[i], phrases[j]
      made["swap_att"] = {i: a._replace(color=b.color), j: b._replace(color=a.color)}
    free = [color for color in colors if not re.search(rf"\b{re.escape(color)}\b", caption)]
    if free:
      k = draw % len(phrases)
      made["replace_att"] = {k: phrases[k]._replace(color=free[draw // len(phrases) % len(free)])}
    if differ:
      made["swap_obj"] = {
        i: a._replace(name=b.name, article=b.article),
        j: b._replace(name=a.name, article=a.article),
      }
    pairs += [Pair(kind, caption, _rewrite(caption, phrases, new)) for kind, new in made.items()]
  return pairs


def _parse(caption: str, colors: tuple[str, ...]) -> list[_Phrase]:
  """The objects of a caption; none where a colour stands outside them."""
  color = "|".join(map(re.escape, colors))
  begin = rf"(?P<article>an? )?(?P<size>(?:small|large) )?(?P<color>{color}) "
  another = rf"(?:an? )?(?:(?:small|large) )?(?:{color}) "
  relations = "|".join(text for texts in scene_texts.RELATIONS.values() for text in texts)
  places = r"in the middle|on the (?:left|right)|at the (?:top|bottom)(?: left| right)?"
  end = rf"(?=$|,| and {another}| (?:is )?(?:{relations}) {another}| (?:{places})$)"
  found = [
    _Phrase(
      match.start(),
      match.end(),
      bool(match["article"]),
      match["size"] or "",
      match["color"],
      match["name"],
    )
    for match in re.finditer(rf"\b{begin}(?P<name>(?:(?!\b(?:{color})\b)[^,])+?){end}", caption)
  ]
  return found if len(found) == len(re.findall(rf"\b(?:{color})\b", caption)) else []


def _rewrite(caption: str, phrases: Sequence[_Phrase], changed: dict[int, _Phrase]) -> str:
  """`caption` with some of its phrases changed."""
  pieces, last = [], 0
  for i, phrase in enumerate(phrases):
    pieces += [caption[last : phrase.start], changed.get(i, phrase).text()]
    last = phrase.end
  return "".join(pieces) + caption[last:]


def _open(image: pathlib.Path | Crop, max_pixels: int) -> pathlib.Path | Image.Image:
  """What `images` reads; a crop whose image cannot be read is left to it to be counted."""
  if not isinstance(image, Crop):
    return image
  try:
    return images_lib.open_image(image.path, max_pixels=max_pixels).crop(image.box)
  except ValueError:
    return image.path
