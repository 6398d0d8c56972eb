"""`python -m bench.input_pipeline [--json]`: our input pipeline beside a PyTorch DataLoader.

Both read the same JPEGs, squash them to the model's size, bicubic, turn the boxes of the best
regions into (cx, cy, w, h), and encode caption and descriptions with the same tokenizer into packed
rows. The peer is what one writes in PyTorch: a Dataset that opens a file with PIL and returns a
dict of arrays, and a DataLoader with a worker a core. Ours reads ArrayRecord shards through
tf.data, once as configured by default (`data.reduced_decode`: a JPEG is decoded at half its size
where that is enough) and once decoding whole, as the peer does.

Each side is a process of its own that is stopped while the others work; rounds go in turn. `cpu`
counts images per second of CPU time of all its threads and worker processes: what a core gives when
nothing else takes it. `wall` is images per second and core as the clock saw it.

The few texts of these images come again in every round, so our side finds them in the tokenizer's
cache. `bench.long_texts` measures the work on texts that are all new, as those of a large run are.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags
from PIL import Image, ImageFilter

from grain_jax import cli
from grain_jax.data.sources import base

ROOT = pathlib.Path(__file__).parent.parent
SIDES = ("ours", "ours_whole", "torch", "torch_reduced")
REGIONS = 5
ROW_LENGTH = 128


def say(line: str) -> None:
  """Progress; stdout is for the results."""
  print(line, file=sys.stderr, flush=True)


def draw(index: int, width: int, height: int) -> bytes:
  """A JPEG with the spectrum of a photograph, more or less: noise at four scales, quality 90."""
  rng = np.random.default_rng(index)
  pixels = np.zeros((height, width, 3))
  for less in (64, 16, 4, 1):
    noise = rng.integers(0, 256, (-(-height // less), -(-width // less), 3), np.uint8)
    layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    pixels += np.asarray(layer.filter(ImageFilter.GaussianBlur(1)), float) * less**0.5
  pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
  encoded = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8)).save(encoded, "JPEG", quality=90)
  return encoded.getvalue()


def make_data(folder: pathlib.Path, *, images: int, width: int, height: int) -> None:
  """`files/` with JPEGs and records.json for the peer, `shards/` for us: the same records."""
  from grain_jax import schema
  from grain_jax.data import build

  rng, records = np.random.default_rng(0), []
  files = folder / "files"
  files.mkdir()
  for i in range(images):
    data = draw(i, width, height)
    (files / f"{i}.jpg").write_bytes(data)
    low = rng.uniform(0, 0.6, (7, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.4, (7, 2))], axis=1)
    regions = [
      {
        "description": f"a small green thing of kind {rng.integers(100)}",
        "box": tuple(float(x) for x in box),
        "score": float(rng.random()),
        "negatives": [],
      }
      for box in boxes
    ]
    caption = f"picture {i} of seven things on a table in front of a window, with a red curtain"
    records.append(
      {
        schema.RECORD_KEY: str(i),
        schema.RECORD_IMAGE: data,
        schema.RECORD_CAPTIONS: [caption],
        schema.RECORD_REGIONS: regions,
        schema.RECORD_NEGATIVES: [],
      }
    )
  source = base.Source(
    name="bench", read=lambda: (("train", r) for r in records), about={}, settings={}
  )
  build.build(source, folder / "shards", shard_size=128, workers=1, say=lambda line: None)
  bare = [{k: v for k, v in r.items() if k != schema.RECORD_IMAGE} for r in records]
  (folder / "records.json").write_text(json.dumps(bare))


def ours(
  folder: pathlib.Path, *, batch: int, size: int, cores: int, reduced: bool
) -> Iterator[Any]:
  """Our batches without end."""
  from configs import common
  from grain_jax.data import pipeline

  config = common.get_config()
  config.batch_size, config.model.image.size = batch, size
  config.data.update(dir=str(folder / "shards"), threads=cores, reduced_decode=reduced)
  config.data.update(row_length=ROW_LENGTH, max_regions=REGIONS, caption="original", prefetch=2)
  return pipeline.train_batches(config.data.dir, config)


def peer(
  folder: pathlib.Path, *, batch: int, size: int, cores: int, reduced: bool = False
) -> Iterator[Any]:
  """Batches of a DataLoader without end; `reduced` decodes at 1/2, 1/4 or 1/8 as ours does."""
  import torch

  from grain_jax import schema, tokenizer

  records = json.loads((folder / "records.json").read_text())
  tokens = tokenizer.Tokenizer()

  class Images(torch.utils.data.Dataset):
    """One example at a time: dict of arrays."""

    def __len__(self) -> int:
      return len(records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
      record = records[index]
      with Image.open(folder / "files" / f"{index}.jpg") as image:
        if reduced:
          image.draft("RGB", (size, size))
        pixels = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
      regions = sorted(record[schema.RECORD_REGIONS], key=lambda r: -r["score"])
      regions = regions[:REGIONS]
      y0, x0, y1, x1 = np.array([r["box"] for r in regions], np.float32).T
      texts = [record[schema.RECORD_CAPTIONS][0]]
      texts += [r["description"] for r in regions]
      packed = tokens.pack(texts, row_length=ROW_LENGTH, regions=REGIONS, negatives=0)
      boxes = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], axis=-1)
      fields = {k: v for k, v in packed._asdict().items() if isinstance(v, np.ndarray)}
      return {"image": np.array(pixels), "boxes": boxes, **fields}

  loader = torch.utils.data.DataLoader(
    Images(), batch, shuffle=True, num_workers=cores, drop_last=True, persistent_workers=cores > 0
  )
  while True:
    yield from loader


def cpu_seconds() -> float:
  """CPU time of this process and of those of its children that still run."""
  own = resource.getrusage(resource.RUSAGE_SELF)
  total, ticks = own.ru_utime + own.ru_stime, os.sysconf("SC_CLK_TCK")
  while True:
    try:
      return total + sum(_ticks_of_children()) / ticks
    except (FileNotFoundError, ProcessLookupError):
      if not pathlib.Path(f"/proc/self/task/{os.getpid()}/children").exists():
        raise  # this kernel does not say
      # Else a thread or a child ended meanwhile, and what the thread had is another's now.


def _ticks_of_children() -> Iterator[int]:
  for task in pathlib.Path("/proc/self/task").iterdir():
    for child in (task / "children").read_text().split():
      after = pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
      yield int(after[11]) + int(after[12])


def serve(side: str, folder: str, batch: int, size: int, cores: int) -> None:
  """A side's process: a line 'N' on stdin is N batches more; answers with what they took."""
  options = {"batch": batch, "size": size, "cores": cores}
  if side.startswith("torch"):
    batches = peer(pathlib.Path(folder), reduced=side == "torch_reduced", **options)
  else:
    batches = ours(pathlib.Path(folder), reduced=side == "ours", **options)
  for line in sys.stdin:
    began, busy = time.perf_counter(), cpu_seconds()
    for _ in range(int(line)):
      next(batches)
    answer = {"wall": time.perf_counter() - began, "cpu": cpu_seconds() - busy}
    print(json.dumps(answer), flush=True)
  os._exit(0)  # its threads and workers end with it


