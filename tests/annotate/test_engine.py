"""The engine of the annotation with a stage that needs no model: blocks, kills, counts, Ray."""

import json
import logging
import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest
import toy_data

from grain_jax import failures
from grain_jax.annotate import __main__ as annotate
from grain_jax.annotate import engine, stages
from grain_jax.data import build, dataset
from grain_jax.data.building import ray_tasks
from grain_jax.data.sources import folder as folder_source
from grain_jax.data.sources import options

ROOT = pathlib.Path(__file__).parents[2]
PATHS = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("annotate", "data", "."))]


class Lengths:
  """Describes a picture by the length of its caption; fails where it says so."""

  num_gpus = 0.0

  def __init__(self, settings):
    self.batch_size, self.settings, self.asked = 3, settings, 0

  def annotate(self, items):
    self.asked += len(items)
    return [self.one(item) for item in items]

  def one(self, item):
    if "bad" in item.captions[0]:
      return stages.Result(None, [("pictures", "refused")])
    words = [f"{len(item.captions[0])} letters", *item.descriptions]
    return stages.Result({"descriptions": words}, raw=[{"said": words}])

  def totals(self):
    asked, self.asked = self.asked, 0
    return {"asked": asked, "never": 0}


@pytest.fixture
def lengths(monkeypatch):
  monkeypatch.setattr(stages, "make", lambda name, settings: Lengths(settings))


@pytest.fixture
def source(tmp_path):
  root = tmp_path / "in"
  root.mkdir()
  picture = toy_data.record(0)["image"]
  with (root / "annotations.jsonl").open("w") as lines:
    for i in range(2500):
      if i < 5:
        (root / f"{i}.jpg").write_bytes(picture)
      elif i != 1200:
        (root / f"{i}.jpg").symlink_to(f"{i % 5}.jpg")
      caption = "bad" if i in (7, 2000) else "a" * (i % 9 + 1)
      lines.write(json.dumps({"image": f"{i}.jpg", "captions": [caption]}) + "\n")
  return folder_source.source(root)


def annotations(out):
  found = {}
  for path in sorted((out / "annotations").glob("*.jsonl")):
    for line in map(json.loads, path.read_text().splitlines()):
      assert line["key"] not in found
      found[line["key"]] = line
  return found


def run(source, out, **changes):
  values = {"execute": engine.here, "say": lambda line: None, **changes}
  return engine.run(source, "lengths", {"a": 1}, out, **values)


def test_every_picture_once_with_its_counts(lengths, source, tmp_path):
  manifest = run(source, tmp_path / "out")
  found = annotations(tmp_path / "out")
  assert len(found) == 2499 and found["10.jpg"]["descriptions"] == ["2 letters"]
  assert "descriptions" not in found["7.jpg"]
  assert manifest["counts"] == {
    "pictures": 2500, "read": 2499, "failed": 2, "descriptions": 2497, "regions": 0, "negatives": 0,
  }  # fmt: skip
  assert manifest["losses"] == {
    "pictures/refused": {"count": 2, "first": ["7.jpg", "2000.jpg"]},
    "pictures/missing_image": {"count": 1, "first": ["1200.jpg"]},
  }
  assert manifest["totals"] == {"asked": 2499, "never": 0}
  raw = (tmp_path / "out" / "raw" / "000000.jsonl").read_text().splitlines()
  assert json.loads(raw[0]) == {"key": "0.jpg", "raw": {"said": ["1 letters"]}}


def test_what_is_finished_is_not_done_again(lengths, source, tmp_path, monkeypatch):
  asked = []
  perform = engine.Job.perform

  def failing(self, task):
    asked.append(task["number"])
    if asked == [0, 1]:
      raise failures.TransientError("gone")
    perform(self, task)

  monkeypatch.setattr(engine.Job, "perform", failing)
  with pytest.raises(failures.TransientError):
    run(source, tmp_path / "out")
  assert not (tmp_path / "out" / "manifest.json").exists()
  said = []
  run(source, tmp_path / "out", say=said.append)
  assert asked == [0, 1, 1, 2] and "1 of 3 blocks are there" in said[0]
  assert len(annotations(tmp_path / "out")) == 2499
  run(source, tmp_path / "out", retry_failed=True)
  assert asked == [0, 1, 1, 2, 0, 1]  # those with a failure
  with pytest.raises(ValueError, match="holds annotations of another settings"):
    engine.run(source, "lengths", {"a": 2}, tmp_path / "out", execute=engine.here)


