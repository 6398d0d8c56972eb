"""The pool of open shards: its bound, its order, its threads, and as many shards as CC12M has."""

import collections
import errno
import json
import os
import pathlib
import resource
import subprocess
import sys
import threading
import time

import pytest
import toy_data

from grain_jax import cli
from grain_jax.data import dataset, records, shards
from grain_jax.data.building import flags as build_flags


class Handle:
  """A reader that notices when it is used after it was closed."""

  def __init__(self, path, opened):
    self.path, self.opened, self.closed = path, opened, False
    opened[path] += 1

  def read(self):
    assert not self.closed
    return self.path

  def close(self):
    assert not self.closed
    self.closed = True
    self.opened[self.path] -= 1


def pool_of(limit):
  """(pool, {path: handles open now})."""
  opened = collections.Counter()
  return shards.ReaderPool(limit, lambda path: Handle(path, opened)), opened


def use(pool, path):
  with pool.reader(path) as reader:
    return reader.read()


def test_all_stay_open_while_they_fit_and_then_the_least_recently_used_is_closed():
  pool, opened = pool_of(3)
  for path in "abcabc":
    assert use(pool, path) == path
  assert pool.opens == 3 and +opened == dict(a=1, b=1, c=1)
  use(pool, "a")
  use(pool, "d")  # in the place of b
  assert +opened == dict(a=1, c=1, d=1) and pool.opens == 4
  with pool.reader("c") as c:
    for path in "efg":
      use(pool, path)
    assert c.read() == "c" and sum(opened.values()) == len(pool) == 3
  pool.discard("c")
  assert +opened == dict(f=1, g=1)


def test_a_reader_that_failed_is_opened_again_and_closed_when_its_last_user_is_done():
  pool, opened = pool_of(3)
  with pool.reader("a") as first:
    with pytest.raises(KeyError), pool.reader("a") as same:
      assert same is first
      raise KeyError
    with pool.reader("a") as fresh:
      assert fresh is not first and not first.closed and opened["a"] == 2
  assert first.closed and opened["a"] == 1 == len(pool)


def test_threads_never_pass_the_bound_nor_read_a_closed_shard():
  pool, opened = pool_of(5)
  most, wrong = [0], []

  def work(seed):
    for i in range(1500):
      path = str((i * 7 + seed * 13) % 17)
      try:
        with pool.reader(path) as reader:
          most[0] = max(most[0], sum(opened.values()))
          if i % 97 == 0:
            time.sleep(0.0005)
          if i % 211 == 0:
            pool.discard(path)
          assert reader.read() == path
      except Exception as error:
        wrong.append(error)

  threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert not wrong and not any(t.is_alive() for t in threads)
  assert most[0] <= 5 and sum(opened.values()) == len(pool) <= 5


def test_where_the_process_has_no_file_left_the_pool_gives_way():
  opened = collections.Counter()

  def open_reader(path):
    if sum(opened.values()) >= 4:
      raise RuntimeError(f"open() failed: {os.strerror(errno.EMFILE)}; opening {path}")
    return Handle(path, opened)

  pool = shards.ReaderPool(100, open_reader)
  assert [use(pool, path) for path in "abcdefgh"] == list("abcdefgh")
  assert len(pool) == 4 == pool.limit
  with pytest.raises(OSError, match="Too many open files") as error, _all_in_use(pool, "efgh"):
    use(pool, "i")
  assert error.value.errno == errno.EMFILE


class _all_in_use:
  def __init__(self, pool, paths):
    self.readers = [pool.reader(path) for path in paths]
    pool._limit = 100

  def __enter__(self):
    for reader in self.readers:
      reader.__enter__()

  def __exit__(self, *error):
    for reader in self.readers:
      reader.__exit__(None, None, None)


@pytest.mark.parametrize(
  "limit, open_at_most",
  [(64, 32), (256, 128), (600, 344), (768, 512), (1024, 512), (4096, 2048), (1 << 20, 1 << 19)],
)
def test_capacity(limit, open_at_most):
  assert shards.capacity(limit) == open_at_most


def test_a_command_raises_the_soft_limit_to_the_hard_one(monkeypatch):
  seen = []
  monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 20000))
  monkeypatch.setattr(resource, "setrlimit", lambda what, both: seen.append((what, both)))
  cli.prepare()
  assert seen == [(resource.RLIMIT_NOFILE, (20000, 20000))]


def test_shards_hold_16384_records_or_more_unless_told_otherwise(tmp_path):
  flags = ["--source=folder", "--input=x", "--out=y"]
  assert build_flags.parse(flags, description="").shard_size >= 16_384
  assert build_flags.parse([*flags, "--shard_size=7"], description="").shard_size == 7


