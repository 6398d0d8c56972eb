"""What a training step of a configuration costs: FLOPs as XLA counts them, and seconds."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from grain_jax.models import initial


def flops_per_step(config: ml_collections.ConfigDict) -> float:
  """FLOPs of one train step on the whole batch, from XLA's analysis of the compiled program.

  The layers are unrolled, as a scanned body would be counted once. Host callbacks (the Hungarian
  matcher) count as zero.
  """
  import jax

  from grain_jax import config as configs
  from grain_jax.models import grain
  from grain_jax.runtime import mesh as meshes
  from grain_jax.training import steps

  config = configs.resolve(config)
  config.mesh.update(data=1, fsdp=1, tensor=1)
  mesh = meshes.create(config, devices=jax.devices()[:1])
  model = grain.build(config, unroll=-1)
  _, abstract, shardings, optimizer = steps.create_state(
    model, config, mesh, total_steps=config.steps or 1, steps_per_epoch=1
  )
  with jax.set_mesh(mesh):
    step = steps.make_train_step(model, config, mesh, optimizer, shardings)
    compiled = step.lower(abstract, initial.dummy_batch(config, config.batch_size)).compile()
  analysis = compiled.cost_analysis()
  if not analysis or not analysis.get("flops"):
    raise ValueError(
      f"cost_analysis of {jax.default_backend()} tells no FLOPs. Count on a CPU: JAX_PLATFORMS=cpu."
    )
  return float(analysis["flops"])


def seconds_per_step(
  of: Mapping[str, ml_collections.ConfigDict],
  *,
  rounds: int = 5,
  steps_per_round: int = 10,
  discard: int = 4,
  say: Callable[[str], None] = print,
) -> dict[str, float]:
  """Median seconds of a train step with its input pipeline, without compilation.

  The configurations take turns, round after round, in this one process, so that whatever else
  the machine does falls on all of them alike. Of each round the first steps are discarded: they
  live on batches that were prepared before the clock started.
  """
  taken: dict[str, list[float]] = {name: [] for name in of}
  runs = {name: _Stepper(config) for name, config in of.items()}
  for number in range(rounds):
    for name, run in runs.items():
      taken[name] += run.time(discard + steps_per_round)[discard:]
    medians = ", ".join(f"{name} {statistics.median(t):.3f}" for name, t in taken.items())
    say(f"timing, round {number + 1} of {rounds}: {medians} s a step")
  return {name: statistics.median(times) for name, times in taken.items()}


class _Stepper:
  """A configuration's train step and state, compiled when first timed."""

  def __init__(self, config: ml_collections.ConfigDict):
    from grain_jax import config as configs
    from grain_jax.runtime import mesh as meshes

    self.config = configs.resolve(config)
    self.config.data.prefetch = 1
    configs.check(self.config)
    self.mesh = meshes.create(self.config)
    self._step: Any = None
    self._state: Any = None
    self._done = 0

  def _create(self) -> None:
    from grain_jax.models import grain
    from grain_jax.training import steps

    config, model = self.config, grain.build(self.config)
    init, _, shardings, optimizer = steps.create_state(
      model, config, self.mesh, total_steps=max(config.steps, 1), steps_per_epoch=1
    )
    self._state = init()
    self._step = steps.make_train_step(model, config, self.mesh, optimizer, shardings)

  def time(self, number: int) -> list[float]:
    """Seconds of each of `number` steps, waiting for its batch included."""
    import jax

    from grain_jax.data import pipeline
    from grain_jax.runtime import mesh as meshes

    seconds = []
    with jax.set_mesh(self.mesh):
      if self._step is None:
        self._create()
      batches = pipeline.train_batches(self.config.data.dir, self.config, start_step=self._done)
      for _ in range(number):
        began = time.perf_counter()
        batch = meshes.to_global(next(batches), self.mesh)
        self._state, values = self._step(self._state, batch)
        jax.block_until_ready(values["loss"])
        seconds.append(time.perf_counter() - began)
      batches.close()
    self._done += number
    return seconds


def machine() -> dict[str, Any]:
  """What the timings were taken on, and how busy it was."""
  import jax

  device = jax.devices()[0]
  cores = (
    os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
  )
  return {
    "platform": platform.platform(),
    "device": f"{len(jax.devices())} x {device.device_kind}",
    "cores": len(cores),
    "load_before": round(os.getloadavg()[0], 2),
    "jax": jax.__version__,
  }
