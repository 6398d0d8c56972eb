"""The peer does the same to the same records; the summary by hand."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from bench import input_pipeline, input_pipeline_sides
from grain_jax.data import dataset


@pytest.mark.parametrize("reduced", [False, True])
def test_ours_and_the_peer_make_the_same_examples(tmp_path, reduced):
  input_pipeline_sides.make_data(tmp_path, images=4, width=120, height=90)
  options = {"batch": 4, "size": 48}
  if reduced:
    options["size"] = 40
  theirs = next(input_pipeline_sides.peer(tmp_path, cores=0, reduced=reduced, **options))
  batch = next(input_pipeline_sides.ours(tmp_path, cores=1, reduced=reduced, **options))
  where = [
    next(j for j in range(4) if np.array_equal(theirs["tokens"][j].numpy(), row))
    for row in batch["tokens"]
  ]
  assert sorted(where) == [0, 1, 2, 3]
  np.testing.assert_array_equal(theirs["image"].numpy()[where], batch["image"])
  np.testing.assert_allclose(theirs["boxes"].numpy()[where], batch["boxes"], atol=1e-6)
  for name in ("segments", "positions", "ends", "text_mask"):
    np.testing.assert_array_equal(theirs[name].numpy()[where], batch[name])


def test_summary_is_images_a_second_of_the_median_round():
  found = {
    "ours_1": {"cpu": [2.0, 2.0, 2.0], "wall": [2.0, 1.9, 9.0], "own": [0.1, 0.1, 0.1]},
    "ours_2": {"cpu": [1.0, 2.0, 9.0], "wall": [1.0, 1.0, 1.0], "own": [0.0004, 0.0005, 0.1]},
    "ours_whole_2": {"cpu": [4.0, 4.0, 4.0], "wall": [2.0, 2.0, 2.0], "own": [0.1, 0.1, 0.1]},
    "ours_0": {"cpu": [2.5, 2.5, 2.5], "wall": [2.0, 2.0, 2.0], "own": [2.5, 2.5, 2.5]},
    "torch": {"cpu": [8.0, 8.0, 0.1], "wall": [4.0, 4.0, 4.0], "own": [1.0, 1.0, 1.0]},
    "torch_reduced": {"cpu": [3.0, 3.0, 3.0], "wall": [2.0, 2.0, 2.0], "own": [1.0, 1.0, 1.0]},
  }
  result = input_pipeline.summary(found, images=40, cores=2, lock_us=200.0)
  cpu, wall = result["images_per_s_per_core_cpu"], result["images_per_s_per_core_wall"]
  assert (cpu["ours"], cpu["torch"], cpu["ratio"], cpu["ratio_whole"]) == (20, 5, 4, 2)
  assert (wall["ours"], wall["torch"], wall["ratio"]) == (20, 5, 4)
  assert (cpu["ratio_reduced"], wall["ratio_reduced"]) == (1.5, 2)
  assert result["workers"] == {
    1: {"images_per_s": 20.0, "speedup": 1.0, "speedup_cpu": 1.0},
    2: {"images_per_s": 40.0, "speedup": 2.0, "speedup_cpu": 2.0},
  }
  assert result["serial_us"] == {"workers": 12.5, "threads": 200.0}
  # 20 images/s of a core with workers, 16 with threads, at most 1e6 / 200 of them.
  assert result["follows"][16] == {"workers": 320, "threads": 256}
  assert input_pipeline.summary(found, images=4000, cores=2, lock_us=200.0)["follows"][112] == {
    "workers": 224_000, "threads": 5_000,
  }  # fmt: skip
  assert [input_pipeline.counts(n) for n in (1, 2, 3, 16)] == [
    [1],
    [1, 2],
    [1, 2, 3],
    [1, 2, 4, 8, 16],
  ]


def test_no_text_comes_twice_and_what_holds_the_lock_is_counted(tmp_path):
  input_pipeline_sides.make_data(tmp_path, images=2, width=120, height=90, records=12)
  records = json.loads((tmp_path / "records.json").read_text())
  texts = [
    text for r in records for text in (*r["captions"], *(g["description"] for g in r["regions"]))
  ]
  assert len(texts) == len(set(texts)) == 12 * 8
  opened = dataset.open_dataset(tmp_path / "shards")
  assert opened.num_records("train") == 12
  assert opened.parse("train", 2).image == (tmp_path / "files/0.jpg").read_bytes()
  resize = Image.Image.resize
  seconds = input_pipeline_sides.lock_seconds(tmp_path, batch=4, size=48, batches=3)
  assert 0 < seconds < 0.01 and Image.Image.resize is resize


def test_the_whole_bench_on_few_images(tmp_path):
  command = [sys.executable, "-m", "bench.input_pipeline", "--json", "--images=8", "--batch=4"]
  command += ["--rounds=1", "--width=120", "--height=90", "--size=48", "--cores=1"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  result = json.loads(done.stdout)
  assert result["settings"]["distinct_texts"] == 3 * 8 * 8
  assert result["serial_us"]["workers"] > 0 and result["workers"].keys() == {"1"}


def test_cpu_seconds_count_what_children_do():
  before = input_pipeline_sides.cpu_seconds()
  busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
  child = subprocess.Popen(
    [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )
  child.stdout.readline()
  assert input_pipeline_sides.cpu_seconds() - before == pytest.approx(0.55, abs=0.2)
  child.communicate("\n")


def test_cpu_seconds_while_threads_end():
  over = threading.Event()

  def come_and_go():
    while not over.is_set():
      thread = threading.Thread(target=lambda: None)
      thread.start()
      thread.join()

  maker = threading.Thread(target=come_and_go)
  maker.start()
  try:
    seen = [input_pipeline_sides.cpu_seconds() for _ in range(100)]
  finally:
    over.set()
    maker.join()
  assert seen[-1] > seen[0]


def test_cpu_seconds_do_not_wait_for_what_the_kernel_does_not_say(monkeypatch):
  def read_text(path):
    raise FileNotFoundError(path)

  monkeypatch.setattr(input_pipeline_sides.pathlib.Path, "read_text", read_text)
  monkeypatch.setattr(input_pipeline_sides.pathlib.Path, "exists", lambda path: False)
  with pytest.raises(FileNotFoundError, match="children"):
    input_pipeline_sides.cpu_seconds()