def measure(folder: pathlib.Path, *, rounds: int, batches: int, **options: int) -> dict[str, Any]:
  """{side: {'wall': s of each round, 'cpu': s of each round}}."""
  found: dict[str, dict[str, list[float]]] = {s: {"wall": [], "cpu": []} for s in SIDES}
  workers = {
    side: subprocess.Popen(
      [
        sys.executable, "-m", "bench.input_pipeline", f"--serve={side}", f"--folder={folder}",
        *(f"--{name}={value}" for name, value in options.items()),
      ],
      cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )
    for side in SIDES
  }  # fmt: skip
  try:
    for number in range(-1, rounds):  # the first does not count: imports, workers, page cache
      for side, worker in workers.items():
        os.killpg(worker.pid, signal.SIGCONT)
        worker.stdin.write(f"{batches}\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
          raise RuntimeError(f"the side {side!r} ended with code {worker.wait()}; see above.")
        os.killpg(worker.pid, signal.SIGSTOP)  # or it would work ahead in the others' time
        for kind, seconds in json.loads(line).items():
          if number >= 0:
            found[side][kind].append(seconds)
      say(f"round {number + 1} of {rounds}")
  finally:
    for worker in workers.values():
      if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
      worker.communicate()
  return found


def summary(found: dict[str, Any], *, images: int, cores: int) -> dict[str, Any]:
  """Images per second of CPU, and per second and core by the clock; ratios to torch.

  'ratio' is to the loader as people write it, the others to one that decodes as ours does.

  Args:
    found: of `measure`.
    images: in a round.
    cores: that the sides could use.
  """
  result: dict[str, Any] = {}
  for kind, per in (("cpu", 1), ("wall", cores)):
    speed = {side: images / per / statistics.median(found[side][kind]) for side in SIDES}
    speed["ratio"] = speed["ours"] / speed["torch"]
    speed["ratio_whole"] = speed["ours_whole"] / speed["torch"]
    speed["ratio_reduced"] = speed["ours"] / speed["torch_reduced"]
    result[f"images_per_s_per_core_{kind}"] = {k: round(v, 3) for k, v in speed.items()}
  return result


def main() -> None:
  flag = flags.FLAGS
  options = {"batch": flag.batch, "size": flag.size, "cores": flag.cores or _cores()}
  if flag.serve:
    serve(flag.serve, flag.folder, **options)
    return
  if min(flag.images, flag.batch, flag.rounds) < 1 or flag.images < flag.batch:
    raise ValueError(
      f"--images={flag.images} must be at least --batch={flag.batch}, both positive."
    )
  with tempfile.TemporaryDirectory() as folder:
    say(f"drawing {flag.images} images of {flag.width} x {flag.height}")
    make_data(pathlib.Path(folder), images=flag.images, width=flag.width, height=flag.height)
    batches = flag.images // flag.batch
    found = measure(pathlib.Path(folder), rounds=flag.rounds, batches=batches, **options)
  result = summary(found, images=batches * flag.batch, cores=options["cores"])
  result["settings"] = {
    **options, "images": flag.images, "width": flag.width, "height": flag.height,
    "rounds": flag.rounds, "machine": platform.machine(), "load": round(os.getloadavg()[0], 2),
  }  # fmt: skip
  if flag.json:
    print(json.dumps(result))
    return
  for name, values in result.items():
    print(name, ", ".join(f"{k} {v}" for k, v in values.items()))


def _cores() -> int:
  affinity = getattr(os, "sched_getaffinity", None)
  return len(affinity(0)) if affinity else os.cpu_count() or 1


if __name__ == "__main__":
  flags.DEFINE_bool("json", False, "One JSON object on stdout.")
  flags.DEFINE_integer("images", 512, "Images to draw; a round reads all.")
  flags.DEFINE_integer("width", 640, "Of the images in pixels.")
  flags.DEFINE_integer("height", 480, "Of the images in pixels.")
  flags.DEFINE_integer("size", 224, "Side of the model's images in pixels.")
  flags.DEFINE_integer("batch", 64, "Images a batch.")
  flags.DEFINE_integer("cores", 0, "Threads, and workers of the peer; 0: as many as cores.")
  flags.DEFINE_integer("rounds", 5, "Rounds, of which the median counts.")
  flags.DEFINE_enum(
    "serve", "", ("", *SIDES), "For the processes of the sides; not given by default."
  )
  flags.DEFINE_string("folder", "", "For the processes of the sides; not given by default.")
  cli.run(main)
