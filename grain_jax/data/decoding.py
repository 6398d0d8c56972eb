"""The one way from an image to the pixels that are seen: RGB, upright, on white.

Building, training, evaluations, `load` and `embed` all decode here, so that a file looks the same
to each of them, or is refused by each of them for the same reason.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from grain_jax import schema
from grain_jax.data import jpegs

MAX_PIXELS = schema.MAX_PIXELS
_BOMB = f"image of more than {schema.MOST_PIXELS} pixels: more than PIL opens"

_ALPHA_MODES = ("LA", "PA", "RGBA", "La", "RGBa")
# By EXIF's number: what turns the pixels of a file upright. `ImageOps.exif_transpose` writes EXIF
# anew as well, and fails where it cannot.
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_DRAFT_FORMATS = ("JPEG", "MPO")  # MPO: a JPEG with further images behind it, of many phones


class TooManyPixels(ValueError):
  """An image larger than the limit, told from its header."""


def decode(
  source: bytes | Image.Image | np.ndarray,
  *,
  max_pixels: int = MAX_PIXELS,
  enough: Callable[[int, int], tuple[int, int]] | None = None,
) -> Image.Image:
  """An image -> as it is shown, RGB: upright (EXIF), transparency on white, 16 bits to 8.

  Of an animated file it is the first frame; of a PIL image the one that it stands at.

  Args:
    source: bytes of a file in any format that PIL reads, an image that PIL has opened, or u8
      [H, W, 3], [H, W, 1] or [H, W].
    max_pixels: of the largest image to decode; a larger one is refused by its header.
    enough: (width, height) of the image as shown -> a width and height that are enough. A JPEG is
      then decoded at 1/2, 1/4 or 1/8 of its size where that is no smaller: the decoder leaves out
      what a later resize would take away.

  Raises:
    TooManyPixels: it is larger than `max_pixels`.
    ValueError: it is corrupt, cut short, or no image; one line.
  """
  if isinstance(source, np.ndarray):
    return _from_array(source)
  if isinstance(source, Image.Image):
    return _shown(source, max_pixels, None)
  if (plain := _plain_jpeg(source, max_pixels, enough)) is not None:
    return plain
  image = _open(source)
  with image:
    return _shown(image, max_pixels, enough)


def _plain_jpeg(
  data: bytes, max_pixels: int, enough: Callable[[int, int], tuple[int, int]] | None
) -> Image.Image | None:
  """The same image sooner, where `jpegs` can; None: it is for Pillow."""
  header = jpegs.read_header(data)
  if header is None or header.width * header.height > max_pixels:
    return None
  reduction = 1
  if enough is not None:
    wanted = enough(*header)
    fits = min(have // need for have, need in zip(header, wanted, strict=True))
    reduction = next(r for r in (8, 4, 2, 1) if r <= max(fits, 1))  # as Pillow's `draft` has it
  pixels = jpegs.decode(data, header, reduction)
  return None if pixels is None else Image.fromarray(pixels)


def as_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS, max_side: int = 0) -> bytes:
  """Bytes of an image file -> bytes of a JPEG that any reader shows as `decode` shows the file.

  A JPEG that is so already, RGB or grey and upright, stays as it is.

  Args:
    data: of a file in any format that PIL reads.
    max_pixels: of the largest image to decode.
    max_side: pixels of the longer side beyond which it is made smaller, by averaging; 0: never.
  """
  with _open(data) as image:
    shown = _shown(image, max_pixels, None)
    plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    if max_side and max(shown.size) > max_side:
      factor, plain = max_side / max(shown.size), False
      size = [max(1, round(side * factor)) for side in shown.size]
      shown = shown.resize(size, Image.Resampling.LANCZOS)
    if plain and _orientation(image) == 1:
      return data
  encoded = io.BytesIO()
  try:
    shown.save(encoded, "JPEG", quality=95, subsampling=0)
  except MemoryError:
    raise
  except Exception as error:  # a JPEG's sides end at 65,535
    raise ValueError(f"corrupt image: {_reason(error)}") from None
  return encoded.getvalue()


def size_as_shown(data: bytes) -> tuple[int, int]:
  """(width, height) of the image that `decode` gives, from the header of its file."""
  with _open(data) as image:
    return image.size[::-1] if _orientation(image) >= 5 else image.size


def _open(data: bytes) -> Image.Image:
  try:
    return Image.open(io.BytesIO(data))
  except Image.DecompressionBombError:
    raise TooManyPixels(_BOMB) from None
  except MemoryError:  # nothing is wrong with the image
    raise
  except Exception as error:  # PIL raises a dozen kinds, SyntaxError and struct.error among them
    raise ValueError(f"corrupt image: {_reason(error)}") from None


def _shown(
  image: Image.Image,
  max_pixels: int,
  enough: Callable[[int, int], tuple[int, int]] | None,
) -> Image.Image:
  _check_pixels(image, max_pixels)
  try:
    reduces = enough is not None and image.format in _DRAFT_FORMATS
    if reduces:
      sideways = _orientation(image) >= 5
      width, height = enough(*(image.size[::-1] if sideways else image.size))
      image.draft(None, (height, width) if sideways else (width, height))
    _load(image)
    _check_pixels(image, max_pixels)  # an icon's header does not tell
    turn = _UPRIGHT.get(_orientation(image))
    shown = _rgb(image if turn is None else image.transpose(turn))
    if shown is not image:
      shown.info = {}  # a crop of it must not be turned a second time
  except TooManyPixels:
    raise
  except Image.DecompressionBombError:
    raise TooManyPixels(_BOMB) from None
  except MemoryError:  # nothing is wrong with the image
    raise
  except Exception as error:  # as above
    raise ValueError(f"corrupt image: {_reason(error)}") from None
  if enough is not None and not reduces:
    enough(*shown.size)
  return shown


def _load(image: Image.Image) -> None:
  image.load()


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
  width, height = image.size
  if not width * height:
    raise ValueError(f"corrupt image: {width} x {height} pixels")
  if width * height > max_pixels:
    raise TooManyPixels(
      f"image of {width} x {height} pixels: more than {max_pixels} (config.data.max_pixels)"
    )


def _orientation(image: Image.Image) -> int:
  """1 (upright) to 8, as EXIF numbers them; 1 where it says nothing that can be understood."""
  try:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # EXIF of no use says nothing of the pixels
    return 1
  return value if value in range(1, 9) else 1


def _rgb(image: Image.Image) -> Image.Image:
  transparent: Any = image.info.get("transparency")
  if image.mode.startswith("I") or image.mode == "F":
    values = np.asarray(image)
    grey = Image.fromarray(_to_8_bits(values, image.mode))
    if isinstance(transparent, int):  # the one value that a PNG of 16 bits shows as nothing
      grey.paste(255, mask=Image.fromarray(values == transparent))
    return grey.convert("RGB")
  if image.mode in _ALPHA_MODES or transparent is not None:
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white
  return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
  """Grey values of more than 8 bits as u8.

  Files of 32 bits do not say which value is white: the least of 1 (of floats), 255, 65,535 and
  2^32 - 1 that no value exceeds.
  """
  values = np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)
  whites = [1] * (mode == "F") + [255, 65_535, 2**32 - 1]
  if mode.startswith("I;16"):
    whites = [65_535]
  most = values.max(initial=0)
  white = next((w for w in whites if most <= w), most)
  return np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
  grey = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 1)
  if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[-1] == 3)):
    raise ValueError(f"{array.dtype} {list(array.shape)} is no u8 [H, W, 3] picture")
  if not array.size:
    raise ValueError(f"{array.dtype} {list(array.shape)} has no pixels")
  return Image.fromarray(array.reshape(array.shape[:2]) if grey else array).convert("RGB")


def _reason(error: Exception) -> str:
  if isinstance(error, UnidentifiedImageError):  # its message is of a buffer in memory
    return "no format that PIL knows"
  return " ".join(str(error).split()) or type(error).__name__
