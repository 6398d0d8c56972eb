"""The first cell of the notebooks where grain_jax is not: in an empty folder, as in Colab."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest
from packaging import requirements

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RECORD = """
import json, subprocess, types
def run(command, **options):
  print(json.dumps(command))
  return types.SimpleNamespace(returncode=0, stderr="")
subprocess.run = run
"""


def first_cell():
  notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
  return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def run_cell(folder, source, *, before="", after="", **environment):
  cell = first_cell().replace('SOURCE = ""', f"SOURCE = {source!r}", 1)
  code = f"{before}\n{cell}\n{after}"
  kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  return subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder,
    env={**kept, **environment},
  )  # fmt: skip


def test_all_notebooks_begin_alike():
  for path in NOTEBOOKS:
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert cells[0].source == first_cell(), path
    assert not any("configs/" in cell.source for cell in cells)  # recipes by name are everywhere


def test_where_nothing_is_given_a_line_says_what_to_set(tmp_path):
  done = run_cell(tmp_path, "")
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert "set SOURCE" in done.stderr and "wheel" in done.stderr


def test_a_notebook_ends_at_that_line(tmp_path, monkeypatch):
  monkeypatch.delenv("PYTHONPATH", raising=False)
  notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}
  )
  with pytest.raises(nbclient.exceptions.CellExecutionError, match="set SOURCE in this cell"):
    client.execute()
  assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"][1] is None


@pytest.mark.parametrize(
  ("source", "url"),
  [
    ("https://example.org/grain_jax", "git+https://example.org/grain_jax"),
    ("git+https://example.org/grain_jax.git", "git+https://example.org/grain_jax.git"),
    ("ssh://git@example.org/grain_jax.git", "git+ssh://git@example.org/grain_jax.git"),
    ("https://example.org/grain_jax-0.1-py3-none-any.whl", None),
    ("grain-jax", ""),
  ],
)
def test_an_address_a_wheel_or_a_name_is_asked_for(source, url, tmp_path):
  """Read by the library that pip reads requirements with."""
  done = run_cell(tmp_path, source, before=RECORD)
  assert done.returncode == 0, done.stderr
  wanted = requirements.Requirement(json.loads(done.stdout)[-1])
  assert (wanted.name, wanted.extras) == ("grain-jax", {"scenes", "evals"})
  assert (wanted.url or "") == (source if url is None else url)


def test_what_cannot_be_installed_is_a_line(tmp_path):
  done = run_cell(tmp_path, "no-such-package", PIP_NO_INDEX="1")
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert "SOURCE = 'no-such-package' cannot be installed. ERROR: " in done.stderr


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  """A repository with what a build takes."""
  folder = tmp_path_factory.mktemp("repository")
  for name in ("grain_jax", "configs"):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, folder / name)
  user = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
  for command in (["init", "-q"], ["add", "-A"], [*user, "commit", "-qm", "all"]):
    subprocess.run(["git", *command], cwd=folder, check=True)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["repository", "wheel"])
def test_a_repository_and_a_wheel_are_installed(kind, repository, tmp_path):
  source = "https://example.org/grain_jax"  # git finds it on this disk
  git = {
    "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
    "GIT_CONFIG_VALUE_0": source,
  }  # fmt: skip
  if kind == "wheel":
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path / "dist", repository], check=True)
    (source,) = map(str, (tmp_path / "dist").glob("*.whl"))
  site, empty = tmp_path / "site", tmp_path / "empty"
  site.mkdir()
  empty.mkdir()
  pip = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
  done = run_cell(
    empty, source, before=f"import sys; sys.path.append({str(site)!r})",
    after="from grain_jax import recipes; print(recipes.FOLDER)", PIP_TARGET=str(site),
    **pip, **git,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert pathlib.Path(done.stdout.strip()) == site / "grain_jax" / "configs"
