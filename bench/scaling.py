"""How a step grows with the machine: plans for 16 to 256 chips at the same batch per chip.

FLOPs, memory and gradient traffic of a chip should stay as they are: that is linear scaling, as far
as a compiler can tell. Nothing is run, and no machine need be there (requirements-plan.txt).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from grain_jax import cli
from grain_jax.plan import chips as plan_chips

# Largest relative growth from the first machine to any other.
LIMITS = {"flops": 0.02, "memory": 0.05, "gradient_traffic": 0.10}


def plan(topology: str, arguments: Sequence[str]) -> dict[str, Any]:
  """The plan of one machine, in a process of its own: each wants its own environment.

  Raises:
    ValueError: the plan failed; its last line.
  """
  done = subprocess.run(
    [sys.executable, "-m", "grain_jax.plan", f"--topology={topology}", "--json", *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise ValueError(f"{topology}: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
  return json.loads(done.stdout)


def row(found: Mapping[str, Any]) -> dict[str, Any]:
  """What the comparison needs of a plan, all of one chip and one step.

  Raises:
    ValueError: the program does not fit, so nothing of it can be counted.
  """
  if not found["fits"]:
    raise ValueError(
      f"{found['topology']}: {found['batch_per_chip']} images per chip do not fit. Lower "
      "--batch_per_chip or set --config.model.remat=block."
    )
  sent = found["collective_bytes_per_chip"]
  return {
    "topology": found["topology"],
    "chips": found["chips"],
    "batch_per_chip": found["batch_per_chip"],
    "flops": found["flops_per_chip"],
    "memory": found["memory_per_chip_bytes"]["total"],
    "gradient_traffic": found["gradient_bytes_per_chip"],
    "traffic": sent["total"],
    "step_seconds": found["step_seconds_estimate"],
    "bound_by": found["bound_by"],
    "samples_per_second": found["samples_per_second"],
    "compile_seconds": found["compile_seconds"],
  }


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Growth of each figure from the first machine on, whether it keeps to LIMITS, and efficiency."""
  first = rows[0]
  growth = {name: max(abs(r[name] / first[name] - 1) for r in rows) for name in LIMITS}
  ideal = first["samples_per_second"] / first["chips"]
  return {
    "rows": list(rows),
    "growth": growth,
    "limits": LIMITS,
    "within_limits": all(growth[name] <= limit for name, limit in LIMITS.items()),
    "efficiency": [r["samples_per_second"] / r["chips"] / ideal for r in rows],
  }


def table(found: Mapping[str, Any]) -> str:
  """The comparison for people, in Markdown."""
  lines = [
    "| machine | GFLOP a sample | memory, GB | gradient traffic, MB | sent in all, MB | step, ms "
    "| of linear |",
    "|---|---|---|---|---|---|---|",
  ]
  for r, efficiency in zip(found["rows"], found["efficiency"], strict=True):
    lines.append(
      f"| {r['topology']} | {r['flops'] / r['batch_per_chip'] / 1e9:.1f} "
      f"| {r['memory'] / 1e9:.2f} | {r['gradient_traffic'] / 1e6:.0f} "
      f"| {r['traffic'] / 1e6:.0f} | {r['step_seconds'] * 1e3:.1f} ({r['bound_by']}) "
      f"| {efficiency:.1%} |"
    )
  for name, limit in found["limits"].items():
    lines.append(f"\n{name}: grows by {found['growth'][name]:.1%}, at most {limit:.0%} is wanted")
  return "\n".join(lines)


def run(
  topologies: Sequence[str],
  arguments: Sequence[str],
  planner: Callable[[str, Sequence[str]], Mapping[str, Any]] = plan,
) -> dict[str, Any]:
  """Plans all machines and compares them.

  Raises:
    ValueError: an unknown machine, fewer than two, or a plan that failed.
  """
  if len(topologies) < 2:
    raise ValueError(f"--topologies={','.join(topologies)}: name at least two to compare.")
  for name in topologies:
    plan_chips.parse(name)
  return compare([row(planner(name, arguments)) for name in topologies])


def main() -> None:
  flag = flags.FLAGS
  arguments = [
    f"--config={flag.config}",
    f"--batch_per_chip={flag.batch_per_chip}",
    f"--count={flag.count}",
  ]
  found = run(flag.topologies, arguments)
  print(json.dumps(found) if flag.json else table(found))


if __name__ == "__main__":
  flags.DEFINE_string("config", "configs/cc12m.py", "Recipe, FILE or FILE:argument.")
  flags.DEFINE_list(
    "topologies", ["v5e:4x4", "v5e:8x8", "v5e:16x16"], "Machines, the first to compare with."
  )
  flags.DEFINE_integer("batch_per_chip", 64, "Images a step on each chip.")
  flags.DEFINE_string("count", "scanned", "As in grain_jax.plan.")
  flags.DEFINE_bool("json", False, "One JSON object on stdout.")
  cli.run(main)
