"""Storage that fails is told from damaged records, and ends a run instead of thinning it."""

import errno
import os

import numpy as np
import pytest
import toy_data

from grain_jax import failures
from grain_jax.data import bad_records, dataset, examples, pipeline, sampler, shards

RECORDS = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(failures, "RETRY_DELAYS", (0.0, 0.01))


@pytest.fixture
def data(tmp_path):
  """Eight records in two shards, of pixels that do not compress: 70 kB each."""
  noise = np.random.default_rng(0)
  made = [toy_data.record(i) for i in range(RECORDS)]
  for record in made:
    record["image"] = toy_data.jpeg(noise.integers(0, 256, (160, 160, 3)))
  return toy_data.built(tmp_path / "d", made)


def shard(data, number=1):
  return sorted(data.glob("*array_record-*"))[number]


def cut(path):
  os.truncate(path, path.stat().st_size // 3)


def empty(path):
  os.truncate(path, 0)


def cut_end(path):
  os.truncate(path, path.stat().st_size - 1)


def longer(path):
  """Another file has taken its place, without the records."""
  path.write_bytes(b"\1" * (path.stat().st_size + 100_000))


def other(path):
  """So much of something else: no whole ArrayRecord file."""
  path.write_bytes(b"\1" * path.stat().st_size)


def no_end(path):
  """The end, where array_record keeps its index, came back as zeros."""
  size = path.stat().st_size
  path.write_bytes(path.read_bytes()[: size - 70_000] + bytes(70_000))


def gone(path):
  path.unlink()


def folder_gone(path):
  path.parent.rename(path.parent.with_name("elsewhere"))


LOSSES = (cut, empty, cut_end, longer, other, no_end, gone, folder_gone)


@pytest.mark.parametrize("lose", LOSSES)
def test_a_shard_lost_before_its_first_read_is_lost_storage(data, lose):
  opened = dataset.open_dataset(data)
  lose(shard(data))
  with pytest.raises(
    failures.TransientError, match=r"00001-of-00002, record 1 cannot be read"
  ) as e:
    opened.read("train", [5, 0, 6])
  assert "\n" not in str(e.value) and "3 attempts" in str(e.value) and "again" in str(e.value)
  if lose is not folder_gone:
    assert all(opened.read("train", [0, 1, 2, 3]))  # the other shard is still there


@pytest.mark.parametrize("lose", (cut, empty, longer, other))
def test_a_shard_lost_while_it_is_open_is_lost_storage(data, lose):
  opened = dataset.open_dataset(data)
  assert all(opened.read("train", range(RECORDS)))
  lose(shard(data))
  with pytest.raises(failures.TransientError, match="00001-of-00002, record . cannot be read"):
    opened.read("train", [7, 6, 5, 4])
  with pytest.raises(failures.TransientError, match="00001-of-00002, record 3"):
    opened.parse("train", 7)


@pytest.mark.parametrize("training", [True, False])
def test_training_and_evaluation_end_with_the_line_of_the_lost_shard(data, training):
  opened, c = pipeline.open_dataset(data), toy_data.config(data, prefetch=1)
  batches = pipeline.train_batches(opened, c)
  next(batches)
  cut(shard(data))
  with pytest.raises(failures.TransientError, match="has .* bytes instead of .*the same command"):
    if training:
      for _ in range(20):
        next(batches)
    else:
      list(pipeline.eval_batches(opened, "train", c))
  assert not batches.bad


NUMBERS = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EACCES, errno.ENOENT]


class Failing:
  """A reader whose system calls fail, as array_record tells it, for `times` reads."""

  def __init__(self, reader, number, times):
    self.reader, self.number, self.times = reader, number, times

  def __getattr__(self, name):
    return getattr(self.reader, name)

  def read(self, wanted):
    self.times[0] -= 1
    if self.times[0] >= 0:
      words = os.strerror(self.number)
      raise RuntimeError(
        f"pread() failed: {words}; reading /d/x; at byte 18229; "
        "Could not read from the underlying reader; at byte 0"
      )
    return self.reader.read(wanted)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_read_that_fails_is_done_again_through_a_fresh_handle(data, monkeypatch, number):
  made, times = [], [2]

  def open_reader(path):
    made.append(path)
    return Failing(shards._open_reader(path), number, times)

  monkeypatch.setattr(shards, "READERS", shards.ReaderPool(open_reader=open_reader))
  opened = dataset.open_dataset(data)
  assert all(opened.read("train", [1]))
  assert len(made) == 3  # a stale handle stays stale
  times[0] = 10**6
  with pytest.raises(failures.TransientError, match=f"record 1 cannot be.*{os.strerror(number)}"):
    opened.read("train", [1])


def test_storage_that_comes_back_in_time_costs_nothing(data, monkeypatch):
  opened = dataset.open_dataset(data)
  want = opened.read("train", range(RECORDS))
  path, elsewhere = shard(data), data / "elsewhere"
  whole = path.read_bytes()
  os.truncate(path, 100)
  monkeypatch.setattr(failures, "RETRY_DELAYS", (0.0, 0.0, 0.0))
  waits = []
  monkeypatch.setattr(failures.time, "sleep", lambda s: waits.append(s) or mend())

  def mend():
    if len(waits) == 2:
      elsewhere.write_bytes(whole)
      elsewhere.replace(path)

  assert opened.read("train", range(RECORDS)) == want and len(waits) == 2


