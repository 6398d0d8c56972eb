"""Shared by all tests: eight virtual devices, a compile cache, tiny configurations, tiny scenes.

Asked for tests/gpu by name, it leaves JAX's devices as they are.
"""

import fcntl
import os
import pathlib
import sys

# The environment tells pytest-xdist's workers, which do not see the command.
_GPU = os.environ.get("GRAIN_JAX_TESTS") == "gpu" or any("tests/gpu" in a for a in sys.argv[1:])
if _GPU:
  os.environ["GRAIN_JAX_TESTS"] = "gpu"
else:
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    + " --xla_cpu_parallel_codegen_split_count=1"  # the other core has its own tests
  )
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from grain_jax import cli  # noqa: E402

cli.prepare()  # no Keras, rare garbage: a test process is like a command's
if not _GPU:  # a machine with a GPU has pytest alone
  import hypothesis

  hypothesis.settings.register_profile("tests", deadline=None, max_examples=25, derandomize=True)
  hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items):
  """The long ones are counted as skipped, unless they are asked for.

  Files with slow tests come first, the longest, of whole commands, before all: no core waits for
  one of them at the end. The order of a file's tests stays.
  """
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(key=lambda item: (item.path not in slow, len(item.path.parts)))
  if os.environ.get("GRAIN_JAX_LONG") == "1":
    return
  for item in items:
    if item.get_closest_marker("long"):
      item.add_marker(pytest.mark.skip(reason="long: make test-all, or GRAIN_JAX_LONG=1"))


@pytest.fixture(scope="module", autouse=True)
def fresh_caches():
  """Compiled functions of a test file go with it: all of them together take gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def tiny():
  """A whole configuration of a model of a few thousand parameters."""
  return _tiny()


@pytest.fixture(scope="session")
def tiny_clip():
  """The same for method 'clip', without data; not to be written to."""
  c = _tiny()
  c.method, c.evals, c.data.max_regions = "clip", (), 0
  return c


def _tiny():
  from configs import common
  from grain_jax import config as configs

  c = common.get_config()
  c.batch_size = 8
  c.eval_batch_size = 8
  c.steps = 4
  c.model.update(embed_dim=16, remat="none", unroll=1)
  c.model.image.update(size=32, patch=16, width=32, depth=2, heads=2)
  c.model.text.update(width=32, depth=2, heads=2, vocab_size=49408, context=32)
  c.model.decoder.update(width=32, depth=2, heads=2, mlp_dim=64)
  c.data.row_length = 64
  c.data.max_regions = 3
  c.optimizer.warmup_steps = 1
  c.loss.matcher = "device"
  return configs.resolve(c)


@pytest.fixture
def make_batch(rng):
  """A random host batch for a configuration, as the pipeline would make it."""

  def make(config, *, size=None, rng=rng):
    from grain_jax import schema

    b, r, length = size or config.batch_size, config.data.max_regions, config.data.row_length
    side = config.model.image.size
    k, n_each = config.data.negatives, config.data.negatives_per_region
    batch = {
      name: np.zeros(shape, dtype)
      for name, (shape, dtype) in schema.batch_shapes(
        batch=b,
        image_size=side,
        row_length=length,
        regions=r,
        negatives=k,
        region_negatives=n_each,
      ).items()
    }
    batch["image"][:] = rng.integers(0, 256, batch["image"].shape)
    for i in range(b):
      at = 0
      for t in range(1 + r + k + r * n_each):
        n = int(rng.integers(3, 9))
        batch["tokens"][i, at : at + n] = rng.integers(1, 300, n)
        batch["segments"][i, at : at + n] = t + 1
        batch["positions"][i, at : at + n] = np.arange(n)
        batch["ends"][i, t] = at + n - 1
        at += n
    batch["text_mask"][:] = True
    batch["region_mask"][:] = rng.random((b, r)) < 0.7
    batch["text_mask"][:, 1 : 1 + r] &= batch["region_mask"]
    if k:
      batch["text_mask"][:, 1 + r : 1 + r + k] = rng.random((b, k)) < 0.8
    if n_each:
      fits = rng.random((b, r, n_each)) < 0.8
      batch["region_negative_mask"][:] = fits & batch["region_mask"][..., None]
      batch["text_mask"][:, 1 + r + k :] = batch["region_negative_mask"].reshape(b, -1)
    size_ = rng.uniform(0.1, 0.5, (b, r, 2))
    center = rng.uniform(size_ / 2, 1 - size_ / 2)
    batch["boxes"][:] = np.concatenate([center, size_], -1)
    batch["example_mask"][:] = True
    return batch

  return make


@pytest.fixture(scope="session")
def once(tmp_path_factory):
  """`once(name, make)` -> folder that `make(folder)` filled, one for all xdist workers."""
  base = tmp_path_factory.getbasetemp()
  base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

  def get(name, make):
    folder = base / name
    with (base / f"{name}.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not folder.exists():
        make(base / f"{name}.tmp")
        (base / f"{name}.tmp").rename(folder)
    return folder

  return get


@pytest.fixture(scope="session")
def scenes_dir(once):
  """64 training scenes of 32 pixels, 24 for evaluation, 64 single objects; not to be written to."""
  from bench import kills

  return once("scenes", kills.build_scenes)


@pytest.fixture(scope="session")
def finished_run(once, scenes_dir):
  """Workdir of a finished `grain_jax.main` with all evaluations; not to be written to."""
  from bench import kills

  return once("run", lambda workdir: kills.finish(kills.start(scenes_dir, workdir), workdir))
