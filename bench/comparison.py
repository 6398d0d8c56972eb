"""Runs of a comparison: the arms, what is to be trained, and training it without repeating any."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Without descriptions a row need not be longer than the recipe's longest text: the controls pay
# for no padding.
_CAPTION_ROW = {"data.max_regions": 0, "data.row_length": 32}

# What differs from the recipe.
ARMS: dict[str, dict[str, Any]] = {
  "clip": {"method": "clip", **_CAPTION_ROW},
  "clip_text": {"method": "clip", "data.caption": "joined", **_CAPTION_ROW},
  "clip_multi": {"method": "clip", "loss.multi_positive": 1.0},
  "grain_caption": {"loss.box": 0.0, "loss.region": 0.0, **_CAPTION_ROW},
  "grain": {},
  "grain_permuted": {"loss.permute_regions": True},
}
TREATED = "grain"
BUDGETS = ("images", "flops", "seconds")
TUNING_SEED = 100
METRICS = {  # name in results.json -> heading
  "zero_shot/unseen/top1": "unseen top-1",
  "zero_shot/seen/top1": "seen top-1",
  "retrieval/image_to_text/r1": "image to text R@1",
  "retrieval/text_to_image/r1": "text to image R@1",
  "grounding/mean_iou": "mean IoU",
}
_CHOICE = ("retrieval/image_to_text/r1", "retrieval/text_to_image/r1")
_SAME = 0.02  # budgets that differ by less than this part share a run


@dataclasses.dataclass(frozen=True)
class Run:
  """One training: everything that tells it from the others."""

  arm: str
  lr: float
  seed: int
  steps: int

  @property
  def name(self) -> str:
    return f"{self.arm}-lr{self.lr:g}-seed{self.seed}-steps{self.steps}"

  def overrides(self, arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Config keys that make the recipe this run, of the arms'; tuning never looks at `objects`."""
    own = {"optimizer.lr": self.lr, "seed": self.seed, "steps": self.steps, "keep_checkpoints": 1}
    if self.seed == TUNING_SEED:
      own["evals"] = ("retrieval",)
    return {**arms[self.arm], **own}


# (run, CPU cores it may use or None for all) -> results.json
Runner = Callable[[Run, Sequence[int] | None], Mapping[str, float]]


class Diverged(ValueError):
  """A run whose loss is no longer finite."""