def test_a_record_of_no_bytes_in_a_whole_shard_is_a_bad_record(tmp_path, monkeypatch):
  out = toy_data.built(tmp_path / "d", [toy_data.record(i) for i in range(4)])
  monkeypatch.setattr(shards.READERS, "_entries", type(shards.READERS._entries)())

  class Emptied(Failing):
    def read(self, wanted):
      return [b"" if w == 2 else r for w, r in zip(wanted, self.reader.read(wanted), strict=True)]

  pool = shards.ReaderPool(open_reader=lambda p: Emptied(shards._open_reader(p), 0, [0]))
  monkeypatch.setattr(shards, "READERS", pool)
  batches = pipeline.train_batches(out, toy_data.config(out))
  assert next(batches)["example_mask"].sum() == 3 and batches.bad == {2: "no caption"}


def test_open_dataset_asks_again_where_the_storage_fails(data, monkeypatch):
  read, times = dataset.pathlib.Path.read_text, [2]

  def fail(path, *arguments, **options):
    times[0] -= 1
    if times[0] >= 0:
      raise OSError(errno.ESTALE, "Stale file handle", str(path))
    return read(path, *arguments, **options)

  monkeypatch.setattr(dataset.pathlib.Path, "read_text", fail)
  assert dataset.open_dataset(data).num_records("train") == RECORDS
  times[0] = 10**6
  with pytest.raises(failures.TransientError, match=f"{data} cannot be read: Stale file handle"):
    dataset.open_dataset(data)


@pytest.mark.parametrize(
  "error, storage",
  [
    (OSError(errno.EIO, "x"), True),
    (OSError(errno.ESTALE, "x"), True),
    (OSError(errno.ENOTCONN, "x"), True),
    (OSError(errno.EMFILE, "x"), True),
    (TimeoutError("x"), True),
    (ConnectionResetError("x"), True),
    (FileNotFoundError(errno.ENOENT, "x"), False),
    (PermissionError(errno.EACCES, "x"), False),
    (OSError(errno.ENOSPC, "x"), False),
    (OSError("cannot identify image file"), False),
    (ValueError("x"), False),
  ],
)
def test_errors_of_storage(error, storage):
  assert failures.is_storage(error) == storage


def limits(**changes):
  return bad_records.Limits(**dict(in_a_row=4, fraction=0.1, window=100, least=5) | changes)


def first_refused(masks, **changes):
  """Number of the record at which a run ends, counted from 0, and why; None: it goes on."""
  counter, before = bad_records.BadRecordCounter(limits(**changes)), 0
  for mask in masks:
    found = counter.add(np.asarray(mask, bool))
    if found:
      return before + found[0], found[1]
    before += len(mask)
  return None


@pytest.mark.parametrize("batch", [1, 2, 7, 60])
def test_bad_records_in_a_row_end_a_run_however_it_is_cut_into_batches(batch):
  def cut(good):
    return [good[i : i + batch] for i in range(0, len(good), batch)]

  at, why = first_refused(cut([True] * 9 + [False] * 4 + [True] * 47), least=100)
  assert at == 12 and why == "4 records in a row are bad (config.data.max_bad_in_a_row)"
  broken = ([False] * 3 + [True]) * 15
  assert first_refused(cut(broken), least=100) is None
  assert first_refused(cut([False] * 60), in_a_row=0, least=100) is None


@pytest.mark.parametrize("batch", [1, 8, 60])
def test_more_than_a_fraction_of_the_last_records_ends_a_run(batch, rng):
  """Against counting over each window anew."""
  good = rng.random(600) > np.linspace(0, 0.25, 600)
  want = None
  for n in range(1, 601):
    last = ~good[max(0, n - 100) : n]
    if not good[n - 1] and last.sum() >= 5 and last.sum() > 0.1 * len(last):
      want = n - 1
      break
  assert want is not None and want > 100
  at, why = first_refused(
    [good[i : i + batch] for i in range(0, 600, batch)], in_a_row=0
  )  # fmt: skip
  assert at == want and "of the last 100 records are bad, more than config.data.max_bad" in why
  assert first_refused([good], in_a_row=0, fraction=1.0) is None


@pytest.fixture(scope="module")
def half_bad(tmp_path_factory):
  """Sixteen records, of which the odd ones are no images."""
  made = [toy_data.record(i) for i in range(16)]
  for record in made[1::2]:
    record["image"] = b"no picture"
  return toy_data.built(tmp_path_factory.mktemp("data") / "half", made, check_image=False)


def test_too_many_bad_records_end_the_batches_with_where_and_what_to_do(half_bad):
  c = toy_data.config(half_bad)
  batches = pipeline.train_batches(half_bad, c)
  with pytest.raises(examples.BadRecord) as error:
    for _ in range(40):
      next(batches)
  line = str(error.value)
  assert line.startswith("20 of the last ") and "\n" not in line
  assert "array_record-0000" in line and ", record " in line and "corrupt image" in line
  assert "config.data.max_bad_fraction = 0.01" in line and "again" in line
  c.data.update(max_bad_fraction=1.0, max_bad_in_a_row=0)
  batches = pipeline.train_batches(half_bad, c)
  assert sum(int((~next(batches)["example_mask"]).sum()) for _ in range(40)) == 80


def test_a_run_that_goes_on_ends_at_a_record_of_its_own_steps(half_bad):
  c = toy_data.config(half_bad)
  with pytest.raises(examples.BadRecord) as error:
    batches = pipeline.train_batches(half_bad, c, start_step=7)
    for _ in range(40):
      next(batches)
  where = str(error.value).split("the last one is ")[1].split(": ")[0]
  opened = dataset.open_dataset(half_bad)
  steps = [
    sampler.indices(seed=c.seed, epoch=n // 4, step=n % 4, batch_size=4, num_records=16)
    for n in range(7, 47)
  ]
  bad = [i for i in np.concatenate(steps).tolist() if i % 2]
  assert where == opened.locate("train", bad[19])  # the 20th, of config.data.min_bad
