"""`python -m bench.matching [--json]`: what assigning queries to regions costs, by either solver.

The solvers alone, on random costs of a device's batch, and as a share of the train step of a
recipe with random weights and data. SciPy by itself, without JAX, is the floor of the host solver.
Everything is the median of rounds in which the candidates go in turn.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np
from absl import flags

from grain_jax import cli
from grain_jax import config as configs

SOLVERS = configs.CHOICES["loss.matcher"]


def say(line: str) -> None:
  """Progress; stdout is for the results."""
  print(line, file=sys.stderr, flush=True)


def medians(calls: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
  """Median seconds of each call over rounds in turn, after one that does not count."""
  taken: dict[str, list[float]] = {name: [] for name in calls}
  for number in range(rounds + 1):
    for name, call in calls.items():
      began = time.perf_counter()
      call()
      if number:
        taken[name].append(time.perf_counter() - began)
  return {name: statistics.median(seconds) for name, seconds in taken.items()}


def solvers(*, problems: int, queries: int, regions: int) -> dict[str, Callable[[], Any]]:
  """Calls that solve `problems` random problems: each solver, and SciPy alone."""
  import jax
  import jax.numpy as jnp
  import scipy.optimize

  from grain_jax.objectives import matching

  cost = np.random.default_rng(0).random((problems, queries, regions), np.float32)
  device, mask = jnp.asarray(cost), jnp.ones((problems, regions), bool)
  calls: dict[str, Callable[[], Any]] = {
    "scipy": lambda: [scipy.optimize.linear_sum_assignment(c.T) for c in cost]
  }
  for solver in SOLVERS:
    solve = jax.jit(functools.partial(matching.solve, solver=solver))
    calls[solver] = lambda solve=solve: jax.block_until_ready(solve(device, mask))
  return calls


def steps_of(config: ml_collections.ConfigDict) -> dict[str, Callable[[], Any]]:
  """Calls that take a train step on one device with each solver."""
  import jax

  from grain_jax import schema
  from grain_jax.models import grain
  from grain_jax.runtime import mesh as meshes
  from grain_jax.training import steps

  mesh = meshes.create(config, jax.devices()[:1])
  model, rng = grain.build(config), np.random.default_rng(0)
  shapes = schema.batch_shapes(
    batch=config.batch_size,
    image_size=config.model.image.size,
    row_length=config.data.row_length,
    regions=config.data.max_regions,
  )
  batch = {name: np.ones(shape, dtype) for name, (shape, dtype) in shapes.items()}
  batch["image"] = rng.integers(0, 256, batch["image"].shape, np.uint8)
  batch["tokens"] = rng.integers(1, 400, batch["tokens"].shape, np.int32)
  batch["boxes"] = rng.uniform(0.3, 0.6, batch["boxes"].shape).astype(np.float32)
  batch["positions"][:] = np.arange(config.data.row_length) % config.model.text.context
  init, _, shardings, optimizer = steps.create_state(
    model, config, mesh, total_steps=10, steps_per_epoch=1
  )
  with jax.set_mesh(mesh):
    state = init()
  calls = {}
  for solver in SOLVERS:
    own = ml_collections.ConfigDict(config.to_dict())
    own.loss.matcher = solver
    kept = [jax.tree.map(jax.numpy.copy, state)]  # a step consumes the state it is given
    step = steps.make_train_step(model, own, mesh, optimizer, shardings)

    def call(step: Any = step, kept: list[Any] = kept) -> None:
      with jax.set_mesh(mesh):
        kept[0], _ = jax.block_until_ready(step(kept[0], meshes.to_global(batch, mesh)))

    calls[solver] = call
  return calls


def main() -> None:
  flag = flags.FLAGS
  if min(flag.rounds, flag.problems) < 1:
    raise ValueError("--rounds and --problems must be positive.")
  config = configs.resolve(configs.load(flag.recipe))
  config.optimizer.update(warmup_steps=1)
  configs.check(config)
  if config.method != "grain" or not config.data.max_regions:
    raise ValueError(f"--recipe={flag.recipe} matches nothing. Give one of method 'grain'.")
  sizes = {"queries": config.model.num_queries, "regions": config.data.max_regions}
  alone = medians(solvers(problems=flag.problems, **sizes), rounds=flag.rounds)
  say(", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in alone.items()))
  step = medians(steps_of(config), rounds=flag.rounds)
  layers = config.model.decoder.depth if config.loss.aux_box_loss else 1
  in_step = config.batch_size * layers
  own = medians(solvers(problems=in_step, **sizes), rounds=flag.rounds)
  result = {
    "solver_ms": {name: round(1e3 * s, 3) for name, s in alone.items()},
    "step_ms": {name: round(1e3 * s, 1) for name, s in step.items()},
    "share_of_step": {name: round(own[name] / step[name], 5) for name in SOLVERS},
    "settings": {
      "problems": flag.problems, "problems_in_step": in_step, **sizes, "recipe": flag.recipe,
      "batch_size": config.batch_size, "rounds": flag.rounds,
    },
  }  # fmt: skip
  if flag.json:
    print(json.dumps(result))
    return
  for name, values in result.items():
    print(name, ", ".join(f"{k} {v}" for k, v in values.items()))


if __name__ == "__main__":
  flags.DEFINE_bool("json", False, "One JSON object on stdout.")
  flags.DEFINE_string("recipe", "configs/quickstart.py", "Recipe, FILE or FILE:argument.")
  flags.DEFINE_integer("problems", 1024, "Problems a call of the solvers alone.")
  flags.DEFINE_integer("rounds", 9, "Rounds, of which the median counts.")
  cli.run(main)