SHARDS = 2441  # of CC12M at 4,096 records each

RANDOM_READS = """
import json, os, resource, sys, threading
import numpy as np
sys.path[:0] = {paths!r}
hard = {limit}
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, hard))
from grain_jax import cli
cli.prepare()
from grain_jax.data import dataset, examples, records, shards
import toy_data
most = [0]
opened = dataset.open_dataset({data!r})
config = toy_data.config({data!r}, threads=4)
made = examples.Examples(opened, "train", config, training=True)
order = np.random.default_rng(0).integers(0, {shards}, 6000).reshape(4, -1, 20)
good = [0]

def work(rows):
  for indices in rows:
    chunk = made.chunk(indices, 0)
    assert [r.key.decode() for r in chunk.parsed] == [f"r{{i % 8}}" for i in indices]
    most[0] = max(most[0], len(shards.READERS))
    good[0] += len(indices)

threads = [threading.Thread(target=work, args=(rows,)) for rows in order]
[t.start() for t in threads]
[t.join() for t in threads]
files = sum("array_record" in os.readlink(f"/proc/self/fd/{{f}}")
            for f in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{{f}}"))
counts = opened.reads("train")
print(json.dumps(dict(good=good[0], bad=len(made.bad), most=most[0], files=files,
                      opens=counts.opens, records=counts.records)), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
  """`SHARDS` shards of a record each: hard links to eight files."""
  folder = tmp_path_factory.mktemp("data")
  one = toy_data.built(
    folder / "eight", [toy_data.record(i, size=16) for i in range(8)], shard_size=1
  )
  manifest = json.loads((one / dataset.MANIFEST).read_text())
  split = manifest["splits"]["train"]
  entries, out = split["shards"], folder / "many"
  out.mkdir()
  split["shards"] = []
  for i in range(SHARDS):
    name = dataset.shard_name("toy", "train", i, SHARDS)
    os.link(one / entries[i % 8]["file"], out / name)
    split["shards"].append({**entries[i % 8], "file": name})
  (out / dataset.MANIFEST).write_text(json.dumps(manifest))
  return out


def random_reads(data, *, soft, limit):
  paths = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parent)]
  program = RANDOM_READS.format(paths=paths, data=str(data), soft=soft, limit=limit, shards=SHARDS)
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, timeout=300, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_more_shards_than_the_process_may_open_files(many_shards):
  found = random_reads(many_shards, soft=1024, limit=1024)
  assert (found["good"], found["bad"], found["records"]) == (6000, 0, 6000)
  assert found["most"] == found["files"] == 512
  # 6,000 draws of 2,441 shards, of which 512 are open: about 79 % are not.
  assert 0.7 < found["opens"] / found["records"] < 0.9


def test_all_shards_stay_open_where_half_of_the_hard_limit_allows(many_shards):
  if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 6000:
    pytest.skip("the hard limit of this machine is below 6,000")
  found = random_reads(many_shards, soft=1024, limit=6000)
  assert (found["good"], found["bad"]) == (6000, 0)
  # Each that was drawn is opened once: 2,441 (1 - e^(-6,000 / 2,441)) = 2,232 of them.
  assert 2100 < found["opens"] == found["files"] == found["most"] <= SHARDS


def test_a_dataset_built_anew_is_not_read_through_the_old_shards(tmp_path):
  def key():
    opened = dataset.open_dataset(tmp_path / "d")
    return opened.parse("train", 0).key, opened

  toy_data.built(tmp_path / "d", [toy_data.record(0), toy_data.record(1)])
  first, kept = key()
  toy_data.built(tmp_path / "d", [toy_data.record(2), toy_data.record(3)], overwrite=True)
  second, _ = key()
  assert (first, second) == (b"r0", b"r2") and kept.parse("train", 1).key == b"r1"


def test_shards_of_a_dataset_that_is_gone_are_closed(tmp_path):
  pool, opened = pool_of(3)
  with pool.reader("a", owner=1), pool.reader("a", owner=2):
    assert opened["a"] == 2
  pool.forget(1)
  use(pool, "b")
  assert +opened == dict(a=1, b=1) and len(pool) == 2


def test_opens_are_counted_for_each_split(tmp_path):
  pairs = [*(toy_data.record(i) for i in range(8)), ("val", toy_data.record(9))]
  opened = dataset.open_dataset(toy_data.built(tmp_path / "d", pairs))
  opened.read("train", [0, 5, 6])
  opened.read("train", [7])
  assert opened.reads("train") == (4, 2) and opened.reads("val") == (0, 0)
  assert records.parse(opened.read("val", [0])[0]).key == b"r9"
  assert opened.reads("val") == (1, 1)
