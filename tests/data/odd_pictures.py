"""Pictures of every mode and kind of file, with what is to be seen of each; and what is refused."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

SIZE = 48
Y, X = np.mgrid[0:40, 0:56]
RGB = np.stack([X * 4, Y * 6, 240 - X * 2 - Y], -1).astype(np.uint8)  # as it is to be seen
GREY = RGB[..., 0]
ALPHA = (Y * 6).astype(np.uint8)
COLORS = np.array([[16 * i, 255 - 16 * i, 128] for i in range(16)], np.uint8)

# What EXIF's numbers mean (CIPA DC-008, tag 274): the pixels of the file -> as they are shown.
ORIENTATIONS = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: np.swapaxes(x, 0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: np.swapaxes(x, 0, 1)[::-1, ::-1],
  8: lambda x: np.rot90(x, 1),
}


def save(image, kind, **options):
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def exif(orientation):
  tags = Image.Exif()
  tags[274] = orientation
  return tags


def gray(values):
  return np.repeat(np.asarray(values, np.uint8)[..., None], 3, -1)


def on_white(color, alpha):
  share = alpha[..., None] / 255
  return np.rint(color * share + 255 * (1 - share)).astype(np.uint8)


def palette_image():
  image = Image.fromarray(GREY // 16)
  image.putpalette(COLORS.tobytes())
  return image


def lab_image():
  profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
  return ImageCms.profileToProfile(Image.fromarray(RGB), *profiles, outputMode="LAB")


def sixteen_bits(values):
  return np.asarray(values, np.uint16) * 257


def png_of_16_bits(values, transparent):
  """Grey, with the one value that is shown as nothing: PIL does not write it."""
  height, width = values.shape
  lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
  return png(header, (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", zlib.compress(lines)))


def png(header, *chunks):
  found = b"\x89PNG\r\n\x1a\n"
  for name, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
    found += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
  return found


def bomb(side):
  """The header of a PNG of side x side, and nothing behind it."""
  header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  return png(header, (b"IDAT", zlib.compress(b"")))


def pictures():
  """name -> (file, as it is shown; largest difference: 0 equal, 1 rounded, None 2 in the mean)."""
  whole, pal = Image.fromarray(RGB), palette_image()
  rgba = Image.fromarray(np.dstack([RGB, ALPHA]))
  la = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
  one, frames = Image.fromarray(GREY > 127), [Image.fromarray(255 - RGB)]
  indices = GREY // 16
  holed = np.where((indices == 3)[..., None], 255, COLORS[indices]).astype(np.uint8)
  corner = np.where((RGB[5, 7] == RGB).all(-1)[..., None], 255, RGB)
  hole16 = gray(np.where(GREY == 40, 255, GREY))
  thin = np.stack([np.linspace(0, 255, 12_000)] * 3, -1).astype(np.uint8)[None].repeat(2, 0)
  found = {
    "1.png": (save(one, "PNG"), gray((GREY > 127) * 255), 0),
    "L.png": (save(GREY, "PNG"), gray(GREY), 0),
    "LA.png": (save(la, "PNG"), on_white(gray(GREY), ALPHA), 1),
    "P.png": (save(pal, "PNG"), COLORS[indices], 0),
    "P_transparent.png": (save(pal, "PNG", transparency=3), holed, 0),
    "RGB.png": (save(RGB, "PNG"), RGB, 0),
    "RGB_transparent.png": (
      save(RGB, "PNG", transparency=tuple(map(int, RGB[5, 7]))), corner.astype(np.uint8), 0),
    "RGBA.png": (save(rgba, "PNG"), on_white(RGB, ALPHA), 1),
    "I;16.png": (save(sixteen_bits(GREY), "PNG"), gray(GREY), 0),
    "I;16_transparent.png": (png_of_16_bits(sixteen_bits(GREY), 40 * 257), hole16, 0),
    "animated.png": (save(whole, "PNG", save_all=True, append_images=frames), RGB, 0),
    "I;16.tif": (save(sixteen_bits(GREY), "TIFF"), gray(GREY), 0),
    "I.tif": (save(sixteen_bits(GREY).astype(np.int32), "TIFF"), gray(GREY), 0),
    "F.tif": (save((GREY / 255).astype(np.float32), "TIFF"), gray(GREY), 0),
    "CMYK.tif": (save(whole.convert("CMYK"), "TIFF"), RGB, 1),
    "LAB.tif": (save(lab_image(), "TIFF"), RGB, None),
    "RGBA.tif": (save(rgba, "TIFF"), on_white(RGB, ALPHA), 1),
    "P.gif": (save(pal, "GIF"), COLORS[indices], 0),
    "P_transparent.gif": (save(pal, "GIF", transparency=3), holed, 0),
    "animated.gif": (
      save(pal, "GIF", save_all=True, append_images=[pal.rotate(180)]), COLORS[indices], 0),
    "RGB.webp": (save(RGB, "WEBP", lossless=True), RGB, 0),
    "RGBA.webp": (save(rgba, "WEBP", lossless=True, exact=True), on_white(RGB, ALPHA), 1),
    "animated.webp": (
      save(whole, "WEBP", lossless=True, save_all=True, append_images=frames), RGB, 0),
    "RGB.bmp": (save(RGB, "BMP"), RGB, 0),
    "P.bmp": (save(pal, "BMP"), COLORS[indices], 0),
    "1x1.png": (save(RGB[5:6, 5:6], "PNG"), RGB[5:6, 5:6], 0),
    "12000x2.png": (save(thin, "PNG"), thin, 0),
  }  # fmt: skip
  jpegs = {"RGB": whole, "L": Image.fromarray(GREY), "1x1": Image.fromarray(RGB[5:6, 5:6])}
  for name, image in {**jpegs, "12000x2": Image.fromarray(thin)}.items():
    data = save(image, "JPEG")
    found[f"{name}.jpg"] = (data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), 0)
  found["CMYK.jpg"] = (save(whole.convert("CMYK"), "JPEG", quality=95, subsampling=0), RGB, None)
  found["MPO.jpg"] = (save(whole, "MPO", save_all=True, append_images=frames), RGB, None)
  for number, turn in ORIENTATIONS.items():
    data = save(RGB, "JPEG", exif=exif(number))
    found[f"exif{number}.jpg"] = (data, turn(np.asarray(Image.open(io.BytesIO(data)))), 0)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
      data = save(RGB, kind, exif=exif(number), **options)
      found[f"exif{number}.{kind.lower()}"] = (data, turn(RGB), 0)
  return found


def refused():
  """name -> file that no reader takes."""
  whole = {"jpg": ("JPEG", {}), "png": ("PNG", {}), "gif": ("GIF", {}), "bmp": ("BMP", {}),
           "tif": ("TIFF", {}), "webp": ("WEBP", {"lossless": True})}  # fmt: skip
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, RGB.shape, dtype=np.uint8)
  cut = {}
  for suffix, (kind, options) in whole.items():
    data = save(noise, kind, **options)
    cut[f"cut.{suffix}"] = data[: len(data) // 2]
  return {
    **cut,
    "page.jpg": b"<html>not found</html>",
    "empty.jpg": b"",
    "bomb.png": bomb(9_500),  # 90 million pixels
    "bomb_of_pil.png": bomb(20_000),
  }


PICTURES, REFUSED = pictures(), refused()
# The build stores these as they are: JPEG, RGB or grey, upright. All others it encodes anew.
