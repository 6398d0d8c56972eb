"""The wheel in an environment of its own: every command, recipes by name, from another folder."""

import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess
import sys
import venv

import numpy as np
import pytest
from PIL import Image

from bench import kills
from grain_jax import config as configs
from grain_jax import recipes

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built from a copy: a build leaves folders beside the sources."""
  source = tmp_path_factory.mktemp("source")
  ignore = shutil.ignore_patterns("__pycache__")
  for folder in ("grain_jax", "configs"):
    shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source / name)
  command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
  subprocess.run([*command, "-w", source / "dist", source], check=True, capture_output=True)
  (built,) = (source / "dist").glob("*.whl")
  return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
  """Folder of an environment with the wheel; what it needs is that of these tests."""
  folder = tmp_path_factory.mktemp("environment")
  venv.create(folder, with_pip=False)
  (packages,) = folder.glob("lib/*/site-packages")
  (packages / "of_the_tests.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
  command = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q"]
  subprocess.run([*command, "--no-deps", "--no-index", wheel], check=True, capture_output=True)
  return folder


@pytest.fixture
def command(environment, tmp_path, monkeypatch):
  """Runs `grain-jax ...` in an empty folder."""
  monkeypatch.delenv("PYTHONPATH", raising=False)

  def run(*arguments, code=0):
    done = subprocess.run(
      [environment / "bin" / "grain-jax", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    return done

  return run


def test_every_recipe_is_the_same_by_name_and_by_path():
  assert recipes.names() == sorted(
    p.stem for p in pathlib.Path("configs").glob("*.py") if p.stem not in ("__init__", "common")
  )
  for name in recipes.names():
    by_name, by_path = (configs.load(f"{p}:seed=3") for p in (name, f"configs/{name}.py"))
    assert by_name.to_dict() == by_path.to_dict() and by_name.seed == 3


def test_the_wheel_asks_for_what_the_tests_run_on(environment):
  (packages,) = environment.glob("lib/*/site-packages")
  (metadata,) = packages.glob("grain_jax-*.dist-info/METADATA")
  lines = re.findall(r"^Requires-Dist: ([\w.-]+)(\S*)", metadata.read_text(), re.M)
  names = {name.lower().replace("_", "-") for name, _ in lines}
  assert "tensorflow" in names  # any of its builds: the tests run on tensorflow-cpu
  pinned = pathlib.Path("requirements.txt").read_text().lower()
  for name in names - {"tensorflow"}:
    assert importlib.metadata.version(name)
    assert f"\n{name.replace('_', '-')}==" in pinned or name in ("scikit-learn", "jax"), name
  assert (packages / "grain_jax" / "py.typed").is_file()


@pytest.mark.slow
def test_the_installed_program_builds_trains_evaluates_and_more(command, tmp_path, environment):
  rng = np.random.default_rng(0)
  (tmp_path / "mine" / "images").mkdir(parents=True)
  lines = []
  for i in range(40):
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / f"mine/{i}.png")
    box = {"description": f"a thing {i}", "box": [0.1, 0.1, 0.6, 0.6]}
    lines.append(json.dumps({"image": f"{i}.png", "captions": [f"picture {i}"], "regions": [box]}))
  (tmp_path / "mine" / "annotations.jsonl").write_text("\n".join(lines))
  assert command("--version").stdout.startswith("grain_jax 0.")
  command("build", "--source=folder", "--input=mine", "--out=data", "--val_fraction=0.2")
  recipe = f"--config=quickstart:{kills.TINY}"
  keys = ("steps=3", "batch_size=8", "eval_batch_size=8", "data.dir=data", "evals=()")
  overrides = [f"--config.{key}" for key in keys]
  command("train", recipe, "--workdir=run", *overrides)
  assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
  command("evaluate", "--workdir=run", "--evals=retrieval")
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  assert "retrieval/image_to_text/r1" in results
  command("export", "--workdir=run", "--format=safetensors", "--out=out")
  command("convert", "--from=safetensors", "--input=out", "--out=again")
  command("embed", "--checkpoint=again", "--images=mine", "--out=mine.npz")
  program = "import grain_jax; print(grain_jax.load('again').encode_text(['a', 'b']).shape)"
  python = environment / "bin" / "python"
  done = subprocess.run([python, "-c", program], capture_output=True, text=True, cwd=tmp_path)
  assert done.stdout.startswith("(2, "), done.stderr


def test_what_there_is_not_ends_in_a_line(command, tmp_path):
  for arguments, words in (
    (["trian"], "Did you mean train?"),
    (["train", "--config=cc12n", "--workdir=w"], "Did you mean --config=cc12m?"),
    (["plan", "--config=configs/cc12m.py", "--topology=v5e:4x4"], "Did you mean --config=cc12m?"),
  ):
    done = command(*arguments, code=2)
    assert words in done.stderr and done.stderr.count("\n") == 1
  usage = command().stdout
  assert all(name in usage for name in ("train", "evaluate", "build", "plan"))


def test_ones_own_recipe_by_its_path(command, tmp_path):
  (tmp_path / "own.py").write_text(
    "from configs import common\n\n\ndef get_config(arg=''):\n  c = common.get_config()\n"
    "  c.data.dir = 'nowhere_at_all'\n  return common.parse(c, arg)\n"
  )
  done = command("train", "--config=own.py", "--workdir=w", code=1)
  assert "nowhere_at_all cannot be opened" in done.stderr and done.stderr.count("\n") == 1
