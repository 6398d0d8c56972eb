"""What is in a given box: its class among all, or its description among ones that are nearly right.

A box's embedding is made by one of `METHODS`:
crop     the image cut to the box, seen by the image encoder; any model can do it.
query    the region query whose box has the highest IoU with it; needs region queries.
patches  the mean of the patches whose centres lie in it (of the nearest one where there is none),
         normalised again; the image is seen once, whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from grain_jax.evals import grounding, retrieval
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs import instances
from grain_jax.evals.inputs.encoders import Encoders

METHODS = ("crop", "query", "patches")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
COLORS += ("black", "white", "gray", "grey")


class Annotated(NamedTuple):
  """An image and its boxes."""

  source: images_lib.Source
  boxes: np.ndarray  # (cx, cy, w, h) as fractions of the image, [R, 4]


class Block(NamedTuple):
  """Embeddings of some boxes."""

  index: np.ndarray  # of each box among those of all images, rising, i64 [n]
  values: np.ndarray  # f32 [n, E], L2-normalised


def methods(encoders: Encoders) -> tuple[str, ...]:
  """Those of `METHODS` that a model can do."""
  # The default of the field is the function that says so.
  has_patches = encoders.patches is not Encoders.patches
  able = {"crop": True, "query": encoders.has_regions, "patches": has_patches}
  return tuple(method for method in METHODS if able[method])


def embed(
  encoders: Encoders,
  method: str,
  annotated: Sequence[Annotated],
  *,
  what: str,
  unreadable: images_lib.Unreadable,
) -> Iterator[Block]:
  """Embeddings of the boxes of all images that can be read, a batch at a time.

  Args:
    encoders: of the model.
    method: one of `METHODS`.
    annotated: images with their boxes.
    what: name of the evaluation, for messages.
    unreadable: filled in on the way.

  Raises:
    ValueError: an unknown method, one that the model cannot do, or no image that can be read.
  """
  if method not in METHODS:
    raise ValueError(f"{what}: method {method!r} is unknown. Choose from {', '.join(METHODS)}.")
  if method == "query":
    encoders.require_regions(f"{what} by queries")
  if method == "crop":
    yield from _by_crop(encoders, annotated, what=what, unreadable=unreadable)
    return
  starts = np.cumsum([0] + [len(item.boxes) for item in annotated])
  files = [item.source for item in annotated]
  of_batch = _query_embeddings if method == "query" else _patch_embeddings
  for batch in instances.batches(encoders, files, what=what, unreadable=unreadable):
    boxes = [annotated[i].boxes for i in batch.index]
    if not sum(map(len, boxes)):
      continue
    index = [np.arange(starts[i], starts[i + 1]) for i in batch.index]
    values = of_batch(encoders, batch.image, boxes)
    yield Block(
      np.concatenate(index), retrieval.check_embeddings(values, name=f"{method} of boxes")
    )


def evaluate(
  blocks: Iterator[Block], labels: np.ndarray, classes: np.ndarray, *, what: str
) -> dict[str, float | int]:
  """Accuracy over boxes of the class that is most similar; ties go to the class of lower index.

  Args:
    blocks: from `embed`.
    labels: class of every box, those that cannot be seen included, i64 [N].
    classes: an embedding each, f32 [C, E], L2-normalised.
    what: name of the evaluation, for messages.

  Returns:
    `top1`, `top5`, and `mean_per_class` (the mean over classes that occur of their own top-1, also
    called mAcc or balanced accuracy): fractions; `boxes`: how many could be seen.
  """
  ranks, own = [], []
  for block in blocks:
    own.append(np.asarray(labels)[block.index])
    candidates = np.arange(len(classes))
    ranks.append(retrieval.first_hit_ranks(block.values, classes, own[-1], candidates))
  if not ranks:
    raise ValueError(f"{what}: there is no box to classify. Check the annotations.")
  return accuracies(np.concatenate(ranks), np.concatenate(own))


def accuracies(ranks: np.ndarray, labels: np.ndarray) -> dict[str, float | int]:
  """`top1`, `top5`, `mean_per_class`, `boxes` from the rank of each box's own class, i64 [N]."""
  correct = np.bincount(labels, weights=ranks == 0)
  counts = np.bincount(labels)
  return {
    "top1": retrieval.recall_at_k(ranks, 1),
    "top5": retrieval.recall_at_k(ranks, 5),
    "mean_per_class": float(np.mean(correct[counts > 0] / counts[counts > 0])),
    "boxes": len(ranks),
  }


