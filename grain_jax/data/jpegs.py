"""Plain JPEGs by libjpeg-turbo itself (the package simplejpeg, where it is installed).

Pillow decodes by the same library, to the same pixels, but passes the file to it piece by piece and
the pixels through a buffer of its own. What is not plain (EXIF, an orientation in XMP, Adobe's
marker, several images, any doubt about the file) is left to Pillow, which then also says what is
wrong with it.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import numpy as np

_SIZES = frozenset({0xC0, 0xC1, 0xC2})  # SOF: baseline, extended, progressive; Huffman coding
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
_SCAN, _END, _QUOTED = 0xDA, 0xD9, 0xFF
# Markers that say how the image is to be shown, or that others follow: EXIF, MPF, Adobe.
# An XMP packet, which most editors write, says so too where it holds an orientation.
_XMP = (0xE1, b"http://ns.adobe.com/xap/1.0/\0")
_TURNED = re.compile(rb'tiff:Orientation(="|>)[2-8]')
_NOT_PLAIN = ((0xE1, b"Exif\0"), (0xE2, b"MPF\0"), (0xEE, b"Adobe"))


class Header(NamedTuple):
  """Of a plain JPEG."""

  width: int
  height: int


@functools.cache
def _library() -> Any:
  try:
    import simplejpeg
  except ImportError:
    return None
  return simplejpeg


def read_header(data: bytes) -> Header | None:
  """The size of a plain JPEG; None: it is something else, or there is no library for it."""
  if _library() is None or data[:2] != b"\xff\xd8":
    return None
  at, found = 2, None
  while at + 4 <= len(data) and data[at] == 0xFF:
    marker = data[at + 1]
    if marker == _QUOTED:  # fill
      at += 1
      continue
    if marker in _BARE:
      at += 2
      continue
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    start = at + 4
    if marker == _SCAN:
      return found
    if marker == _END or length < 2:
      return None
    if any(m == marker and data.startswith(head, start) for m, head in _NOT_PLAIN):
      return None
    is_xmp = marker == _XMP[0] and data.startswith(_XMP[1], start)
    if is_xmp and _TURNED.search(data, start, at + 2 + length):
      return None
    if marker in _SIZES:
      bits, components = data[start : start + 1], data[start + 5 : start + 6]  # it may be cut off
      if found is not None or bits != b"\x08" or components not in (b"\1", b"\3"):
        return None
      height, width = (int.from_bytes(data[start + i : start + i + 2], "big") for i in (1, 3))
      found = Header(width, height) if width * height else None
    elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xCC):  # another kind of coding
      return None
    at += 2 + length
  return None


def decode(data: bytes, header: Header, reduction: int) -> np.ndarray | None:
  """RGB pixels u8 [ceil(height / reduction), ceil(width / reduction), 3]; None: ask Pillow.

  Args:
    data: of a plain JPEG.
    header: of it.
    reduction: 1, 2, 4 or 8.
  """
  width, height = (-(-side // reduction) for side in header)
  least = {"min_width": width, "min_height": height} if reduction > 1 else {}
  try:
    pixels = _library().decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, **least)
  except (ValueError, RuntimeError):  # anything that libjpeg-turbo warns of, too
    return None
  return pixels if pixels.shape == (height, width, 3) else None
