"""Worker processes: the same batches as threads make, and what happens when one of them dies."""

import errno
import io
import json
import logging
import os
import pathlib
import resource
import signal
import time

import numpy as np
import psutil
import pytest
import toy_data

from grain_jax import failures
from grain_jax.data import dataset, examples, mixture, pipeline
from grain_jax.data.feeding import deaths, plan, pool


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  made = [toy_data.record(i) for i in range(23)]
  for record in made:
    record["negatives"] = [
      {"caption": "no box", "kind": "object"},
      {"caption": "é", "kind": "action"},
    ]
    for region in record["regions"]:
      region["negatives"] = ["a grey box", "a long description of nothing " * 8]
  return toy_data.built(tmp_path_factory.mktemp("data") / "toy", made)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
  """Eight records, of which 2 has half a JPEG and 5 none at all."""
  good = [toy_data.record(i) for i in range(8)]
  good[2]["image"] = good[2]["image"][: len(good[2]["image"]) // 2]
  good[5]["image"] = b"no picture"
  return toy_data.built(tmp_path_factory.mktemp("data") / "bad", good, check_image=False)


def config(data, workers, **changes):
  c = toy_data.config(data, resize="crop", flip=True, negatives=2, negatives_per_region=1)
  c.data.update(workers=workers, row_length=100, **changes)
  return c


def processes(batches):
  return batches._batches._processes


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("size, chunk", [(4, 32), (12, 4), (20, 2)])
def test_workers_make_what_threads_make(data, monkeypatch, workers, size, chunk):
  monkeypatch.setattr(pipeline, "_CHUNK", chunk)
  runs = []
  for number in (0, workers):
    c = config(data, number)
    c.batch_size = size
    batches = pipeline.train_batches(data, c)
    runs.append(toy_data.take(batches, 9))  # kept by us, more than are lent
    told = (batches.dropped_negatives(), batches.shard_opens_per_1000() > 0, batches.bad)
    assert told[0] == pytest.approx(0.2, abs=0.1)  # of what is made ahead too
    runs[-1].append({"told": np.array(str(told[1:]))})
    batches.close()
  toy_data.assert_equal(*runs)


def test_a_run_that_goes_on_and_hosts_that_share_read_what_one_does(data):
  threads = pipeline.train_batches(data, config(data, 0))
  whole = toy_data.take(threads, 8)
  threads.close()
  later = pipeline.train_batches(data, config(data, 2), start_step=5)
  toy_data.assert_equal(toy_data.take(later, 3), whole[5:])
  later.close()
  parts = []
  for host in range(2):
    batches = pipeline.train_batches(data, config(data, 1), host=host, num_hosts=2)
    parts.append(toy_data.take(batches, 3))
    batches.close()
  toy_data.assert_equal(
    [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)], whole[:3]
  )


def test_a_mixture_is_mixed_alike(data, tmp_path):
  other = toy_data.built(tmp_path / "other", [toy_data.record(i) for i in range(30, 36)])
  runs = []
  for workers in (0, 2):
    c = config("", workers)
    c.data.sources = (
      {"dir": str(data), "weight": 2.0},
      {"dir": str(other), "regions": False, "name": "plain"},
    )
    batches = pipeline.train_batches(mixture.open_training(c), c)
    runs.append(toy_data.take(batches, 12))
    batches.close()
  toy_data.assert_equal(*runs)
  assert {0, 1} == set(np.concatenate([batch["source"] for batch in runs[1]]).tolist())


def test_bad_records_are_left_out_and_counted(bad, caplog):
  runs = []
  for workers in (0, 2):
    with caplog.at_level(logging.WARNING):
      batches = pipeline.train_batches(bad, config(bad, workers))
      runs.append(toy_data.take(batches, 4))
    assert batches.bad.keys() == {2, 5} and "corrupt image" in batches.bad[2]
    named = [r.message for r in caplog.records if "skipped bad record" in r.message]
    assert len(named) == 2 and all("array_record" in line for line in named)
    caplog.clear()
    batches.close()
  toy_data.assert_equal(*runs)


