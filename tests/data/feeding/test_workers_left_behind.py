"""However a run ends, its workers end, and nothing of their memory is left."""

import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest
import toy_data

RUN = """
import os, signal, sys, time
sys.path[:0] = {paths!r}
import toy_data
from grain_jax.data import dataset, pipeline
c = toy_data.config({data!r})
c.data.workers = 2
opened = dataset.open_dataset({data!r})
{begin}
batches = pipeline.train_batches(opened, c)
{first}
print(*[p.pid for p in batches._batches._processes], flush=True)
{end}
"""
ENDS = {
  "end": ("", 0),
  "error": ("raise KeyError(batches)", 1),
  "exit": ("os._exit(3)", 3),  # as the watchdog ends a run
  "stopped by its code": ("batches.close()", 0),
  "SIGTERM": ("time.sleep(60)", -signal.SIGTERM),
  "SIGKILL": ("time.sleep(60)", -signal.SIGKILL),
  "SIGKILL while it works": ("for batch in batches: pass", -signal.SIGKILL),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data") / "toy"
  return toy_data.built(folder, [toy_data.record(i) for i in range(11)])


def start(data, *, end, begin="", first="batch = next(batches)"):
  paths = [str(pathlib.Path(__file__).parents[3]), str(pathlib.Path(toy_data.__file__).parent)]
  program = RUN.format(paths=paths, data=str(data), begin=begin, first=first, end=end)
  run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
  workers = [int(pid) for pid in run.stdout.readline().split()]
  assert len(workers) == 2
  return run, workers


def assert_gone(workers):
  late = time.monotonic() + 5
  while any(map(psutil.pid_exists, workers)):
    assert time.monotonic() < late, "a worker is left"
    time.sleep(0.05)


@pytest.mark.parametrize("how", ENDS)
def test_no_process_and_no_memory_is_left(data, how):
  end, code = ENDS[how]
  run, workers = start(data, end=end)
  if how == "SIGTERM":  # they are there: what they share has no name that could stay
    maps = "".join(pathlib.Path(f"/proc/{pid}/maps").read_text() for pid in (run.pid, *workers))
    assert "memfd:grain_jax" in maps and "/dev/shm/" not in maps
  if how.startswith("SIG"):
    time.sleep(0.3)
    run.send_signal(getattr(signal, how.split()[0]))
  assert run.wait(60) == code
  assert_gone(workers)


def test_workers_that_wait_for_storage_end_too(tmp_path):
  """They would try again for half a minute."""
  data = toy_data.built(tmp_path / "lost", [toy_data.record(i) for i in range(8)])
  cut = "for path in opened._splits['train'].paths: os.truncate(path, 100)"
  run, workers = start(data, begin=cut, first="time.sleep(2)", end="time.sleep(60)")
  run.kill()
  run.wait()
  assert_gone(workers)
