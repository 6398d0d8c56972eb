"""Boxes as people write them -> (ymin, xmin, ymax, xmax) as fractions of the image."""

from __future__ import annotations

from collections.abc import Sequence

FORMATS = ("yxyx", "xyxy", "xywh", "cxcywh")  # --box_format
UNITS = ("fractions", "pixels")  # --box_units


def to_corners(box: Sequence[float], box_format: str) -> tuple[float, float, float, float]:
  """(ymin, xmin, ymax, xmax) of a box, in the units that it is in.

  Args:
    box: four numbers: yxyx (ymin, xmin, ymax, xmax), xyxy (xmin, ymin, xmax, ymax), xywh (xmin,
      ymin, width, height) or cxcywh (the centre's x and y, width, height).
    box_format: one of `FORMATS`.
  """
  a, b, c, d = box
  if box_format == "yxyx":
    return a, b, c, d
  if box_format == "xyxy":
    return b, a, d, c
  if box_format == "xywh":
    return b, a, b + d, a + c
  if box_format == "cxcywh":
    return b - d / 2, a - c / 2, b + d / 2, a + c / 2
  raise ValueError(f"--box_format = {box_format!r} is none of {', '.join(FORMATS)}. Use one.")


def to_fractions(
  corners: Sequence[float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
  """Corners in pixels as fractions.

  Args:
    corners: (ymin, xmin, ymax, xmax) in pixels; a pixel's left edge is its index, so that a box
      over the whole image ends at its width and height.
    size: (width, height) of the image as it is shown.
  """
  ymin, xmin, ymax, xmax = corners
  width, height = size
  return ymin / height, xmin / width, ymax / height, xmax / width


def is_under_a_pixel(box: Sequence[float]) -> bool:
  """Whether four numbers given as pixels look like fractions: none is above 1."""
  return max(map(abs, box)) <= 1
