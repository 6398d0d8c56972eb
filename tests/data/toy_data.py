"""Small datasets for the tests of data: images of coloured rectangles, and whatever is wrong."""

import io

import numpy as np
from PIL import Image

from configs import common
from grain_jax import schema
from grain_jax.data import build
from grain_jax.data.sources import base

COLORS = {
  "red": (220, 30, 30),
  "green": (30, 200, 60),
  "blue": (40, 60, 230),
  "pink": (250, 140, 190),
}


def jpeg(pixels):
  encoded = io.BytesIO()
  Image.fromarray(np.asarray(pixels, np.uint8)).save(encoded, "JPEG", quality=95, subsampling=0)
  return encoded.getvalue()


def record(index, *, size=48, regions=None, **changes):
  """An image of up to four rectangles side by side; the texts name their colours."""
  rng = np.random.default_rng(index)
  pixels = np.full((size, size, 3), 255, np.uint8)
  names = list(COLORS)[: rng.integers(1, 5) if regions is None else regions]
  entries = []
  for i, name in enumerate(names):
    top, left = int(rng.integers(2, size // 2)), i * size // 4 + 1
    bottom, right = top + size // 3, left + size // 5
    pixels[top:bottom, left:right] = COLORS[name]
    box = tuple(float(x) / size for x in (top, left, bottom, right))
    score = float(np.float32(rng.random()))
    entries.append({"description": f"a {name} box", "box": box, "score": score, "negatives": []})
  return {
    schema.RECORD_KEY: f"r{index}",
    schema.RECORD_IMAGE: jpeg(pixels),
    schema.RECORD_CAPTIONS: [
      f"{' and '.join(names) or 'nothing'}, number {index}",
      f"picture {index}",
    ],
    schema.RECORD_REGIONS: entries,
    schema.RECORD_NEGATIVES: [],
    **changes,
  }


def source(records, *, name="toy", **options):
  """A source of (split, record) pairs, or of records of the split train."""
  pairs = [r if isinstance(r, tuple) else ("train", r) for r in records]
  options = {"about": {}, "settings": {"records": len(pairs)}, **options}
  return base.Source(name=name, read=lambda: iter(pairs), **options)


def quiet(line):
  """Takes the lines of progress."""


def built(directory, records, *, shard_size=4, overwrite=False, allow_dropped=1.0, **options):
  """Builds records of which, in a toy, most may be bad."""
  build.build(
    source(records, **options), directory, shard_size=shard_size, workers=2, say=quiet,
    overwrite=overwrite, allow_dropped=allow_dropped,
  )  # fmt: skip
  return directory


def config(directory, **data):
  c = common.get_config()
  c.batch_size, c.eval_batch_size, c.model.image.size = 4, 4, 48
  c.data.dir, c.data.row_length, c.data.threads, c.data.max_regions = str(directory), 64, 1, 3
  c.data.update(data)
  return c


def take(batches, count):
  """The next `count` batches."""
  return [next(batches) for _ in range(count)]


def assert_equal(a, b):
  """Both hold the same batches, bit for bit."""
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name], err_msg=name)
