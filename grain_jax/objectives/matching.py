"""Which query answers for which region: the assignment of least total cost.

One signature for every solver: `cost [..., Q, R], mask [..., R] -> query index [..., R]`.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.sharding import PartitionSpec as P

from grain_jax import config as configs

Array = jax.Array

SOLVERS = configs.CHOICES["loss.matcher"]

# Above this many assignments the device solver stops trying them all (7! = 5040).
_MAX_ASSIGNMENTS = 5040


def clean_cost(cost: Array, mask: Array) -> Array:
  """Finite costs with the same best assignment.

  Regions that are masked out cost nothing wherever they go. A NaN or infinite entry becomes so
  large that an assignment takes as few of them as it can.

  Args:
    cost: [..., Q, R].
    mask: bool [..., R].

  Returns:
    f32 [..., Q, R], finite.
  """
  cost = jnp.where(mask[..., None, :], cost.astype(jnp.float32), 0.0)
  good = jnp.isfinite(cost)
  largest = jnp.max(jnp.where(good, jnp.abs(cost), 0.0), axis=(-2, -1), keepdims=True)
  return jnp.where(good, cost, (2.0 * largest + 1.0) * cost.shape[-1])


def solve(
  cost: Array,
  mask: Array,
  *,
  solver: str = "host",
  batch_axes: tuple[str, ...] = (),
) -> Array:
  """Assigns a query of its own to each region, at least total cost.

  Args:
    cost: [..., Q, R] with Q >= R; cost of giving region r to query q.
    mask: bool [..., R]; false for regions that do not exist.
    solver: 'host' (SciPy in a callback, each device's shard on that device's host) or 'device'
      (exact, on the accelerator).
    batch_axes: mesh axes over which the leading dimension is sharded; used by 'host' under
      `jax.set_mesh`. Empty: the cost is not sharded.

  Returns:
    i32 [..., R]: index of the region's query; -1 where the mask is false. No gradient flows.
  """
  configs.check_choice("loss.matcher", solver)
  queries, regions = cost.shape[-2:]
  if queries < regions:
    raise ValueError(f"{queries} queries for {regions} regions: every region needs a query.")
  if regions == 0:
    return jnp.zeros((*cost.shape[:-2], 0), jnp.int32)
  cost = clean_cost(jax.lax.stop_gradient(cost), mask)
  if solver == "host":
    _check_host()
  function = _solve_on_host if solver == "host" else _solve_on_device
  if solver == "host" and batch_axes:
    spec = P(batch_axes)
    function = jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)
  return jnp.where(mask, function(cost), -1)


def _check_host() -> None:
  """Raises a one-line ValueError where JAX has no CPU backend, which callbacks go through."""
  try:
    jax.local_devices(backend="cpu")
  except RuntimeError as error:
    raise ValueError(
      "config.loss.matcher = 'host' needs JAX's CPU backend beside the accelerator's, and "
      f"JAX_PLATFORMS={jax.config.jax_platforms} leaves it out. Append ',cpu' to it."
    ) from error


def _solve_on_host(cost: Array) -> Array:
  shape = jax.ShapeDtypeStruct((*cost.shape[:-2], cost.shape[-1]), jnp.int32)
  return jax.pure_callback(_scipy, shape, cost, vmap_method="expand_dims")


def _scipy(cost: np.ndarray) -> np.ndarray:
  """[..., Q, R], finite -> i32 [..., R], by `scipy.optimize.linear_sum_assignment`."""
  cost = np.asarray(cost)
  flat = cost.reshape(-1, *cost.shape[-2:]).swapaxes(-1, -2)
  rows = [scipy.optimize.linear_sum_assignment(problem)[1] for problem in flat]
  shape = (*cost.shape[:-2], cost.shape[-1])
  return np.asarray(rows, np.int32).reshape(shape)


@functools.lru_cache(maxsize=8)
def _assignments(queries: int, regions: int) -> np.ndarray:
  """All ways to give `regions` regions a query of their own: i32 [ways, regions]."""
  return np.array(list(itertools.permutations(range(queries), regions)), np.int32)


def _solve_on_device(cost: Array) -> Array:
  queries, regions = cost.shape[-2:]
  if math.perm(queries, regions) <= _MAX_ASSIGNMENTS:
    ways = _assignments(queries, regions)  # [A, R]
    terms = [cost[..., ways[:, r], r] for r in range(regions)]  # R times [..., A]
    best = jnp.argmin(functools.reduce(jnp.add, terms), axis=-1)
    return jnp.asarray(ways)[best]
  flat = cost.reshape(-1, queries, regions)
  return jax.vmap(_hungarian)(flat).reshape(*cost.shape[:-2], regions)


def _hungarian(cost: Array) -> Array:
  """[Q, R] -> i32 [R], by Optax's Hungarian algorithm, whose pairs come in any order."""
  queries, regions = optax.assignment.hungarian_algorithm(cost)
  return jnp.zeros(cost.shape[-1], jnp.int32).at[regions].set(queries.astype(jnp.int32))
