"""`python -m grain_jax.plan --config=FILE --topology=v5e:4x4`: a run, before a machine is paid for.

Compiles the train step of the configuration for that machine, which need not be there, and says
whether it fits, what bounds it and what the run costs. See docs/performance.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from grain_jax import cli
from grain_jax.plan import chips as plan_chips


def _size(count: float, unit: str) -> str:
  """12,345,678 -> '12.3 M' + unit."""
  for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(count) >= factor:
      return f"{count / factor:,.3g} {prefix}{unit}"
  return f"{count:,.3g} {unit}"


def table(plan: Mapping[str, Any]) -> str:
  """The plan for people, in lines."""
  memory, capacity = plan["memory_per_chip_bytes"], plan["memory_capacity_bytes"]
  batch = plan["batch_per_chip"]
  rows = [
    ("machine", f"{plan['topology']}, {plan['chips']} chips"),
    ("batch", f"{batch} per chip, {plan['batch_size']} in all"),
    ("fits", "yes" if plan["fits"] else "NO"),
    ("memory per chip", f"{_size(memory['total'], 'B')} of {_size(capacity, 'B')}"),
    *((f"  {kind}", _size(size, "B")) for kind, size in memory.items() if kind != "total"),
    ("compilation", f"{plan['compile_seconds']:.0f} s ({plan['compile_cpu_seconds']:.0f} s CPU)"),
    ("executed per sample", _size(plan["flops_per_chip"] / batch, "FLOP")),
    ("  with passes of float32", _size(plan["pass_flops_per_chip"] / batch, "FLOP")),
    ("useful per sample", _size(plan["useful_flops_per_chip"] / batch, "FLOP")),
  ]
  if plan["step_seconds_estimate"] is not None:
    seconds = plan["seconds_by_resource"]
    rows += [
      ("memory traffic per sample", _size(plan["memory_traffic_bytes_per_sample"], "B")),
      ("with attention in one pass", _size(plan["modelled_traffic_bytes_per_sample"], "B")),
      *(
        (f"  {cause['where']}", _size(cause["bytes_per_sample"], "B"))
        for cause in plan["memory_traffic_causes"]
      ),
      ("  with on-chip memory (XLA's count)", _size(plan["accessed_bytes_per_sample"], "B")),
      ("sent by each chip a step", _size(plan["collective_bytes_per_chip"]["total"], "B")),
      *(
        (f"  {kind}", _size(size, "B"))
        for kind, size in plan["collective_bytes_per_chip"].items()
        if kind != "total"
      ),
      ("step at least", f"{plan['step_seconds_estimate'] * 1e3:.1f} ms ({plan['bound_by']})"),
      *((f"  {name}", f"{value * 1e3:.1f} ms") for name, value in seconds.items()),
      ("samples/s at most", f"{plan['samples_per_second']:,.0f}"),
      ("MFU at most", f"{plan['mfu_bound']:.0%}"),
      ("run", f"{plan['steps']:,} steps on {plan['examples']:,} images"),
      ("  days at least", f"{plan['days']:.2f}"),
      ("  chip-hours at least", f"{plan['chip_hours']:,.1f}"),
    ]
  width = max(len(name) for name, _ in rows) + 2
  lines = [f"{name:<{width}}{value}" for name, value in rows]
  return "\n".join([*lines, *(f"note: {note}" for note in plan["notes"])])


def main() -> None:
  flag = flags.FLAGS
  machine = plan_chips.parse(flag.topology)
  if flag.batch_per_chip < 0:
    raise ValueError(f"--batch_per_chip={flag.batch_per_chip} must not be negative.")
  os.environ.update(plan_chips.environment(machine))
  from grain_jax.plan import estimate as plan_estimate  # loads JAX, which reads the variables

  options = plan_estimate.Options(
    examples=flag.examples,
    count=flag.count,
    caption_tokens=flag.caption_tokens,
    description_tokens=flag.description_tokens,
  )
  planner = plan_estimate.Planner(flag.config, machine, options)
  batch = flag.batch_per_chip
  if flag.search:
    batch = planner.search(start=batch)
  plan = planner.plan(batch)
  print(json.dumps(plan) if flag.json else table(plan))


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config",
    None,
    "By name or the path of a file, either with :argument; --config.KEY=VALUE sets a key.",
  )
  flags.DEFINE_string("topology", None, f"Machine to plan for: {plan_chips.known()}.")
  flags.DEFINE_integer("batch_per_chip", 0, "Images a step on each chip; 0: as configured.")
  flags.DEFINE_bool("search", False, "Find the largest batch per chip that fits, and plan it.")
  flags.DEFINE_bool("json", False, "One JSON object on stdout.")
  flags.DEFINE_integer("examples", 10_000_000, "Images in the training split; about CC12M's.")
  flags.DEFINE_string("count", "scanned", "Count FLOPs and traffic in: scanned | unrolled.")
  flags.DEFINE_float("caption_tokens", 26.0, "Mean length of a caption, for useful FLOPs.")
  flags.DEFINE_float("description_tokens", 10.0, "Mean length of a description, likewise.")
  flags.mark_flags_as_required(["config", "topology"])
  cli.run(main)
