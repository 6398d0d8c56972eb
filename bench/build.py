"""`python -m bench.build [--json]`: records a second of `data.build`, and its memory.

JPEGs of 500 x 400 pixels with a caption and three regions, in a folder that is made here. One and
two worker processes and, where Ray is installed, a cluster of this machine, in turn; then the
memory of a build of ten times as many lines (of the same few pictures, one pixel a side).
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from grain_jax import cli

_REGIONS = [{"description": "a thing", "box": [0.1, 0.1, 0.6, 0.7], "score": 0.5}] * 3
_CODE = "import sys; from grain_jax.data import build; sys.exit(build.main(sys.argv[1:]))"


def make_folder(root: pathlib.Path, count: int, *, size: tuple[int, int] = (500, 400)) -> None:
  """A folder for --source=folder, of 40 pictures under `count` names."""
  root.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(min(count, 40)):
    small = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC), int)
    noisy = np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(root / f"{i:07d}.jpg", quality=90)
  with (root / "annotations.jsonl").open("w") as lines:
    for i in range(count):
      path = root / f"{i:07d}.jpg"
      if not path.exists():
        os.link(root / f"{i % 40:07d}.jpg", path)
      line = {"image": path.name, "captions": [f"picture {i} of a thing on a table"]}
      lines.write(json.dumps({**line, "regions": _REGIONS}) + "\n")


def run(folder: pathlib.Path, out: pathlib.Path, *options: str) -> tuple[float, int]:
  """(seconds, largest resident memory of a process in bytes) of a build, without what starts it."""
  command = [sys.executable, "-c", _CODE, "--source=folder", f"--input={folder}", f"--out={out}"]
  began = time.monotonic()
  done = subprocess.run([*command, *options], capture_output=True, text=True)
  seconds = time.monotonic() - began
  if done.returncode:
    last = (done.stderr.strip() or "no output").splitlines()[-1]
    raise ValueError(f"the build ended with code {done.returncode}: {last}")
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  shutil.rmtree(out)
  return seconds, peak


def measure(folder: pathlib.Path, *, records: int, rounds: int, ray: bool) -> dict[str, Any]:
  """{'records_per_second': {way: median}, 'two_over_one', 'memory_bytes': {records: largest}}."""
  make_folder(folder / "in", records)
  ways = {"one worker": ["--workers=1"], "two workers": ["--workers=2"]}
  if ray:
    ways["Ray"] = ["--ray_address=local"]
  taken: dict[str, list[float]] = {way: [] for way in ways}
  for _ in range(rounds):
    for way, options in ways.items():
      seconds, _ = run(folder / "in", folder / "out", *options)
      taken[way].append(seconds)
      print(f"{way}: {records / seconds:.0f} records/s", file=sys.stderr, flush=True)
  rates = {way: records / statistics.median(times) for way, times in taken.items()}
  return {
    "records": records,
    "records_per_second": rates,
    "two_over_one": rates["two workers"] / rates["one worker"],
  }


def memory(folder: pathlib.Path, *, records: int) -> dict[int, int]:
  """{records: largest resident memory in bytes} of builds of so many and of ten times as many."""
  found = {}
  for count in (records, 10 * records):
    make_folder(folder / str(count), count, size=(1, 1))
    program = "import sys; from bench import build; print(build.run_alone(*sys.argv[1:]))"
    done = subprocess.run(
      [sys.executable, "-c", program, str(folder / str(count)), str(folder / "out")],
      capture_output=True, text=True, check=True,
    )  # fmt: skip
    found[count] = int(done.stdout.split()[-1])
    shutil.rmtree(folder / str(count))
  return found


def run_alone(folder: str, out: str) -> int:
  """Of a process that does nothing else, for the memory of its children is the largest of all."""
  return run(pathlib.Path(folder), pathlib.Path(out), "--workers=1")[1]


def main() -> None:
  flag = flags.FLAGS
  with tempfile.TemporaryDirectory(dir=flag.folder or None) as name:
    folder = pathlib.Path(name)
    found = measure(folder, records=flag.records, rounds=flag.rounds, ray=flag.ray)
    found["memory_bytes"] = memory(folder, records=flag.records)
  if flag.json:
    print(json.dumps(found))
    return
  for way, rate in found["records_per_second"].items():
    print(f"{way:12} {rate:7.0f} records/s")
  print(f"two workers over one: {found['two_over_one']:.2f}")
  for count, size in found["memory_bytes"].items():
    print(f"{count:,} lines: {size / 2**20:.0f} MiB at most")


if __name__ == "__main__":
  flags.DEFINE_integer("records", 8000, "JPEGs to build.")
  flags.DEFINE_integer("rounds", 3, "Times that each way is measured, in turn.")
  flags.DEFINE_bool("ray", False, "Measure a Ray cluster of this machine too.")
  flags.DEFINE_string("folder", "", "Folder to work in; the system's own by default.")
  flags.DEFINE_bool("json", False, "One JSON object on stdout.")
  cli.run(main)