def test_only_what_failed_is_done_again(lengths, source, tmp_path, monkeypatch):
  out = tmp_path / "out"
  first = run(source, out)
  whole = annotations(out)
  raw = sorted(path.read_text() for path in (out / "raw").iterdir())

  def broken(stage, items):
    raise failures.TransientError("gone")

  with monkeypatch.context() as patch:  # the server is away
    patch.setattr(Lengths, "annotate", broken)
    with pytest.raises(failures.TransientError):
      run(source, out, retry_failed=True)
  assert not (out / "manifest.json").exists()  # nothing takes it for finished
  assert annotations(out) == whole
  again = run(source, out)  # goes on with those that failed, and they fail again
  assert again["totals"] == {"asked": 2499 + 2, "never": 0}  # all that was spent
  for part in ("counts", "losses"):
    assert again[part] == first[part]
  assert annotations(out) == whole
  assert sorted(path.read_text() for path in (out / "raw").iterdir()) == raw
  with monkeypatch.context() as patch:
    patch.setattr(Lengths, "one", lambda stage, item: stages.Result({"descriptions": ["x"]}))
    third = run(source, out, retry_failed=True)
  assert third["counts"]["failed"] == 0 and third["totals"] == {"asked": 2499 + 4, "never": 0}
  assert set(third["losses"]) == {"pictures/missing_image"}
  now = {key: {"key": key, "descriptions": ["x"]} for key in ("7.jpg", "2000.jpg")}
  assert annotations(out) == whole | now and not list((out / "again").iterdir())


def test_more_failures_than_may_be_are_an_error(lengths, source, tmp_path):
  match = r"2 of 2,499 pictures failed \(pictures/refused 2, .*--retry_failed"
  with pytest.raises(ValueError, match=match) as error:
    run(source, tmp_path / "out", max_failures=0.0005)
  assert "\n" not in str(error.value) and not (tmp_path / "out" / "manifest.json").exists()
  run(source, tmp_path / "out", max_failures=0.001)


def test_a_stage_is_given_what_the_one_before_wrote(lengths, source, tmp_path):
  run(source, tmp_path / "first")
  second = options.apply(source, {"annotated": str(tmp_path / "first")})
  run(second, tmp_path / "second")
  assert annotations(tmp_path / "second")["3.jpg"]["descriptions"] == ["4 letters", "4 letters"]


class Captions(Lengths):
  def one(self, item):
    return stages.Result({"captions": ["a picture"]} if not item.captions else {})


