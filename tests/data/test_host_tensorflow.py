"""One place imports TensorFlow, and hides the GPUs from it."""

import ast
import logging
import pathlib

import grain_jax
from grain_jax.data import host_tensorflow

PACKAGE = pathlib.Path(grain_jax.__file__).parent


def imported(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module


def test_nothing_else_imports_it():
  loads = {"tensorflow", "tensorflow_datasets", "clu"}
  found = {
    path.relative_to(PACKAGE).as_posix(): {name.split(".")[0] for name in imported(path)} & loads
    for path in PACKAGE.rglob("*.py")
  }
  found = {path: names for path, names in found.items() if names}
  # clu imports TensorFlow; `writers` hides the GPUs before it makes a writer.
  assert found.pop("data/host_tensorflow.py") == {"tensorflow", "tensorflow_datasets"}
  # TFDS alone, which loads no TensorFlow for what it does there (test_build.py).
  assert found.pop("data/metadata.py") == {"tensorflow_datasets"}
  assert found.pop("runtime/writers.py") == {"clu"}
  assert "grain_jax.data" in imported(PACKAGE / "runtime/writers.py")
  assert found == {"training/loop.py": {"clu"}}  # for the type checker alone
  assert "TYPE_CHECKING" in (PACKAGE / "training/loop.py").read_text()


def test_gpus_are_hidden_or_it_is_said(monkeypatch, caplog):
  calls = []
  monkeypatch.setattr(
    host_tensorflow.tf.config, "set_visible_devices", lambda *args: calls.append(args)
  )
  host_tensorflow.hide_gpus()
  assert calls == [([], "GPU")]

  def used(*args):
    raise RuntimeError("Visible devices cannot be modified\nafter being initialized")

  monkeypatch.setattr(host_tensorflow.tf.config, "set_visible_devices", used)
  with caplog.at_level(logging.WARNING):
    host_tensorflow.hide_gpus()
  assert "holds memory of the GPUs (Visible devices cannot be modified after" in caplog.text
