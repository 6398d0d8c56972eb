"""Image and boxes together: squash, random resized crop, horizontal flip.

Random numbers depend on (seed, epoch, index of the record) alone, so a record looks the same
whichever host, thread or restarted run reads it. Boxes are (ymin, xmin, ymax, xmax) as fractions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from PIL import Image

ASPECTS = (3 / 4, 4 / 3)  # of a crop's sides in pixels, as in torchvision's RandomResizedCrop
_LONGEST = 16  # times the shorter side: what is resized of the longer one for a center crop
MIN_VISIBLE = 0.5  # part of a box's area that a crop must keep
_SIDES = re.compile(rb"\b(?:left|right)(?:most|wards?|hand)?\b", re.IGNORECASE)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
  """Finaliser of splitmix64 (Steele et al., OOPSLA 2014): a bijection that scatters all bits."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def uniforms(*, seed: int, epoch: int | np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
  """Random numbers in [0, 1) of each record and pass, `epoch` (or [records]): f64 [records, count].

  A counter-based generator, because building a NumPy generator for each record takes longer than
  all else that is done to a small image.
  """
  state = np.asarray(indices).astype(np.uint64)
  for word in (epoch, seed):
    words = word if isinstance(word, np.ndarray) else np.array([word % (1 << 64)], np.uint64)
    words = words.astype(np.uint64)
    state = _mix(state + _GOLDEN) ^ _mix(words + _GOLDEN)
  draws = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
  bits = _mix(_mix(state)[:, None] + draws)
  return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_without_repeat(number: int, draws: np.ndarray) -> list[int]:
  """As many of range(number) as there are draws in [0, 1), or all of them, none twice."""
  left = list(range(number))
  return [left.pop(int(draw * len(left))) for draw in draws[:number].tolist()]


# PIL's filters, with antialiasing, by config.model.image.interpolation.
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def squash(image: Image.Image, size: int, *, interpolation: str = "bicubic") -> np.ndarray:
  """The whole image at size x size: u8 [size, size, 3]."""
  if image.size != (size, size):
    image = image.resize((size, size), INTERPOLATIONS[interpolation])
  return np.asarray(image)


def center_crop(image: Image.Image, size: int, *, interpolation: str = "bicubic") -> np.ndarray:
  """The middle of the image, its shorter side at `size`, as CLIP sees it: u8 [size, size, 3].

  As transformers' CLIPImageProcessor crops. torchvision's CenterCrop, which OpenAI's CLIP uses,
  begins a pixel later where the longer side less `size` is 3 mod 4: it rounds half to even.
  """
  image = _middle(image)
  width, height = image.size
  shorter = min(width, height)
  scaled = (max(int(size * width / shorter), size), max(int(size * height / shorter), size))
  if image.size != scaled:
    image = image.resize(scaled, INTERPOLATIONS[interpolation])
  left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
  return np.asarray(image.crop((left, top, left + size, top + size)))


def _middle(image: Image.Image) -> Image.Image:
  """An image without the ends that a center crop leaves out, where it is long and thin.

  Resized as a whole, 12,000 x 2 pixels would become 1,344,000 x 224. What is left is long enough
  for the crop and the bicubic filter; a usual image stays whole, as CLIP's preprocessing has it.
  """
  shorter, longer = sorted(image.size)
  left_out = (longer - _LONGEST * shorter) // 2
  if left_out <= 0:
    return image
  width, height = image.size
  x, y = (left_out, 0) if width > height else (0, left_out)
  return image.crop((x, y, width - x, height - y))


RESIZES = {"squash": squash, "center_crop": center_crop}


def resize(
  image: Image.Image, size: int, how: str, *, interpolation: str = "bicubic"
) -> np.ndarray:
  """The image of an evaluation, by one of `RESIZES` and `INTERPOLATIONS`: u8 [size, size, 3]."""
  if how not in RESIZES:
    raise ValueError(f"resize = {how!r} is unknown. Choose from {', '.join(RESIZES)}.")
  return RESIZES[how](image, size, interpolation=interpolation)