def choose(
  values: np.ndarray, texts: np.ndarray, positive: Sequence[int], negatives: Sequence[Sequence[int]]
) -> np.ndarray:
  """Whether each box is more similar to its own description than to all of the wrong ones.

  A tie is wrong: who cannot tell two descriptions apart has not chosen (Bianchi et al., CVPR 2024).

  Args:
    values: embeddings of boxes, [n, E].
    texts: of all descriptions, [T, E].
    positive: index of the right one for each box, n of them.
    negatives: indices of the wrong ones, n lists of one or more.

  Returns:
    bool [n].
  """
  hits = np.zeros(len(values), bool)
  for i, (value, right, wrong) in enumerate(zip(values, positive, negatives, strict=True)):
    scores = texts[[right, *wrong]] @ value
    hits[i] = scores[0] > scores[1:].max()
  return hits


def evaluate_built(
  encoders: Encoders,
  batches: retrieval.Batches,
  *,
  colors: Sequence[str] = COLORS,
  texts_per_call: int = 8192,
) -> dict[str, float | int]:
  """Given boxes: which of all descriptions, and which colour, is it? By every way of `methods`.

  Args:
    encoders: of the model.
    batches: (batch, extras) with extras "descriptions" (R strings a row); the batch's `boxes` and
      `region_mask` say which regions exist. Regions without description do not count.
    colors: words; those that occur count: the wrong descriptions of a box are its own with each
      other colour.
    texts_per_call: most texts handed to `encoders.text` at once.

  Returns:
    `region_classification/{method}/top1`, `.../top5`, `.../mean_per_class` among all distinct
    descriptions of the split; `fine_grained/{method}/accuracy` among the colours, beside
    `fine_grained/chance`, over `fine_grained/boxes` whose description names one colour (figures are
    left out without any). Counts: `region_classification/classes`, `.../boxes`, and of both
    `examples` of `rows` rows.

  Raises:
    ValueError: no described region, boxes or embeddings that are not finite.
  """
  able = methods(encoders)
  texts: list[str] = []
  parts: dict[str, list[np.ndarray]] = {method: [] for method in able}
  examples = rows = 0
  for batch, extras in batches:
    counted = retrieval.counted_rows(batch, extras, ("descriptions",))
    rows += len(batch["example_mask"])
    examples += len(counted)
    annotated = []
    for i in counted:
      own = [text.strip() for text in extras["descriptions"][i]]
      kept = [r for r, real in enumerate(batch["region_mask"][i]) if real and own[r]]
      if kept:
        texts += [own[r] for r in kept]
        annotated.append(Annotated(batch["image"][i], np.asarray(batch["boxes"][i])[kept]))
    for method in able if annotated else ():
      blocks = embed(
        encoders,
        method,
        annotated,
        what="region_classification",
        unreadable=images_lib.Unreadable(),
      )
      parts[method] += [block.values for block in blocks]
  if not texts:
    raise ValueError(
      f"region_classification: none of {rows} rows has a described region. Check the split."
    )
  names = {text: i for i, text in enumerate(dict.fromkeys(texts))}
  labels = np.asarray([names[text] for text in texts])
  words = {word for text in names for word in re.findall(r"\w+", text.lower())}
  present = [color for color in colors if color.lower() in words]
  wrong = {text: other_colors(text, present) for text in names}
  everything = list(dict.fromkeys([*names, *(w for others in wrong.values() for w in others)]))
  embedded = retrieval.encode_texts(encoders.text, everything, texts_per_call=texts_per_call)
  index = {text: i for i, text in enumerate(everything)}
  colored = [i for i, text in enumerate(texts) if wrong[text]]
  negatives = [[index[w] for w in wrong[texts[i]]] for i in colored]
  results: dict[str, float | int] = {}
  for method in able:
    values = np.concatenate(parts[method])
    block = Block(np.arange(len(values)), values)
    found = evaluate(iter([block]), labels, embedded[: len(names)], what="region_classification")
    del found["boxes"]
    results |= {f"region_classification/{method}/{key}": value for key, value in found.items()}
    if colored:
      hits = choose(values[colored], embedded, labels[colored], negatives)
      results[f"fine_grained/{method}/accuracy"] = float(hits.mean())
  if colored:
    results["fine_grained/chance"] = chance(negatives)
  results |= {"fine_grained/boxes": len(colored), "region_classification/boxes": len(texts)}
  results["region_classification/classes"] = len(names)
  for family in ("fine_grained", "region_classification"):
    results |= {f"{family}/examples": examples, f"{family}/rows": rows}
  return results


