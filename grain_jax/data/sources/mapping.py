"""Values of a row by the path of their name, and lists of boxes and labels as regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grain_jax.data import records


def look_up(values: Any, path: str, *, separator: str) -> Any:
  """The value at "objects.bbox"; of a list of objects the list of their values; None if absent."""
  if isinstance(values, Mapping) and path in values:
    return values[path]
  head, _, rest = path.partition(separator)
  if isinstance(values, Mapping):
    return look_up(values.get(head), rest, separator=separator) if rest else values.get(head)
  if isinstance(values, (list, tuple)):
    return [look_up(item, path, separator=separator) for item in values]
  return None


def regions(
  key: str, boxes: Any, labels: Any, scores: Any = None, *, names: Sequence[str] = ()
) -> tuple[list[Any], list[records.Refused]]:
  """(regions, what is none) of an image's boxes and their labels, one for each.

  Args:
    key: of the image.
    boxes: [n] lists of four numbers, or None.
    labels: [n] texts, or indices into `names`.
    scores: [n] numbers, or None.
    names: of the classes.
  """
  if boxes is None:
    return [], []
  lists = [boxes, labels] + ([] if scores is None else [scores])
  if not all(isinstance(x, (list, tuple)) and len(x) == len(boxes) for x in lists):
    count = max(1, len(boxes) if isinstance(boxes, (list, tuple)) else 1)
    return [], [records.Refused(key, "regions", records.MALFORMED)] * count
  scores = [None] * len(boxes) if scores is None else scores
  return [
    {"description": text(label, names), "box": box, "score": score, "negatives": []}
    for box, label, score in zip(boxes, labels, scores, strict=True)
  ], []


def text(value: Any, names: Sequence[str]) -> Any:
  """A label in words: the class's name, where it is an index of one; "_" is a space in it."""
  if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
    return names[value].replace("_", " ")
  return value
