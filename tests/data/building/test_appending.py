"""Shards written while blocks are read are those written after them, whenever that ends."""

import hashlib
import json
import pathlib
import tempfile
import time

import numpy as np
import pytest
import toy_data
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_jax import failures
from grain_jax.data import build, dataset
from grain_jax.data.building import appending, on_disk, preview, shards, tally, tasks, workers
from grain_jax.data.building import block as block_lib
from grain_jax.data.building import hints as hints_lib
from grain_jax.data.sources import folder as folder_source


def write_blocks(root, blocks, *, size=0):
  """Finished blocks of [(split, key)]; a record is its key and place, and `size` random bytes."""
  random = np.random.default_rng(0)
  place = tasks.Place(root)
  for folder in (place.scratch, place.facts, place.dataset):
    folder.mkdir(parents=True)
  for number, rows in enumerate(blocks):
    folder = block_lib.folder_of(place.blocks, number)
    folder.mkdir(parents=True)
    for split in {split for split, _ in rows}:
      file = str(block_lib.records_file(folder, split))
      writer = array_record_module.ArrayRecordWriter(file, "group_size:1,uncompressed")
      for row, (own, key) in enumerate(rows):
        if own == split:
          writer.write(f"{key} {number} {row}".encode() + random.bytes(size))
      writer.close()
    items = [[split, key, [1, 0, 0, 0, 9], []] for split, key in rows]
    facts = {
      "items": items,
      "hints": hints_lib.Hints(toy_data.source([])).take(),
      "preview": preview.Preview().take(),
    }
    (folder / block_lib.FACTS).write_text(json.dumps(facts))
  return place


def new_plan(place, size):
  return shards.Plan(
    on_disk.SeenKeys(place.scratch),
    shard_size=size,
    counts=tally.Tally(1.0),
    hints=hints_lib.Hints(toy_data.source([])),
    page=preview.Preview(),
  )


def parts_of(place, plan):
  """Of all blocks, one by one."""
  for number, folder in enumerate(sorted(place.blocks.glob("*"))):
    yield plan.add(number, json.loads((folder / block_lib.FACTS).read_text()))


def write_after(place, plan):
  """All shards that are not finished, by the function that workers call."""
  for split, several in plan.shards.items():
    for number, runs in enumerate(several):
      shards.write(
        split, number, runs, folder=place.dataset, facts=place.facts, blocks=place.blocks
      )


def written(place):
  """{file: its bytes}, and what is known of the shards."""
  return {
    file.name: file.read_bytes() for folder in (place.dataset, place.facts)
    for file in folder.iterdir()
  }  # fmt: skip


row = st.tuples(st.sampled_from(["train", "val", "test"]), st.sampled_from("abcdefghijklm"))


@settings(max_examples=60, deadline=None)
@given(
  blocks=st.lists(st.lists(row, max_size=6), min_size=1, max_size=5),
  size=st.integers(1, 4),
  most=st.integers(0, 3),
  ends=st.integers(0, 5),
  there=st.booleans(),
)
def test_they_are_the_shards_written_afterwards(blocks, size, most, ends, there):
  """With duplicates and several splits; `ends`: blocks after which no shard is begun."""
  with tempfile.TemporaryDirectory() as folder:
    after = write_blocks(pathlib.Path(folder) / "after", blocks)
    plan = new_plan(after, size)
    list(parts_of(after, plan))
    write_after(after, plan)
    place = write_blocks(pathlib.Path(folder) / "while", blocks)
    if there and "train" in plan.shards:  # one is finished already
      runs = plan.shards["train"][0]
      shards.write("train", 0, runs, folder=place.dataset, facts=place.facts, blocks=place.blocks)
    plan = new_plan(place, size)
    told = list(parts_of(place, plan))
    with appending.Appender(place, most=most) as appender:
      for parts in told[:ends]:
        appender.add(parts)
      if ends >= len(told):  # else stopped in the middle: what was begun is thrown away
        begun = appender.begin_no_more()
        appender.wait()
        finished = {("train", 0)} if there and "train" in plan.shards else set()
        for shard in begun | set(appender.finished()) | finished:
          assert shards.read_facts(place.facts, *shard) is not None
    assert not list(place.dataset.glob("*.tmp-*"))
    write_after(place, plan)
    assert written(place) == written(after)


def wait_until(met):
  deadline = time.monotonic() + 60
  while not met():
    assert time.monotonic() < deadline, "it never came"
    time.sleep(0.005)


def numbered(count, per_block):
  rows = [("train", f"k{i}") for i in range(count)]
  return [rows[i : i + per_block] for i in range(0, count, per_block)]