def test_a_bad_record_that_is_to_stop_the_run_stops_it(bad):
  lines = []
  for workers in (0, 2):
    batches = pipeline.train_batches(bad, config(bad, workers, on_bad_record="stop"))
    with pytest.raises(examples.BadRecord, match="on_bad_record=skip") as error:
      toy_data.take(batches, 2)
    lines.append(str(error.value))
  for line in lines:
    assert "\n" not in line and "record" in line


@pytest.mark.parametrize(
  "number, words",
  [
    (signal.SIGKILL, r"was killed by SIGKILL\. Where memory runs out, lower config.data.workers"),
    (signal.SIGSEGV, r"was killed by SIGSEGV\."),
  ],
)
def test_a_killed_worker_is_one_line(data, number, words):
  batches = pipeline.train_batches(data, config(data, 2))
  next(batches)
  victim, other = processes(batches)
  os.kill(victim.pid, number)
  with pytest.raises(failures.TransientError, match=words) as error:
    toy_data.take(batches, 1000)
  assert f"worker 0 of the input pipeline (process {victim.pid})" in str(error.value)
  assert "\n" not in str(error.value) and failures.restart_helps(error.value)
  assert other.poll() is not None


def test_a_worker_killed_for_memory_is_told_from_one_killed_by_hand(data, monkeypatch, tmp_path):
  counts = tmp_path / "memory.events"
  counts.write_text("low 0\nhigh 3\nmax 9\noom 4\noom_kill 2\noom_group_kill 0\n")
  monkeypatch.setattr(deaths, "_COUNTS", (str(tmp_path / "none"), str(counts)))
  batches = pipeline.train_batches(data, config(data, 2))
  next(batches)
  counts.write_text("low 0\nhigh 3\nmax 12\noom 5\noom_kill 3\noom_group_kill 0\n")
  os.kill(processes(batches)[1].pid, signal.SIGKILL)
  with pytest.raises(failures.TransientError, match="worker 1 .* by the system for want of memory"):
    toy_data.take(batches, 1000)
  assert deaths.describe(-9, {}) == (
    "was killed by SIGKILL, perhaps by the system for want of memory"
  )
  assert deaths.describe(3, {}) == "ended with code 3"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux")
def test_a_worker_without_memory_ends_the_run_instead_of_losing_its_images(tmp_path):
  large = [toy_data.record(i, size=3000, regions=1) for i in range(2)]
  folder = toy_data.built(tmp_path / "large", large + [toy_data.record(i) for i in range(2, 9)])
  c = config(folder, 1, reduced_decode=False)
  batches = pipeline.train_batches(folder, c)
  (worker,) = processes(batches)
  next(batches)
  while psutil.Process(worker.pid).cpu_percent(0.3):  # until all that is to be ahead is made
    pass
  used = psutil.Process(worker.pid).memory_info().vms
  resource.prlimit(worker.pid, resource.RLIMIT_AS, (used + (1 << 20), used + (1 << 20)))
  with pytest.raises(failures.TransientError, match="no more memory") as error:
    toy_data.take(batches, 50)
  assert "\n" not in str(error.value) and not batches.bad


def test_an_error_of_the_program_shows_and_ends_the_run(data, monkeypatch, capfd):
  monkeypatch.setattr(plan, "describe", lambda *a, **k: '{"chunk": 4}')
  with pytest.raises(RuntimeError, match="worker . of the input pipeline .* ended with code 1"):
    next(pipeline.train_batches(data, config(data, 1)))
  assert "KeyError: 'shapes'" in capfd.readouterr().err


def test_interrupts_are_the_run_s(data):
  """A launcher signals all processes of a job: the run saves, and needs its workers until then."""
  batches = pipeline.train_batches(data, config(data, 2))
  for _ in range(2):  # while they start, and when they have
    for process in processes(batches):
      os.kill(process.pid, signal.SIGTERM)
      os.kill(process.pid, signal.SIGINT)
    next(batches)
  toy_data.take(batches, 30)
  batches.close()


