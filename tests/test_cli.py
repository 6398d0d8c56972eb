"""Flags, and errors in one line."""

import os
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.util import tensor_util

from grain_jax import cli
from grain_jax import config as configs


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize(("kind", "code"), [("ValueError", 1), ("failures.TransientError", 75)])
def test_an_error_has_its_code_with_and_without_its_traceback(kind, code, asked):
  program = f"""
from grain_jax import cli, failures
def main():
  raise {kind}("gone")
cli.run(main)
"""
  flag = ["--traceback"] * asked
  done = subprocess.run([sys.executable, "-c", program, *flag], capture_output=True, text=True)
  assert done.returncode == code and done.stderr.splitlines()[-1].endswith("Error: gone")
  assert ("Traceback" in done.stderr) == asked


@pytest.fixture
def parse(monkeypatch):
  """The parser of a program with --config and --workdir, and of nothing else in this process."""
  values = flags.FlagValues()
  monkeypatch.setattr(flags, "FLAGS", values)
  config_flags.DEFINE_config_file("config", None, "", flag_values=values)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  flags.mark_flags_as_required(["config", "workdir"], flag_values=values)

  def run(*arguments):
    monkeypatch.setattr(sys, "argv", ["program", *arguments])  # config_flags reads it itself
    cli._parse(["program", *arguments])
    return values

  return run


CONFIG = "configs/quickstart.py"
FULL = (f"--config={CONFIG}", "--workdir=w")


@pytest.mark.parametrize("config", [(f"--config={CONFIG}",), ("--config", CONFIG)])
def test_overrides_reach_the_config(parse, config):
  values = parse(*config, "--workdir=w", "--config.optimizer.lr=0.5", "--config.data.flip")
  assert (values.config.optimizer.lr, values.config.data.flip) == (0.5, True)
  assert values.config.steps == configs.load(CONFIG).steps


def test_a_switch_is_turned_off_by_no(parse):
  assert parse(*FULL, "--noconfig.loss.mask_duplicates").config.loss.mask_duplicates is False


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ((*FULL, "--config.optimzer.lr=1"), ["config.optimzer.lr", "config.optimizer.lr"]),
    (("--config", CONFIG, "--workdir=w", "--config.sede=1"), ["config.sede", "config.seed"]),
    ((*FULL, "--noconfig.data.flop"), ["config.data.flop", "config.data.flip"]),
    ((*FULL, "--config.batch_size=many"), ["config.batch_size", "many"]),
    (("--config=configs/quikstart.py", "--workdir=w"), ["configs/quikstart.py", "=quickstart?"]),
    (("--config", "configs/quikstart.py", "--workdir=w"), ["no file", "--config=quickstart?"]),
    ((f"--config={CONFIG}:optimizer.rate=1", "--workdir=w"), ["config.optimizer.rate"]),
    (
      (f"--config={CONFIG}:runlocale", "--workdir=w"),
      ["'runlocale' is neither 'runlocal' nor"],
    ),
    ((*FULL, "--wrokdir=x"), ["wrokdir", "Did you mean --workdir?"]),
    ((*FULL, "--output_dir=x"), ["output_dir", "Did you mean --workdir?"]),
    ((*FULL, "--lr=1e-3"), ["--lr", "Did you mean --config.optimizer.lr?"]),
    ((*FULL, "--batch-size", "8"), ["--batch-size", "Did you mean --config.batch_size?"]),
    ((*FULL, "--xyzzy"), ["--xyzzy is not a flag of this command. --help lists all."]),
    ((*FULL, "--config.learning_rate=1"), ["Did you mean config.optimizer.lr?"]),
    ((*FULL, "more"), ["'more'", "--name=value"]),
    ((f"--config={CONFIG}",), ["--workdir must be given"]),
    ((), ["--config and --workdir must be given"]),
  ],
)
def test_a_wrong_command_line_ends_in_one_line(parse, capsys, arguments, words):
  with pytest.raises(SystemExit) as end:
    parse(*arguments)
  error = capsys.readouterr().err
  assert end.value.code == 2 and error.count("\n") == 1
  for word in words:
    assert word in error


def test_a_message_of_several_lines_becomes_one(capsys):
  with pytest.raises(SystemExit) as end:
    cli.fail(FileNotFoundError("first\n  second"))
  assert end.value.code == 1
  assert capsys.readouterr().err == "FileNotFoundError: first second\n"


@pytest.mark.slow
def test_commands_write_tensorboard_events_and_start_without_keras_or_full_collections(tmp_path):
  program = """
import atexit, gc, pathlib, sys
from grain_jax import cli

atexit.register(lambda: print(gc.get_freeze_count() > 100_000))  # what the end leaves alone

def main():
  import tensorflow_datasets
  from grain_jax.runtime import writers

  writer = writers.create_writer(pathlib.Path(sys.argv[0]), start_step=0)
  writer.write_scalars(1, {"x": 0.5})
  writer.close()
  full = gc.get_stats()[2]["collections"]
  print("tensorflow" in sys.modules, "keras" in sys.modules, full)

cli.run(main)
"""
  environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
  command = [sys.executable, "-c", f"import sys; sys.argv = [{str(tmp_path)!r}]\n{program}"]
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert done.stdout.split() == ["True", "False", "0", "True"], done.stderr
  (events,) = tmp_path.glob("events.out.tfevents.*")
  loader = event_file_loader.EventFileLoader(str(events))
  values = [v for event in loader.Load() for v in event.summary.value]
  assert [(v.tag, tensor_util.make_ndarray(v.tensor)) for v in values] == [("x", 0.5)]


@pytest.mark.parametrize(
  ("value", "want"),
  [
    ("retrieval", ("retrieval",)),
    ("retrieval, zero_shot:imagenet", ("retrieval", "zero_shot:imagenet")),
    ("", ()),
    ("()", ()),
    ("('grounding',)", ("grounding",)),
  ],
)
def test_evaluations_are_a_comma_list(parse, value, want):
  assert parse(*FULL, f"--config.evals={value}").config.evals == want
