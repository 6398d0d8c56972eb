"""The frame that pixel boxes are given in: of what size, and how it lies in the image as shown."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from grain_jax import failures, places
from grain_jax.data import box_formats

# EXIF's orientation -> where a point (y, x) of the stored image, in fractions, is shown.
_TURNS = {
  5: lambda y, x: (x, y),
  6: lambda y, x: (x, 1 - y),
  7: lambda y, x: (1 - x, 1 - y),
  8: lambda y, x: (1 - x, y),
}

_LONGEST = 1 << 31  # pixels of a side, which no file has


class Frame(NamedTuple):
  """Of an image's boxes."""

  width: float
  height: float
  orientation: int = 1  # EXIF's, where boxes are of the image before it is turned upright

  def fractions(self, box: Any, box_format: str) -> Any:
    """(ymin, xmin, ymax, xmax) as fractions of the image as shown; None where a box is none.

    Args:
      box: four numbers in pixels; NaN and boxes outside stay what they are, for `records.check`.
      box_format: one of `box_formats.FORMATS`.
    """
    if isinstance(box, (str, bytes, dict)):
      return None
    try:
      numbers = [float(x) for x in box]
    except (TypeError, ValueError, OverflowError):
      return None
    if len(numbers) != 4:
      return None
    corners = box_formats.to_corners(numbers, box_format)
    corners = box_formats.to_fractions(corners, (self.width, self.height))
    return turn(corners, self.orientation)


def turn(corners: Sequence[float], orientation: int) -> tuple[float, ...]:
  """Corners of a box in a stored image -> in the image as EXIF's orientation (5 to 8) shows it."""
  ymin, xmin, ymax, xmax = corners
  if orientation not in _TURNS:
    return ymin, xmin, ymax, xmax
  (y1, x1), (y2, x2) = _TURNS[orientation](ymin, xmin), _TURNS[orientation](ymax, xmax)
  if orientation in (6, 7):  # a side that is turned round ends where it began
    x1, x2 = x2, x1
  if orientation in (7, 8):
    y1, y2 = y2, y1
  return y1, x1, y2, x2


def frame_of(image: pathlib.Path, width: Any = None, height: Any = None) -> Frame | None:
  """The frame of an image's boxes.

  It has the size that the annotations give, whatever that of the file, which may be a smaller copy;
  where they give none, the file's as it is shown. Where theirs is the size of the file before EXIF
  turns it on its side, the boxes are of that.

  Args:
    image: the file.
    width, height: as the annotations have them.

  Returns:
    None where neither annotations nor file tell a size: the image cannot be read either.
  """
  given = _is_size(width) and _is_size(height)
  stored = orientation = None
  try:
    file = places.find_file(image)
    stored, orientation = failures.retry_read(lambda: _header(file), file)
  except (OSError, ValueError):  # `records.check` counts it
    if not given:
      return None
  if not given:
    shown = stored[::-1] if orientation >= 5 else stored
    return Frame(*shown) if min(shown) > 0 else None
  sideways = stored == (width, height) and width != height and orientation >= 5
  return Frame(width, height, orientation if sideways else 1)


def _is_size(value: Any) -> bool:
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return number and 0 < value < _LONGEST


def _header(file: pathlib.Path) -> tuple[tuple[int, int], int]:
  """((width, height) as stored, EXIF's orientation) of an image file; ValueError if it is none."""
  with file.open("rb") as opened:
    try:
      image = Image.open(opened)
      orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
      return image.size, orientation if orientation in range(1, 9) else 1
    except OSError as error:
      if failures.is_storage(error):
        raise
      raise ValueError("no image") from None
    except Exception:  # PIL raises a dozen kinds
      raise ValueError("no image") from None