def test_workers_import_neither_jax_nor_tensorflow_nor_a_tokenizer(data):
  batches = pipeline.train_batches(data, config(data, 2))
  files = [pathlib.Path(f"/proc/{p.pid}/maps") for p in processes(batches)]
  while not all("array_record" in file.read_text() for file in files):  # both have begun
    next(batches)
    time.sleep(0.05)
  toy_data.take(batches, 20)
  for file in files:
    mapped = file.read_text()
    assert not [name for name in ("jaxlib", "tensorflow", "tokenizers") if name in mapped]
  batches.close()


def test_arrays_that_are_in_use_are_not_written_over(data):
  """JAX takes an array over as it lies where it can: it must stay until JAX lets go of it."""
  jax = pytest.importorskip("jax")
  threads = pipeline.train_batches(data, config(data, 0))
  wanted = toy_data.take(threads, 60)
  threads.close()
  rng = np.random.default_rng(0)
  batches = pipeline.train_batches(data, config(data, 2))
  held = {}
  for step in range(60):
    batch = next(batches)
    made = jax.device_put(batch) if step % 2 else {k: v[1:] for k, v in batch.items()}
    held[step] = made
    del batch
    for old in [s for s in held if rng.random() < 0.3 and s != step]:
      del held[old]
    for step_held, arrays in held.items():
      for name, values in arrays.items():
        want = wanted[step_held][name][0 if step_held % 2 else 1 :]
        np.testing.assert_array_equal(np.asarray(values), want)
  assert len(held) > 2
  batches.close()


def test_what_a_run_holds_does_not_grow(data):
  batches = pipeline.train_batches(data, config(data, 2))
  own, seen = psutil.Process(), []

  def measure():
    people = [psutil.Process(p.pid) for p in processes(batches)]
    memory = sum(p.memory_info().rss for p in [own, *people])
    return memory / 2**20, own.num_fds() + sum(p.num_fds() for p in people), own.num_threads()

  for _ in range(4):
    for _ in range(150):
      next(batches)
    seen.append(measure())
  assert len(processes(batches)) == 2
  assert seen[-1][0] - seen[0][0] < 8
  # A file or a thread of what earlier tests left may go or come meanwhile; 150 batches do not.
  for i in (1, 2):
    counts = [s[i] for s in seen[1:]]
    assert max(counts) - min(counts) <= 2, seen
  fds = own.num_fds()
  batches.close()
  assert own.num_fds() < fds and not own.children()


def test_as_many_chunks_are_under_way_as_keep_all_workers_busy(data, monkeypatch):
  started = []

  class Process:
    pid = 0

    def __init__(self):
      reader, self.writer = os.pipe()
      self.stdout, self.stdin = os.fdopen(reader), io.StringIO()

    def kill(self):
      os.close(self.writer)

    def wait(self):
      return -9

  def start(arguments, descriptors):
    started.append(Process())
    return started[-1]

  monkeypatch.setattr(pool, "_start", start)
  batches = pipeline.train_batches(data, config(data, 30, prefetch=1))
  made = batches._batches
  assert len(started) == 30 and len(made._making) * made._chunks >= 2 * 30
  batches.close()


@pytest.mark.parametrize(
  ("error", "kind"),
  [
    (OSError(errno.EIO, "gone"), failures.TransientError),
    (OSError(errno.ENOENT, "not there"), ValueError),
    (dataset.ShardChanged("it is another"), dataset.ShardChanged),
  ],
)
def test_an_error_of_a_worker_has_the_code_that_it_has_in_the_run(error, kind):
  told = plan.made_of(json.loads(json.dumps(plan.describe_error(error))))
  assert type(told) is kind
  assert failures.restart_helps(told) == failures.restart_helps(error)
