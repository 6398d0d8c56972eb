"""Compiled programs are kept for the next process, unless a process says otherwise."""

import json
import os
import stat
import subprocess
import sys

import drawn
import pytest

from grain_jax.convert import run_folder
from grain_jax.runtime import compile_cache

# What JAX tells of its cache while a model is opened and encodes one image.
PROGRAM = """
import collections, json, sys
import jax, numpy as np
exec(sys.argv[2])
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))
import grain_jax
model = grain_jax.load(sys.argv[1])
embedding = model.encode_image(np.zeros((32, 32, 3), np.uint8))
for count in (1, 2, 5, 16, 17, 33):
  model.encode_image(np.zeros((count, 32, 32, 3), np.uint8))
print(json.dumps({"hits": events["cache_hits"], "misses": events["cache_misses"],
                  "requests": events["compile_requests_use_cache"], "embedding": embedding.tolist(),
                  "folder": jax.config.jax_compilation_cache_dir,
                  "tensorflow": "tensorflow" in sys.modules}))
"""


@pytest.fixture
def run(tmp_path, tiny):
  """`run(first_line, **environment)` -> (what `PROGRAM` printed, its stderr)."""
  run_folder.write(tmp_path / "model", config=tiny, params=_full(tiny), source={})
  own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS")
  environment = {k: v for k, v in os.environ.items() if k not in own}
  environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")

  def run(first_line="", **more):
    done = subprocess.run(
      [sys.executable, "-c", PROGRAM, tmp_path / "model", first_line],
      env=environment | more, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1]), done.stderr

  return run


def _full(config):
  import jax
  import numpy as np

  return jax.tree.map(np.asarray, drawn.params(config))


@pytest.mark.slow
def test_a_second_process_compiles_nothing(run, tmp_path):
  first, _ = run()
  folder = tmp_path / "cache" / "grain_jax" / "jax"
  kept = list(folder.glob("jit_apply-*"))
  assert first["folder"] == str(folder) and len(kept) == 1
  assert first["misses"] >= 1 and first["hits"] == 0 and not first["tensorflow"]
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700
  second, errors = run()
  assert second["hits"] == second["requests"] == 1 and second["misses"] == 0
  assert "compiling" not in errors
  assert second["embedding"] == first["embedding"]
  kept[0].write_bytes(kept[0].read_bytes()[:1000])  # as when a process is killed in the middle
  third, _ = run()
  assert third["embedding"] == first["embedding"]


@pytest.mark.slow
def test_what_a_process_has_set_itself_stays(run, tmp_path):
  ours, theirs = tmp_path / "cache", tmp_path / "theirs"
  found, _ = run(JAX_COMPILATION_CACHE_DIR=str(theirs))
  assert found["folder"] == str(theirs) and not ours.exists()
  found, _ = run(f"jax.config.update('jax_compilation_cache_dir', {str(theirs)!r})")
  assert found["folder"] == str(theirs) and not ours.exists()
  found, _ = run("jax.config.update('jax_enable_compilation_cache', False)")
  assert found["folder"] is None and not ours.exists()


def test_a_folder_below_the_users(tmp_path, monkeypatch):
  kept = {}
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setattr(compile_cache.jax.config, "update", kept.__setitem__)
  compile_cache.keep_in("~/programs")
  assert kept["jax_compilation_cache_dir"] == str(tmp_path / "programs")


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_is_named_once(run, tmp_path):
  (tmp_path / "cache").write_text("a file, where a folder is wanted")
  found, errors = run("import grain_jax; grain_jax.load(sys.argv[1])")
  assert found["folder"] is None and found["hits"] == 0
  assert errors.count("compiled programs are not kept (") == 1
  (tmp_path / "cache").unlink()
  (tmp_path / "cache" / "grain_jax" / "jax").mkdir(parents=True)
  (tmp_path / "cache" / "grain_jax" / "jax").chmod(0o777)
  found, errors = run()
  assert found["folder"] is None and "others may write to" in errors
