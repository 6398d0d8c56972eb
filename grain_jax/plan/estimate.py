"""From a compiled step to a plan: does it fit, what bounds it, how long and how dear is the run."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import ml_collections

from grain_jax import config as configs
from grain_jax import flops as counter
from grain_jax.data import sampler
from grain_jax.plan import hlo as plan_hlo
from grain_jax.plan import program as plan_program
from grain_jax.plan import traffic as plan_traffic
from grain_jax.plan import useful as plan_useful
from grain_jax.plan.chips import Machine, roofline
from grain_jax.runtime import mesh as meshes
from grain_jax.training import sizing

STEP = 8  # images per chip between two batches that `largest_batch` tells apart
COUNTS = ("scanned", "unrolled")


@dataclasses.dataclass(frozen=True)
class Options:
  """What the caller knows beside configuration and machine."""

  examples: int = 10_000_000  # images in the training split
  count: str = "scanned"  # program whose FLOPs and traffic are counted: one of COUNTS
  caption_tokens: float = 26.0  # mean length, for the useful FLOPs
  description_tokens: float = 10.0


def for_machine(
  config: ml_collections.ConfigDict,
  machine: Machine,
  *,
  batch_per_chip: int = 0,
  examples: int = 10_000_000,
) -> tuple[ml_collections.ConfigDict, list[str]]:
  """(the configuration as it can be planned there, a note for each thing that had to change)."""
  config, notes = configs.resolve(config), []
  asked = config.copy_and_resolve_references()
  if batch_per_chip:
    config.batch_size = batch_per_chip * machine.num_chips
  if sizing.is_open(config):
    devices = meshes.batch_shards(config, machine.num_chips)
    platform = machine.chip.platform
    config = sizing.choose(
      config,
      records=examples,
      devices=devices,
      platform=platform,
      memory=machine.chip.memory_bytes,
    )
  if machine.chip.platform == "gpu":
    if config.method == "grain" and config.loss.matcher == "host":
      config.loss.matcher = "device"
      notes.append(
        "planned with loss.matcher=device: the host's callback cannot be compiled for a GPU "
        "without one"
      )
    if config.model.attention != "xla":
      config.model.attention = "xla"
      notes.append(
        "planned with XLA's attention: cuDNN's needs a GPU to compile; it needs less memory"
      )
    if config.model.norm == "auto":
      config.model.norm = "pallas"  # no GPU is here to ask; it is what one takes
  for key in ("remat", "unroll"):
    if asked.model[key] != config.model[key]:
      notes.append(f"model.{key}={config.model[key]}, chosen for this machine's memory")
  configs.check(config)
  return config, notes


class Planner:
  """Compiles a configuration for a machine at several batches, each once."""

  def __init__(self, config: ml_collections.ConfigDict, machine: Machine, options: Options):
    if options.count not in COUNTS:
      raise ValueError(f"--count={options.count} is unknown. Choose one of {', '.join(COUNTS)}.")
    for name in ("examples", "caption_tokens", "description_tokens"):
      if getattr(options, name) <= 0:
        raise ValueError(f"--{name}={getattr(options, name)} must be positive.")
    self.machine, self.options = machine, options
    self._config = config
    self._compiled: dict[int, plan_program.Compiled] = {}
    self._traced: dict[int, plan_program.Traced] = {}

  @functools.cached_property
  def devices(self) -> list[Any]:
    return plan_program.devices(self.machine)

  def config(self, batch_per_chip: int) -> tuple[ml_collections.ConfigDict, list[str]]:
    return for_machine(
      self._config, self.machine, batch_per_chip=batch_per_chip, examples=self.options.examples
    )

  def _trace(self, batch_per_chip: int, **changes: Any) -> plan_program.Traced:
    config, _ = self.config(batch_per_chip)
    for key, value in changes.items():
      configs.set_key(config, key.replace("__", "."), value)
    return plan_program.trace(config, self.devices)

  def traced(self, batch_per_chip: int) -> plan_program.Traced:
    """The program that runs, before compilation."""
    if batch_per_chip not in self._traced:
      self._traced[batch_per_chip] = self._trace(batch_per_chip)
    return self._traced[batch_per_chip]

  def compiled(self, batch_per_chip: int) -> plan_program.Compiled:
    """The program that runs, at this batch (0: the configuration's)."""
    if batch_per_chip not in self._compiled:
      self._compiled[batch_per_chip] = plan_program.compile(self.traced(batch_per_chip))
    return self._compiled[batch_per_chip]

  def fits(self, batch_per_chip: int) -> tuple[bool, int]:
    """(whether the program that runs fits, bytes per chip it needs)."""
    found = self.compiled(batch_per_chip)
    total = found.memory["total"]
    return found.fits and total <= self.machine.chip.memory_bytes, total

  def search(self, start: int = 0) -> int:
    """The largest batch per chip that fits, near enough (`largest_batch`).

    Raises:
      ValueError: not even the smallest fits.
    """
    chip = self.machine.chip
    found = largest_batch(self.fits, capacity=chip.memory_bytes, start=start or 64)
    if not found:
      raise ValueError(
        f"--search: not even {STEP} images per chip fit {self.machine.name}, which has "
        f"{chip.memory_bytes / 1e9:.0f} GB a chip. Set config.mesh.fsdp or a smaller model."
      )
    return found

  def costs(self, batch_per_chip: int) -> dict[str, Any]:
    """FLOPs, traffic and collectives of a chip in a step, with notes on how they were counted."""
    program, notes = self.compiled(batch_per_chip), []
    chips = self.machine.num_chips
    jaxpr = self.traced(batch_per_chip).jaxpr
    flops = sum(counter.count(jaxpr).values()) / chips
    passes = sum(counter.count(jaxpr, passes=self.machine.chip.passes).values()) / chips - flops
    counted = program
    if self.options.count == "unrolled":
      unrolled = self._trace(batch_per_chip, model__unroll=-1)
      counted = plan_program.compile(unrolled)
      if not counted.fits:
        notes.append("the unrolled program does not fit: counts are from the one that runs")
        counted = program
      elif counted.xla_flops:
        once = sum(counter.count(unrolled.jaxpr, trip_counts=False).values()) / chips
        repeated = sum(counter.count(unrolled.jaxpr).values()) / chips
        exact = counted.xla_flops + (repeated - once)  # loops left, by trip count
        if exact < 0.99 * flops:
          notes.append(
            "XLA merged what rematerialisation computes again in the unrolled program: counts are "
            "from the one that runs"
          )
          counted = program
        else:
          flops = exact
    found: dict[str, Any] = {
      "flops_per_chip": flops,
      "pass_flops_per_chip": flops + passes,
      "notes": notes,
    }
    if not counted.text:
      notes.append("it does not fit, so there is no program to count traffic and collectives in")
      return found | {"traffic": None, "xla_bytes": 0.0, "collectives": []}
    module = plan_hlo.parse(counted.text)
    for path in module.unknown_loops():
      notes.append(f"turns of the loop {path} are not in the program: counted once")
    everything, once = (
      sum(t.bytes for t in plan_traffic.traffic(module, hbm_only=False, trip_counts=trip_counts))
      for trip_counts in (True, False)
    )
    found["xla_bytes"] = counted.xla_bytes + everything - once if counted.xla_bytes else everything
    found["traffic"] = plan_traffic.traffic(module)
    found["collectives"] = plan_traffic.collectives(module)
    found["counted"] = "scanned" if counted is program else "unrolled"
    return found

  def useful_flops(self, batch_per_chip: int) -> float:
    """FLOPs per chip that any implementation of the model needs (`plan_useful.useful_flops`)."""
    config, _ = self.config(batch_per_chip)
    keys = dict(configs.flatten(config))
    changes = {"model__remat": "none", "loss__chunk": 0, "accumulate": 1}
    changes = {k: v for k, v in changes.items() if k.replace("__", ".") in keys}
    counts = counter.count(self._trace(batch_per_chip, **changes).jaxpr)
    return (
      plan_useful.useful_flops(
        counts,
        config,
        batch=config.batch_size,
        caption=self.options.caption_tokens,
        description=self.options.description_tokens,
      )
      / self.machine.num_chips
    )

  def plan(self, batch_per_chip: int = 0) -> dict[str, Any]:
    """The whole plan; keys as in docs/performance.md.

    Args:
      batch_per_chip: images of a step on each chip; 0: the configuration's batch, shared out.
    """
    config, notes = self.config(batch_per_chip)
    machine, chip = self.machine, self.machine.chip
    steps_per_epoch = sampler.steps_per_epoch(self.options.examples, config.batch_size)
    total_steps = config.steps or round(config.epochs * steps_per_epoch)
    program = self.compiled(batch_per_chip)
    fits, _ = self.fits(batch_per_chip)
    costs = self.costs(batch_per_chip)
    local = config.batch_size / machine.num_chips
    found: dict[str, Any] = {
      "topology": machine.name,
      "chips": machine.num_chips,
      "fits": fits,
      "batch_per_chip": int(local) if local.is_integer() else local,
      "batch_size": config.batch_size,
      "memory_per_chip_bytes": program.memory,
      "memory_capacity_bytes": chip.memory_bytes,
      "compile_seconds": program.seconds,
      "compile_cpu_seconds": program.cpu_seconds,
      "flops_per_chip": costs["flops_per_chip"],
      "pass_flops_per_chip": costs["pass_flops_per_chip"],
      "useful_flops_per_chip": self.useful_flops(batch_per_chip),
      "collective_bytes_per_chip": None,
      "step_seconds_estimate": None,
      "bound_by": None,
      "chip_hours": None,
      "notes": notes + costs["notes"],
    }
    if costs["traffic"] is None:
      return found
    hbm = sum(t.bytes for t in costs["traffic"])
    sent: dict[str, float] = {}
    for exchange in costs["collectives"]:
      sent[exchange.kind] = sent.get(exchange.kind, 0.0) + exchange.sent
    seconds = roofline(
      machine,
      pass_flops=costs["pass_flops_per_chip"],
      memory_bytes=hbm,
      collectives=costs["collectives"],
    )
    gradients = sum(c.sent for c in costs["collectives"] if plan_traffic.is_gradient_reduction(c))
    bound = max(seconds, key=lambda name: seconds[name])
    step = seconds[bound]
    hours = total_steps * step / 3600
    found |= {
      "counted": costs["counted"],
      "collective_bytes_per_chip": sent | {"total": sum(sent.values())},
      "gradient_bytes_per_chip": gradients,
      "memory_traffic_bytes_per_chip": hbm,
      "memory_traffic_bytes_per_sample": hbm / local,
      "modelled_traffic_bytes_per_sample": plan_traffic.modelled(
        costs["traffic"],
        plan_traffic.attention_bytes(
          config, images=local, align=8 if chip.platform == "gpu" else 1
        ),
      )
      / local,
      "accessed_bytes_per_sample": costs["xla_bytes"] / local,
      "memory_traffic_causes": [
        {"where": where, "bytes_per_sample": size / local}
        for where, size in plan_traffic.causes(costs["traffic"])
      ],
      "seconds_by_resource": seconds,
      "step_seconds_estimate": step,
      "bound_by": bound,
      "samples_per_second": config.batch_size / step,
      "mfu_bound": found["useful_flops_per_chip"] / step / chip.peak_flops,
      "steps": total_steps,
      "examples": self.options.examples,
      "days": hours / 24,
      "chip_hours": hours * machine.num_chips,
    }
    return found


def largest_batch(
  probe: Callable[[int], tuple[bool, int]], *, capacity: int, start: int = 64, step: int = STEP
) -> int:
  """The largest multiple of `step` that fits, to within 1/32 of itself; 0 if not even `step` does.

  Memory grows about linearly with the batch, so each guess lies where the line through the last
  two probes meets the capacity; an interval between one that fits and one that does not closes in.

  Args:
    probe: batch -> (fits, bytes it needs); called once for each batch.
    capacity: bytes there are.
    start: first batch to try.
    step: grain of the answer.
  """
  seen: dict[int, int] = {}
  good, bad = 0, math.inf
  batch = max(start // step, 1) * step
  while True:
    fits, seen[batch] = probe(batch)
    good, bad = (max(good, batch), bad) if fits else (good, min(bad, batch))
    if bad - good <= max(step, good // 32 // step * step):
      return good
    low, high = good + step, bad - step if bad < math.inf else max(4 * good, step)
    guess = (good + bad) / 2 if bad < math.inf else 2 * good
    if len(seen) >= 2:
      (b0, m0), (b1, m1) = sorted(seen.items(), key=lambda kv: abs(kv[1] - capacity))[:2]
      if m1 != m0 and (m1 - m0) / (b1 - b0) > 0:
        guess = b0 + (capacity - m0) * (b1 - b0) / (m1 - m0)
    batch = int(min(max(guess // step * step, low), high))
