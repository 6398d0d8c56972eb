"""Several real processes of one run on this machine: started, waited for, listened to."""

from __future__ import annotations

import pathlib
import subprocess
import time
from collections.abc import Sequence

from bench import kills as runs
from grain_jax.runtime import metrics

LONG = 900.0  # seconds after which a run counts as hanging
FLAGS = ("--config.evals=()", "--config.watchdog_seconds=120")
MAIN = ("-m", "grain_jax.main")
PAIR = (*FLAGS, "--config.method=clip", "--config.steps=12")  # compiles in a third of the time


def lines(workdir: pathlib.Path) -> int:
  """Lines of metrics, one a step, that a run has written so far."""
  path = workdir / "metrics.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


def wait_for_step(step: int, workdir: pathlib.Path, *processes: subprocess.Popen) -> None:
  """Returns when the metrics of `step` are there; raises when a process ends before."""
  until = time.monotonic() + LONG
  while lines(workdir) < step:
    if any(p.poll() is not None for p in processes) or time.monotonic() > until:
      raise RuntimeError(f"{workdir} did not come to step {step}: {said(workdir)[-2000:]}")
    time.sleep(0.01)


def said(workdir: pathlib.Path, name: str = "*") -> str:
  """All that the processes of a run wrote to stderr."""
  return "".join(path.read_text() for path in sorted(workdir.glob(f"{name}err.txt")))


def find_line(text: str, word: str) -> str:
  """The first line with `word` in it; '' if there is none."""
  return next((line for line in text.splitlines() if word in line), "")


def start_several(
  data: pathlib.Path,
  workdir: pathlib.Path,
  count: int,
  *flags: str,
  first: Sequence[str] = MAIN,
  last: Sequence[str] = MAIN,
  last_data: pathlib.Path | None = None,
) -> list[subprocess.Popen]:
  """`count` processes of one run; their names are 'p0-', 'p1-', ...; the first and the last may
  run other programs, and the last read another copy of the data."""
  address = (f"--coordinator_address=127.0.0.1:{runs.free_port()}", f"--num_processes={count}")
  return [
    runs.start(
      last_data if last_data is not None and i == count - 1 else data,
      workdir,
      *PAIR,
      *flags,
      *address,
      f"--process_id={i}",
      name=f"p{i}-",
      program=first if i == 0 else last if i == count - 1 else MAIN,
    )
    for i in range(count)
  ]


def start_pair(data: pathlib.Path, workdir: pathlib.Path, *flags: str) -> list[subprocess.Popen]:
  """Two processes of one run."""
  return start_several(data, workdir, 2, *flags)


def end(processes: Sequence[subprocess.Popen]) -> list[int]:
  """Exit codes; a process that does not end is killed and gives -9."""
  codes = []
  until = time.monotonic() + LONG
  for process in processes:
    try:
      codes.append(process.wait(max(until - time.monotonic(), 1)))
    except subprocess.TimeoutExpired:
      process.kill()
      codes.append(process.wait())
  return codes


def finish_several(data: pathlib.Path, workdir: pathlib.Path, count: int, *flags: str) -> None:
  """Starts `count` processes of a run, to its end."""
  codes = end(start_several(data, workdir, count, *flags))
  if any(codes):
    raise RuntimeError(f"{workdir} ended with codes {codes}: {said(workdir)[-2000:]}")


def finish_pair(data: pathlib.Path, workdir: pathlib.Path) -> None:
  """Starts both processes of a run again, to its end."""
  finish_several(data, workdir, 2)


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """Loss of every step of a run."""
  entries = metrics.read_jsonl(workdir / "metrics.jsonl")
  return {e["step"]: e["train/loss"] for e in entries if "train/loss" in e}
