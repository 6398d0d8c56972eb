"""Evaluations within a run: told to stop there, failing there, impossible from the start."""

import functools
import json

import numpy as np
import pytest
from PIL import Image

from bench import kills
from grain_jax import config as configs
from grain_jax import evaluate, failures
from grain_jax.data import dataset
from grain_jax.evals import built
from grain_jax.runtime import metrics, preemption
from grain_jax.training import loop, setup

pytestmark = pytest.mark.slow  # each trains a few steps


@pytest.fixture
def config(scenes_dir):
  """Four steps, evaluated after the second and the last, saved after the last alone."""
  c = configs.load(f"configs/quickstart.py:{kills.TINY}")
  c.data.dir, c.method, c.data.max_regions = str(scenes_dir), "clip", 0
  c.steps, c.eval_every, c.save_every, c.evals = 4, 2, 100, ("zero_shot", "retrieval")
  c.mesh.update(data=-1)
  return c


def test_a_signal_within_an_evaluation_is_answered_at_its_next_batch(config, tmp_path, monkeypatch):
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  loop.train(config, str(whole))
  real, inside = preemption.Preemption.check, []

  def check(self):
    inside.append(1)
    if len(inside) == 2:
      self._noticed = True
    real(self)

  monkeypatch.setattr(preemption.Preemption, "check", check)
  with pytest.raises(preemption.Preempted, match="checkpoint 2 is saved"):
    loop.train(config, str(stopped))
  assert len(inside) == 2 and kills.saved_steps(stopped) == [2]
  assert not [x for x in metrics.read_jsonl(stopped / "metrics.jsonl") if "train/loss" not in x]
  results = {"step": 4, **loop.train(config, str(stopped))}
  assert results == json.loads((whole / "results.json").read_text())
  assert kills.differences(kills.final_state(whole), kills.final_state(stopped)) == []
  lines = metrics.read_jsonl(stopped / "metrics.jsonl")
  assert [line["step"] for line in lines if "train/loss" not in line] == [2, 4]


def test_outside_sets_are_evaluated_along_the_way(config, tmp_path, rng):
  """A folder of labelled images, the first six of each set."""
  for name in ("cat", "dog"):
    (tmp_path / "sets" / "pets" / name).mkdir(parents=True)
    for i in range(5):
      image = Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8))
      image.save(tmp_path / "sets" / "pets" / name / f"{i}.png")
  (tmp_path / "sets" / "pets" / "dog" / "1.png").write_bytes(b"broken")
  config.evals = ("retrieval", "zero_shot:pets")
  with pytest.raises(ValueError, match="give --config.datasets=DIR"):
    loop.train(config, str(tmp_path / "run"))
  config.datasets, config.eval_limit = str(tmp_path / "sets"), 6
  results = loop.train(config, str(tmp_path / "run"))
  assert results["zero_shot/pets/limit"] == 6 and 0 <= results["zero_shot/pets/top1"] <= 1
  page = (tmp_path / "run" / "report.html").read_text()
  assert page.count("zero_shot:pets: 1 of 6 pictures cannot be read") == 1
  lines = metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl")
  assert [line["step"] for line in lines if "zero_shot/pets/top1" in line] == [2, 4]
  config.evals = ("zero_shot:imagenet",)
  with pytest.raises(ValueError, match="or give --config.datasets=DIR with a folder of pictures"):
    loop.train(config, str(tmp_path / "other"))


def test_outside_sets_may_lie_in_the_users_folder(config, tmp_path, monkeypatch):
  (tmp_path / "sets").mkdir()
  monkeypatch.setenv("HOME", str(tmp_path))
  config.datasets = "~/sets"
  run = setup.settle(config, "~/run", continue_as=(), say=len, warn=len)
  assert (run.options.root, run.folder) == (tmp_path / "sets", tmp_path / "run")


@pytest.mark.parametrize(
  ("error", "kind"),
  [
    (ValueError("no caption was found"), ValueError),
    (OSError(5, "Input/output error"), failures.TransientError),
  ],
)
def test_an_evaluation_that_fails_costs_its_own_results_and_the_code(
  config, tmp_path, monkeypatch, capsys, error, kind
):
  def fail(*arguments):
    raise error

  broken = built.EVALS["zero_shot"]._replace(run=fail)
  monkeypatch.setitem(built.EVALS, "zero_shot", broken)
  with pytest.raises(kind, match="2 evaluations failed .zero_shot at step 2, zero_shot at step 4."):
    loop.train(config, str(tmp_path))
  results = json.loads((tmp_path / "results.json").read_text())
  assert "retrieval/image_to_text/r1" in results and "zero_shot/top1" not in results
  assert kills.saved_steps(tmp_path)[-1] == 4
  said = capsys.readouterr().out
  assert said.count("warning: evaluation zero_shot failed: ") == 2


