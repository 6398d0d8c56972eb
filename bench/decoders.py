"""`python -m bench.decoders [--json]`: decoders and resizers of images beside Pillow's.

Of each that is installed: CPU time an image, one thread, and how far its pixels are from Pillow's:
the largest difference in steps of 1/255, and the part of all values that differs by more than one
step. Decoding is that of JPEGs to RGB, whole and at half size; resizing is Pillow's pixels at half
size to the model's side, bicubic with antialiasing. None but Pillow need be installed:

  pip install --target=SITE simplejpeg PyTurboJPEG imagecodecs opencv-python-headless \\
    cykooz-resizer pyvips pyvips-binary

and PYTHONPATH=SITE. pillow-simd stands in Pillow's place: `--save=FILE` keeps Pillow's pixels, and
with `--against=FILE` and pillow-simd on PYTHONPATH the rows of `pillow` are pillow-simd's.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from bench import input_pipeline_sides
from grain_jax import helptext

Pixels = np.ndarray  # u8 [H, W, 3]


def _pillow() -> dict[str, Callable]:
  def decode(data: bytes, reduction: int) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
      if reduction > 1:
        image.draft("RGB", (image.size[0] // reduction, image.size[1] // reduction))
      return np.asarray(image)

  def resize(image: Image.Image, side: int) -> Pixels:
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))

  return {"decode": decode, "resize_image": resize}


def _simplejpeg() -> dict[str, Callable]:
  import simplejpeg

  def decode(data: bytes, reduction: int) -> Pixels:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    least = dict(min_height=height // reduction, min_width=width // reduction)
    least = least if reduction > 1 else {}
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, **least)

  return {"decode": decode}


def _turbojpeg() -> dict[str, Callable]:
  import turbojpeg

  library = turbojpeg.TurboJPEG()  # of the system

  def decode(data: bytes, reduction: int) -> Pixels:
    return library.decode(data, turbojpeg.TJPF_RGB, scaling_factor=(1, reduction))

  return {"decode": decode}


def _imagecodecs() -> dict[str, Callable]:
  import imagecodecs

  def decode(data: bytes, reduction: int) -> Pixels | None:
    return imagecodecs.jpeg8_decode(data) if reduction == 1 else None  # whole alone

  return {"decode": decode}


def _opencv() -> dict[str, Callable]:
  import cv2

  cv2.setNumThreads(1)
  flags = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2}

  def decode(data: bytes, reduction: int) -> Pixels:
    return cv2.cvtColor(
      cv2.imdecode(np.frombuffer(data, np.uint8), flags[reduction]), cv2.COLOR_BGR2RGB
    )

  def resize(pixels: Pixels, side: int) -> Pixels:
    return cv2.resize(pixels, (side, side), interpolation=cv2.INTER_CUBIC)

  return {"decode": decode, "resize": resize}


def _tensorflow() -> dict[str, Callable]:
  from grain_jax.data.host_tensorflow import tf

  tf.config.threading.set_intra_op_parallelism_threads(1)
  tf.config.threading.set_inter_op_parallelism_threads(1)

  def decode(data: bytes, reduction: int) -> Pixels:
    return tf.io.decode_jpeg(
      data, channels=3, ratio=reduction, dct_method="INTEGER_ACCURATE", fancy_upscaling=True
    ).numpy()

  def resize(pixels: Pixels, side: int) -> Pixels:
    made = tf.image.resize(pixels, (side, side), method="bicubic", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(made), 0, 255), tf.uint8).numpy()

  return {"decode": decode, "resize": resize}


def _torch() -> dict[str, Callable]:
  import torch

  torch.set_num_threads(1)

  def resize(pixels: Pixels, side: int) -> Pixels:
    with torch.inference_mode():
      batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
      made = torch.nn.functional.interpolate(batch, (side, side), mode="bicubic", antialias=True)
      return made[0].permute(1, 2, 0).numpy()

  return {"resize": resize}


def _cykooz_resizer() -> dict[str, Callable]:
  import cykooz_resizer as cykooz

  resizer = cykooz.Resizer()
  algorithm = cykooz.ResizeAlg.convolution(cykooz.FilterType.catmull_rom)
  options = cykooz.ResizeOptions(resize_alg=algorithm, use_alpha=False)

  def resize(image: Image.Image, side: int) -> Pixels:
    made = Image.new("RGB", (side, side))
    resizer.resize_pil(image, made, options)
    return np.asarray(made)

  return {"resize_image": resize}


def _pyvips() -> dict[str, Callable]:
  import os

  os.environ["VIPS_CONCURRENCY"] = "1"
  import pyvips

  def decode(data: bytes, reduction: int) -> Pixels:
    return pyvips.Image.jpegload_buffer(data, shrink=reduction).numpy()

  def resize(pixels: Pixels, side: int) -> Pixels:
    image = pyvips.Image.new_from_array(pixels)
    return image.resize(side / image.width, vscale=side / image.height, kernel="cubic").numpy()

  return {"decode": decode, "resize": resize}


CANDIDATES: dict[str, Callable[[], dict[str, Callable]]] = {
  "pillow": _pillow,
  "simplejpeg": _simplejpeg,
  "turbojpeg": _turbojpeg,
  "imagecodecs": _imagecodecs,
  "opencv": _opencv,
  "tensorflow": _tensorflow,
  "torch": _torch,
  "cykooz_resizer": _cykooz_resizer,
  "pyvips": _pyvips,
}


def difference(found: Sequence[Pixels], wanted: Sequence[Pixels]) -> dict[str, float]:
  """{'largest': in 1/255, 'beyond_one': part of the values that differ by more than one}."""
  steps = [np.abs(f.astype(np.int16) - w) for f, w in zip(found, wanted, strict=True)]
  beyond = sum(int((s > 1).sum()) for s in steps) / sum(s.size for s in steps)
  return {"largest": max(int(s.max()) for s in steps), "beyond_one": round(beyond, 9)}


def work(
  candidate: dict[str, Callable], files: Sequence[bytes], half: Sequence[Pixels], side: int
) -> dict[str, Callable]:
  """{kind: function that does it to all files, or pixels at half size, and returns pixels}."""
  arrays = [pixels.copy() for pixels in half]
  small = [Image.fromarray(pixels) for pixels in arrays]
  found: dict[str, Callable] = {}
  if decode := candidate.get("decode"):
    found |= {
      "decode_whole": lambda: [decode(data, 1) for data in files],
      "decode_half": lambda: [decode(data, 2) for data in files],
    }
  if resize := candidate.get("resize"):
    found["resize"] = lambda: [resize(pixels, side) for pixels in arrays]
  if resize_image := candidate.get("resize_image"):
    found["resize"] = lambda: [resize_image(image, side) for image in small]
  return found


def measure(
  files: Sequence[bytes], *, side: int, rounds: int, against: dict[str, list[Pixels]] | None = None
) -> tuple[dict[str, Any], dict[str, list[Pixels]]]:
  """({candidate: {kind: {us, largest, beyond_one}} or why not}, Pillow's pixels).

  Args:
    files: JPEGs.
    side: that images are resized to, in pixels.
    rounds: of which the median counts; candidates take turns.
    against: pixels to compare with; None: those of this Pillow.
  """
  half = (against or {}).get("decode_half") or [_pillow()["decode"](d, 2) for d in files]
  jobs: dict[str, dict[str, Callable]] = {}
  result: dict[str, Any] = {}
  for name, open_candidate in CANDIDATES.items():
    try:
      jobs[name] = work(open_candidate(), files, half, side)
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or its library is not
      result[name] = f"not there: {' '.join(str(error).split())[:100]}"
  own = {kind: run() for kind, run in jobs["pillow"].items()}
  wanted = against or own
  times: dict[tuple[str, str], list[float]] = {}
  for number in range(-1, rounds):  # the first does not count
    for name, kinds in jobs.items():
      for kind, run in kinds.items():
        began = time.process_time()
        found = run()
        seconds = time.process_time() - began
        if found[0] is None:
          continue
        if number < 0:
          result.setdefault(name, {})[kind] = difference(found, wanted[kind])
        else:
          times.setdefault((name, kind), []).append(seconds)
  for (name, kind), seconds in times.items():
    result[name][kind]["us"] = round(statistics.median(seconds) / len(files) * 1e6)
  return result, own


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m bench.decoders", description=__doc__)
  parser.formatter_class = helptext.ArgparseFormatter
  parser.add_argument("--images", type=int, default=32, help="images of 640 x 480 to draw")
  parser.add_argument("--folder", default="", help="of JPEGs to read instead")
  parser.add_argument("--side", type=int, default=224, help="pixels to resize to")
  parser.add_argument("--rounds", type=int, default=7, help="of which the median counts")
  parser.add_argument("--save", default="", help=".npz for Pillow's pixels")
  parser.add_argument("--against", default="", help=".npz of pixels to compare with")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  flags = parser.parse_args(arguments)
  if flags.folder:
    paths = sorted(pathlib.Path(flags.folder).glob("*.jpg"))[: flags.images]
    files = [path.read_bytes() for path in paths]
  else:
    files = [input_pipeline_sides.draw(i, 640, 480) for i in range(flags.images)]
  against = None
  if flags.against:
    with np.load(flags.against) as stored:
      kinds = ("decode_whole", "decode_half", "resize")
      against = {kind: [stored[f"{kind}_{i}"] for i in range(len(files))] for kind in kinds}
  result, own = measure(files, side=flags.side, rounds=flags.rounds, against=against)
  if flags.save:
    arrays = {f"{kind}_{i}": p for kind, several in own.items() for i, p in enumerate(several)}
    np.savez(flags.save, **arrays)
  if flags.json:
    print(json.dumps(result))
    return
  for name, kinds in result.items():
    print(name, kinds if isinstance(kinds, str) else json.dumps(kinds))


if __name__ == "__main__":
  main()
