"""Means over seeds, paired differences, their Student t intervals, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# {arm: {seed: {metric: value}}}
Measured = Mapping[str, Mapping[int, Mapping[str, float]]]


class Interval(NamedTuple):
  """A mean with its confidence interval; a single value has none (NaN)."""

  mean: float
  low: float
  high: float


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
  """Student t interval of a mean: m ± t_{n-1} s / sqrt(n).

  Args:
    values: independent measurements, [n], n >= 1.
    confidence: of the two-sided interval, in (0, 1).
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not len(values) or not np.all(np.isfinite(values)):
    raise ValueError(f"values = {values.tolist()}: finite numbers are needed, one at least.")
  mean, n = float(values.mean()), len(values)
  if n == 1:
    return Interval(mean, math.nan, math.nan)
  half = stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
  return Interval(mean, mean - float(half), mean + float(half))


def paired_interval(
  treated: Sequence[float], control: Sequence[float], *, confidence: float = 0.95
) -> Interval:
  """Student t interval of the mean of `treated - control`, value by value, [n] each."""
  if len(treated) != len(control):
    raise ValueError(
      f"{len(treated)} values cannot be paired with {len(control)}. Give the same seeds of both."
    )
  differences = np.asarray(treated, np.float64) - np.asarray(control, np.float64)
  return mean_interval(differences, confidence=confidence)


def difference(measured: Measured, treated: str, control: str, metric: str) -> Interval | None:
  """Paired difference over the seeds that both arms have; None where there is none."""
  a, b = measured.get(treated, {}), measured.get(control, {})
  seeds = sorted(s for s in a.keys() & b.keys() if metric in a[s] and metric in b[s])
  if not seeds:
    return None
  return paired_interval([a[s][metric] for s in seeds], [b[s][metric] for s in seeds])


def summarize(
  measured: Measured, *, metrics: Sequence[str], treated: str
) -> dict[str, dict[str, Interval]]:
  """{arm: {metric: interval}}; `treated` also has 'METRIC - CONTROL', its paired differences."""
  summary: dict[str, dict[str, Interval]] = {}
  for arm, seeds in measured.items():
    values = {m: [of[m] for of in seeds.values() if m in of] for m in metrics}
    summary[arm] = {m: mean_interval(v) for m, v in values.items() if v}
  if treated in summary:
    for control in [arm for arm in measured if arm != treated]:
      for metric in metrics:
        found = difference(measured, treated, control, metric)
        if found is not None:
          summary[treated][f"{metric} - {control}"] = found
  return summary


def best_control(measured: Measured, *, treated: str, metric: str) -> str | None:
  """The arm other than `treated` of highest mean; the one whose victory is hardest to beat."""
  means = {
    arm: np.mean([of[metric] for of in seeds.values() if metric in of])
    for arm, seeds in measured.items()
    if arm != treated and any(metric in of for of in seeds.values())
  }
  return max(means, key=lambda arm: means[arm]) if means else None


def to_json(summary: Mapping[str, Mapping[str, Interval]]) -> dict:
  """{arm: {metric: {'mean', 'low', 'high'}}} with null for a bound that one seed cannot give."""
  return {
    arm: {
      metric: {k: v if math.isfinite(v) else None for k, v in interval._asdict().items()}
      for metric, interval in metrics.items()
    }
    for arm, metrics in summary.items()
  }


def percent(interval: Interval | None, *, sign: bool = False) -> str:
  """'26.0 [24.1, 27.9]' of fractions, in percent or points; a dash where nothing was measured."""
  if interval is None:
    return "–"
  form = "{:+.1f}" if sign else "{:.1f}"
  mean, low, high = (form.format(100 * v) for v in interval)
  return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table: first column to the left, the others to the right."""
  rule = [":--", *["--:"] * (len(header) - 1)]
  return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def verdict(
  measured: Measured,
  *,
  treated: str,
  metric: str,
  what: str,
  arms: Sequence[str],
  seeds: Sequence[int],
) -> str:
  """The claim's line, whatever comes out: what was found, and whether the claim holds.

  The claim is that `treated` exceeds the control of highest mean; it holds where the whole interval
  of the paired difference lies above 0. Nothing is said before all `arms` have all `seeds`.
  """
  claim = f"{treated} against the best control on {what}"
  missing = [
    arm
    for arm in dict.fromkeys([*arms, treated])
    if any(metric not in measured.get(arm, {}).get(s, {}) for s in seeds)
  ]
  control = best_control(measured, treated=treated, metric=metric)
  if missing or control is None:
    return f"{claim}: not measured yet ({', '.join(missing) or 'a control'} to be run)."
  found = difference(measured, treated, control, metric)
  if math.isnan(found.low):
    end = "one seed decides nothing"
  else:
    end = "the claim holds" if found.low > 0 else "the claim does not hold"
  points = percent(found, sign=True).replace(" [", " points [")
  if "[" not in points:
    points += " points"
  return f"{claim}, {control}: {points}; {end}."