def test_what_failed_before_a_run_was_stopped_is_in_its_code_all_the_same(
  config, tmp_path, monkeypatch
):
  """The evaluation that fails is the one at which the run is told to stop."""

  def fail(*arguments):
    monkeypatch.setattr(preemption.Preemption, "reached", lambda self: True)
    raise ValueError("once")

  with monkeypatch.context() as patch:
    patch.setitem(built.EVALS, "retrieval", built.EVALS["retrieval"]._replace(run=fail))
    with pytest.raises(preemption.Preempted):
      loop.train(config, str(tmp_path))
  monkeypatch.undo()
  with pytest.raises(ValueError, match="^1 evaluation failed .retrieval at step 2.: .*: once "):
    loop.train(config, str(tmp_path))
  assert json.loads((tmp_path / "results.json").read_text())["step"] == 4
  loop.train(config, str(tmp_path))  # it was said


def test_the_best_checkpoint_waits_for_an_evaluation_that_works(config, tmp_path, monkeypatch):
  config.checkpoint.best_metric = "zero_shot/top1"
  broken = built.EVALS["zero_shot"]._replace(run=lambda *x: (_ for _ in ()).throw(KeyError("x")))
  monkeypatch.setitem(built.EVALS, "zero_shot", broken)
  with pytest.raises(ValueError, match="evaluations failed"):
    loop.train(config, str(tmp_path))
  assert not (tmp_path / "checkpoints" / "best.json").exists()


NEEDS = {
  "grounding": "a described region",
  "detection": "a described region",
  "region_classification": "a described region",
  "composition": "false captions .* or a caption that names coloured objects",
  "retrieval": "a caption",
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_its_data_cannot_serve_is_said_before_the_first_step(
  name, config, tmp_path, monkeypatch
):
  config.method, config.data.max_regions, config.evals = "grain", 3, (name,)
  parse = dataset.Dataset.parse

  def bare(self, split, index):
    return parse(self, split, index)._replace(
      captions=[b""] if name == "retrieval" else [b"a photo"], descriptions=[b" "]
    )

  monkeypatch.setattr(dataset.Dataset, "parse", bare)
  match = f"{name}: none of the 24 records of split 'val' .* has {NEEDS[name]}"
  with pytest.raises(ValueError, match=match) as error:
    loop.train(config, str(tmp_path / "run"))
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
  monkeypatch.undo()
  evaluate.check(configs.resolve(config), dataset.open_dataset(config.data.dir))


def test_no_regions_by_config_is_said_too(config):
  config.method, config.evals, config.data.max_regions = "grain", ("region_classification",), 0
  with pytest.raises(ValueError, match="needs regions and config.data.max_regions = 0"):
    evaluate.check(configs.resolve(config), dataset.open_dataset(config.data.dir))


def test_a_process_that_fails_alone_ends_the_run():
  """The others wait for it in a collective: it cannot go on without them."""
  from grain_jax.evals.inputs import attempts

  def alone(name, line):
    raise failures.TransientError("process 1 did not come")

  attempt = attempts.Attempts(print, alone)
  with pytest.raises(KeyError, match="mine"):
    attempt("retrieval", lambda: {}["mine"])
  with pytest.raises(failures.TransientError):
    attempt("retrieval", lambda: 1)
  told = []
  theirs = json.dumps({"line": "KeyError: theirs", "again": False})
  attempt = attempts.Attempts(told.append, lambda name, mine: [mine, theirs])
  assert attempt("retrieval", lambda: np.ones(2)) is None
  assert told == ["evaluation retrieval failed: KeyError: theirs"]


@pytest.mark.parametrize(
  "mine, theirs",
  [(None, OSError(5, "gone")), (ValueError("no"), OSError(5, "gone")), (None, ValueError("no"))],
)
def test_processes_end_with_one_code_for_an_evaluation_that_failed(mine, theirs):
  from grain_jax.evals.inputs import attempts

  def evaluate_as(error):
    if error is not None:
      raise error

  codes, texts = [], []
  attempts.Attempts(print, lambda name, text: texts.append(text) or [text])("x", lambda: 1)
  assert texts.pop() == ""  # success: the others are waited for long
  for error in (mine, theirs):  # what each tells
    found = attempts.Attempts(print, lambda name, text: texts.append(text) or [text])
    found("retrieval", functools.partial(evaluate_as, error))
  for error in (mine, theirs):
    found = attempts.Attempts(print, lambda name, text: texts)
    assert found("retrieval", functools.partial(evaluate_as, error)) is None
    codes.append(failures.restart_helps(attempts.error_of(found.errors, kept="x")))
  assert codes == [isinstance(theirs, OSError)] * 2
