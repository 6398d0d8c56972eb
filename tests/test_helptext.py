"""`--help` of every command: what it is for, its own flags, and what holds where none is given."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from grain_jax import config as configs
from grain_jax import failures, recipes

ROOT = pathlib.Path(__file__).parent.parent


def commands():
  """Every module that ends in `cli.run(...)` of its own, or reads its flags with argparse."""
  for folder in ("grain_jax", "bench"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      text = path.read_text()
      if re.search(
        r'^if __name__ == "__main__":\n(\n|  .*\n)*  (cli\.run\(main|main\(\))', text, re.M
      ):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        if name not in (
          "grain_jax",
          "grain_jax.data.build",
        ):  # a list of commands; a parser of its own
          yield name


def ask(name, *flags):
  done = subprocess.run(
    [sys.executable, "-m", name, *flags], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_commands_of_the_readme_are_among_those_asked():
  asked = set(commands())
  readme = (ROOT / "README.md").read_text()
  named = set(re.findall(r"python -m ((?:grain_jax|bench)[\w.]*)", readme))
  assert named - asked == {"grain_jax.data.build", "grain_jax.annotate"} and len(asked) > 12


@pytest.mark.slow
@pytest.mark.parametrize("name", list(commands()))
def test_every_flag_says_its_default_or_what_holds_without_it(name):
  text = ask(name, "--help")
  assert "logtostderr" not in text and "pdb" not in text  # of absl
  entries = re.split(r"^  (?=-)", text, flags=re.M)[1:]
  assert len(entries) > 1
  for entry in entries:
    if entry.startswith(("--help", "-h,")) or re.match(r"--\w+  +", entry):  # argparse's switches
      continue
    words = " ".join(entry.split())
    assert re.search(r"default|must be given", words), entry


def test_the_page_of_training_has_recipes_keys_processes_and_exit_codes():
  text = ask("grain_jax.main", "--help")
  for name in recipes.names():
    line = importlib.import_module(f"configs.{name}").__doc__.splitlines()[0]
    assert line in " ".join(text.split()) and f"\n  {name} " in text
  for words in (
    "--config.optimizer.lr=", ":runlocal", "--noconfig.data.flip", "--traceback", "Going on",
    "SLURM", "--process_id", "config.json",
  ):  # fmt: skip
    assert words in text, words
  for code in (0, 1, 2, failures.EXIT_RESTART, failures.EXIT_INTERRUPTED):
    assert re.search(rf"^  {code} +\w", text, re.M), code
  long = [line for line in text.splitlines() if len(line) > 100 and "common.py" not in line]
  assert not long
  full = ask("grain_jax.main", "--helpfull")
  assert "  loss.box_giou_cost " in full and "--[no]logtostderr" in full
  assert "  loss.box_giou_cost " not in text


def test_keys_in_the_help_are_those_of_a_configuration():
  """Against what ml_collections holds once common.py has run."""
  from configs import common

  found = recipes.keys()
  assert {name: ast.literal_eval(key.default) for name, key in found.items()} == dict(
    configs.flatten(common.get_config())
  )
  assert all(key.comment for key in found.values())
  assert found["data.caption"].comment.endswith("a control)")  # which goes on in a second line


def test_defaults_in_a_docstring_of_a_bench(capsys):
  from bench import kills

  with pytest.raises(SystemExit) as end:
    kills.main(["--help"])
  text = " ".join(capsys.readouterr().out.split())
  assert end.value.code == 0 and "runs that are killed (default: 3)" in text
  assert "by default the time" in text and "None" not in text