def random_window(
  width: int, height: int, draws: np.ndarray, *, min_area: float
) -> tuple[int, int, int, int]:
  """A random crop (left, top, right, bottom) in whole pixels.

  Its area is uniform in [min_area, 1] of the image's and its aspect log-uniform in `ASPECTS`; where
  that is wider or higher than the image, the aspect gives way and the area stays.

  Args:
    width: of the image in pixels.
    height: of the image in pixels.
    draws: four random numbers in [0, 1): area, aspect, left, top.
    min_area: least area kept, as a fraction of the image.
  """
  area = (min_area + (1 - min_area) * draws[0]) * width * height
  low, high = np.log(ASPECTS)
  w = min(np.sqrt(area * np.exp(low + (high - low) * draws[1])), width)
  h = min(area / w, height)
  w, h = max(round(area / h), 1), max(round(h), 1)
  w, h = min(w, width), min(h, height)
  left, top = int(draws[2] * (width - w + 1)), int(draws[3] * (height - h + 1))
  return left, top, left + w, top + h


def scale_window(
  window: tuple[int, int, int, int], factor: float, width: int, height: int
) -> tuple[int, int, int, int]:
  """A window of an image in the pixels of a smaller one, at least one pixel wide and high.

  Args:
    window: (left, top, right, bottom) in pixels of the larger image.
    factor: by which the smaller one's sides are shorter.
    width: of the smaller image in pixels.
    height: of the smaller image in pixels.
  """
  left, top, right, bottom = (round(x * factor) for x in window)
  left, top = min(left, width - 1), min(top, height - 1)
  return left, top, min(max(right, left + 1), width), min(max(bottom, top + 1), height)


def crop(
  image: Image.Image,
  window: tuple[int, int, int, int],
  size: int,
  *,
  interpolation: str = "bicubic",
) -> np.ndarray:
  """The window of the image at size x size: u8 [size, size, 3]."""
  return squash(image.crop(window), size, interpolation=interpolation)


def crop_boxes(boxes: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Boxes as fractions of a window, clipped to it, and which of them it still shows.

  Args:
    boxes: f32 [..., 4] fractions of the image.
    windows: [..., 4] windows (ymin, xmin, ymax, xmax), fractions of the image.

  Returns:
    Boxes [..., 4] as fractions of the window, and bool [...]: at least `MIN_VISIBLE` of its area is
    inside.
  """
  origin = np.concatenate([windows[..., :2], windows[..., :2]], axis=-1)
  extent = windows[..., 2:] - windows[..., :2]
  whole = (boxes - origin) / np.concatenate([extent, extent], axis=-1)
  inside = np.clip(whole, 0.0, 1.0)
  visible = _area(inside) >= MIN_VISIBLE * _area(whole)
  return inside.astype(np.float32), visible & (_area(inside) > 0)


def flip(image: np.ndarray) -> np.ndarray:
  """The image with left and right exchanged: u8 [H, W, 3]."""
  # By Pillow: NumPy copies backwards pixel by pixel, which takes three times as long.
  return np.asarray(Image.fromarray(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def flip_boxes(boxes: np.ndarray) -> np.ndarray:
  """Boxes of a flipped image: [..., 4]."""
  ymin, xmin, ymax, xmax = np.moveaxis(boxes, -1, 0)
  return np.stack([ymin, 1 - xmax, ymax, 1 - xmin], axis=-1)


def names_a_side(texts: Iterable[bytes]) -> bool:
  """Whether a text says left or right (as a word), so that the image must not be flipped."""
  return any(_SIDES.search(text) for text in texts)


def _area(boxes: np.ndarray) -> np.ndarray:
  sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
  return sides[..., 0] * sides[..., 1]