def test_full_shards_are_finished_before_the_reading_ends(tmp_path):
  place = write_blocks(tmp_path, numbered(10, 3))
  plan = new_plan(place, 4)
  with appending.Appender(place) as appender:
    for parts in parts_of(place, plan):
      appender.add(parts)
    wait_until((place.facts / "train-00001.json").is_file)
    assert not (place.facts / "train-00002.json").is_file()  # it may get more
    assert appender.begin_no_more() <= {("train", 2)}
    appender.wait()
  records = [json.loads(file.read_text())["records"] for file in sorted(place.facts.iterdir())]
  assert records == [4, 4, 2]
  for file in sorted(place.facts.iterdir()):
    data = (place.dataset / file.stem).read_bytes()
    known = json.loads(file.read_text())
    assert (len(data), hashlib.sha256(data).hexdigest()) == (known["bytes"], known["sha256"])
  reader = array_record_module.ArrayRecordReader(str(place.dataset / "train-00001"))
  assert reader.read_all() == [b"k4 1 1", b"k5 1 2", b"k6 2 0", b"k7 2 1"]
  reader.close()


@pytest.mark.parametrize("size", [1000, 70_000, 400_000])
def test_the_sum_made_while_a_shard_is_written_is_that_of_the_file(tmp_path, size):
  place = write_blocks(tmp_path, numbered(30, 8), size=size)
  plan = new_plan(place, 100)
  list(parts_of(place, plan))
  write_after(place, plan)
  (file,) = place.dataset.iterdir()
  known = shards.read_facts(place.facts, "train", 0)
  assert known["bytes"] == file.stat().st_size > 30 * size and known["records"] == 30
  assert known["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_goes_wrong_is_raised_where_it_is_waited_for(tmp_path):
  place = write_blocks(tmp_path, numbered(4, 2))
  plan = new_plan(place, 4)
  told = list(parts_of(place, plan))
  block_lib.records_file(block_lib.folder_of(place.blocks, 1), "train").unlink()
  with appending.Appender(place) as appender:
    for parts in told:
      appender.add(parts)
    with pytest.raises(RuntimeError, match="No such file"):
      wait_until(lambda: appender.finished())
    with pytest.raises(RuntimeError, match="No such file"):
      appender.wait()
  assert list(place.dataset.iterdir()) == list(place.facts.iterdir()) == []


def test_no_process_starts_where_nothing_is_to_do(tmp_path, monkeypatch):
  monkeypatch.setattr(workers, "_start", lambda *_: pytest.fail("started"))
  source = folder_source.source(write_images(tmp_path / "in", 1))
  workers.executor(source, tasks.Place(tmp_path / "part"), workers=2)(iter(()), toy_data.quiet)


def write_images(root, count):
  root.mkdir()
  (root / "0.jpg").write_bytes(toy_data.record(0)["image"])
  with (root / "annotations.jsonl").open("w") as lines:
    for i in range(count):
      (root / f"p{i}.jpg").symlink_to("0.jpg")
      lines.write(json.dumps({"image": f"p{i}.jpg", "captions": [f"picture {i}"]}) + "\n")
  return root


def test_a_build_by_processes_writes_shards_meanwhile(tmp_path, monkeypatch):
  asked, ask = [], workers._ask
  monkeypatch.setattr(workers, "_ask", lambda *a: (asked.append(a[1]), ask(*a))[1])
  source = folder_source.source(write_images(tmp_path / "in", 2100))
  build.build(source, tmp_path / "out", workers=2, shard_size=500, say=toy_data.quiet)
  assert sorted(task["number"] for task in asked if task["do"] == "block") == [0, 1, 2]
  assert 0 not in [task["number"] for task in asked if task["do"] == "shard"]
  assert dataset.open_dataset(tmp_path / "out").num_records("train") == 2100


@pytest.mark.parametrize("count", [0, 2])
def test_shards_of_another_size_are_made_of_what_was_read(tmp_path, monkeypatch, count):
  """Blocks whose records are in shards of the old size alone are read again."""
  folder, options = write_images(tmp_path / "in", 2100), {"workers": count, "say": toy_data.quiet}
  finish = shards.finish
  monkeypatch.setattr(shards, "finish", lambda *_: raise_lost(None))
  with pytest.raises(failures.TransientError, match="lost"):
    build.build(folder_source.source(folder), tmp_path / "out", shard_size=700, **options)
  monkeypatch.setattr(shards, "finish", finish)
  assert not list((tmp_path / "out.part").glob("blocks/*/*.array_record"))
  build.build(folder_source.source(folder), tmp_path / "out", shard_size=800, **options)
  opened = dataset.open_dataset(tmp_path / "out")
  entries = opened.manifest["splits"]["train"]["shards"]
  assert [entry["records"] for entry in entries] == [800, 800, 500]
  assert [opened.parse("train", i).key for i in (0, 1500, 2099)] == [
    b"p0.jpg",
    b"p1500.jpg",
    b"p2099.jpg",
  ]


def raise_lost(_):
  raise failures.TransientError("lost")
