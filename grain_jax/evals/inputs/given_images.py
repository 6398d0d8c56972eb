"""Images as a caller in Python has them: files, bytes, arrays, tensors -> PIL, one by one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from grain_jax import failures, places
from grain_jax.data import decoding

# PIL, u8 [H, W, 3], a torch tensor, the path of a file, or the bytes of one.
ImageInput: TypeAlias = Image.Image | np.ndarray | str | os.PathLike | bytes
_GIVE = "give u8 [H, W, 3] with values of 0 to 255, a PIL image, a path or the bytes of a file"
_SINGLE = (Image.Image, str, os.PathLike, bytes, bytearray, memoryview)
_WEB = re.compile("https?:/", re.IGNORECASE)  # a pathlib.Path has one slash where there were two
_LONGEST = 80  # characters of a text that is repeated in a message


def split(images: ImageInput | Sequence[ImageInput]) -> list[Any]:
  """One image or several -> a list of images, each for `to_pil`.

  Raises:
    ValueError: neither an image nor several; one line.
  """
  if isinstance(images, _SINGLE):
    return [images]
  if _is_array(images):
    array = _as_array(images, "images")
    if array.ndim == 3:
      return [array]
    if array.ndim == 4 or (array.ndim == 1 and (array.dtype.kind in "OSU" or not array.size)):
      return list(array)
    raise ValueError(f"images is {array.dtype} {list(array.shape)}: {_GIVE}, or several of them.")
  if not isinstance(images, Iterable) or isinstance(images, Mapping):
    raise ValueError(f"images is {_kind(images)}: {_GIVE}, or a list of them.")
  return list(images)


def to_pil(image: Any, index: int, max_pixels: int = decoding.MAX_PIXELS) -> Image.Image:
  """An image as it is shown, RGB.

  Args:
    image: one of what `split` gave.
    index: its place, for messages.
    max_pixels: of the largest image that is read.

  Raises:
    ValueError: it cannot be read, or is no image; one line.
  """
  where = f"images[{index}]"
  if isinstance(image, (str, os.PathLike)):
    where, image = _read(image, where)
  elif isinstance(image, (bytes, bytearray, memoryview)):
    image = bytes(image)
    where = f"{where}, {len(image):,} bytes"
  elif _is_array(image):
    image = _checked(_as_array(image, where), where)
  elif not isinstance(image, Image.Image):
    raise ValueError(f"{where} is {_kind(image)}: {_GIVE}.")
  try:
    return decoding.decode(image, max_pixels=max_pixels)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _read(path: str | os.PathLike, where: str) -> tuple[str, bytes]:
  """(what to call it, its bytes)."""
  text = os.fspath(path)
  shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
  if isinstance(text, str) and text.startswith("data:"):
    raise ValueError(f"{where} = {shown} is a data address: give its bytes, decoded from base64.")
  if isinstance(text, str) and _WEB.match(text):
    line = f"{where} = {shown} is an address: download it, and give the file's path or its bytes."
    raise ValueError(line)
  places.check(path, where)
  file = places.find_file(path)
  try:
    if failures.retry_read(file.is_file, file):
      return f"{where}, {file}", failures.retry_read(file.read_bytes, file)
    folder = text and file.is_dir()
  except OSError as error:
    raise ValueError(f"{where}, {shown}: {error.strerror or error}") from error
  if folder:
    raise ValueError(f"{where}: {shown} is a folder. Give the paths of its files.")
  raise ValueError(f"{where}: there is no file {shown if text else repr(text)}.")


def _checked(array: np.ndarray, where: str) -> np.ndarray:
  """u8 [H, W, 3] with pixels; else the line that says what to do about it."""
  what = f"{where} is {array.dtype} {list(array.shape)}"
  if array.ndim == 3 and 0 in array.shape[:2]:
    raise ValueError(f"{what}: it has no pixels.")
  if array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3:
    return array
  hint = ""
  if array.dtype.kind == "f":
    hint = " Floats do not say whether 1 or 255 is white: (255 * x).round().astype(np.uint8) if 1."
  elif array.ndim == 3 and array.shape[0] == 3:
    hint = " Channels come last: x.transpose(1, 2, 0)."
  raise ValueError(f"{what}: {_GIVE}.{hint}")


def _is_array(value: Any) -> bool:
  return _is_torch(value) or (hasattr(value, "__array__") and not isinstance(value, Image.Image))


def _is_torch(value: Any) -> bool:
  """Whether it is a tensor of torch, which need not be installed."""
  return all(hasattr(value, name) for name in ("detach", "cpu", "is_floating_point"))


def _as_array(value: Any, where: str) -> np.ndarray:
  return _from_torch(value, where) if _is_torch(value) else np.asarray(value)


def _from_torch(tensor: Any, where: str) -> np.ndarray:
  """A tensor of one or several images -> u8 [..., H, W, 3].

  Where its channels are is told by its shape; floats are 0 to 1, as torchvision makes them.
  """
  floats = tensor.is_floating_point()
  array = (tensor.float() if floats else tensor).detach().cpu().numpy()  # NumPy has no bfloat16
  what = f"{where} is {tensor.dtype} {list(array.shape)}"
  shapes = "[N, 3, H, W], [N, H, W, 3], or one of them without N"
  if array.ndim not in (3, 4) or 3 not in (array.shape[-3], array.shape[-1]):
    raise ValueError(f"{what}: give {shapes}.")
  if array.shape[-3] == array.shape[-1]:
    raise ValueError(
      f"{what}: channels may be first or last. Give a NumPy array, u8 [..., H, W, 3]."
    )
  if array.shape[-3] == 3:
    array = np.moveaxis(array, -3, -1)
  if floats:
    low, high = array.min(initial=np.inf), array.max(initial=-np.inf)
    if array.size and not (low >= 0 and high <= 1):  # NaN too
      raise ValueError(
        f"{what} with values of {low:.3g} to {high:.3g}: floats are 0 to 1, before they are "
        "normalised by mean and deviation (clamp what is just outside); or give u8."
      )
    return np.rint(array * 255).astype(np.uint8)
  if array.dtype != np.uint8:
    raise ValueError(f"{what}: give u8 with values of 0 to 255, or floats of 0 to 1.")
  return array


def _kind(value: Any) -> str:
  return "None" if value is None else f"a {type(value).__name__}"
