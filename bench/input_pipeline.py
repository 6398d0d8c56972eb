"""`python -m bench.input_pipeline [--json]`: our input pipeline beside a PyTorch DataLoader.

Both read the same JPEGs, squash them to the model's size, bicubic, turn the boxes of the best
regions into (cx, cy, w, h), and have caption and descriptions as ids of the same tokenizer in
packed rows. The peer is what one writes in PyTorch: a Dataset that opens a file with PIL, encodes
the texts and returns a dict of arrays, and a DataLoader with a worker a core. Ours reads
ArrayRecord shards, which hold the ids, by a worker process a core (`data.workers`), once as
configured by default (`data.reduced_decode`: a JPEG is decoded at half its size where that is
enough) and once decoding whole, as the peer does. No text comes twice in all that a side reads, as
in a large run.

Each side is a process of its own that is stopped while the others work; rounds go in turn. `cpu`
counts images per second of CPU time of all its threads and worker processes: what a core gives when
nothing else takes it. `wall` is images per second and core as the clock saw it. Then

  workers    images per second by the clock with 1, 2, ... workers, and how many times as many as
             with one: `speedup`; `speedup_cpu` by CPU time, which other work disturbs less
  serial_us  CPU time an image that only one thread of a process can spend: with workers all of the
             main process's, with threads what holds Python's lock (`lock_seconds`)
  follows    images per second of one process on so many cores: the cores' or, where it is less,
             what the serial share allows. The training step's own work is not in it.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags

from bench import input_pipeline_sides as sides_lib
from grain_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
CORES = (16, 64, 112)  # for which is said what follows
Found = dict[str, dict[str, list[float]]]


def say(line: str) -> None:
  """Progress; stdout is for the results."""
  print(line, file=sys.stderr, flush=True)


def counts(cores: int) -> list[int]:
  """Numbers of workers to try: powers of two below, and as many as cores."""
  return [n for n in (2**i for i in range(12)) if n < cores] + [cores]


def sides(cores: int) -> list[str]:
  """All sides; 'ours' are those with a worker a core."""
  ours = [f"ours_{n}" for n in counts(cores)]
  return [*ours, f"ours_whole_{cores}", "ours_0", "torch", "torch_reduced"]


def measure(folder: pathlib.Path, *, rounds: int, batches: int, **options: int) -> Found:
  """{side: {'wall', 'cpu', 'own': seconds of each round}}; own: the main process's CPU time."""
  found: Found = {s: {"wall": [], "cpu": [], "own": []} for s in sides(options["cores"])}
  workers = {
    side: subprocess.Popen(
      [
        sys.executable, "-m", "bench.input_pipeline", f"--serve={side}", f"--folder={folder}",
        *(f"--{name}={value}" for name, value in options.items()),
      ],
      cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )
    for side in found
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


def summary(found: Found, *, images: int, cores: int, lock_us: float) -> dict[str, Any]:
  """Speeds, ratios and what follows; see above.

  'ratio' is to the loader as people write it, the others to one that decodes as ours does.

  Args:
    found: of `measure`.
    images: in a round.
    cores: that the sides could use.
    lock_us: microseconds an image under Python's lock, with threads.
  """

  def seconds(side: str, kind: str) -> float:
    return statistics.median(found[side][kind])

  names = {
    "ours": f"ours_{cores}", "ours_whole": f"ours_whole_{cores}", "ours_threads": "ours_0",
    "torch": "torch", "torch_reduced": "torch_reduced",
  }  # fmt: skip
  result: dict[str, Any] = {}
  for kind, per in (("cpu", 1), ("wall", cores)):
    speed = {name: images / per / seconds(side, kind) for name, side in names.items()}
    speed["ratio"] = speed["ours"] / speed["torch"]
    speed["ratio_whole"] = speed["ours_whole"] / speed["torch"]
    speed["ratio_reduced"] = speed["ours"] / speed["torch_reduced"]
    result[f"images_per_s_per_core_{kind}"] = {k: round(v, 3) for k, v in speed.items()}
  result["workers"] = {
    n: {
      "images_per_s": round(images / seconds(f"ours_{n}", "wall"), 1),
      "speedup": round(seconds("ours_1", "wall") / seconds(f"ours_{n}", "wall"), 3),
      "speedup_cpu": round(n * seconds("ours_1", "cpu") / seconds(f"ours_{n}", "cpu"), 3),
    }
    for n in counts(cores)
  }
  own_us = seconds(names["ours"], "own") / images * 1e6
  result["serial_us"] = {"workers": round(own_us, 2), "threads": round(lock_us, 1)}
  speed = result["images_per_s_per_core_cpu"]
  result["follows"] = {
    n: {
      "workers": round(min(n * speed["ours"], 1e6 / own_us)),
      "threads": round(min(n * speed["ours_threads"], 1e6 / lock_us)),
    }
    for n in CORES
  }
  return result


def main() -> None:
  flag = flags.FLAGS
  options = {"batch": flag.batch, "size": flag.size, "cores": flag.cores or _cores()}
  if flag.serve:
    sides_lib.serve(flag.serve, flag.folder, **options)
    return
  if min(flag.images, flag.batch, flag.rounds) < 1 or flag.images < flag.batch:
    raise ValueError(
      f"--images={flag.images} must be at least --batch={flag.batch}, both positive."
    )
  with tempfile.TemporaryDirectory() as name:
    folder, batches = pathlib.Path(name), flag.images // flag.batch
    records = (flag.rounds + 2) * flag.images  # what is made ahead is of new ones too
    say(f"drawing {flag.images} images of {flag.width} x {flag.height} for {records} records")
    sides_lib.make_data(
      folder, images=flag.images, width=flag.width, height=flag.height, records=records
    )
    lock = sides_lib.lock_seconds(folder, batch=flag.batch, size=flag.size, batches=batches)
    found = measure(folder, rounds=flag.rounds, batches=batches, **options)
  result = summary(found, images=batches * flag.batch, cores=options["cores"], lock_us=lock * 1e6)
  result["settings"] = {
    **options, "images": flag.images, "width": flag.width, "height": flag.height,
    "distinct_texts": records * (1 + 7), "rounds": flag.rounds, "machine": platform.machine(),
    "load": round(os.getloadavg()[0], 2),
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
  flags.DEFINE_integer("images", 512, "Images to draw; a round reads as many records.")
  flags.DEFINE_integer("width", 640, "Of the images in pixels.")
  flags.DEFINE_integer("height", 480, "Of the images in pixels.")
  flags.DEFINE_integer("size", 224, "Side of the model's images in pixels.")
  flags.DEFINE_integer("batch", 64, "Images a batch.")
  flags.DEFINE_integer("cores", 0, "Workers of ours and of the peer; 0: as many as cores.")
  flags.DEFINE_integer("rounds", 5, "Rounds, of which the median counts.")
  flags.DEFINE_string("serve", "", "For the processes of the sides; not given by default.")
  flags.DEFINE_string("folder", "", "For the processes of the sides; not given by default.")
  cli.run(main)