class Store:
  """The folder of small JSON files that is committed: one a finished run, costs, protocol."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder

  def read(self, name: str) -> dict[str, Any] | None:
    path = self.folder / f"{name}.json"
    if not path.exists():
      return None
    try:
      return json.loads(path.read_text())
    except ValueError as error:
      raise ValueError(f"{path} is not JSON ({error}). Delete it; its run goes on.") from error

  def write(self, name: str, values: Mapping[str, Any]) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    temporary = self.folder / f".{name}.tmp"
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(self.folder / f"{name}.json")

  def metrics(self, run: Run) -> dict[str, float] | None:
    """Results of a finished run, {} of one that diverged, None of one that is not finished."""
    record = self.read(run.name)
    return None if record is None else record["metrics"]


def tuning_runs(arms: Iterable[str], *, lrs: Sequence[float], steps: int) -> list[Run]:
  """Every learning rate of every arm, on the seed that is not reported."""
  return [Run(arm, lr, TUNING_SEED, steps) for arm in arms for lr in lrs]


def choose_lr(store: Store, arm: str, *, lrs: Sequence[float], steps: int) -> float | None:
  """The learning rate of best retrieval on `val`, the lower of equals; None before all are in.

  Raises:
    ValueError: every one diverged.
  """
  scores: dict[float, float] = {}
  for run in tuning_runs([arm], lrs=sorted(lrs), steps=steps):
    metrics = store.metrics(run)
    if metrics is None:
      return None
    if metrics:
      scores[run.lr] = sum(metrics[name] for name in _CHOICE) / len(_CHOICE)
  if not scores:
    raise ValueError(f"--lrs={lrs}: with all of them {arm} diverges. Give lower ones.")
  return max(scores, key=lambda lr: scores[lr])


def plan_steps(
  arm: str, *, steps: int, costs: Mapping[str, Mapping[str, float]] | None
) -> dict[str, int]:
  """{budget: steps} in which `arm` spends what `grain` spends in `steps` steps.

  Budgets whose lengths differ by under 2 % get the same length, and so share their runs. Without
  `costs` only the budget of images is known.
  """
  lengths = {"images": steps}
  for budget in BUDGETS[1:] if costs else ():
    cost = costs[f"{budget}_per_step"]
    wanted = round(steps * cost[TREATED] / cost[arm])
    near = [n for n in lengths.values() if abs(n - wanted) < _SAME * wanted]
    lengths[budget] = min(near, key=lambda n: abs(n - wanted), default=max(wanted, 1))
  return lengths


def reported_runs(
  lr_of: Mapping[str, float],
  *,
  seeds: Sequence[int],
  steps: int,
  budgets: Sequence[str],
  costs: Mapping[str, Any] | None,
) -> list[Run]:
  """All runs that the tables need, each once: budget by budget, seed by seed, arm by arm."""
  runs: dict[Run, None] = {}
  for budget in budgets:
    for seed in seeds:
      for arm, lr in lr_of.items():
        runs[Run(arm, lr, seed, plan_steps(arm, steps=steps, costs=costs)[budget])] = None
  return list(runs)


def execute(
  runs: Sequence[Run], store: Store, runner: Runner, *, jobs: int = 1, say: Callable[[str], None]
) -> None:
  """Does the runs that have no result yet, `jobs` at a time, each on its own cores.

  Raises:
    ValueError: a run failed; those beside it are finished first, the others are not begun.
  """
  waiting = [run for run in runs if store.metrics(run) is None]
  say(f"{len(runs) - len(waiting)} of {len(runs)} runs are there, {len(waiting)} to do")
  free: queue.SimpleQueue = queue.SimpleQueue()
  for cores in split_cores(jobs):
    free.put(cores)

  stopped = threading.Event()

  def execute_one(run: Run) -> str:
    if stopped.is_set():
      raise concurrent.futures.CancelledError
    cores, began = free.get(), time.monotonic()
    try:
      metrics, failed = dict(runner(run, cores)), None
    except Diverged as error:
      metrics, failed = {}, str(error)
    except BaseException:
      stopped.set()
      raise
    finally:
      free.put(cores)
    record = {**dataclasses.asdict(run), "metrics": metrics, "failed": failed}
    record["cores"] = None if cores is None else len(cores)
    store.write(run.name, record)
    shown = [f"{METRICS[m]} {100 * metrics[m]:.1f} %" for m in METRICS if m in metrics]
    minutes = (time.monotonic() - began) / 60
    return f"{run.name}: {', '.join(shown) or failed} ({minutes:.1f} min)"

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    futures = [pool.submit(execute_one, run) for run in waiting]
    try:
      for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
        say(f"[{done}/{len(waiting)}] {future.result()}")
    finally:
      stopped.set()


def split_cores(jobs: int) -> list[list[int] | None]:
  """A share of this process's cores for each of `jobs`; [None] for one job: no limit."""
  if jobs == 1:
    return [None]
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  if not 1 <= jobs <= len(cores):
    raise ValueError(
      f"--jobs={jobs}: there are {len(cores)} cores to share. Give each run one at least."
    )
  return [cores[i::jobs] for i in range(jobs)]


def train(
  run: Run,
  cores: Sequence[int] | None,
  *,
  recipe: str,
  data: str,
  workdir: pathlib.Path,
  arms: Mapping[str, Mapping[str, Any]] = ARMS,
) -> dict[str, float]:
  """Trains in a process of its own, from its latest checkpoint if it has one; a `Runner`.

  Args:
    run: what to train.
    cores: it may use; None: all.
    recipe: from which the arm differs.
    data: built dataset; empty: the recipe's own.
    workdir: folder of the workdirs of all runs.
    arms: what differs in each arm.

  Returns:
    results.json of the run.
  """
  folder = workdir / run.name
  folder.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "grain_jax.main", f"--config={recipe}", f"--workdir={folder}"]
  overrides = {**run.overrides(arms), **({"data.dir": data} if data else {})}
  command += [f"--config.{key}={value}" for key, value in overrides.items()]
  root = pathlib.Path(__file__).resolve().parent.parent
  paths = [str(root), os.environ.get("PYTHONPATH", "")]
  log = folder / "log.txt"
  with log.open("ab") as file:
    try:  # the process keeps the lock with its output, also when this one dies before it
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(
        f"run {run.name} is going on in another process ({folder}). Wait for it, or stop it."
      ) from None
    process = subprocess.Popen(
      command,
      stdout=file,
      stderr=subprocess.STDOUT,
      env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if cores is not None:  # long before any library counts them for its threads
      os.sched_setaffinity(process.pid, cores)
    code = process.wait()
  if code:
    last = (log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
    if last.startswith("FloatingPointError"):
      raise Diverged(last)
    raise ValueError(f"run {run.name} ended with code {code}: {last} (all of it: {log})")
  results = json.loads((folder / "results.json").read_text())
  if results.pop("step") != run.steps:
    raise ValueError(f"{folder}/results.json is not of step {run.steps}. Delete {folder}.")
  return results
