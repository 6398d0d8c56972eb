"""Model FLOPs against a count by hand, MFU, memory, and the window of the profiler."""

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from grain_jax import config as configs
from grain_jax import flops as counter
from grain_jax.models import attention, grain, initial
from grain_jax.plan import chips
from grain_jax.runtime import mesh as meshes
from grain_jax.runtime import metrics
from grain_jax.training import steps, utilization


def test_products_of_a_program():
  """2 M N K each; the body of a scan as often as it runs, the dearest branch of a cond."""

  def program(x, w):
    x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)
    return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

  jaxpr = jax.make_jaxpr(program)(jnp.ones((3, 4)), jnp.ones((4, 4)))
  assert sum(counter.count(jaxpr.jaxpr).values()) == (5 + 2) * 2 * 3 * 4 * 4


@pytest.mark.parametrize("unroll", [1, -1])
def test_model_flops_of_a_clip(tiny, unroll):
  """Both towers by hand; attention's two products are masked but computed whole."""
  tiny.method, tiny.model.unroll, tiny.model.remat = "clip", unroll, "block"
  width, tokens, patches = 32, 5, 4
  per_layer = 2 * tokens * width * width * (4 + 2 * 4) + 2 * 2 * tokens * tokens * width
  image = 2 * patches * (16 * 16 * 3) * width + 2 * per_layer + 2 * width * 16
  length = tiny.data.row_length
  per_layer = 2 * length * width * width * (4 + 2 * 4) + 2 * 2 * length * length * width
  counted = utilization.model_flops(tiny)
  text = 2 * per_layer
  assert counted / 3 < image + text + 2 * width * 16 * 4
  # The last text block computes the last tokens alone: at least one whole block is there.
  assert counted / 3 > image + per_layer


@pytest.mark.parametrize(
  "changes",
  [
    {"model.image.patch_dropout": 0.5},
    {"optimizer.freeze": ("^image_tower/",), "model.remat": "block", "accumulate": 2},
    {"loss.anchor": 1.0, "loss.chunk": 4},
  ],
)
def test_model_flops_are_those_of_the_products_of_the_real_step(tiny, changes):
  """Of its own trace, where nothing is rematerialised but attention's weights."""
  tiny.update(method="clip")
  tiny.model.image.patch = 8
  for key, value in changes.items():
    configs.set_key(tiny, key, value)
  counted = utilization.model_flops(tiny)
  tiny.update(accumulate=1)
  tiny.model.remat, tiny.loss.chunk = "none", 0
  mesh = meshes.create(tiny, jax.devices()[:1])
  model = grain.build(tiny)
  _, state, shardings, optimizer = steps.create_state(
    model, tiny, mesh, total_steps=10, steps_per_epoch=5
  )
  with jax.set_mesh(mesh):
    step = steps.make_train_step(model, tiny, mesh, optimizer, shardings)
    traced = step.trace(state, initial.dummy_batch(tiny, tiny.batch_size))
  products = counter.count(traced.jaxpr.jaxpr)
  once = sum(n for path, n in products.items() if attention.RECOMPUTED_SCOPE not in path)
  assert counted == once / tiny.batch_size


def test_mfu(tiny):
  tiny.peak_flops = 1e9
  used = utilization.Utilization(tiny, devices=8)
  counted = utilization.model_flops(tiny)
  assert used.metrics(100.0) == {"train/mfu": pytest.approx(100 * counted / 8e9)}
  tiny.peak_flops = 0.0
  assert utilization.Utilization(tiny, devices=8).metrics(100.0) == {}  # a CPU's is not known


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA L40", 181e12),
    ("NVIDIA L40S", 362e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("cpu", 0.0),
  ],
)
def test_peak_flops(kind, peak):
  """The makers' data sheets, bfloat16 without sparsity."""
  assert utilization.peak_flops(kind) == peak


def test_runs_and_plans_know_the_same_peaks():
  kinds = {"v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite", "h100": "NVIDIA H100 80GB"}
  planned = {name: chip.peak_flops for name, chip in chips.CHIPS.items() if chip.platform != "cpu"}
  assert planned == {name: utilization.peak_flops(kind) for name, kind in kinds.items()}


def test_memory_is_this_process_where_devices_do_not_tell():
  import resource

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB -> GiB
  assert 0.02 < utilization.memory()["train/host_memory_gib"] <= peak * 1.01


def test_a_trace_of_the_steps_asked_for(tmp_path, monkeypatch):
  calls, step = [], [0]
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append((folder, step[0])))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", step[0])))

  def steps(first, last, **window):
    calls.clear()
    profiler = metrics.Profiler(ml_collections.ConfigDict(window), tmp_path)
    for step[0] in range(first, last + 1):
      profiler.before(step[0])
      profiler.after(step[0], jnp.zeros(()))
    profiler.close()
    return calls

  assert steps(1, 9, start_step=3, num_steps=2) == [(str(tmp_path), 3), ("stop", 4)]
  assert steps(4, 9, start_step=3, num_steps=3) == [(str(tmp_path), 4), ("stop", 5)]
  assert steps(6, 9, start_step=3, num_steps=3) == []
  assert steps(1, 4, start_step=3, num_steps=5) == [(str(tmp_path), 3), ("stop", 4)]  # cut short
  assert steps(1, 9, start_step=0, num_steps=3) == []
