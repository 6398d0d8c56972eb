"""`python -m bench.ablation [--json]`: what each objective, pooling and annotation is worth.

Fifteen arms on the embedded scenes with false texts made from their structure, at equal images: all
have the same steps, batch and seeds. Each family's learning rate is what `bench.grain_vs_clip`
chose for `clip` and for `grain`. FLOPs stand in a column. A run that is finished is never repeated;
one cut short goes on.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from bench import ablation_data, expectations, statistics
from bench import comparison as comparisons
from bench import costs as costing
from bench import grain_vs_clip as protocol
from grain_jax import cli
from grain_jax import config as configs
from grain_jax.models import initial

_EVALS = ("zero_shot", "retrieval", "composition", "grounding", "segmentation")
# Rows of which under 1 % of the false texts fall out.
_CLIP = {"method": "clip", "data.max_regions": 0, "data.row_length": 32}
_CE_CLIP = {
  **_CLIP, "data.negatives": 4, "data.negatives_of": "caption", "data.row_length": 112,
  "loss.rank": 0.2, "loss.intra": 0.3,
}  # fmt: skip
# What differs from the recipe; 'data' is the variant of `ablation_data` that it trains on.
ARMS: dict[str, dict[str, Any]] = {
  "clip": _CLIP,
  "clip_wide": {**_CLIP, "model.image.width": 168},  # GRAIN's number of parameters
  "ce_clip": _CE_CLIP,
  "ce_clip_random": {**_CE_CLIP, "data": "random_negatives"},
  "ce_clip_anchor": {
    **_CE_CLIP, "loss.anchor": 1.28, "loss.anchor_teacher": "ema", "loss.anchor_decay": 0.99,
  },
  "clippy": {**_CLIP, "model.pool": "max"},
  "grain": {},
  "grain_no_box": {"loss.box": 0.0},
  "grain_no_region": {"loss.region": 0.0},
  "grain_permuted": {"loss.permute_regions": True},
  "grain_1_query": {"model.num_queries": 1, "data.max_regions": 1},
  "grain_7_queries": {"model.num_queries": 7},  # of scenes with five objects at most
  "grain_negatives": {"data.negatives_per_region": 1, "data.row_length": 96},
  "grain_spoilt": {"data": "spoilt_regions"},
  "grain_plus": {
    "data.negatives": 4, "data.negatives_of": "caption", "data.negatives_per_region": 1,
    "data.row_length": 160, "loss.rank": 0.2, "loss.intra": 0.3, "model.pool": "class",
    "model.auxiliary_pool": "max",
  },
}  # fmt: skip
# Asked afterwards, of what the arms left open; by `--arms` only, and set against `grain_plus`.
FOLLOW_UPS: dict[str, dict[str, Any]] = {
  "grain_plus_7_queries": {**ARMS["grain_plus"], "model.num_queries": 7},
  "grain_plus_no_auxiliary": {**ARMS["grain_plus"], "model.auxiliary_pool": "none"},
  "grain_plus_contrast": {**ARMS["grain_plus"], "loss.rank": 0.0, "loss.intra": 0.0},
  "grain_plus_no_false_captions": {
    **ARMS["grain_plus"], "data.negatives": 0, "data.row_length": 96, "loss.rank": 0.0,
    "loss.intra": 0.0,
  },
}  # fmt: skip
_ALL = ARMS | FOLLOW_UPS
METRICS = {  # name in results.json -> heading
  "zero_shot/unseen/top1": "unseen top-1",
  "zero_shot/top1": "zero-shot top-1",
  "retrieval/image_to_text/r1": "image to text R@1",
  "retrieval/text_to_image/r1": "text to image R@1",
  "composition/average": "composition",
  "composition/swap_att": "attributes exchanged",
  "composition/replace_att": "attribute replaced",
  "composition/swap_obj": "places exchanged",
  "grounding/mean_iou": "mean IoU",
  "segmentation/miou": "mIoU",
  # Of the objects' pixels alone: the scenes' captions never speak of a background.
  "segmentation/miou_foreground": "mIoU on objects",
  "segmentation/pixel_accuracy_foreground": "objects' pixels named",
}


def say(line: str) -> None:
  """Progress; stdout is for the results."""
  protocol.say(line)


def family(arm: str) -> str:
  """Whose learning rate an arm takes: that of `clip` or of `grain`."""
  return "clip" if _ALL[arm].get("method") == "clip" else "grain"


def head(arm: str) -> str:
  """What an arm is set against: `clip` or `grain`; `grain_plus` where it was asked afterwards."""
  return "grain_plus" if arm in FOLLOW_UPS else family(arm)


def overrides(arm: str) -> dict[str, Any]:
  """Config keys in which an arm differs from the recipe."""
  return {key: value for key, value in _ALL[arm].items() if key != "data"} | {"evals": _EVALS}


def learning_rates(tuned: comparisons.Store) -> dict[str, float]:
  """{family: learning rate} as `bench.grain_vs_clip` chose them.

  Args:
    tuned: its folder of results.

  Raises:
    ValueError: it has not chosen them; one line.
  """
  chosen = {}
  for name in ("clip", "grain"):
    lr = comparisons.choose_lr(tuned, name, lrs=(5e-4, 1e-3, 2e-3), steps=600)
    if lr is None:
      raise ValueError(
        f"--tuned={tuned.folder} has no choice of a learning rate for {name}. Run: python -m "
        "bench.grain_vs_clip --tuning_steps=600 --lrs=5e-4,1e-3,2e-3"
      )
    chosen[name] = lr
  return chosen


def config_of(arm: str, *, recipe: str, data: pathlib.Path) -> ml_collections.ConfigDict:
  """The configuration of an arm, whole but for seed, length and learning rate."""
  where = data / _ALL[arm].get("data", "plain")
  return protocol.recipe_config(recipe, overrides(arm), data=str(where))


def check_protocol(store: comparisons.Store, *, recipe: str, steps: int) -> None:
  """Ties the results to recipe and arms: what changes them needs another results folder."""
  flat = dict(configs.flatten(configs.resolve(configs.load(recipe))))
  free = {"seed", "steps", "epochs", "optimizer.lr", "data.dir", *configs.FREE_KEYS}
  values = {k: v for k, v in flat.items() if k not in free and not k.startswith("mesh.")}
  now = {"config": values, "arms": ARMS, "follow_ups": FOLLOW_UPS, "steps": steps}
  now["model"] = {"initial": initial.VERSION}
  now = json.loads(json.dumps(now))  # as it will be read back
  old = store.read("protocol")
  if old is None:
    store.write("protocol", now)
    return
  old["config"] = {k: v for k, v in configs.ADDED.items() if k in values} | old["config"]
  for part, was in old.items():
    if was != json.loads(json.dumps(now[part])):
      raise ValueError(
        f"results in {store.folder} were made by another protocol: {part} was {was!r} and is "
        f"{now[part]!r}. Give another --results and another --workdir."
      )


def runs_of(
  arms: Sequence[str], *, seeds: Sequence[int], steps: int, lrs: Mapping[str, float]
) -> list[comparisons.Run]:
  """All runs, seed by seed, so that a table of whole seeds is there soon."""
  return [comparisons.Run(arm, lrs[family(arm)], seed, steps) for seed in seeds for arm in arms]


def measured(
  store: comparisons.Store, runs: Sequence[comparisons.Run]
) -> dict[str, dict[int, dict[str, float]]]:
  """{arm: {seed: metrics}} of what is finished."""
  table: dict[str, dict[int, dict[str, float]]] = {}
  for run in runs:
    if metrics := store.metrics(run):
      table.setdefault(run.arm, {})[run.seed] = metrics
  return table


def notes(store: comparisons.Store, runs: Sequence[comparisons.Run]) -> list[str]:
  """What a reader of the tables must know: runs that are not in them."""
  lines = []
  for what, result in (("are missing", None), ("diverged and are not in the tables", {})):
    if names := [run.name for run in runs if store.metrics(run) == result]:
      lines.append(f"note: {len(names)} of {len(runs)} runs {what}, {names[0]} the first")
  return lines


def flops(
  store: comparisons.Store, arms: Sequence[str], *, recipe: str, data: pathlib.Path
) -> dict[str, float]:
  """FLOPs of a step of each arm, from the folder of results or counted now and written there."""
  known = store.read("flops") or {}
  for arm in arms:
    if arm not in known:
      known[arm] = costing.flops_per_step(config_of(arm, recipe=recipe, data=data))
      store.write("flops", known)
      say(f"{arm}: {known[arm] / 1e9:.1f} GFLOP a step")
  return known


def _arms_of(table: Mapping[str, Any]) -> dict[str, Any]:
  """Without what was asked afterwards: nothing was expected of it."""
  return {arm: of for arm, of in table.items() if arm in ARMS}


def tables(
  table: Mapping[str, Mapping[int, Mapping[str, float]]],
  *,
  costs: Mapping[str, float],
  steps: int,
) -> str:
  """Markdown: all arms, the paired differences to the family's head, and what was expected."""
  rows, differences = [], []
  for arm, of in table.items():
    spent = f"{steps * costs[arm] / 1e12:.1f}" if arm in costs else "–"
    summary = statistics.summarize({arm: of}, metrics=list(METRICS), treated="")[arm]
    values = [statistics.percent(summary.get(metric)) for metric in METRICS]
    rows.append([arm, str(len(of)), spent, *values])
    if arm != (other := head(arm)) and other in table:
      found = [statistics.difference(table, arm, other, metric) for metric in METRICS]
      differences.append([f"{arm} − {other}", *(statistics.percent(x, sign=True) for x in found)])
  parts = [
    f"### Equal images: {steps} steps",
    statistics.markdown(["arm", "seeds", "TFLOP", *METRICS.values()], rows),
    statistics.markdown(["paired difference, points", *METRICS.values()], differences),
    "\n".join(f"* {line}" for line in expectations.lines(_arms_of(table))),
    "Percent, with 95 % Student t intervals over seeds. Synthetic scenes with exact boxes are "
    "evidence for the mechanisms, not for CC12M.",
  ]
  return "\n\n".join(parts)


