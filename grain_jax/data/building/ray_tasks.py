"""Tasks of a build done by a Ray cluster, with Ray Data: the same tasks, on any of its machines."""

from __future__ import annotations

import json
import logging
import pathlib
import socket
from collections.abc import Callable, Iterator
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


class _Doer:
  """Does tasks in a process of the cluster; makes the source once."""

  def __init__(self):
    self._sources: dict[str, base.Source] = {}

  def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
    try:
      recipe = row["recipe"]
      if recipe not in self._sources:
        self._sources[recipe] = sources.make(json.loads(recipe))
      place = tasks.Place(pathlib.Path(row["root"]))
      tasks.perform(json.loads(row["task"]), self._sources[recipe], place)
      error = None
    except Exception as caught:  # told to whoever asked; another one is the program's
      error = tasks.describe(caught)
      if error is None:
        raise
    return {"task": row["task"], "error": json.dumps(error)}


def executor(
  source: base.Source, place: tasks.Place, *, address: str, say: Callable[[str], None]
) -> tasks.Executor:
  """An executor over a cluster; all machines must see the input and the folder of the build."""
  if source.recipe is None:
    raise ValueError(f"--ray_address: the source {source.name} can be read in one process alone.")
  start(address)
  import ray

  cores = int(ray.cluster_resources().get("CPU", 1))
  say(f"Ray: {cores} cores on {len(ray.nodes())} machine(s)")

  def execute(todo: Iterator[tasks.Task], done: Callable[[tasks.Task], None]) -> None:
    common = {"recipe": json.dumps(source.recipe), "root": str(place.root.resolve())}
    rows = [{"task": json.dumps(task), **common} for task in todo]
    if not rows:
      return
    for name in ("ray", "ray.data"):  # a build says itself how far it is
      logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # As many blocks as tasks: Ray hands them out one by one.
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
      _Doer,
      compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(cores, len(rows))),
    )
    for row in data.iter_rows():
      error = json.loads(row["error"])
      if error is not None:
        tasks.raise_described(error)
      done(json.loads(row["task"]))

  return execute