def chance(negatives: Sequence[Sequence[int]]) -> float:
  """The accuracy of choosing blindly: the mean of 1 / (1 + number of wrong descriptions)."""
  return float(np.mean([1 / (1 + len(wrong)) for wrong in negatives]))


def other_colors(description: str, colors: Sequence[str]) -> list[str]:
  """The description with each other colour: "an orange cat" -> "a red cat"; [] without one colour.

  Words are compared whole. The article right before the colour follows it.
  """
  choice = "|".join(map(re.escape, sorted(colors, key=len, reverse=True)))
  pattern = re.compile(rf"\b(?:(an?) )?({choice})\b", re.IGNORECASE)
  found = list(pattern.finditer(description))
  if not colors or len(found) != 1:
    return []
  (match,) = found
  others = []
  for color in colors:
    if color.lower() == match[2].lower():
      continue
    article = ("an " if color[0].lower() in "aeiou" else "a ") if match[1] else ""
    if match[1] and match[1][0].isupper():
      article = article.capitalize()
    others.append(description[: match.start()] + article + color + description[match.end() :])
  return others


def window(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
  """Whole pixels (left, top, right, bottom) that a box (cx, cy, w, h) touches, at least one."""
  low, high = box[:2] - box[2:] / 2, box[:2] + box[2:] / 2
  # A billionth of the image is rounding, not another pixel.
  left = min(max(math.floor((low[0] + 1e-9) * width), 0), width - 1)
  top = min(max(math.floor((low[1] + 1e-9) * height), 0), height - 1)
  right = min(max(math.ceil((high[0] - 1e-9) * width), left + 1), width)
  bottom = min(max(math.ceil((high[1] - 1e-9) * height), top + 1), height)
  return left, top, right, bottom


def inside(box: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """The patches of a grid whose centres lie in a box (cx, cy, w, h): bool [rows, columns].

  Where there is none, the one patch that the centre of the box lies in.
  """
  y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
  mask = (np.abs(y - box[1]) <= box[3] / 2)[:, None] & (np.abs(x - box[0]) <= box[2] / 2)[None]
  if not mask.any():
    row, column = (min(max(int(at * n), 0), n - 1) for at, n in ((box[1], rows), (box[0], columns)))
    mask[row, column] = True
  return mask


def _by_crop(
  encoders: Encoders,
  annotated: Sequence[Annotated],
  *,
  what: str,
  unreadable: images_lib.Unreadable,
) -> Iterator[Block]:
  index: list[int] = []

  def crops() -> Iterator[Image.Image]:
    start = 0
    for i, item in enumerate(annotated):
      try:
        source_image = images_lib.open_image(item.source, max_pixels=encoders.max_pixels)
      except ValueError as error:
        unreadable.reasons[i] = str(error)
      else:
        for j, box in enumerate(item.boxes):
          index.append(start + j)
          yield source_image.crop(window(box, *source_image.size))
      start += len(item.boxes)

  for batch in images_lib.batches(
    crops(),
    size=encoders.size,
    resize=encoders.resize,
    interpolation=encoders.interpolation,
    batch_size=encoders.batch_size,
    unreadable=images_lib.Unreadable(),
    max_pixels=encoders.max_pixels,
  ):
    encoded = retrieval.check_embeddings(encoders.image(batch.image), name="encode_image")
    yield Block(np.asarray(index)[batch.index], encoded)
  if not index:
    raise ValueError(f"{what}: {unreadable.line(len(annotated)) or 'there is no box in it'}.")


def _nearest_queries(predicted: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """Index of the query of highest IoU with each box: i64 [R]."""
  return grounding.iou(predicted[:, None], boxes[None]).argmax(axis=0)


def _query_embeddings(
  encoders: Encoders, images: np.ndarray, boxes: Sequence[np.ndarray]
) -> np.ndarray:
  output = grounding.check_regions(*encoders.regions(images), {"image": images}, range(len(images)))
  return np.concatenate(
    [
      regions[_nearest_queries(predicted, own)]
      for regions, predicted, own in zip(*output, boxes, strict=True)
    ]
  )


def _patch_embeddings(
  encoders: Encoders, images: np.ndarray, boxes: Sequence[np.ndarray]
) -> np.ndarray:
  patches = np.asarray(encoders.patches(images), np.float32)  # [b, rows, columns, E]
  means = [
    grid[inside(box, *grid.shape[:2])].mean(axis=0)
    for grid, own in zip(patches, boxes, strict=True)
    for box in own
  ]
  stacked = np.stack(means)
  return stacked / np.maximum(np.linalg.norm(stacked, axis=-1, keepdims=True), 1e-12)
