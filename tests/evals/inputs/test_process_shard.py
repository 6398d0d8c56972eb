"""Several processes, played by threads that meet at each `gather`, read as one does."""

import threading
from concurrent import futures

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from grain_jax.data import dataset
from grain_jax.evals import built
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.process_shard import ProcessShard


def together(count, work):
  """`work(shard)` by `count` threads, in their order."""
  barrier, given = threading.Barrier(count, timeout=60), [None] * count

  def start(index):
    def gather(array):
      given[index] = array
      barrier.wait()
      whole = np.stack(given)  # as the devices do, only what has one shape
      barrier.wait()
      return whole

    try:
      return work(ProcessShard(index, count, gather))
    except BaseException:
      barrier.abort()
      raise

  with futures.ThreadPoolExecutor(count) as pool:
    return [future.result() for future in [pool.submit(start, i) for i in range(count)]]


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.integers(1, 4), st.lists(st.text(max_size=9) | st.none(), min_size=1, max_size=13)
)
def test_rows_of_all_processes_come_back_in_their_order(count, texts):
  size = len(texts)

  def work(shard):
    part = shard.shard_size(size)
    own = (texts + [""] * part * count)[shard.index * part : (shard.index + 1) * part]
    rows = np.arange(part)[:, None] + shard.index * part
    mine = [row for row in range(size) if shard.holds(row, size)]
    return shard.gather_rows(rows, size), shard.gather_lists(own, size), mine

  found = together(count, work)
  for rows, joined, _ in found:
    assert_array_equal(rows[:, 0], np.arange(size))
    assert joined == texts
  assert sum((mine for _, _, mine in found), []) == list(range(size))  # each row by one process


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_picture_of_a_folder_is_read_by_one_process(count, tmp_path, monkeypatch):
  """Eleven images, of which 3 and 8 are broken, in batches of four."""
  files = [tmp_path / f"{i}.png" for i in range(11)]
  for i, file in enumerate(files):
    shape = (5 + i, 7, 3)
    file.write_bytes(b"broken" if i in (3, 8) else images_lib.png(np.full(shape, i, np.uint8)))
  opened = []
  real = images_lib.open_image
  monkeypatch.setattr(
    images_lib, "open_image", lambda s, **how: (opened.append(s), real(s, **how))[1]
  )

  def work(shard):
    unreadable = images_lib.Unreadable()
    found = images_lib.batches(
      iter(files), size=8, resize="squash", batch_size=4, unreadable=unreadable, shard=shard
    )
    return list(found), unreadable

  for batches, unreadable in together(count, work):
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2, 4], [5, 6, 7, 9], [10]]
    for batch in batches:
      assert batch.image.shape[1:] == (8, 8, 3)
      assert (batch.image == batch.index[:, None, None, None]).all()
      assert_array_equal(batch.original_size[:, 0], 5 + batch.index)
    assert sorted(unreadable.reasons) == [3, 8] and "3.png" in unreadable.reasons[3]
  assert sorted(opened) == sorted(files)


@pytest.mark.parametrize("count", [2, 3])
def test_each_record_of_a_split_is_read_by_one_process(count, scenes_dir, tiny, monkeypatch):
  """24 records with masks in batches of ten, which three do not divide."""
  data = dataset.open_dataset(scenes_dir)
  tiny.eval_batch_size, read = 10, []
  real = dataset.Dataset.read

  def recorded(self, split, indices):
    read.extend(indices)
    return real(self, split, indices)

  monkeypatch.setattr(dataset.Dataset, "read", recorded)

  def work(shard):
    encoders = Encoders(image=len, text=len, regions=len, shard=shard)
    return list(built._batches(tiny, encoders, data, "val"))

  (want,) = together(1, work)
  assert sorted(read) == list(range(24)) and len(want) == 3 and want[0][1]["mask"][0]
  read.clear()
  for found in together(count, work):
    for (batch, extras), (batch_alone, alone) in zip(found, want, strict=True):
      assert extras.keys() == alone.keys() and batch.keys() == batch_alone.keys()
      for name in batch:
        assert_array_equal(batch[name], batch_alone[name], name, strict=True)
      for name in ("index", "label"):
        assert_array_equal(extras[name], alone[name], name, strict=True)
      for name in ("key", "captions", "descriptions", "mask"):
        assert extras[name] == alone[name], name
  assert sorted(read) == list(range(24))
