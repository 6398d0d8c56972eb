"""Intervals against SciPy's, pairing, and the claim's line."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from bench import statistics

finite = st.floats(-1, 1)


def numbers(n):
  return st.lists(finite, min_size=n, max_size=n)


@hypothesis.given(st.integers(2, 8).flatmap(lambda n: st.tuples(numbers(n), numbers(n))))
def test_intervals_are_those_of_scipy(pair):
  a, b = map(np.array, pair)
  hypothesis.assume(a.std() > 1e-6 and (a - b).std() > 1e-6)
  ours = statistics.mean_interval(a)
  low, high = stats.t.interval(0.95, len(a) - 1, loc=a.mean(), scale=stats.sem(a))
  assert_allclose(ours, (a.mean(), low, high), atol=1e-9)
  theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
  ours = statistics.paired_interval(a, b)
  assert_allclose(ours[1:], theirs, atol=1e-9)
  assert_allclose(ours.mean, np.mean(a) - np.mean(b), atol=1e-9)


def test_interval_by_hand():
  # Mean 2, standard deviation 1, t_2 = 4.302653: half width 4.302653 / sqrt(3).
  assert_allclose(statistics.mean_interval([1, 2, 3]), (2, -0.484138, 4.484138), atol=1e-6)
  one = statistics.mean_interval([0.3])
  assert one.mean == 0.3 and np.isnan([one.low, one.high]).all()
  for bad in ([], [0.1, float("nan")]):
    with pytest.raises(ValueError, match="finite numbers are needed"):
      statistics.mean_interval(bad)
  with pytest.raises(ValueError, match="cannot be paired"):
    statistics.paired_interval([1, 2], [1])


def test_differences_pair_the_seeds_that_both_arms_have():
  measured = {
    "grain": {0: {"m": 0.5}, 1: {"m": 0.7}, 2: {"m": 0.9}},
    "clip": {2: {"m": 0.6}, 1: {"m": 0.5}, 7: {"m": 0.0}},
    "clip_text": {0: {"other": 1.0}},
  }
  found = statistics.difference(measured, "grain", "clip", "m")
  assert_allclose(found, statistics.mean_interval([0.2, 0.3]))
  assert statistics.difference(measured, "grain", "clip_text", "m") is None
  summary = statistics.summarize(measured, metrics=["m"], treated="grain")
  assert list(summary["grain"]) == ["m", "m - clip"]
  assert_allclose(summary["clip"]["m"].mean, 1.1 / 3)
  assert summary["clip_text"] == {}


@pytest.mark.parametrize(
  "control, points, end",
  [
    ([0.10, 0.12, 0.11], "+14.0", "the claim holds"),
    ([0.24, 0.27, 0.24], "+0.0", "the claim does not hold"),
    ([0.02, 0.24, 0.12], "+12.3", "the claim does not hold"),  # the interval reaches below 0
    ([0.40, 0.42, 0.41], "-16.0", "the claim does not hold"),
  ],
)
def test_verdict_says_what_came_out(control, points, end):
  grain = [0.24, 0.25, 0.26]
  measured = {
    "grain": {s: {"m": v} for s, v in enumerate(grain)},
    "a": {s: {"m": 0.01} for s in range(3)},
    "b": {s: {"m": v} for s, v in enumerate(control)},
  }
  of = {"treated": "grain", "metric": "m", "what": "unseen pairs", "seeds": (0, 1, 2)}
  line = statistics.verdict(measured, **of, arms=("a", "b", "grain"))
  low, high = stats.ttest_rel(grain, control).confidence_interval()
  assert line == (
    "grain against the best control on unseen pairs, b: "
    f"{points} points [{100 * low:+.1f}, {100 * high:+.1f}]; {end}."
  )
  # A control that is still to run may be the best one.
  line = statistics.verdict(measured, **of, arms=("a", "b", "c", "grain"))
  assert line.endswith("not measured yet (c to be run).")
  measured["b"].pop(1)
  line = statistics.verdict(measured, **of, arms=("a", "b", "grain"))
  assert line.endswith("not measured yet (b to be run).")
  line = statistics.verdict({"grain": measured.pop("grain")}, **of, arms=("grain",))
  assert line.endswith("not measured yet (a control to be run).")
  line = statistics.verdict(measured, **of, arms=("a",))
  assert line.endswith("not measured yet (grain to be run).")
