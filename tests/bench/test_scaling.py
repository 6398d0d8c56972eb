"""The scaling benchmark: growth by hand, bad input, and two machines of virtual CPUs."""

import pytest
from numpy.testing import assert_allclose

from bench import scaling


def planned(topology, chips, **changes):
  """A plan's answer, as far as the benchmark reads it."""
  found = {
    "topology": topology,
    "chips": chips,
    "fits": True,
    "batch_per_chip": 64,
    "flops_per_chip": 9e12,
    "memory_per_chip_bytes": {"parameters": 1e9, "total": 4e9},
    "collective_bytes_per_chip": {"all-reduce": 6e8, "reduce-scatter": 1e8, "total": 9e8},
    "gradient_bytes_per_chip": 7e8,
    "step_seconds_estimate": 0.1,
    "bound_by": "memory",
    "samples_per_second": chips * 640.0,
    "compile_seconds": 50.0,
  }
  return found | changes


def run(*plans):
  by_name = {p["topology"]: p for p in plans}
  return scaling.run(list(by_name), [], planner=lambda name, arguments: by_name[name])


def test_growth_by_hand():
  found = run(
    planned("v5e:4x4", 16),
    planned("v5e:8x8", 64, flops_per_chip=9.09e12, memory_per_chip_bytes={"total": 4.1e9}),
    planned(
      "v5e:16x16",
      256,
      gradient_bytes_per_chip=7.42e8,
      samples_per_second=256 * 576.0,
    ),
  )
  assert_allclose(found["growth"]["flops"], 0.01)
  assert_allclose(found["growth"]["memory"], 0.025)
  assert_allclose(found["growth"]["gradient_traffic"], 0.06)
  assert_allclose(found["efficiency"], [1, 1, 0.9])
  assert found["within_limits"] is True
  assert "v5e:16x16" in scaling.table(found) and "90.0%" in scaling.table(found)


@pytest.mark.parametrize(
  "changes",
  [
    {"flops_per_chip": 9e12 * 1.03},
    {"memory_per_chip_bytes": {"total": 4e9 * 0.9}},
    {"gradient_bytes_per_chip": 8e8},
  ],
)
def test_each_limit_can_be_broken(changes):
  found = run(planned("v5e:4x4", 16), planned("v5e:8x8", 64, **changes))
  assert found["within_limits"] is False


def test_bad_input():
  with pytest.raises(ValueError, match="at least two"):
    run(planned("v5e:4x4", 16))
  with pytest.raises(ValueError, match="Known are"):
    run(planned("v5e:4x4", 16), planned("v5e:9x9", 81))
  with pytest.raises(ValueError, match="do not fit.*remat=block"):
    run(planned("v5e:4x4", 16), planned("v5e:8x8", 64, fits=False))


def test_a_failing_plan_is_one_line():
  with pytest.raises(ValueError, match="v5e:4x4: .*no file configs/nothing.py"):
    scaling.plan("v5e:4x4", ["--config=configs/nothing.py"])
