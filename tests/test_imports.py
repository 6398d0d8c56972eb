"""The direction of imports: from room to room downwards, in no circle; an import is cheap."""

import ast
import pathlib
import subprocess
import sys

import grain_jax

PACKAGE = pathlib.Path(grain_jax.__file__).parent
# From top to bottom. A module belongs to the longest entry that its name begins with.
LEVELS = (
  ("__main__",),
  ("main", "plan"),
  ("training", "annotate"),
  ("evaluate", "embed", "export", "inference"),
  ("encoders",),
  ("evals.sets", "evals.page", "convert"),
  ("evals",),  # the measures
  ("evals.inputs",),
  ("runtime",),
  ("data", "objectives"),
  ("models",),
  (
    "buckets",
    "config",
    "keys",
    "cli",
    "helptext",
    "jsonfiles",
    "local_files",
    "recipes",
    "places",
    "schema",
    "synonyms",
    "textfiles",
    "trees",
    "flops",
    "tokenizer",
    "sentencepiece",
    "tokenizing",
    "failures",
  ),
)
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}


def room(module):
  """'evals.sets.aro' -> 'evals.sets'."""
  parts = module.split(".")
  names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
  return next(name for name in names if name in LEVEL)


def imports():
  """{module: modules of this package that it imports anywhere}, names without 'grain_jax.'."""
  files = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.name != "__init__.py"  # `load` opens inference when called
  }
  known = {name.removesuffix(".__init__"): name for name in files}
  found = {}
  for name, path in files.items():
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        used |= {alias.name.removeprefix("grain_jax.") for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        package = node.module.removeprefix("grain_jax").removeprefix(".")
        names = {f"{package}.{alias.name}".removeprefix(".") for alias in node.names}
        used |= {n if n in known else package for n in names}  # a module of it, or a name in it
    found[name.removesuffix(".__init__")] = {n for n in used if n in known}
  return found


def circle(graph):
  """Some circle of a graph {node: nodes}, [] if there is none."""
  done, path = set(), []

  def visit(node):
    if node in path:
      return [*path[path.index(node) :], node]
    if node in done:
      return []
    path.append(node)
    for other in sorted(graph.get(node, ())):
      if found := visit(other):
        return found
    path.pop()
    done.add(node)
    return []

  return next(filter(None, map(visit, sorted(graph))), [])


def test_every_module_has_its_room():
  tops = {name.split(".")[0] for name in LEVEL}
  assert [name for name in imports() if name.split(".")[0] not in tops] == []


def test_nothing_is_imported_upwards():
  upwards = [
    f"{name} -> {other}"
    for name, used in imports().items()
    for other in used
    if LEVEL[room(other)] < LEVEL[room(name)]
  ]
  assert not upwards


def test_there_is_no_circle_of_modules_or_of_rooms():
  modules = imports()
  assert circle(modules) == []
  rooms = {}
  for name, used in modules.items():
    rooms.setdefault(room(name), set()).update({room(other) for other in used} - {room(name)})
  assert circle(rooms) == []
  assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]  # it would be seen


def test_data_never_imports_jax_and_models_never_tensorflow():
  def loads(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
          yield node.module.split(".")[0]

  assert not {"jax", "flax", "optax"} & set(loads("data"))
  for folder in ("models", "objectives"):
    assert not {"tensorflow", "tensorflow_datasets", "clu"} & set(loads(folder))


def test_to_import_the_package_or_a_room_is_cheap():
  rooms = [
    ".".join(("grain_jax", *path.parent.relative_to(PACKAGE).parts))
    for path in sorted(PACKAGE.rglob("__init__.py"))
    if path.parent.name != "objectives"  # which lists the terms
  ]
  program = (
    f"import sys, importlib\nfor name in {rooms!r}: importlib.import_module(name)\n"
    "print(sorted({'jax', 'tensorflow', 'numpy', 'scipy', 'PIL'} & set(sys.modules)))"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert len(rooms) > 8 and done.stdout == "[]\n"
