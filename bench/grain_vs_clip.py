"""`python -m bench.grain_vs_clip [--json]`: does grounding descriptions help, beside fair controls?

Every arm is the same recipe with a few keys changed. Each arm's learning rate is chosen on a seed
that is not reported, by retrieval on `val`, in runs that may be shorter (`--tuning_steps`); then
all arms run on the same seeds (of parameters and of the order of the data). Three tables: at equal
images, at equal FLOPs and at equal seconds of training; for the last two an arm cheaper than
`grain` trains for more steps, with a schedule of its own length. A run that is finished is never
repeated; one cut short goes on.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from bench import comparison as comparisons
from bench import costs as costing
from bench import statistics
from grain_jax import cli
from grain_jax import config as configs
from grain_jax.data import dataset
from grain_jax.models import initial

ARMS, METRICS, BUDGETS = comparisons.ARMS, comparisons.METRICS, comparisons.BUDGETS
TREATED, TUNING_SEED = comparisons.TREATED, comparisons.TUNING_SEED
Store = comparisons.Store
CLAIM = "zero_shot/unseen/top1"
_CAVEAT = "Synthetic scenes with exact boxes are evidence for the mechanism, not for CC12M."


def say(line: str) -> None:
  """Progress; stdout is for the results."""
  print(line, file=sys.stderr, flush=True)


def recipe_config(
  recipe: str, overrides: Mapping[str, Any], *, data: str = ""
) -> ml_collections.ConfigDict:
  """The recipe's configuration with `overrides` of dotted keys."""
  config = configs.load(recipe)
  for key, value in overrides.items():
    configs.set_key(config, key, value)
  if data:
    config.data.dir = data
  return config