def to_json(
  table: Mapping[str, Mapping[int, Mapping[str, float]]],
  *,
  costs: Mapping[str, float],
  steps: int,
) -> dict[str, Any]:
  """{'arms': {arm: {metric: {mean, low, high}}}, 'differences', 'flops', 'steps', 'expected'}."""
  own = {
    arm: statistics.summarize({arm: of}, metrics=list(METRICS), treated="")[arm]
    for arm, of in table.items()
  }
  pairs = {
    f"{arm} - {head(arm)}": {
      metric: found
      for metric in METRICS
      if (found := statistics.difference(table, arm, head(arm), metric)) is not None
    }
    for arm in table
    if arm != head(arm)
  }
  return {
    "steps": steps,
    "flops": {arm: steps * costs[arm] for arm in table if arm in costs},
    "arms": statistics.to_json(own),
    "differences": statistics.to_json(pairs),
    "expected": expectations.to_json(_arms_of(table)),
  }


def main() -> None:
  flag = flags.FLAGS
  arms = protocol.parse_names("arms", flag.arms, list(_ALL))
  seeds = protocol.parse_seeds(flag.seeds)
  if flag.steps < 1:
    raise ValueError(f"--steps={flag.steps}: the length of a run must be positive. Set it.")
  store, data = comparisons.Store(pathlib.Path(flag.results)), pathlib.Path(flag.data)
  lrs = learning_rates(comparisons.Store(pathlib.Path(flag.tuned)))
  runs = runs_of(arms, seeds=seeds, steps=flag.steps, lrs=lrs)
  if not flag.report:
    check_protocol(store, recipe=flag.recipe, steps=flag.steps)
    for arm in arms:
      configs.check(configs.resolve(config_of(arm, recipe=flag.recipe, data=data)))
    from grain_jax.data.scenes import scenes

    ablation_data.build_all(scenes.SceneSettings(negatives=True), data, say=say)
    flops(store, arms, recipe=flag.recipe, data=data)
    runner = functools.partial(train, recipe=flag.recipe, data=data, workdir=flag.workdir)
    comparisons.execute(runs, store, runner, jobs=flag.jobs, say=say)
  found, costs = measured(store, runs), store.read("flops") or {}
  for line in notes(store, runs):
    say(line)
  shown = to_json if flag.json else tables
  result = shown(found, costs=costs, steps=flag.steps)
  print(json.dumps(result) if flag.json else result)


