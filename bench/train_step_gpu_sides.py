"""The sides of `bench.train_step --device=gpu`: one train step on one device, compiled, then timed.

As a module it is a worker. It reads one line of JSON, {'recipe', 'row_length', 'case', 'seed',
'rehearse'}, gets its step ready (everything that takes long and needs no quiet), answers
{'ready': ...}, waits for a line 'time', and answers {'timed': ...}. What cannot be done is
{'failed': one line}. Without TensorFlow, Orbax, clu or tensorflow-datasets.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from bench import train_step_sides as sides

_WARM_UP = 3  # steps before the clock counts
_ROUNDS = 3
_ROUND_SECONDS = 1.2  # of steps without a pause; the median round counts


@dataclasses.dataclass(frozen=True)
class Case:
  """One program to be timed."""

  side: str  # ours | peer
  batch: int
  remat: str = "none"
  matcher: str = "device"
  attention: str = "auto"
  unroll: int = -1
  norm: str = "auto"

  @property
  def name(self) -> str:
    """'ours-256-block-host', with what is not the default alone after the matcher."""
    if self.side == "peer":
      return f"peer-{self.batch}"
    parts = ["ours", str(self.batch), self.remat, self.matcher]
    parts += [self.attention] if self.attention != "auto" else []
    parts += ["scan"] if self.unroll != -1 else []
    parts += [f"norm_{self.norm}"] if self.norm != "auto" else []
    return "-".join(parts)

  def config(self, recipe: str, *, row_length: int, seed: int) -> ml_collections.ConfigDict:
    """The recipe in bfloat16 with this case's settings, on one device."""
    changes = {"model.attention": self.attention, "model.unroll": self.unroll}
    changes["model.norm"] = self.norm
    changes |= {"loss.matcher": self.matcher, "model.dtype": "bfloat16", "model.remat": self.remat}
    return sides.setting(
      recipe, batch_size=self.batch, row_length=row_length, seed=seed, changes=changes
    )


class Ours:
  """grain_jax's train step, as the training loop runs it, on the first device."""

  def __init__(self, config: ml_collections.ConfigDict, batch: Mapping[str, np.ndarray]):
    import jax

    from grain_jax.models import grain
    from grain_jax.runtime import distributed
    from grain_jax.runtime import mesh as meshes
    from grain_jax.training import steps

    distributed.keep_cpu_backend()
    self._jax, self._device = jax, jax.devices()[0]
    self._mesh = meshes.create(config, [self._device])
    with jax.set_mesh(self._mesh):
      init, abstract, shardings, optimizer = steps.create_state(
        grain.build(config), config, self._mesh,
        total_steps=sides.TOTAL_STEPS, steps_per_epoch=sides.STEPS_PER_EPOCH,
      )  # fmt: skip
      step = steps.make_train_step(grain.build(config), config, self._mesh, optimizer, shardings)
      sharding = meshes.batch_sharding(self._mesh)
      shapes = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        for name, value in batch.items()
      }
      self._init = init.lower().compile()
      self._step = step.lower(abstract, shapes).compile()
    self._host_batch, self._place = batch, meshes.to_global

  def start(self) -> float:
    """Makes the state and takes the first step; its loss."""
    with self._jax.set_mesh(self._mesh):
      self._state = self._init()
      self._batch = self._place(dict(self._host_batch), self._mesh)
    return self.run(1)

  def run(self, steps: int) -> float:
    """Takes steps one after the other and waits for the last; its loss."""
    with self._jax.set_mesh(self._mesh):
      for _ in range(steps):
        self._state, metrics = self._step(self._state, self._batch)
      self._jax.block_until_ready((self._state, metrics))
    return float(metrics["loss"][0])

  def facts(self) -> dict[str, Any]:
    """What the program is, and what it took."""
    from grain_jax.models import attention

    stats, planned = self._device.memory_stats() or {}, self._step.memory_analysis()
    return {
      "device": self._device.device_kind,
      "framework": f"jax {self._jax.__version__}",
      "peak_memory_bytes": stats.get("peak_bytes_in_use"),
      "planned_memory_bytes": planned.temp_size_in_bytes
      + planned.argument_size_in_bytes
      + planned.output_size_in_bytes
      - planned.alias_size_in_bytes,
      "attention_taken": attention.implementations(),
    }


