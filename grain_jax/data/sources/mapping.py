"""Values of a row by the path of their name, and lists of boxes and labels as regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grain_jax.data import records

CROWD = "crowd"  # a box around many
_CROWDS = ("iscrowd", "is_crowd", "is_group_of", "IsGroupOf")  # names of what says so of boxes


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


def crowd_paths(boxes: str, *, separator: str) -> list[str]:
  """Where it may stand of boxes that they are around many: beside them."""
  head = boxes.rpartition(separator)[0]
  return [f"{head}{separator}{name}" if head else name for name in _CROWDS]


def crowds(values: Any, boxes: str, *, separator: str) -> Any:
  """What stands beside the boxes: [n] numbers or bools, of which 1 is around many; None: nothing.

  Args:
    values: of a row.
    boxes: the path of its boxes.
    separator: in paths.
  """
  for path in crowd_paths(boxes, separator=separator):
    found = look_up(values, path, separator=separator)
    if isinstance(found, (list, tuple)) and not all(value is None for value in found):
      return found
  return None


def regions(
  key: str,
  boxes: Any,
  labels: Any,
  scores: Any = None,
  *,
  around_many: Any = None,
  names: Sequence[str] = (),
) -> tuple[list[Any], list[records.Refused]]:
  """(regions, what is none) of an image's boxes and their labels, one for each.

  Boxes around many are none: what is in them is not one thing of that name.

  Args:
    key: of the image.
    boxes: [n] lists of four numbers, or None.
    labels: [n] texts, or indices into `names`.
    scores: [n] numbers, or None.
    around_many: [n] numbers or bools, as `crowds` finds them, or None.
    names: of the classes.
  """
  if boxes is None:
    return [], []
  lists = [boxes, labels, *(x for x in (scores, around_many) if x is not None)]
  if not all(isinstance(x, (list, tuple)) and len(x) == len(boxes) for x in lists):
    count = max(1, len(boxes) if isinstance(boxes, (list, tuple)) else 1)
    return [], [records.Refused(key, "regions", records.MALFORMED)] * count
  scores = [None] * len(boxes) if scores is None else scores
  around_many = [0] * len(boxes) if around_many is None else around_many
  found, lost = [], []
  for box, label, score, many in zip(boxes, labels, scores, around_many, strict=True):
    if many == 1:  # also True; -1 is unknown
      lost.append(records.Refused(key, "regions", CROWD))
      continue
    found.append({"description": text(label, names), "box": box, "score": score, "negatives": []})
  return found, lost


def text(value: Any, names: Sequence[str]) -> Any:
  """A label in words: the class's name, where it is an index of one; "_" is a space in it."""
  if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
    return names[value].replace("_", " ")
  return value