def train(
  run: comparisons.Run,
  cores: Sequence[int] | None,
  *,
  recipe: str,
  data: pathlib.Path,
  workdir: str,
) -> dict[str, float]:
  """A `comparisons.Runner` of these arms."""
  where = data / _ALL[run.arm].get("data", "plain")
  return comparisons.train(
    run, cores, recipe=recipe, data=str(where), workdir=pathlib.Path(workdir),
    arms={run.arm: overrides(run.arm)},
  )  # fmt: skip


if __name__ == "__main__":
  flags.DEFINE_list("arms", list(ARMS), f"Which of {', '.join(_ALL)}.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, of parameters and data alike.")
  flags.DEFINE_integer("steps", 1300, "Length of every run.")
  flags.DEFINE_string("recipe", "configs/quickstart.py", "Recipe, FILE or FILE:argument.")
  flags.DEFINE_string("data", "data/ablation", "Folder of the three data sets, built if missing.")
  flags.DEFINE_string("workdir", "runs/ablation", "Folder of the workdirs of all runs.")
  flags.DEFINE_string("results", "bench/results/ablation", "Folder of a JSON file a run.")
  flags.DEFINE_string("tuned", "bench/results/grain_vs_clip", "Results that chose learning rates.")
  flags.DEFINE_integer("jobs", 1, "Runs at a time, each on its own share of the cores.")
  flags.DEFINE_bool("report", False, "Tables from the results that are there; nothing is run.")
  flags.DEFINE_bool("json", False, "One JSON object on stdout.")
  cli.run(main)
