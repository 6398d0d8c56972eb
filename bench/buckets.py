"""Runs from a bucket to a bucket, killed while it fails, against one on a disk, bit for bit.

`python -m bench.buckets --json [--kills=N]` starts an emulator of Google Cloud Storage
(requirements-test.txt), trains the tiny model of `bench.kills` once on a disk, and N times from gs://
to gs://, with a SIGKILL after a random step and requests that are answered 429 and 503, cut off or
late. It compares every array of the final states, and counts requests.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from bench import kills, loopback_bucket
from grain_jax import helptext

_FLAGS = ("--config.evals=()",)
# Some requests of each library fail, and all are late.
_FAULTS = (
  {"match": "checkpoints.*alt=media", "status": 503, "times": 3},
  {"match": "POST.*checkpoints", "status": 429, "times": 3},
  {"match": "scenes.*alt=media", "cut": 5, "times": 3},
  {"match": "PUT", "status": 503, "times": 3},
  {"match": ".", "delay": 0.02},
)


def _wait_for_step(process: subprocess.Popen, logs: pathlib.Path, step: int) -> None:
  """Returns when the run has said that it did `step`."""
  said = re.compile(rf"^step +{step}/", re.M)
  while not said.search((logs / "stdout.txt").read_text()):
    if process.poll() is not None:
      kills.finish(process, logs)
      raise RuntimeError(f"the run ended before step {step}")
    time.sleep(0.01)


def measure(folder: pathlib.Path, *, count: int, seed: int, say: Any = print) -> dict[str, Any]:
  """The comparison: {'kills', 'steps', 'killed_after', 'resumed_from', 'equal', ...}."""
  rng = np.random.default_rng(seed)
  kills.build_scenes(folder / "scenes")
  kills.finish(kills.start(folder / "scenes", folder / "disk", *_FLAGS), folder / "disk")
  whole = kills.final_state(folder / "disk")
  result: dict[str, Any] = {"kills": count, "steps": kills.STEPS, "arrays": len(whole)}
  killed, resumed, different, requests = [], [], [], []
  with loopback_bucket.serve(folder / "emulator") as bucket:
    bucket.create("test")
    os.environ.update(bucket.environment, TF_CPP_MIN_LOG_LEVEL="3")
    script = (
      "import pathlib; from grain_jax import places\n"
      f"places.upload(pathlib.Path({str(folder / 'scenes')!r}), places.at('gs://test/scenes'))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=kills.ROOT, check=True)
    for run in range(count):
      step, before = int(rng.integers(1, kills.STEPS)), len(bucket.requests())
      logs, workdir = folder / f"logs-{run}", bucket.buckets / "test" / f"run-{run}"
      flags = (*_FLAGS, f"--workdir=gs://test/run-{run}", f"--config.data.local_copy={logs}/ssd")
      bucket.fail(*_FAULTS)
      process = kills.start("gs://test/scenes", logs, *flags)
      _wait_for_step(process, logs, step + 1)  # the line of a step comes with the next one
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      whole_ones = [p.parent.name for p in workdir.glob("checkpoints/*/commit_success.txt")]
      bucket.fail(*_FAULTS)
      kills.finish(kills.start("gs://test/scenes", logs, *flags), logs)
      bucket.fail()
      found = kills.differences(whole, kills.final_state(workdir))
      different += [f"run {run}: {name}" for name in found]
      killed.append(step)
      resumed.append(max(map(int, whole_ones)))
      requests.append(len(bucket.requests()) - before)
      say(
        f"run {run}: killed after step {step}, went on from {resumed[-1]}, {requests[-1]} requests"
      )
  result |= {"killed_after": killed, "resumed_from": resumed, "requests": requests}
  return result | {"equal": not different, "different": different}


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m bench.buckets", description=__doc__)
  parser.formatter_class = helptext.ArgparseFormatter
  parser.add_argument("--kills", type=int, default=3, help="runs that are killed")
  parser.add_argument("--seed", type=int, help="of the steps; by default the time")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  flags = parser.parse_args(arguments)
  flags.seed = int(time.time()) if flags.seed is None else flags.seed
  logging.set_verbosity(logging.ERROR)  # Orbax misses files that nothing here needs
  with tempfile.TemporaryDirectory() as folder:
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    result = measure(pathlib.Path(folder), count=flags.kills, seed=flags.seed, say=say)
  result["seed"] = flags.seed
  if flags.json:
    print(json.dumps(result))
  else:
    verdict = "equal, bit for bit" if result["equal"] else f"DIFFERENT: {result['different']}"
    print(f"{result['kills']} killed runs of {result['steps']} steps: {verdict}.")
  sys.exit(not result["equal"])


if __name__ == "__main__":
  main()
