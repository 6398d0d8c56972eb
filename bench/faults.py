"""Faults done to real runs, against one that nothing disturbed, bit for bit.

`python -m bench.faults [--json] [--kills=50] [--only=lost_process,...]` trains a tiny model on some
scenes, in one process and in two, and does to it what machines do:

  kills         SIGKILL at random moments, start-up and saving included, until the run is through
  preempted     SIGTERM to one of two processes
  lost_process  SIGKILL of one of two processes
  slow_process  one of two processes stands still for half of the time
  late_process  the data of one of two stop coming, as where a mount is lost
  lost_storage  the shards of one of two processes are cut short, and mended
  full_disk     no file can grow while a checkpoint is written (RLIMIT_FSIZE)
  bad_shard     a shard of the data is overwritten between epochs, and mended
  elastic       SIGTERM to one of four processes; one, two and eight go on
  unshared_workdir  two processes do not see one folder behind --workdir
  two_runs      a second run is started in the workdir of one that goes on
  stale_handle  the one of two that reads the newest checkpoint meets stale handles

Each is started again as a launcher would, and must end with the arrays of the undisturbed run; on
another number of processes, whose sums have another order, with its losses to 1e-4.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging

from bench import kills as runs
from bench import several, workdir_faults
from grain_jax import helptext
from grain_jax.failures import EXIT_RESTART
from grain_jax.runtime import metrics

# `grain_jax.main` whose records come for {batches} batches and no longer.
_STUCK = """
import itertools, threading
from grain_jax import cli, main
from grain_jax.data import examples

chunk, batch = examples.Examples.chunk, itertools.count()


def stuck(*arguments):
  if next(batch) >= {batches}:
    threading.Event().wait()
  return chunk(*arguments)