def check_protocol(store: Store, recipe: str, *, data: str) -> None:
  """Ties the results to recipe, arms and data: what changes them needs another results folder."""
  config = recipe_config(recipe, {}, data=data)
  free = {"seed", "steps", "epochs", "optimizer.lr", *configs.FREE_KEYS}
  flat = configs.flatten(configs.resolve(config))
  values = {k: v for k, v in flat if k not in free and not k.startswith("mesh.")}
  manifest = dataset.open_dataset(config.data.dir).manifest
  text = json.dumps(manifest["splits"], sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  now = {"config": values, "arms": ARMS, "data": {"digest": digest}}
  now["model"] = {"initial": initial.VERSION}
  now = json.loads(json.dumps(now))  # as it will be read back
  old = store.read("protocol")
  if old is None:
    store.write("protocol", now)
    return
  old["config"] = {k: v for k, v in configs.ADDED.items() if k in values} | old["config"]
  old.setdefault("model", {"initial": 1})
  for part in ("config", "arms", "data", "model"):
    for key in sorted(old[part].keys() & now[part].keys()):
      if old[part][key] != now[part][key]:
        raise ValueError(
          f"results in {store.folder} were made by another protocol: {part}.{key} was "
          f"{old[part][key]!r} and is {now[part][key]!r}. Give another --results and another "
          "--workdir."
        )


def measure(store: Store, config_of: Callable[[str], ml_collections.ConfigDict]) -> dict[str, Any]:
  """Costs of a step of every arm, from the folder of results or measured now and written there."""
  costs = store.read("costs")
  if costs is None:
    costs = {"machine": costing.machine(), "flops_per_step": {}}
    for arm in ARMS:
      costs["flops_per_step"][arm] = costing.flops_per_step(config_of(arm))
      say(f"{arm}: {costs['flops_per_step'][arm] / 1e9:.1f} GFLOP a step")
    of = {arm: config_of(arm) for arm in ARMS}
    costs["seconds_per_step"] = costing.seconds_per_step(of, say=say)
    store.write("costs", costs)
  missing = sorted(set(ARMS) - set(costs["seconds_per_step"]))
  if missing:
    raise ValueError(
      f"{store.folder}/costs.json lacks {', '.join(missing)}: costs are measured for all arms in "
      "turn. Delete it to measure them again."
    )
  return costs


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What is compared: the flags, checked."""

  arms: tuple[str, ...]
  seeds: tuple[int, ...]
  lrs: tuple[float, ...]
  steps: int
  budgets: tuple[str, ...] = BUDGETS
  tuning_steps: int = 0  # length of the runs that choose learning rates; 0: `steps`

  def tuning_runs(self) -> list[comparisons.Run]:
    """Every learning rate of every arm."""
    return comparisons.tuning_runs(self.arms, lrs=self.lrs, steps=self.tuning_steps or self.steps)

  def learning_rates(self, store: Store) -> dict[str, float]:
    """{arm: learning rate} of the arms for which it is chosen."""
    steps = self.tuning_steps or self.steps
    found = {a: comparisons.choose_lr(store, a, lrs=self.lrs, steps=steps) for a in self.arms}
    return {arm: lr for arm, lr in found.items() if lr is not None}

  def measured(self, store: Store, budget: str) -> dict[str, dict[int, dict[str, float]]]:
    """{arm: {seed: metrics}} of the finished runs at a budget."""
    costs, table = store.read("costs"), {}
    for arm, lr in self.learning_rates(store).items():
      steps = comparisons.plan_steps(arm, steps=self.steps, costs=costs).get(budget)
      if steps is not None:
        of = {seed: store.metrics(comparisons.Run(arm, lr, seed, steps)) for seed in self.seeds}
        if any(of.values()):
          table[arm] = {seed: metrics for seed, metrics in of.items() if metrics}
    return table

  def summary(self, store: Store, budget: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """{arm: {metric: {'mean', 'low', 'high'}}} of a budget; fractions."""
    table = self.measured(store, budget)
    return statistics.to_json(statistics.summarize(table, metrics=list(METRICS), treated=TREATED))

  def notes(self, store: Store) -> list[str]:
    """What a reader of the tables must know: missing runs, learning rates at the grid's edge."""
    lrs, lines = self.learning_rates(store), []
    for arm in self.arms:
      if arm not in lrs:
        lines.append(f"{arm}: its learning rate is not chosen yet.")
      elif len(self.lrs) > 1 and lrs[arm] in (min(self.lrs), max(self.lrs)):
        lines.append(f"{arm}: the best learning rate {lrs[arm]:g} is at the edge of the values.")
    for budget in self.budgets:
      table = self.measured(store, budget)
      for arm in lrs:
        if missing := [str(s) for s in self.seeds if s not in table.get(arm, {})]:
          lines.append(f"{arm} at equal {budget}: no result of seed {', '.join(missing)}.")
    return lines


def tables(comparison: Comparison, store: Store) -> str:
  """Markdown: for each budget the arms, the paired differences, and the claim's line."""
  costs, lrs = store.read("costs"), comparison.learning_rates(store)
  parts = []
  for budget in comparison.budgets:
    table = comparison.measured(store, budget)
    summary = statistics.summarize(table, metrics=list(METRICS), treated=TREATED)
    rows = []
    for arm, of in table.items():
      steps = comparisons.plan_steps(arm, steps=comparison.steps, costs=costs)[budget]
      spent = ["–", "–"]
      if costs:
        spent = [
          f"{steps * costs['flops_per_step'][arm] / 1e12:.2f}",
          f"{steps * costs['seconds_per_step'][arm] / 60:.1f}",
        ]
      values = [statistics.percent(summary[arm].get(metric)) for metric in METRICS]
      rows.append([arm, f"{lrs[arm]:g}", str(len(of)), str(steps), *spent, *values])
    header = ["arm", "lr", "seeds", "steps", "TFLOP", "minutes", *METRICS.values()]
    parts += [f"### At equal {budget}", statistics.markdown(header, rows)]
    own = summary.get(TREATED, {})
    rows = [
      [f"{TREATED} − {arm}"]
      + [statistics.percent(own.get(f"{metric} - {arm}"), sign=True) for metric in METRICS]
      for arm in table
      if arm != TREATED
    ]
    parts.append(statistics.markdown(["paired difference, points", *METRICS.values()], rows))
    what = f"unseen pairs at equal {budget}"
    of = {"arms": comparison.arms, "seeds": comparison.seeds}
    parts.append(statistics.verdict(table, treated=TREATED, metric=CLAIM, what=what, **of))
  parts.append(f"Percent, with 95 % Student t intervals over seeds. {_CAVEAT}")
  return "\n\n".join(parts)


def parse_names(flag: str, values: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
  """Checks names of a list flag; they come back in the order of `known`."""
  for value in values:
    if value not in known:
      near = difflib.get_close_matches(value, known, n=1)
      hint = f"Did you mean {near[0]}?" if near else f"Choose from {', '.join(known)}."
      raise ValueError(f"--{flag}: {value!r} is unknown. {hint}")
  if not values:
    raise ValueError(f"--{flag} is empty. Choose from {', '.join(known)}.")
  return tuple(name for name in known if name in values)


def parse_seeds(values: Sequence[str]) -> tuple[int, ...]:
  """Checks the seeds to report."""
  for value in values:
    if not value.isdecimal():
      raise ValueError(f"--seeds: {value!r} is not a whole number from 0 on. Give some, as 0,1,2.")
  seeds = tuple(dict.fromkeys(int(value) for value in values))
  if TUNING_SEED in seeds:
    raise ValueError(
      f"--seeds: seed {TUNING_SEED} chooses the learning rates and is not reported. Leave it out."
    )
  if not seeds:
    raise ValueError("--seeds is empty. Give some, as 0,1,2.")
  return seeds


def parse_lrs(values: Sequence[str]) -> tuple[float, ...]:
  """Checks the learning rates."""
  lrs: list[float] = []
  for value in values:
    try:
      lr = float(value)
    except ValueError:
      lr = 0.0
    if not 0 < lr < float("inf") or lr in lrs:
      raise ValueError(f"--lrs: {value!r} is not a new positive number. Give some, as 1e-3,2e-3.")
    lrs.append(lr)
  if not lrs:
    raise ValueError("--lrs is empty. Give some, as 1e-3,2e-3.")
  return tuple(lrs)


def run_all(
  comparison: Comparison, store: Store, *, recipe: str, data: str, workdir: pathlib.Path, jobs: int
) -> None:
  """Whatever is not there yet: costs, the choice of learning rates, the runs of the tables."""
  check_protocol(store, recipe, data=data)
  comparisons.split_cores(jobs)
  for arm in comparison.arms:
    configs.check(configs.resolve(recipe_config(recipe, ARMS[arm], data=data)))
  costs = None
  if set(comparison.budgets) != {"images"}:
    costs = measure(store, lambda arm: recipe_config(recipe, ARMS[arm], data=data))
  runner = functools.partial(comparisons.train, recipe=recipe, data=data, workdir=workdir)
  execute = functools.partial(comparisons.execute, store=store, runner=runner, jobs=jobs, say=say)
  execute(comparison.tuning_runs())
  lrs = comparison.learning_rates(store)
  say("learning rates: " + ", ".join(f"{arm} {lr:g}" for arm, lr in lrs.items()))
  execute(
    comparisons.reported_runs(
      lrs,
      seeds=comparison.seeds,
      steps=comparison.steps,
      budgets=comparison.budgets,
      costs=costs,
    )
  )


def main() -> None:
  flag = flags.FLAGS
  store = Store(pathlib.Path(flag.results))
  comparison = Comparison(
    arms=parse_names("arms", flag.arms, list(ARMS)),
    seeds=parse_seeds(flag.seeds),
    lrs=parse_lrs(flag.lrs),
    steps=flag.steps or configs.load(flag.recipe).steps,
    budgets=parse_names("budgets", flag.budgets, BUDGETS),
    tuning_steps=flag.tuning_steps,
  )
  for name, steps in (("steps", comparison.steps), ("tuning_steps", flag.tuning_steps or 1)):
    if steps < 1:
      raise ValueError(f"--{name}={steps}: the length of a run must be positive. Set it.")
  if flag.json and flag.budget not in comparison.budgets:
    raise ValueError(f"--budget={flag.budget} is not in --budgets={','.join(comparison.budgets)}.")
  if not flag.report:
    workdir = pathlib.Path(flag.workdir)
    run_all(comparison, store, recipe=flag.recipe, data=flag.data, workdir=workdir, jobs=flag.jobs)
  for note in comparison.notes(store):
    say(f"note: {note}")
  if flag.json:
    print(json.dumps(comparison.summary(store, flag.budget)))
  else:
    print(tables(comparison, store))


if __name__ == "__main__":
  flags.DEFINE_list("arms", list(ARMS), f"Which of {', '.join(ARMS)}.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to report, of parameters and data alike.")
  flags.DEFINE_list("lrs", ["1e-3", "2e-3", "4e-3"], "Learning rates to choose from.")
  flags.DEFINE_list("budgets", list(BUDGETS), f"Which of {', '.join(BUDGETS)}.")
  flags.DEFINE_integer("steps", 0, "Length of the run at equal images; 0: the recipe's.")
  flags.DEFINE_integer("tuning_steps", 0, "Length of runs that choose learning rates; 0: --steps.")
  flags.DEFINE_string("recipe", "configs/quickstart.py", "Recipe, FILE or FILE:argument.")
  flags.DEFINE_string("data", "", "Built dataset; the recipe's own by default.")
  flags.DEFINE_string("workdir", "runs/grain_vs_clip", "Folder of the workdirs of all runs.")
  flags.DEFINE_string("results", "bench/results/grain_vs_clip", "Folder of a JSON file a run.")
  flags.DEFINE_integer("jobs", 1, "Runs at a time, each on its own share of the cores.")
  flags.DEFINE_bool("report", False, "Tables from the results that are there; nothing is run.")
  flags.DEFINE_bool("json", False, "One JSON object {arm: {metric: {mean, low, high}}} on stdout.")
  flags.DEFINE_enum("budget", "images", BUDGETS, "The table that --json prints.")
  cli.run(main)
