"""Backgrounds of scenes: low in saturation, so that every tint stands out, of any brightness."""

from __future__ import annotations

import numpy as np
from PIL import Image

KINDS = ("plain", "gradient", "stripes", "blobs", "noise")

DARKEST, BRIGHTEST = 0.35, 1.0  # mean brightness
TINT = 0.05  # largest deviation of a channel from gray


def draw(kind: str, *, size: int, rng: np.random.Generator) -> np.ndarray:
  """A background of one of `KINDS`, u8 [size, size, 3]."""
  base, other = _color(rng), _color(rng)
  contrast = 0.15 + 0.35 * rng.random()
  other = base + contrast * (other - base)
  if kind == "plain":
    return np.tile(_bytes(base), (size, size, 1))
  if kind == "gradient":
    x, y = 2 * rng.random(2) - 1
    ramp = (np.arange(size) / (size - 1) - 0.5) / (abs(x) + abs(y) + 1e-6)
    weight = 1 + 2 * (x * ramp[None, :] + y * ramp[:, None])  # in [0, 2]
    # Per channel, and in single precision: half the time.
    step = (other - base).astype(np.float32)
    weight, canvas = weight.astype(np.float32), np.empty((size, size, 3), np.uint8)
    for channel in range(3):
      canvas[..., channel] = _bytes(weight * step[channel] + np.float32(base[channel]))
    return canvas
  if kind == "stripes":
    width, (x, y) = size * (0.06 + 0.14 * rng.random()), 2 * rng.random(2) - 1
    length = np.sqrt(x * x + y * y) + 1e-6
    ramp = np.arange(size) / (width * length)
    odd = np.floor(x * ramp[None, :] + y * ramp[:, None]).astype(np.int64) & 1
    return np.take(np.stack([_bytes(base), _bytes(other)]), odd, axis=0)
  if kind == "blobs":
    cells = 3 + int(rng.random() * 4)
    grid = base + rng.random((cells, cells, 1)) * 1.5 * (other - base)
    return np.asarray(Image.fromarray(_bytes(grid)).resize((size, size), Image.BICUBIC)).copy()
  if kind == "noise":
    grain = rng.integers(0, 29, (size, size, 1), dtype=np.uint8)
    return np.minimum(_bytes(base), 227) + grain
  raise ValueError(f"background = {kind!r}: unknown. Choose from {KINDS}.")


def _color(rng: np.random.Generator) -> np.ndarray:
  """A grayish colour in [0, 1], f64 [3]."""
  brightness = DARKEST + (BRIGHTEST - DARKEST) * rng.random()
  return brightness + TINT * (2 * rng.random(3) - 1)


def _bytes(color: np.ndarray) -> np.ndarray:
  return np.minimum(np.maximum(color * 255 + 0.5, 0), 255).astype(np.uint8)
