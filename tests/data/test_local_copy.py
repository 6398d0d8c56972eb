"""Shards copied to a machine's disk: whole by checksum, gone on with, shared, errors by kind."""

import collections
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import toy_data

from bench import kills
from grain_jax import failures, places
from grain_jax.data import dataset, local_copy, pipeline

RECORDS = 12


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(failures, "RETRY_DELAYS", (0.0, 0.01))
  monkeypatch.setattr(dataset, "_LOOK_EVERY", 0.0)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """Twelve records in three shards of 280 kB; not to be written to."""
  noise = np.random.default_rng(0)
  made = [toy_data.record(i) for i in range(RECORDS)]
  for record in made:
    record["image"] = toy_data.jpeg(noise.integers(0, 256, (160, 160, 3)))
  return toy_data.built(tmp_path_factory.mktemp("built") / "d", made)


@pytest.fixture
def data(built, tmp_path):
  return shutil.copytree(built, tmp_path / "d")


def opened(data, tmp_path):
  return dataset.open_dataset(data, local_copy=str(tmp_path / "ssd"))


def copier(found, tmp_path, said=None):
  parts = local_copy.splits_of(found, "train")
  say = (lambda line: None) if said is None else said.append
  return local_copy.Copier(str(tmp_path / "ssd"), parts, say=say)


def finished(tmp_path):
  """The shards of the copy that are whole."""
  files = (tmp_path / "ssd").rglob("*array_record*")
  return sorted(path for path in files if path.suffix not in (".lock", ".part"))


def shards_of(data):
  return sorted(data.glob("*array_record-*"))


def test_what_is_copied_is_read_there(data, tmp_path):
  found, said = opened(data, tmp_path), []
  before = found.read("train", range(RECORDS))
  copying = copier(found, tmp_path, said)
  copying.wait()
  assert [p.read_bytes() for p in finished(tmp_path)] == [p.read_bytes() for p in shards_of(data)]
  assert found.read("train", range(RECORDS)) == before  # which finds the copies
  shutil.rmtree(data)
  assert found.read("train", range(RECORDS)) == before
  assert str(tmp_path / "ssd") in found.locate("train", 0)
  assert "copying 3 shards, 0.00 GB" in said[0] and "all shards are copied" in said[1]
  copying.close()


def test_training_begins_before_anything_is_copied(data, tmp_path, monkeypatch):
  gate, open_raw = threading.Event(), places.open_raw
  config = toy_data.config(data, local_copy=str(tmp_path / "ssd"))
  here = toy_data.config(data)

  def held(path, offset=0):
    gate.wait(60)
    return open_raw(path, offset)

  found = opened(data, tmp_path)
  monkeypatch.setattr(places, "open_raw", held)
  copying = copier(found, tmp_path)
  batches = pipeline.train_batches(found, config)
  expected = pipeline.train_batches(dataset.open_dataset(data), here)
  for step in range(6):
    mine, theirs = next(batches), next(expected)
    for name in theirs:
      np.testing.assert_array_equal(mine[name], theirs[name])
    assert bool(finished(tmp_path)) == (step > 2)
    if step == 2:
      gate.set()
      copying.wait()
  copying.close()
  batches.close()
  expected.close()


