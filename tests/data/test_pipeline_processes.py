"""The pipeline in programs of their own: what they import, and how they end while it runs."""

import pathlib
import subprocess
import sys

import pytest
import toy_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  directory = tmp_path_factory.mktemp("data") / "toy"
  return toy_data.built(directory, [toy_data.record(i) for i in range(11)])


def test_data_does_not_import_jax():
  code = "import sys, grain_jax.data.pipeline, grain_jax.data.build; sys.exit('jax' in sys.modules)"
  root = pathlib.Path(__file__).parents[2]
  assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


ENDING = """
import sys
sys.path[:0] = {paths!r}
import toy_data
from grain_jax.data import pipeline
c = toy_data.config({data!r})
batches = pipeline.train_batches({data!r}, c)
next(batches)
{end}
"""


@pytest.mark.slow
@pytest.mark.parametrize("end, code", [("", 0), ("raise KeyError(batches)", 1)])
def test_a_program_that_ends_while_the_pipeline_runs(data, end, code):
  paths = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parent)]
  program = ENDING.format(paths=paths, data=str(data), end=end)
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
  assert done.returncode == code


DROPPED = """
import sys, threading, time
sys.path[:0] = {paths!r}
import toy_data
from grain_jax.data import examples, pipeline
kept, dropped, chunk = [], threading.Event(), examples.Examples.chunk

def drop(*arguments):
  time.sleep(0.3)
  if kept:
    kept.clear()  # as a collection of garbage in this thread might
    dropped.set()
  return chunk(*arguments)

examples.Examples.chunk = drop
batches = pipeline.train_batches({data!r}, toy_data.config({data!r}))
next(batches)
kept.append(batches)
del batches
assert dropped.wait(20)
other = pipeline.train_batches({data!r}, toy_data.config({data!r}))
next(other)
other.close()
time.sleep(3)  # the first pipeline's threads end
"""


@pytest.mark.slow
def test_a_pipeline_dropped_by_its_own_thread_does_not_wait_for_itself(data):
  paths = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parent)]
  program = DROPPED.format(paths=paths, data=str(data))
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=100)
  assert done.returncode == 0, done.stderr[-2000:]