class Peer:
  """The PyTorch peer, texts trimmed: towers compiled, bfloat16 autocast, fused AdamW."""

  def __init__(
    self, config: ml_collections.ConfigDict, batch: Mapping[str, np.ndarray], *, rehearse: bool
  ):
    import torch

    from bench.peers import grain_torch

    self._torch, self._device = torch, "cpu" if rehearse else "cuda"
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    o = config.optimizer
    warmup = o.warmup_steps or round(o.warmup_epochs * sides.STEPS_PER_EPOCH)
    self._trainer = grain_torch.Trainer(
      config, total_steps=sides.TOTAL_STEPS, warmup_steps=warmup, device=self._device
    )
    # A rehearsal shows that the parts fit together; compiling for a CPU would take its minutes.
    self._trainer.compile(backend="eager" if rehearse else "inductor")
    self._batch = sides.peer_batch(batch, config, form="trimmed").to(self._device)
    self.run(2)  # compiles
    if self._device == "cuda":
      torch.cuda.empty_cache()  # others are to be timed before it

  def start(self) -> float:
    """One step; its loss."""
    if self._device == "cuda":
      self._torch.cuda.reset_peak_memory_stats()
    return self.run(1)

  def run(self, steps: int) -> float:
    """Takes steps one after the other and waits for the last; its loss."""
    for _ in range(steps):
      with self._torch.autocast(self._device, dtype=self._torch.bfloat16):
        parts = self._trainer.forward(self._batch)
      self._trainer.update(parts["loss"])
    if self._device == "cuda":
      self._torch.cuda.synchronize()
    return float(parts["loss"].detach())

  def facts(self) -> dict[str, Any]:
    """What the program is, and what it took."""
    cuda = self._device == "cuda"
    return {
      "device": self._torch.cuda.get_device_name() if cuda else "cpu",
      "framework": f"torch {self._torch.__version__}",
      "peak_memory_bytes": self._torch.cuda.max_memory_allocated() if cuda else None,
    }


def measure(runner: Any) -> dict[str, Any]:
  """Median seconds a step over rounds of steps without a pause."""
  runner.run(_WARM_UP)
  began = time.perf_counter()
  runner.run(1)
  count = max(1, min(50, round(_ROUND_SECONDS / max(time.perf_counter() - began, 1e-6))))
  rounds = []
  for _ in range(_ROUNDS):
    began = time.perf_counter()
    loss = runner.run(count)
    rounds.append((time.perf_counter() - began) / count)
  return {
    "seconds_per_step": float(np.median(rounds)),
    "fastest_and_slowest": [min(rounds), max(rounds)],
    "steps_timed": count * _ROUNDS,
    "loss": loss,
  }


def _answer(kind: str, value: Any) -> None:
  print(json.dumps({kind: value}), flush=True)


def _accelerator(side: str) -> None:
  """Raises a one-line error where the framework sees no GPU."""
  if side == "ours":
    import jax

    if jax.default_backend() != "gpu":
      raise RuntimeError(f"JAX sees no GPU here, but {jax.default_backend()}")
  else:
    import torch

    if not torch.cuda.is_available():
      raise RuntimeError("PyTorch sees no GPU here")


def work() -> None:
  """The worker's conversation on stdin and stdout."""
  task = json.loads(sys.stdin.readline())
  began = time.monotonic()
  case, rehearse = Case(**task["case"]), task["rehearse"]
  try:
    if not rehearse:
      _accelerator(case.side)
    config = case.config(task["recipe"], row_length=task["row_length"], seed=task["seed"])
    batch = sides.host_batch(config)
    if case.side == "ours":
      runner: Any = Ours(config, batch)
    else:
      runner = Peer(config, batch, rehearse=rehearse)
    ready = time.monotonic() - began
    _answer("ready", {"seconds": ready})
    if sys.stdin.readline().strip() != "time":  # the parent is gone
      return
    began = time.monotonic()
    first_loss = runner.start()
    seconds = {"seconds_to_first_step": ready + time.monotonic() - began, "first_loss": first_loss}
    _answer("timed", {**seconds, **measure(runner), **runner.facts()})
  except Exception as error:  # out of memory, no GPU, what the compiler refuses: a result as well
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    _answer("failed", lines[0][:300])
    raise


if __name__ == "__main__":
  work()
