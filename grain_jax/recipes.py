"""Where recipes are: by name those of this package, by path anyone's own.

They stand in `configs/` of a checkout, and in `grain_jax/configs` where the package is installed:
setup.py puts them there. A recipe says `from configs import common` in both.
"""

from __future__ import annotations

import difflib
import importlib.machinery
import importlib.util
import pathlib
import sys
import types

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


def find(path: str) -> str:
  """'FILE' or 'FILE:argument' of a recipe given by name or by path.

  Args:
    path: value of --config: 'cc12m', 'configs/cc12m.py', either with ':argument'.

  Raises:
    ValueError: there is neither such a file nor such a recipe; one line.
  """
  name, colon, arg = path.partition(":")
  if pathlib.Path(name).is_file():
    return path
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
