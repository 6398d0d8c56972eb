import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from grain_jax.objectives import matching


def random_costs(seed, *, problems=40, queries=5, regions=5, ties=False, bad=False):
  rng = np.random.default_rng(seed)
  cost = rng.normal(size=(problems, queries, regions)).astype(np.float32) * 4
  if ties:
    cost = np.round(cost / 4)
  if bad:
    cost[rng.random(cost.shape) < 0.1] = np.nan
    cost[rng.random(cost.shape) < 0.05] = np.inf
    cost[rng.random(cost.shape) < 0.05] = -np.inf
  return cost, rng.random((problems, regions)) < 0.7


def scipy_total(cost, mask):
  """Least total cost of the valid regions alone, by SciPy on the valid columns."""
  total = []
  for c, m in zip(cost, mask, strict=True):
    rows, columns = scipy.optimize.linear_sum_assignment(c[:, m])
    total.append(c[:, m][rows, columns].sum())
  return np.array(total)


def total(cost, mask, queries):
  chosen = np.take_along_axis(cost, np.maximum(queries, 0)[:, None], axis=1)[:, 0]
  return np.where(mask, chosen, 0).sum(-1)


def assert_assignment(queries, mask, number):
  for row, m in zip(np.asarray(queries), mask, strict=True):
    assert (row[~m] == -1).all()
    assert len(set(row[m])) == m.sum() and ((row[m] >= 0) & (row[m] < number)).all()


@pytest.mark.parametrize("solver", matching.SOLVERS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("queries,regions", [(5, 5), (7, 3), (4, 1), (9, 8)])
def test_matching_costs_what_scipy_costs(solver, ties, queries, regions):
  cost, mask = random_costs(1, queries=queries, regions=regions, ties=ties)
  found = np.asarray(matching.solve(jnp.asarray(cost), jnp.asarray(mask), solver=solver))
  assert_assignment(found, mask, queries)
  assert_allclose(total(cost, mask, found), scipy_total(cost, mask), rtol=1e-5, atol=1e-5)


def test_solvers_agree_where_the_optimum_is_unique():
  cost, mask = random_costs(2, problems=500)
  host, device = (
    np.asarray(matching.solve(jnp.asarray(cost), jnp.asarray(mask), solver=s))
    for s in matching.SOLVERS
  )
  assert_array_equal(host, device)


@pytest.mark.parametrize("solver", matching.SOLVERS)
def test_bad_entries_are_avoided_first(solver):
  cost, mask = random_costs(3, problems=200, bad=True)
  found = np.asarray(matching.solve(jnp.asarray(cost), jnp.asarray(mask), solver=solver))
  assert_assignment(found, mask, 5)
  bad = (~np.isfinite(cost)).astype(np.float32)
  # As few bad entries as any assignment has, by SciPy on the 0/1 costs.
  assert_array_equal(total(bad, mask, found), scipy_total(bad, mask))
  # Among those, the least finite cost.
  finite = np.where(bad > 0, 1e6, cost)
  assert_allclose(
    total(finite, mask, found).astype(np.float64), scipy_total(finite.astype(np.float64), mask),
    rtol=1e-6, atol=1e-2,
  )  # fmt: skip


@given(
  st.integers(0, 2**31), st.sampled_from([(1, 1), (5, 2), (5, 5)]), st.booleans(), st.booleans()
)
def test_solvers_cost_the_same_on_every_input(seed, sizes, ties, bad):
  queries, regions = sizes
  cost, mask = random_costs(seed, problems=3, queries=queries, regions=regions, ties=ties, bad=bad)
  clean = np.asarray(matching.clean_cost(jnp.asarray(cost), jnp.asarray(mask)))
  assert np.isfinite(clean).all()
  totals = [
    total(clean, mask, np.asarray(matching.solve(jnp.asarray(cost), jnp.asarray(mask), solver=s)))
    for s in matching.SOLVERS
  ]
  assert_allclose(*totals, rtol=1e-5, atol=1e-5)


def test_host_matcher_solves_each_shard_on_its_own_under_a_mesh(monkeypatch):
  calls = []
  monkeypatch.setattr(
    matching, "_scipy", lambda c, solve=matching._scipy: (calls.append(c.shape), solve(c))[1]
  )
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  cost, mask = random_costs(4, problems=32)
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  with jax.set_mesh(mesh):
    found = jax.jit(lambda c, m: matching.solve(c, m, solver="host", batch_axes=("data",)))(
      jax.device_put(cost, sharding), jax.device_put(mask, sharding)
    )
  assert_allclose(
    total(cost, mask, np.asarray(found)), scipy_total(cost, mask), rtol=1e-5, atol=1e-5
  )
  assert sorted(calls) == [(4, 5, 5)] * 8  # one call a shard, no gather


def test_no_region_at_all_is_no_problem():
  cost, mask = jnp.zeros((2, 4, 0)), jnp.zeros((2, 0), bool)
  for solver in matching.SOLVERS:
    assert matching.solve(cost, mask, solver=solver).shape == (2, 0)


def test_errors_say_what_is_wrong():
  with pytest.raises(ValueError, match="every region needs a query"):
    matching.solve(jnp.zeros((1, 2, 3)), jnp.ones((1, 3), bool))
  with pytest.raises(ValueError, match="config.loss.matcher = 'scipy' is unknown"):
    matching.solve(jnp.zeros((1, 3, 3)), jnp.ones((1, 3), bool), solver="scipy")


def test_the_host_solver_says_what_it_lacks(monkeypatch):
  def local_devices(*, backend):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "local_devices", local_devices)
  cost, mask = np.zeros((2, 3, 3), np.float32), np.ones((2, 3), bool)
  with pytest.raises(ValueError, match="'host' needs JAX's CPU backend .*Append ',cpu'") as error:
    matching.solve(cost, mask, solver="host")
  assert "\n" not in str(error.value)
  matching.solve(cost, mask, solver="device")
