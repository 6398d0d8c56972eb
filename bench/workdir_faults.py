"""Scenarios of `bench.faults` about the workdir: not shared, used twice, behind a stale handle."""

from __future__ import annotations

import signal
import time
from typing import Any

from bench import kills as runs
from bench import several
from grain_jax.failures import EXIT_RESTART

# `grain_jax.main` in whose place of work {folder} stands for a relative --workdir.
_ELSEWHERE = """
import os
from grain_jax import cli, main
from grain_jax.runtime import workdirs
from grain_jax.training import loop

workdirs.SHARED_SECONDS, train = 5.0, loop.train


def elsewhere(config, workdir, **options):
  os.chdir({folder!r})
  return train(config, workdir, **options)


loop.train = elsewhere
cli.run(main.main)
"""

# `grain_jax.main` that waits {seconds} for a workdir that another run holds.
_IMPATIENT = """
from grain_jax import cli, main
from grain_jax.runtime import workdirs

workdirs.LOCK_SECONDS = {seconds}
cli.run(main.main)
"""

# `grain_jax.main` whose first {times} reads of a checkpoint meet a stale handle.
_STALE = """
import errno, itertools
import orbax.checkpoint as ocp
from grain_jax import cli, main
from grain_jax.runtime import checkpoint

checkpoint.WAITS, count = (0.2, 0.5), itertools.count()
restore = ocp.PyTreeCheckpointHandler.restore


def stale(*arguments, **named):
  if next(count) < {times}:
    raise OSError(errno.ESTALE, "Stale file handle")
  return restore(*arguments, **named)


ocp.PyTreeCheckpointHandler.restore = stale
cli.run(main.main)
"""


def unshared_workdir(faults: Any) -> dict[str, Any]:
  """Each of two processes has a folder of its own behind the same path: neither begins."""
  workdir = faults.folder / "unshared"
  places = [faults.folder / f"machine-{i}" for i in range(2)]
  for place in places:
    place.mkdir()
  address = (f"--coordinator_address=127.0.0.1:{runs.free_port()}", "--num_processes=2")
  pair = [
    runs.start(
      faults.data, workdir, *several.PAIR, *address, f"--process_id={i}", "--workdir=run",
      name=f"p{i}-", program=("-c", _ELSEWHERE.format(folder=str(place))),
    )
    for i, place in enumerate(places)
  ]  # fmt: skip
  began = time.monotonic()
  codes, seconds = several.end(pair), time.monotonic() - began
  line = several.find_line(several.said(workdir), "is not one folder for all processes")
  left = sorted(p.name for place in places for p in place.rglob("*") if p.is_file())
  faults.say(f"unshared workdir: codes {codes} after {seconds:.0f} s: {line}")
  good = codes == [1, 1] and bool(line) and "metrics.jsonl" not in left
  return {"equal": good, "codes": codes, "line": line, "left": left}


def two_runs(faults: Any) -> dict[str, Any]:
  """A second run in the workdir of one that goes on ends; the first is as if never disturbed."""
  workdir = faults.folder / "twice"
  first = runs.start(faults.data, workdir, *several.FLAGS)
  several.wait_for_step(2, workdir, first)
  first.send_signal(signal.SIGSTOP)  # it goes on, but not to its end before the second has started
  program = ("-c", _IMPATIENT.format(seconds=1.0))
  second = runs.start(faults.data, workdir, *several.FLAGS, name="second-", program=program)
  (code,) = several.end([second])
  first.send_signal(signal.SIGCONT)
  line = several.find_line((workdir / "second-err.txt").read_text(), "is held by")
  runs.finish(first, workdir)
  faults.say(f"two runs: the second ended with {code}: {line}")
  result = faults.compare(workdir, 1)
  named = f"process {first.pid} on " in line
  return result | {"equal": result["equal"] and code == 1 and named, "code": code, "line": line}


def stale_handle(faults: Any) -> dict[str, Any]:
  """The one of two that reads meets stale handles: once, and goes on; always, and all is kept."""
  workdir = faults.folder / "stale"
  pair = several.start_pair(faults.data, workdir)
  several.wait_for_step(4, workdir, *pair)
  pair[1].terminate()
  several.end(pair)
  saved = runs.saved_steps(workdir)
  pair = several.start_several(
    faults.data, workdir, 2, first=("-c", _STALE.format(times=1_000_000))
  )
  always = several.end(pair)
  line = several.find_line(several.said(workdir), "though it may be whole")
  kept = runs.saved_steps(workdir)
  faults.say(f"stale handle, always: codes {always}, checkpoints {saved} -> {kept}: {line}")
  pair = several.start_several(faults.data, workdir, 2, first=("-c", _STALE.format(times=1)))
  once = several.end(pair)
  began = several.find_line((workdir / "p0-out.txt").read_text()[-4000:], f"step {saved[-1]} of")
  faults.say(f"stale handle, once: codes {once}; {began}")
  result = faults.compare(workdir, 2)
  good = always == [EXIT_RESTART] * 2 and once == [0, 0] and kept == saved and bool(line and began)
  return result | {
    "equal": result["equal"] and good, "codes": {"always": always, "once": once},
    "saved": saved, "kept": kept, "line": line,
  }  # fmt: skip
