"""GRIT's boxes of phrases: lists of seven numbers, as regions.

Each is start, end (offsets in characters of the caption, end exclusive, written as floats), x_min,
y_min, x_max, y_max (fractions of the image) and the detector's score. `ref_exps` holds the noun
chunks again, each grown to its whole expression where that is longer; where it is not, the two
lists hold the same entry, which is one region.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grain_jax.data import records

NAMES = ("noun_chunks", "ref_exps")
EXPRESSIONS = ("both", *NAMES)  # --expressions
SPAN_OUTSIDE = "span_outside_caption"
BAD_SPAN = "bad_span"  # no whole numbers
RESIZED = "boxes_of_another_shape"  # the image was padded or cut, the boxes were not
TOLERANCE = 0.05  # published boxes reach a little over the edge
SIZES = ("width", "height", "original_width", "original_height")  # in what img2dataset says
_PIXELS = 2  # by which rounding may change a side


def regions(
  key: str,
  values: Mapping[str, Any],
  *,
  expressions: str = "both",
  reshaped: bool = False,
) -> tuple[list[Any], list[records.Refused]]:
  """(regions, what of the lists is none) of an image.

  Args:
    key: of the image.
    values: with `caption` and the lists of `NAMES`; of the image's size, as img2dataset gives it.
    expressions: which lists to read, one of `EXPRESSIONS`.
    reshaped: the image was padded or cut, whatever `values` say.
  """
  caption = values.get("caption")
  caption = caption if isinstance(caption, str) else ""
  names = NAMES if expressions == "both" else (expressions,)
  lists = [values.get(name) for name in names]
  entries: list[Any] = []
  refused = []
  for found in lists:
    if found is None:
      continue
    if not isinstance(found, (list, tuple)):
      refused.append(records.Refused(key, "regions", records.MALFORMED))
      continue
    before = entries.copy()
    entries += [entry for entry in found if entry not in before]
  if entries and (reshaped or was_reshaped(values)):
    return [], [records.Refused(key, "regions", RESIZED)] * len(entries)
  kept = []
  for entry in entries:
    region = _region(entry, caption)
    if isinstance(region, str):
      refused.append(records.Refused(key, "regions", region))
    else:
      kept.append(region)
  return kept, refused


def _region(entry: Any, caption: str) -> dict[str, Any] | str:
  if not isinstance(entry, (list, tuple)) or len(entry) != 7:
    return records.MALFORMED
  if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in entry):
    return records.MALFORMED
  start, end, xmin, ymin, xmax, ymax, score = entry
  if any(isinstance(x, float) and not x.is_integer() for x in (start, end)):
    return BAD_SPAN
  start, end = int(start), int(end)
  if min(start, end) < 0 or max(start, end) > len(caption):
    return SPAN_OUTSIDE
  return {
    "description": caption[start:end],
    "box": (ymin, xmin, ymax, xmax),
    "score": score,
    "negatives": [],
  }


def was_reshaped(values: Mapping[str, Any]) -> bool:
  """Whether img2dataset says that an image is stored in another shape than it had.

  Its default resize mode pads to a square: fractions of the original are none of what is stored.
  """
  sizes = [values.get(name) for name in SIZES]
  if not all(isinstance(x, int) and x > 0 for x in sizes):
    return False
  width, height, own_width, own_height = sizes
  across, down = width / own_width, height / own_height
  return abs(height - own_height * across) > _PIXELS and abs(width - own_width * down) > _PIXELS
