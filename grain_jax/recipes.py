"""Where recipes are: by name those of this package, by path anyone's own.

They stand in `configs/` of a checkout, and in `grain_jax/configs` where the package is installed:
setup.py puts them there. A recipe says `from configs import common` in both.
"""

from __future__ import annotations

import ast
import difflib
import importlib.machinery
import importlib.util
import pathlib
import sys
import types
from typing import NamedTuple

from grain_jax import places

_HERE = pathlib.Path(__file__).resolve().parent
FOLDER = next(
  folder
  for folder in (_HERE / "configs", _HERE.parent / "configs")
  if (folder / "common.py").is_file()
)
_NOT_RECIPES = ("__init__", "common")


def names() -> list[str]:
  """Names of the recipes that come with the package."""
  return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in _NOT_RECIPES)


def described() -> dict[str, str]:
  """{name: first line of the docstring} of the recipes that come with the package."""
  found = {}
  for name in names():
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    found[name] = (text or "").partition("\n")[0]
  return found


class Key(NamedTuple):
  """A key of a configuration as configs/common.py states it."""

  default: str  # as it is written there
  comment: str  # what it means, its unit


def keys() -> dict[str, Key]:
  """{'optimizer.lr': Key} of configs/common.py, from its source."""
  lines = (FOLDER / "common.py").read_text(encoding="utf-8").splitlines()
  (function,) = (
    node
    for node in ast.parse("\n".join(lines)).body
    if isinstance(node, ast.FunctionDef) and node.name == "get_config"
  )
  found = {}
  for node in function.body:
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
      continue
    if isinstance(node.value, ast.Call):  # a section
      continue
    comments = [line.partition("  # ")[2] for line in lines[node.lineno - 1 : node.end_lineno]]
    for line in lines[node.end_lineno :]:  # a long one goes on in lines of its own
      if not line.startswith("  # "):
        break
      comments.append(line.removeprefix("  # "))
    key = ast.unparse(node.targets[0]).partition(".")[2]
    found[key] = Key(ast.unparse(node.value), " ".join(filter(None, comments)))
  return found


def find(path: str) -> str:
  """'FILE' or 'FILE:argument' of a recipe given by name or by path.

  Args:
    path: value of --config: 'cc12m', 'configs/cc12m.py', either with ':argument'.

  Raises:
    ValueError: there is neither such a file nor such a recipe; one line.
  """
  name, colon, arg = path.partition(":")
  if (file := places.at(name)).is_file():  # Python opens no path with a tilde
    return f"{file}{colon}{arg}"
  if name in names():
    return f"{FOLDER / name}.py{colon}{arg}"
  near = difflib.get_close_matches(pathlib.Path(name).stem, names(), n=1, cutoff=0.5)
  hint = f"Did you mean --config={near[0]}{colon}{arg}? " if near else ""
  raise ValueError(
    f"--config={path}: there is no file {name}. {hint}Recipes by name are {', '.join(names())}; "
    "give one's own by its path."
  )


def load_module(file: pathlib.Path) -> types.ModuleType:
  """The module of a recipe's file, run; it may import `configs.common`."""
  provide_configs(file)
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def provide_configs(file: pathlib.Path) -> None:
  """Makes `configs` the folder of a recipe if it has a common.py of its own, else the package's."""
  folder = file.resolve().parent
  folder = folder if (folder / "common.py").is_file() else FOLDER
  present = sys.modules.get("configs")
  if present is not None and str(folder) in map(_resolved, getattr(present, "__path__", ())):
    return
  for name in [n for n in sys.modules if n == "configs" or n.startswith("configs.")]:
    del sys.modules[name]
  spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
  spec.submodule_search_locations = [str(folder)]
  sys.modules["configs"] = importlib.util.module_from_spec(spec)


def _resolved(path: str) -> str:
  return str(pathlib.Path(path).resolve())