examples.Examples.chunk = stuck
cli.run(main.main)
"""
Say = Callable[[str], None]


class Faults:
  """The scenarios; every method returns {'equal': ..., what was seen}."""

  def __init__(self, folder: pathlib.Path, *, kills: int, seed: int, say: Say = print):
    self.folder, self.kills, self.say = folder, kills, say
    self.rng = random.Random(seed)
    self.data = folder / "scenes"
    self._states: dict[int, dict[str, Any]] = {}
    if not self.data.exists():
      runs.build_scenes(self.data)

  def undisturbed(self, processes: int) -> dict[str, Any]:
    """Final arrays of a run left alone, made once."""
    if processes not in self._states:
      workdir, began = self.folder / f"undisturbed-{processes}", time.monotonic()
      if processes == 1:
        runs.finish(runs.start(self.data, workdir, *several.FLAGS), workdir)
      else:
        several.finish_pair(self.data, workdir)
      self.say(f"undisturbed, {processes} process(es): {time.monotonic() - began:.0f} s")
      self._states[processes] = runs.final_state(workdir)
    return self._states[processes]

  def compare(self, workdir: pathlib.Path, processes: int) -> dict[str, Any]:
    """The final arrays of a run against those of an undisturbed one."""
    different = runs.differences(self.undisturbed(processes), runs.final_state(workdir))
    return {"equal": not different, "different": different[:5]}

  def random_kills(self) -> dict[str, Any]:
    """`kills` SIGKILLs over runs of `STEPS` steps, each started again after each, to its end."""
    done, run, at, equal = 0, 0, [], []
    while done < self.kills:
      workdir, run = self.folder / f"killed-{run}", run + 1
      while done < self.kills:
        process, before = runs.start(self.data, workdir, *several.FLAGS), several.lines(workdir)
        # A third of the kills falls anywhere in the start-up, the others into training and saving.
        steps = self.rng.choice([0, 0, 1, 2, 3, 4, 5, 6])
        until = time.monotonic() + (self.rng.uniform(0, 20) if not steps else several.LONG)
        # A run that goes on begins with the lines up to its checkpoint, so it may have fewer.
        while process.poll() is None and time.monotonic() < until:
          if steps and several.lines(workdir) >= before + steps:
            time.sleep(self.rng.uniform(0, 0.2))
            break
          time.sleep(0.002)
        if process.poll() is not None:
          runs.finish(process, workdir)  # raises if it failed by itself
          break
        process.kill()
        process.wait()
        done += 1
        at.append(several.lines(workdir))
        self.say(f"kill {done}: after step {at[-1]}, checkpoints {runs.saved_steps(workdir)}")
      process = runs.start(self.data, workdir, *several.FLAGS)
      runs.finish(process, workdir)
      equal.append(self.compare(workdir, 1)["equal"])
    return {"equal": all(equal), "kills": done, "runs": run, "killed_after": at}

  def preempted(self) -> dict[str, Any]:
    """SIGTERM to one of two: both save the same step, and end with the code for a restart."""
    workdir = self.folder / "preempted"
    pair = several.start_pair(self.data, workdir)
    several.wait_for_step(4, workdir, *pair)
    began = time.monotonic()
    pair[1].terminate()
    codes = several.end(pair)
    seconds, saved = time.monotonic() - began, runs.saved_steps(workdir)
    self.say(f"preempted: codes {codes} after {seconds:.1f} s, checkpoint {saved[-1:]}")
    several.finish_pair(self.data, workdir)
    result = self.compare(workdir, 2)
    result |= {"codes": codes, "seconds": round(seconds, 1), "saved": saved[-1]}
    return result | {"equal": result["equal"] and codes == [EXIT_RESTART, EXIT_RESTART]}

  def lost_process(self) -> dict[str, Any]:
    """SIGKILL of either of two: the other ends within a bounded time and says why."""
    result: dict[str, Any] = {"equal": True}
    for victim in (0, 1):
      workdir = self.folder / f"lost-{victim}"
      pair = several.start_pair(self.data, workdir)
      several.wait_for_step(5, workdir, *pair)
      pair[victim].kill()
      began = time.monotonic()
      codes = several.end(pair)
      seconds, other = time.monotonic() - began, 1 - victim
      line = several.find_line(several.said(workdir, f"p{other}-"), "Start all again")
      self.say(f"process {victim} killed: the other ended with {codes[other]} in {seconds:.1f} s")
      several.finish_pair(self.data, workdir)
      same = self.compare(workdir, 2)["equal"]
      result["equal"] &= same and bool(line) and codes[other] not in (0, -signal.SIGKILL)
      result[f"process_{victim}"] = {
        "code_of_other": codes[other], "seconds": round(seconds, 1), "line": line, "equal": same,
      }  # fmt: skip
    return result

  def slow_process(self) -> dict[str, Any]:
    """One of two stands still for half of the time, from its first step on."""
    workdir = self.folder / "slow"
    pair = several.start_pair(self.data, workdir)
    several.wait_for_step(1, workdir, *pair)
    stops = 0
    while pair[0].poll() is None and pair[1].poll() is None:
      pair[1].send_signal(signal.SIGSTOP)
      time.sleep(0.5)
      pair[1].send_signal(signal.SIGCONT)
      stops += 1
      time.sleep(0.5)
    codes = several.end(pair)
    self.say(f"slow process: codes {codes} after {stops} stops")
    result = self.compare(workdir, 2)
    return result | {
      "codes": codes, "stops": stops, "equal": result["equal"] and codes == [0, 0],
    }  # fmt: skip

  def late_process(self) -> dict[str, Any]:
    """One of two waits for records that never come: both end with a line that names it."""
    workdir = self.folder / "late"
    soon, program = "--config.watchdog_seconds=20", ("-c", _STUCK.format(batches=6))
    pair = several.start_several(self.data, workdir, 2, soon, last=program)
    several.wait_for_step(4, workdir, *pair)
    began = time.monotonic()
    codes = several.end(pair)
    seconds, line = (
      time.monotonic() - began,
      several.find_line(several.said(workdir, "p0-"), "is late"),
    )
    self.say(f"late process: codes {codes} after {seconds:.1f} s: {line}")
    several.finish_several(self.data, workdir, 2, soon)
    result = self.compare(workdir, 2)
    named = "process 1 of 2" in line and "waits for the data" in line
    result |= {"codes": codes, "seconds": round(seconds, 1), "line": line}
    return result | {"equal": result["equal"] and named and codes == [EXIT_RESTART, EXIT_RESTART]}

  def lost_storage(self) -> dict[str, Any]:
    """One of two loses its data, on a mount of its own: both end, and the last checkpoint stays."""
    workdir = self.folder / "lost-storage"
    data = shutil.copytree(self.data, self.folder / "lost-scenes")
    ahead = "--config.data.prefetch=1"  # or all 12 steps are read before it shows
    pair = several.start_several(self.data, workdir, 2, ahead, last_data=data)
    several.wait_for_step(2, workdir, *pair)
    shards = {path: path.read_bytes() for path in data.rglob("*train*array_record*")}
    for path, whole in shards.items():
      os.truncate(path, len(whole) // 3)
    began = time.monotonic()
    codes = several.end(pair)
    seconds, kept = time.monotonic() - began, runs.saved_steps(workdir)
    lines = [several.find_line(several.said(workdir, f"p{i}-"), "cannot be read") for i in (0, 1)]
    self.say(f"lost storage: codes {codes} after {seconds:.1f} s, checkpoints {kept}: {lines[0]}")
    for path, whole in shards.items():
      path.write_bytes(whole)
    several.finish_several(self.data, workdir, 2, ahead)
    result = self.compare(workdir, 2)
    good = codes == [EXIT_RESTART, EXIT_RESTART] and bool(kept) and kept[-1] < 12 and all(lines)
    result |= {"codes": codes, "seconds": round(seconds, 1), "kept": kept, "line": lines[0]}
    return result | {"equal": result["equal"] and good}

  def full_disk(self) -> dict[str, Any]:
    """From the first checkpoint on no file can grow past 64 KiB, then there is room again."""
    workdir = self.folder / "full"
    process = runs.start(self.data, workdir, *several.FLAGS)
    several.wait_for_step(4, workdir, process)
    while not max(runs.saved_steps(workdir), default=0) and process.poll() is None:
      time.sleep(0.01)
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**16, hard))
    (code,), kept = several.end([process]), runs.saved_steps(workdir)
    line = several.find_line(several.said(workdir), "could not be written")
    self.say(f"full disk: code {code}, checkpoints {kept}: {line}")
    runs.finish(runs.start(self.data, workdir, *several.FLAGS), workdir)
    result = self.compare(workdir, 1)
    whole = bool(line) and code == EXIT_RESTART and bool(kept)
    return result | {"code": code, "kept": kept, "line": line, "equal": result["equal"] and whole}

  @contextlib.contextmanager
  def _overwritten_shard(self, data: pathlib.Path) -> Iterator[None]:
    """The largest shard of the training split with garbage in its middle, then whole again."""
    shard = max(data.rglob("*train*array_record*"), key=lambda p: p.stat().st_size)
    whole = shard.read_bytes()
    middle = len(whole) // 2
    with shard.open("r+b") as file:  # in place: the run holds it open
      file.seek(middle)
      file.write(self.rng.randbytes(4096))
    try:
      yield
    finally:
      with shard.open("r+b") as file:
        file.write(whole)

  def bad_shard(self) -> dict[str, Any]:
    """A shard overwritten after the first epoch: the run stops; mended, it goes on as if never."""
    workdir = self.folder / "bad-shard"
    data = shutil.copytree(self.data, self.folder / "bad-scenes")
    stop = (*several.FLAGS, "--config.data.on_bad_record=stop")
    whole = self.folder / "undisturbed-stop"  # on_bad_record is part of a run's identity
    runs.finish(runs.start(self.data, whole, *stop), whole)
    process = runs.start(data, workdir, *stop)
    several.wait_for_step(8, workdir, process)
    with self._overwritten_shard(data):
      (code,) = several.end([process])
    line = (
      several.find_line(several.said(workdir), "BadRecord")
      or several.said(workdir).strip().rsplit("\n", 1)[-1]
    )
    self.say(f"bad shard: code {code}: {line}")
    runs.finish(runs.start(data, workdir, *stop), workdir)
    different = runs.differences(runs.final_state(whole), runs.final_state(workdir))
    skipping = self.folder / "bad-shard-skip"
    process = runs.start(data, skipping, *several.FLAGS)
    several.wait_for_step(8, skipping, process)
    with self._overwritten_shard(data):
      (skipped,) = several.end([process])
    entries = metrics.read_jsonl(skipping / "metrics.jsonl")
    bad = sum(entry.get("train/bad_examples", 0) for entry in entries)
    self.say(f"bad shard, skipped: code {skipped}, {bad:.0f} bad examples")
    good = not different and code == 1 and skipped == 0 and bad > 0
    return {"equal": good, "code": code, "line": line, "skipped": {"code": skipped, "bad": bad}}

  def elastic(self) -> dict[str, Any]:
    """A run of four processes goes on as one of one, two and eight, with the losses of one.

    Of GRAIN: dropout and the host matcher would show an order of samples that is another.
    """
    grain = "--config.method=grain"
    whole, began = self.folder / "undisturbed-grain", self.folder / "elastic-4"
    runs.finish(runs.start(self.data, whole, *several.PAIR, grain), whole)
    want = several.losses(whole)
    four = several.start_several(self.data, began, 4, grain)
    several.wait_for_step(4, began, *four)
    four[3].terminate()
    codes, saved = several.end(four), runs.saved_steps(began)[-1]
    self.say(f"elastic: four processes ended with {codes}, checkpoint {saved}")
    result: dict[str, Any] = {"codes": codes, "saved": saved}
    for count in (1, 2, 8):
      workdir = shutil.copytree(began, self.folder / f"elastic-{count}")
      several.finish_several(self.data, workdir, count, grain)
      got = several.losses(workdir)
      far = max(abs(got.get(step, float("inf")) - loss) / loss for step, loss in want.items())
      result[f"{count}_processes"] = far
      self.say(f"elastic: {count} process(es) went on from {saved}; losses within {far:.1e}")
    near = all(result[f"{count}_processes"] < 1e-4 for count in (1, 2, 8))
    return result | {"equal": near and saved < max(want) and codes == [EXIT_RESTART] * 4}


SCENARIOS: dict[str, Callable[[Faults], dict[str, Any]]] = {
  "kills": Faults.random_kills,
  "preempted": Faults.preempted,
  "lost_process": Faults.lost_process,
  "slow_process": Faults.slow_process,
  "late_process": Faults.late_process,
  "lost_storage": Faults.lost_storage,
  "full_disk": Faults.full_disk,
  "bad_shard": Faults.bad_shard,
  "elastic": Faults.elastic,
  "unshared_workdir": workdir_faults.unshared_workdir,
  "two_runs": workdir_faults.two_runs,
  "stale_handle": workdir_faults.stale_handle,
}


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
  parser.formatter_class = helptext.ArgparseFormatter
  parser.add_argument("--kills", type=int, default=50, help="SIGKILLs at random moments")
  parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, by comma")
  parser.add_argument("--seed", type=int, help="of the moments; by default the time")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  flags = parser.parse_args(arguments)
  flags.seed = int(time.time()) if flags.seed is None else flags.seed
  names = flags.only.split(",")
  unknown = [name for name in names if name not in SCENARIOS]
  if unknown:
    parser.error(f"--only: {unknown[0]!r} is none of {', '.join(SCENARIOS)}")
  logging.set_verbosity(logging.ERROR)  # Orbax misses files that nothing here needs
  say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
  result: dict[str, Any] = {"seed": flags.seed}
  with tempfile.TemporaryDirectory() as folder:
    faults = Faults(pathlib.Path(folder), kills=flags.kills, seed=flags.seed, say=say)
    for name in names:
      began = time.monotonic()
      result[name] = SCENARIOS[name](faults)
      result[name]["wall_seconds"] = round(time.monotonic() - began)
  result["equal"] = all(result[name]["equal"] for name in names)
  if flags.json:
    print(json.dumps(result))
  else:
    for name in names:
      print(f"{name}: {'as undisturbed' if result[name]['equal'] else 'DIFFERENT'} {result[name]}")
  sys.exit(not result["equal"])


if __name__ == "__main__":
  main()
