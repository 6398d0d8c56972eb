"""Tasks of a build done by a Ray cluster, with Ray Data: the same tasks, on any of its machines."""

from __future__ import annotations

import json
import logging
import pathlib
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from grain_jax.data import sources
from grain_jax.data.building import tasks
from grain_jax.data.sources import base

LOCAL = "local"  # the address that starts a cluster on this machine
_PATIENCE = 10.0  # seconds for a cluster to answer


def start(address: str) -> None:
  """Connects to a cluster, or starts one here; one line where that cannot be."""
  try:
    import ray
  except ImportError as error:
    raise ValueError(
      "--ray_address needs Ray: pip install -r requirements-annotate.txt."
    ) from error
  if ray.is_initialized():
    return
  options = {"log_to_driver": False, "include_dashboard": False}
  if address != LOCAL:
    _check_answers(address)
    options = {"address": address, "log_to_driver": False}
  options["logging_level"] = logging.ERROR
  try:
    ray.init(**options)
  except Exception as error:  # ConnectionError, ValueError, RuntimeError, by what is wrong
    reason = " ".join(str(error).split())[:200]
    raise ValueError(
      f"--ray_address={address}: no cluster answers there ({reason}). Start one, or give 'local'."
    ) from error


def _check_answers(address: str) -> None:
  """Raises where nobody listens: Ray would ask for minutes, and then end the process."""
  host, _, port = address.rpartition("://")[2].partition(":")
  if address == "auto" or not port.isdigit():
    return
  try:
    socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
  except OSError as error:
    raise ValueError(
      f"--ray_address={address}: no cluster answers there ({error}). Start one, or give 'local'."
    ) from error


class Doer:
  """Does tasks in a process of the cluster, which it stays in."""

  def __init__(self):
    self.made: dict[str, Any] = {}  # of each job, what `make` gave

  def make(self, job: Mapping[str, Any]) -> Any:
    """What the tasks of a job have in common."""
    raise NotImplementedError

  def perform(self, made: Any, task: tasks.Task) -> None:
    """Does a task."""
    raise NotImplementedError

  def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
    try:
      if row["job"] not in self.made:
        self.made[row["job"]] = self.make(json.loads(row["job"]))
      self.perform(self.made[row["job"]], json.loads(row["task"]))
      error = None
    except Exception as caught:  # told to whoever asked; another one is the program's
      error = tasks.describe(caught)
      if error is None:
        raise
    return {"task": row["task"], "error": json.dumps(error)}


class _Builder(Doer):
  def make(self, job: Mapping[str, Any]) -> tuple[base.Source, tasks.Place]:
    return sources.make(job["recipe"]), tasks.Place(pathlib.Path(job["root"]))

  def perform(self, made: tuple[base.Source, tasks.Place], task: tasks.Task) -> None:
    tasks.perform(task, *made)


def executor(
  source: base.Source, place: tasks.Place, *, address: str, say: Callable[[str], None]
) -> tasks.Executor:
  """An executor over a cluster; all machines must see the input and the folder of the build."""
  if source.recipe is None:
    raise ValueError(f"--ray_address: the source {source.name} can be read in one process alone.")
  start(address)
  say(describe())

  def execute(todo: Iterator[tasks.Task], done: Callable[[tasks.Task], None]) -> None:
    run(_Builder, {"recipe": source.recipe, "root": str(place.root.resolve())}, todo, done)

  return execute


def describe() -> str:
  """A line on the cluster."""
  import ray

  found = ray.cluster_resources()
  gpus = f", {found['GPU']:.0f} GPU(s)" if found.get("GPU") else ""
  return f"Ray: {found.get('CPU', 1):.0f} cores{gpus} on {len(ray.nodes())} machine(s)"


def run(
  doer: type[Doer],
  job: Mapping[str, Any],
  todo: Iterator[tasks.Task],
  done: Callable[[tasks.Task], None],
  *,
  num_gpus: float = 0.0,
) -> None:
  """Has a cluster do tasks, by actors that stay.

  Args:
    doer: class of the actors.
    job: JSON, what the tasks have in common.
    todo: the tasks.
    done: called with each that is done.
    num_gpus: of an actor, where the cluster has some.
  """
  import ray

  have = ray.cluster_resources()
  gpus = num_gpus if have.get("GPU") else 0.0
  most = int(have["GPU"] / gpus) if gpus else int(have.get("CPU", 1))
  told = json.dumps(job)
  rows = [{"task": json.dumps(task), "job": told} for task in todo]
  if not rows:
    return
  for name in ("ray", "ray.data"):  # a build says itself how far it is
    logging.getLogger(name).setLevel(logging.ERROR)
  context = ray.data.DataContext.get_current()
  context.enable_progress_bars = False
  # As many blocks as tasks: Ray hands them out one by one.
  data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
    doer,
    num_gpus=gpus or None,
    compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(most, len(rows)))),
  )
  for row in data.iter_rows():
    error = json.loads(row["error"])
    if error is not None:
      tasks.raise_described(error)
    done(json.loads(row["task"]))
