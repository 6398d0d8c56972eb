"""Drawings as sprites: rendered once, then turned, scaled and tinted as often as needed."""

from __future__ import annotations

import dataclasses
import functools
import io
import math

import numpy as np
from PIL import Image

from grain_jax.data.scenes import concepts as concepts_lib

# Sprites are kept at sides that shrink by this factor, so that an affine resampling never scales
# down by more than it and needs no filter of its own.
LEVEL_STEP = 1.4


@dataclasses.dataclass(frozen=True)
class Sprite:
  """A drawing as luminance and alpha.

  Attributes:
    levels: pictures of mode "La" (luminance times alpha, alpha), the long side of the drawing
      in pixels falling by `LEVEL_STEP`.
    aspect: short side / long side of the drawing, in (0, 1].
    extents: rotation in whole degrees -> (left, top, right, bottom), distances from the centre to
      the edges of the turned drawing, in long sides, all positive.
  """

  levels: tuple[tuple[float, Image.Image], ...]
  aspect: float
  extents: dict[int, tuple[float, float, float, float]]


@dataclasses.dataclass(frozen=True)
class Patch:
  """A placed sprite: rows top..top+h, columns left..left+w of the scene."""

  top: int
  left: int
  pixels: np.ndarray  # u8 [h, w, 2]: luminance times alpha, alpha

  def window(self, size: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the part that lies within a scene of side `size`."""
    height, width = self.pixels.shape[:2]
    bottom, right = min(self.top + height, size), min(self.left + width, size)
    return max(self.top, 0), max(self.left, 0), bottom, right


def load(concept: concepts_lib.Concept, *, max_side: int, max_rotation: int) -> Sprite:
  """Renders a concept.

  Args:
    concept: what to draw.
    max_side: longest side it will be shown at, in pixels.
    max_rotation: largest turn in degrees, either way.
  """
  try:
    import resvg_py
  except ImportError as error:
    raise ImportError(
      f"scenes need the package resvg_py: not installed. {concepts_lib.INSTALL}"
    ) from error
  side = math.ceil(1.6 * max_side)  # the drawing fills most of its square
  svg = concepts_lib.drawing(concept)
  png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
  rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(np.float64)
  alpha = rgba[..., 3]
  red, green, blue = np.moveaxis(rgba[..., :3] / 255, -1, 0)
  luminance = _normalize(0.299 * red + 0.587 * green + 0.114 * blue, alpha)  # ITU-R BT.601
  pair = np.stack([luminance * alpha, alpha], axis=-1).round().astype(np.uint8)
  rows, columns = np.flatnonzero((alpha > 127).any(1)), np.flatnonzero((alpha > 127).any(0))
  box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
  picture = _from_array(pair).crop(box)
  long, short = max(picture.size), min(picture.size)
  levels, target = [], float(max_side)
  while target >= 8:
    scale = target / long
    size = [max(1, round(d * scale)) for d in picture.size]
    small = picture.resize(size, Image.Resampling.LANCZOS)
    padded = Image.new("La", (size[0] + 4, size[1] + 4))
    padded.paste(small, (2, 2))
    levels.append((size[0] / picture.width * long, padded))
    target /= LEVEL_STEP
  return Sprite(tuple(levels), short / long, _extents(alpha > 127, box, max_rotation))


def transform_sprite(
  sprite: Sprite, *, side: float, rotation: int, center: tuple[float, float]
) -> Patch:
  """The sprite rotated and scaled, as a patch of the scene.

  Args:
    sprite: what `load` returned.
    side: long side of the drawing, in pixels.
    rotation: degrees, clockwise.
    center: (x, y) of the drawing's centre in the scene, in pixels.
  """
  level = sprite.levels[0]
  for candidate in sprite.levels:
    if candidate[0] < side:
      break
    level = candidate
  long, picture = level
  reach_left, reach_top, reach_right, reach_bottom = (side * e for e in sprite.extents[rotation])
  left, top = math.floor(center[0] - reach_left - 1), math.floor(center[1] - reach_top - 1)
  right, bottom = math.ceil(center[0] + reach_right + 1), math.ceil(center[1] + reach_bottom + 1)
  angle, scale = math.radians(rotation), long / side
  cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
  dx, dy = left - center[0], top - center[1]
  affine = (
    cos,
    sin,
    cos * dx + sin * dy + picture.width / 2,
    -sin,
    cos,
    -sin * dx + cos * dy + picture.height / 2,
  )
  turned = picture.transform(
    (right - left, bottom - top), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
  )
  return Patch(top, left, np.asarray(turned))


def compose(canvas: np.ndarray, patch: Patch, *, rgb: tuple[int, int, int]) -> np.ndarray:
  """Draws a patch in a tint onto u8 [H, H, 3], in place; returns its alpha, u8 [h, w]."""
  top, left, bottom, right = patch.window(len(canvas))
  rows = slice(top - patch.top, bottom - patch.top)
  columns = slice(left - patch.left, right - patch.left)
  product, alpha = patch.pixels[rows, columns, 0], patch.pixels[rows, columns, 1]
  tinted = np.take(tint_table(rgb), alpha.astype(np.intp) * 256 + product, axis=0)
  part = canvas[top:bottom, left:right]
  part[:] = tinted + (part * (255 - alpha.astype(np.uint16))[..., None] + 127) // 255
  return alpha


@functools.lru_cache(maxsize=32)
def tint_table(rgb: tuple[int, int, int]) -> np.ndarray:
  """Colours of a tint: (alpha, luminance times alpha) -> RGB times alpha, u8 [65536, 3].

  Outlines stay dark, the usual luminance of a drawing (0.6 after `_normalize`) takes the colour
  itself, and lights go a third of the way to white; so the shape stays and the hue too.
  """
  alpha, product = np.mgrid[0:256, 0:256]
  luminance = np.minimum(product / np.maximum(alpha, 1), 1.0)[..., None]
  color = np.array(rgb, np.float64)
  dark = color * (0.08 + 0.92 * np.sqrt(np.minimum(luminance / 0.6, 1)))
  light = np.maximum(luminance - 0.6, 0) / 0.4 * 0.33
  tinted = dark * (1 - light) + 255 * light
  return (tinted * alpha[..., None] / 255).round().astype(np.uint8).reshape(-1, 3)


def _normalize(luminance: np.ndarray, alpha: np.ndarray) -> np.ndarray:
  """Luminance with the median of what is not outline at 0.6; black drawings are lifted first."""
  solid = alpha > 127
  if np.mean(luminance[solid] > 0.2) < 0.4:
    luminance = 0.35 + 0.65 * luminance
  median = np.median(luminance[solid & (luminance > 0.2)])
  below = luminance / median * 0.6
  above = 0.6 + (luminance - median) / max(1 - median, 1e-6) * 0.4
  return np.clip(np.where(luminance <= median, below, above), 0, 1)


def _extents(solid, box, max_rotation):
  left, top, right, bottom = box
  rows = np.flatnonzero(solid.any(1))
  first, last = solid[rows].argmax(1), solid.shape[1] - solid[rows][:, ::-1].argmax(1)
  x = np.concatenate([first, first, last, last]) - (left + right) / 2
  y = np.concatenate([rows, rows + 1, rows, rows + 1]) - (top + bottom) / 2
  x, y = x / max(right - left, bottom - top), y / max(right - left, bottom - top)
  extents = {}
  for degrees in range(-max_rotation, max_rotation + 1):
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    u, v = x * cos - y * sin, x * sin + y * cos
    extents[degrees] = tuple(map(float, (-u.min(), -v.min(), u.max(), v.max())))
  return extents


def _from_array(pair: np.ndarray) -> Image.Image:
  """u8 [h, w, 2] -> mode "La"."""
  bands = [Image.fromarray(np.ascontiguousarray(pair[..., i])) for i in range(2)]
  return Image.merge("La", bands)
