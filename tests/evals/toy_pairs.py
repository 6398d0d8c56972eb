"""A model that prefers texts by chance, and files for the tests of composition."""

import json
import zlib

import numpy as np
from PIL import Image

from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import composition as sets


def random_unit(key):
  value = np.random.default_rng(zlib.crc32(str(key).encode())).normal(size=6)
  return (value / np.linalg.norm(value)).astype(np.float32)


def right(red, true, false):
  """Whether the fake model prefers `true` for the image of a red value."""
  image = random_unit(red)
  return bool(image @ random_unit(true) > image @ random_unit(false))


MODEL = Encoders(
  image=lambda images: np.stack([random_unit(i) for i in images[:, 4, 4, 0]]),
  text=lambda texts: np.stack([random_unit(t) for t in texts]),
  regions=None,
  size=8,
)


def write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def picture(path, red):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (12, 12), (red, 0, 0)).save(path, format="png")  # whatever the name says


def evaluate(name, root, **changes):
  lines = []
  options = Options(root=root, warn=lines.append, **changes)
  sets.check(name, options)
  return sets.run(MODEL, name, options), lines