def test_a_picture_without_a_caption_is_given_one(tmp_path, monkeypatch):
  """Annotated all the same; a build that adds what was written keeps it, and drops one without."""
  monkeypatch.setattr(stages, "make", lambda name, settings: Captions(settings))
  root = tmp_path / "in"
  root.mkdir()
  for name in ("with", "without", "empty"):
    (root / f"{name}.jpg").write_bytes(toy_data.record(0)["image"])
  lines = [{"image": "with.jpg", "caption": "mine"}, {"image": "without.jpg"},
           {"image": "empty.jpg", "captions": [""]}]  # fmt: skip
  (root / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  plain = folder_source.source(root)
  manifest = run(plain, tmp_path / "out")
  assert manifest["counts"]["read"] == 3 and not manifest["counts"]["failed"]
  source = options.apply(plain, {"annotated": str(tmp_path / "out")})
  build.build(source, tmp_path / "built", workers=0, allow_dropped=1.0, say=toy_data.quiet)
  assert list(captions(tmp_path / "built")) == [["mine"], ["a picture"], ["a picture"]]
  build.build(plain, tmp_path / "alone", workers=0, allow_dropped=1.0, say=toy_data.quiet)
  assert list(captions(tmp_path / "alone")) == [["mine"]]


def captions(folder):
  opened = dataset.open_dataset(folder)
  for i in range(opened.num_records("train")):
    yield [text.decode() for text in opened.parse("train", i).captions]


def test_a_run_goes_on_with_other_settings_that_change_nothing(lengths, source, tmp_path):
  out, said = tmp_path / "out", []
  for seconds in (1, 2):
    engine.run(
      source, "lengths", {"a": 1, "timeout": seconds}, out, execute=engine.here,
      neutral=("timeout",), say=said.append,
    )  # fmt: skip
  assert [line for line in said if "goes on" in line] == [said[-1]]  # and had nothing to do


def test_a_run_of_which_all_fails_ends_early(source, tmp_path, monkeypatch):
  """A model that is no use is no fault of 12 million pictures, nor mended by a new start."""

  class Nothing(Lengths):
    def one(self, item):
      return stages.Result(None, [("pictures", "no_reply")])

  monkeypatch.setattr(stages, "make", lambda name, settings: Nothing(settings))
  with pytest.raises(ValueError, match="2,499 of the last 2,499 pictures failed"):
    run(source, tmp_path / "out", max_failures=1.0)


def test_captions_of_two_stages_stand_one_after_another(source, tmp_path, monkeypatch):
  class Again(Lengths):
    def one(self, item):
      return stages.Result({"captions": ["the same", f"after {len(item.captions)}"]})

  monkeypatch.setattr(stages, "make", lambda name, settings: Again(settings))
  run(source, tmp_path / "first")
  second = options.apply(source, {"annotated": str(tmp_path / "first")})
  run(second, tmp_path / "second")
  assert annotations(tmp_path / "second")["3.jpg"]["captions"] == ["the same", "after 1", "after 3"]


PROGRAM = """
import os, signal, sys, threading
sys.path[:0] = {paths!r}
import test_engine
from grain_jax.annotate import engine, stages
from grain_jax.data.sources import folder
stages.make = lambda name, settings: test_engine.Lengths(settings)
if {after}:
  threading.Timer({after}, os.kill, (os.getpid(), signal.SIGKILL)).start()
engine.run(folder.source({root!r}), "lengths", {{"a": 1}}, __import__("pathlib").Path({out!r}),
           execute=engine.here)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_goes_on(lengths, source, tmp_path, seed):
  """By SIGKILL: the same annotations, none twice, none lost."""
  run(source, tmp_path / "whole")
  out, random_ = tmp_path / "out", random.Random(seed)
  values = {"paths": PATHS, "root": source.recipe["arguments"]["input"], "out": str(out)}
  codes = []
  for _ in range(2):
    program = PROGRAM.format(**values, after=random_.uniform(0.01, 0.3))
    codes.append(subprocess.run([sys.executable, "-c", program], capture_output=True).returncode)
  assert -signal.SIGKILL in codes
  program = PROGRAM.format(**values, after=0)
  subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
  assert annotations(out) == annotations(tmp_path / "whole")


class RayLengths(annotate.Annotator):
  """The toy stage in a process of Ray; the first that does block 1 is killed, in the middle."""

  def perform(self, made, task):
    made._stage_of = lambda: Lengths(None)
    once = made.out.parent / "once"
    if task["number"] == 1 and not once.exists():
      once.touch()
      made.stage.one = lambda item: os.kill(os.getpid(), signal.SIGKILL)
    super().perform(made, task)


@pytest.mark.long
def test_ray_of_which_a_worker_is_killed(lengths, source, tmp_path):
  """Two workers, the same annotations: none twice, none lost."""
  ray = pytest.importorskip("ray")
  run(source, tmp_path / "whole")
  ray.init(
    num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
    runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(PATHS)}},
  )  # fmt: skip
  try:
    manifest = run(
      source, tmp_path / "out", execute=lambda job, todo, done: ray_tasks.run(
        RayLengths, job, todo, done
      )
    )  # fmt: skip
  finally:
    ray.shutdown()
  assert (tmp_path / "once").exists()
  assert annotations(tmp_path / "out") == annotations(tmp_path / "whole")
  assert manifest["totals"] == {"asked": 2499, "never": 0} and manifest["counts"]["failed"] == 2