@hypothesis.given(length=st.integers(0, 300_000), spoilt=st.booleans())
@hypothesis.settings(max_examples=15)
def test_a_copy_that_was_cut_off_goes_on(built, tmp_path_factory, length, spoilt):
  folder = tmp_path_factory.mktemp("copy")
  found = opened(built, folder)
  (shard, *_), offsets, open_raw = local_copy._shards([(found, "train")]), [], places.open_raw
  whole = shard.source.read_bytes()
  left = bytearray(whole[: min(length, len(whole))])
  if spoilt and left:
    left[len(left) // 2] ^= 1
  part = local_copy._part_of(shard)
  part.parent.mkdir(parents=True)
  part.write_bytes(left)

  def noted(path, offset=0):
    offsets.append(offset)
    return open_raw(path, offset)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(places, "open_raw", noted)
    assert local_copy.copy(shard, stopped=lambda: False)
  assert hashlib.sha256(shard.target.read_bytes()).hexdigest() == shard.sha256
  assert offsets == [len(left), 0] if spoilt and left else offsets == [len(left)]
  assert not part.exists()


def test_one_that_is_stopped_leaves_its_part_and_no_name(data, tmp_path):
  found = opened(data, tmp_path)
  (shard, *_) = local_copy._shards([(found, "train")])
  assert not local_copy.copy(shard, stopped=lambda: True)
  assert not shard.target.exists() and local_copy._part_of(shard).stat().st_size
  assert found.copy_of("train") == shard.target.parent
  assert len(found.read("train", [0])[0]) > 1000 and str(data) in found.locate("train", 0)


def test_processes_of_a_machine_share_it(data, tmp_path, monkeypatch):
  reads, open_raw = collections.Counter(), places.open_raw

  def noted(path, offset=0):
    reads[path.name] += 1
    return open_raw(path, offset)

  monkeypatch.setattr(places, "open_raw", noted)
  several = [copier(opened(data, tmp_path), tmp_path) for _ in range(3)]  # locks are of open files
  for copying in several:
    copying.wait()
    copying.close()
  assert len(finished(tmp_path)) == 3 and set(reads.values()) == {1}
  assert copier(opened(data, tmp_path), tmp_path)._threads == []  # nothing is left to do


def with_lost_copies(data, tmp_path):
  """The dataset, whose copies were finished and are cut short now, and its records."""
  found = opened(data, tmp_path)
  copying = copier(found, tmp_path)
  copying.wait()
  copying.close()
  before = found.read("train", range(RECORDS))
  for path in finished(tmp_path):
    os.truncate(path, 100)
  return found, before


def test_a_copy_that_is_lost_is_read_at_its_origin(data, tmp_path, caplog):
  found, before = with_lost_copies(data, tmp_path)
  dataset.shards.READERS.forget(found._splits["train"]._owner)
  assert found.read("train", range(RECORDS)) == before
  assert caplog.text.count("is lost:") == 3


def test_one_thread_leaves_a_lost_copy_while_another_asks_why_its_read_failed(
  data, tmp_path, monkeypatch
):
  found, before = with_lost_copies(data, tmp_path)
  gone, split = threading.Event(), found._splits["train"]
  lost = type(split)._lost

  def slow(self, shard, error):
    if threading.current_thread().name == "slow":
      assert gone.wait(10)
    return lost(self, shard, error)

  monkeypatch.setattr(type(split), "_lost", slow)
  got = {}
  threads = [
    threading.Thread(target=lambda n=n: got.update({n: found.read("train", [0, 1])}), name=n)
    for n in ("slow", "fast")
  ]
  threads[0].start()
  threads[1].start()
  threads[1].join()
  gone.set()
  threads[0].join()
  assert got == dict.fromkeys(("slow", "fast"), before[:2])


def other_bytes(path):
  """So many bytes of something else."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def other_records(path):
  """A shard of the same form and size, as of a directory that was built anew."""
  content = path.read_bytes()
  other = shards_of(path.parent)[0].read_bytes()
  path.write_bytes((other + bytes(len(content)))[: len(content)])


@pytest.mark.parametrize("change", [other_bytes, other_records])
def test_a_shard_that_changed_is_named_when_it_is_copied(data, tmp_path, change):
  found = opened(data, tmp_path)
  change(shards_of(data)[1])
  copying = copier(found, tmp_path)
  with pytest.raises(dataset.ShardChanged, match=r"00001-of-00003 is not what manifest\.json says"):
    copying.wait()
  with pytest.raises(dataset.ShardChanged) as caught:
    copying.check()
  assert "\n" not in str(caught.value) and not failures.restart_helps(caught.value)
  assert not any("00001-of" in path.name for path in finished(tmp_path))


def test_one_that_is_cut_short_is_lost_storage(data, tmp_path):
  found = opened(data, tmp_path)
  os.truncate(shards_of(data)[1], 1000)
  with pytest.raises(failures.TransientError, match=r"has 1000 bytes instead of \d+") as caught:
    copier(found, tmp_path).wait()
  assert failures.restart_helps(caught.value)


@pytest.mark.parametrize("workers", (0, 1))
def test_one_that_changed_under_the_run_ends_what_reads_it_in_place(data, workers):
  found = dataset.open_dataset(data)
  before = found.read("train", [0])
  path = shards_of(data)[1]
  os.utime(path, ns=(1, 1))  # touched, or copied again
  assert len(found.read("train", [4])[0]) > 1000
  other_records(shards_of(data)[2])
  os.utime(shards_of(data)[2], ns=(1, 1))
  with pytest.raises(dataset.ShardChanged, match="00002-of-00003 is not what") as caught:
    found.read("train", [8])
  assert "\n" not in str(caught.value)
  config = toy_data.config(data)
  config.data.workers = workers
  batches = pipeline.train_batches(found, config)
  with pytest.raises(dataset.ShardChanged, match="00002-of-00003 is not what"):
    for _ in range(3):
      next(batches)
  batches.close()
  assert found.read("train", [0]) == before


def test_times_that_change_for_nothing_are_not_looked_at_for_ever(data, monkeypatch):
  found, reads = dataset.open_dataset(data), []
  monkeypatch.setattr(dataset, "_MOST_IN_VAIN", 1)
  digest_of = dataset.digest_of
  monkeypatch.setattr(dataset, "digest_of", lambda path: reads.append(path) or digest_of(path))
  for turn in range(1, 5):  # a mount that gives the time of now
    for path in shards_of(data):
      os.utime(path, ns=(turn, turn))
    dataset.shards.READERS.forget(found._splits["train"]._owner)
    assert all(len(record) > 1000 for record in found.read("train", range(RECORDS)))
  assert len(reads) == 2


FULL = """
import resource, signal, sys
from grain_jax import failures
from grain_jax.data import dataset, local_copy
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
found = dataset.open_dataset(sys.argv[1], local_copy=sys.argv[2])
try:
  local_copy.Copier(sys.argv[2], local_copy.splits_of(found, "train"), say=print).wait()
except Exception as error:
  print(failures.restart_helps(error), error)
"""


def test_a_disk_that_gets_full_is_a_line_and_a_new_start(data, tmp_path):
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
  command = [sys.executable, "-c", FULL, str(data), str(tmp_path / "ssd")]
  done = subprocess.run(command, cwd=kills.ROOT, capture_output=True, text=True, timeout=60)
  assert done.stdout.splitlines()[-1].startswith(
    f"True config.data.local_copy = {tmp_path / 'ssd'}: the disk is full (File too large)."
  ), done.stderr
  assert finished(tmp_path) == []


@pytest.mark.slow
def test_a_run_on_a_shard_that_changed_ends_with_its_line(scenes_dir, tmp_path):
  data = shutil.copytree(scenes_dir, tmp_path / "scenes")
  (shard,) = data.glob("scenes-train.*")
  other_bytes(shard)
  keys = (
    f"--config.data.local_copy={tmp_path / 'ssd'}",
    "--config.method=clip",
    "--config.evals=()",
  )
  process = kills.start(data, tmp_path / "run", *keys)
  assert process.wait(timeout=300) == 1
  last = (tmp_path / "run" / "stderr.txt").read_text().splitlines()[-1]
  assert last.startswith(f"ShardChanged: shard {shard} is not what manifest.json says")
  assert "copying 1 shards" in (tmp_path / "run" / "stdout.txt").read_text()


def test_room_is_looked_at_before_the_run(data, tmp_path, monkeypatch):
  folder = str(tmp_path / "ssd")
  parts = local_copy.splits_of(opened(data, tmp_path), "train")
  local_copy.check(folder)
  local_copy.check_room(folder, parts)
  usage = collections.namedtuple("Usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10))
  with pytest.raises(failures.TransientError, match=r"^config\.data\.local_copy = .* 0\.0 GB are"):
    local_copy.check_room(folder, parts)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
  with pytest.raises(ValueError, match="Name a larger one"):
    local_copy.check_room(folder, parts)
  local_copy.check_room("", [])
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\)"):
    local_copy.check(str(tmp_path / "file" / "x"))
  with pytest.raises(ValueError, match="is an address"):
    local_copy.check("gs://bucket/x")
