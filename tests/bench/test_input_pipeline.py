"""The peer does the same to the same records; the summary by hand."""

import threading

import numpy as np
import pytest

from bench import input_pipeline


@pytest.mark.parametrize("reduced", [False, True])
def test_ours_and_the_peer_make_the_same_examples(tmp_path, reduced):
  input_pipeline.make_data(tmp_path, images=4, width=120, height=90)
  options = {"batch": 4, "size": 48}
  if reduced:
    options["size"] = 40
  theirs = next(input_pipeline.peer(tmp_path, cores=0, reduced=reduced, **options))
  batch = next(input_pipeline.ours(tmp_path, cores=1, reduced=reduced, **options))
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
    "ours": {"cpu": [1.0, 2.0, 9.0], "wall": [1.0, 1.0, 1.0]},
    "ours_whole": {"cpu": [4.0, 4.0, 4.0], "wall": [2.0, 2.0, 2.0]},
    "torch": {"cpu": [8.0, 8.0, 0.1], "wall": [4.0, 4.0, 4.0]},
    "torch_reduced": {"cpu": [3.0, 3.0, 3.0], "wall": [2.0, 2.0, 2.0]},
  }
  result = input_pipeline.summary(found, images=40, cores=2)
  cpu, wall = result["images_per_s_per_core_cpu"], result["images_per_s_per_core_wall"]
  assert (cpu["ours"], cpu["torch"], cpu["ratio"], cpu["ratio_whole"]) == (20, 5, 4, 2)
  assert (wall["ours"], wall["torch"], wall["ratio"]) == (20, 5, 4)
  assert (cpu["ratio_reduced"], wall["ratio_reduced"]) == (1.5, 2)


def test_cpu_seconds_count_what_children_do():
  import subprocess
  import sys

  before = input_pipeline.cpu_seconds()
  busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
  child = subprocess.Popen(
    [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )
  child.stdout.readline()
  assert input_pipeline.cpu_seconds() - before == pytest.approx(0.55, abs=0.2)
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
    seen = [input_pipeline.cpu_seconds() for _ in range(100)]
  finally:
    over.set()
    maker.join()
  assert seen[-1] > seen[0]


def test_cpu_seconds_do_not_wait_for_what_the_kernel_does_not_say(monkeypatch):
  def read_text(path):
    raise FileNotFoundError(path)

  monkeypatch.setattr(input_pipeline.pathlib.Path, "read_text", read_text)
  monkeypatch.setattr(input_pipeline.pathlib.Path, "exists", lambda path: False)
  with pytest.raises(FileNotFoundError, match="children"):
    input_pipeline.cpu_seconds()
