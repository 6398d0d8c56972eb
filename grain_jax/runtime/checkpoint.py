"""Checkpoints by Orbax, behind four verbs: save, restore, latest, wait; and which of them are best.

No barrier goes through the devices (Orbax's default), where it could meet a step of training.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from grain_jax import failures, places, trees
from grain_jax.runtime import best_results, distributed, orbax_noise, replicas

# Seconds to wait before a checkpoint that could not be read, or not be written at the end of a run,
# is tried again: what a network file system needs to get over a stale handle.
WAITS = (1.0, 5.0, 15.0)
COMMITTED = "commit_success.txt"  # Orbax's last file of a checkpoint in a bucket
_SLOW = 3600.0  # seconds that a process waits for another whose storage is slower


class SaveError(failures.TransientError):
  """A checkpoint could not be written; the earlier ones are as they were."""


class _Manager(ocp.CheckpointManager):
  """Orbax's, which would otherwise ask about preemption itself, from a thread, at older steps."""

  def reached_preemption(self, step: int) -> bool:
    return False


class Checkpoints:
  """The checkpoints of a workdir; each holds a state and a JSON description.

  Saving is asynchronous and atomic: what is half-written when the process dies is never listed.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep: int | None = None,
    best_metric: str = "",
    keep_best: int = 0,
    read_only: bool = False,
  ):
    """Opens (and creates) `directory`.

    Args:
      directory: of the checkpoints, the same for all processes.
      keep: newest checkpoints kept; None: all.
      best_metric: name of the result that `record` is told, greater is better; empty: none.
      keep_best: checkpoints kept for their results, on top of `keep`.
      read_only: leave everything as it is, as beside a run that goes on.
    """
    self._directory = places.at(directory).resolve()
    self._read_only = read_only
    if not read_only:
      self._directory.mkdir(parents=True, exist_ok=True)
      orbax_noise.silence()
    self._keep, self._keep_best = keep, keep_best
    self._results = best_results.BestResults(self._directory / "best.json", best_metric)
    processes = set(range(distributed.process_count())) if distributed.process_count() > 1 else None
    multiprocessing = ocp.options.MultiprocessingOptions(active_processes=processes)
    self._manager = _Manager(
      epath.Path(self._directory),
      item_handlers={
        "state": ocp.PyTreeCheckpointHandler(
          multiprocessing_options=multiprocessing, type_handler_registry=replicas.handlers()
        ),
        "meta": ocp.JsonCheckpointHandler(multiprocessing_options=multiprocessing),
      },
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self,
        cleanup_tmp_directories=not read_only,
        create=False,
        multiprocessing_options=multiprocessing,
      ),
    )
    self._damaged: list[int] = []  # passed over by `restore`
    self._saving: int | None = None
    self._failure: SaveError | None = None  # of the checkpoint being written

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts to write `state` and the JSON-able `meta` as checkpoint `step`.

    Damaged checkpoints that `restore` passed over are first renamed to 'damaged-STEP': they would
    be in the way of the step, and count among the newest that are kept. A checkpoint before this
    one that could not be written is warned about: this one is the next try. All must call it.

    Raises:
      SaveError: this one cannot even be begun.
    """
    if self._damaged:
      self._set_damaged_aside()
    self._settle()
    self._saving = step
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)),
        force=True,
      )
    except Exception as error:  # Orbax and the file system raise many kinds
      raise self._not_saved(error) from error

  def save_surely(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Writes checkpoint `step` and waits for it, trying again some times; all must call it.

    Raises:
      SaveError: it could not be written; on all processes.
    """
    for wait in (0.0, *WAITS):
      time.sleep(wait)
      try:
        self.save(step, state, meta)
      except SaveError as error:  # of this process alone, perhaps: the others are told below
        self._failure = error
      failure = self._settle()
      if failure is None:
        return
    raise SaveError(f"{failure}. Make room or mend the storage, and start again.")

  def _set_damaged_aside(self) -> None:
    if distributed.process_index() == 0:
      for step in self._damaged:
        target, number = self._directory / f"damaged-{step}", 1
        while target.exists():
          target, number = self._directory / f"damaged-{step}-{number}", number + 1
        places.move_aside(self._directory / str(step), target, first=COMMITTED)
    distributed.broadcast("damaged checkpoints set aside", "")
    self._damaged = []
    self._manager.reload()

  def _not_saved(self, error: BaseException) -> SaveError:
    reason = failures.one_line(error, limit=300)
    last = max((s for s in self._steps() if s != self._saving), default=None)
    kept = "there is no earlier one" if last is None else f"checkpoint {last} is kept"
    return SaveError(
      f"checkpoint {self._saving} in {self._directory} could not be written ({reason}); {kept}"
    )

  def check(self) -> None:
    """Warns where the checkpoint being written has failed; waits for nothing."""
    try:
      self._manager.check_for_errors()
    except Exception as error:
      self._fail(error)

  def _fail(self, error: BaseException) -> None:
    """Notes that the checkpoint being written has failed, and says it once."""
    if self._failure is None:
      self._failure = self._not_saved(error)
      self._failure.__cause__ = error
      logging.warning("%s; the next save is the next try", self._failure)

  def _settle(self) -> SaveError | None:
    """Waits for what is being written, on all processes; why it failed, on whichever it did."""
    for call in (self._manager.check_for_errors, self._manager.wait_until_finished):
      try:
        call()
      except Exception as error:  # Orbax and the file system raise many kinds
        self._fail(error)
    own, self._failure = self._failure, None
    told = _gather("saved", own and str(own))
    line = next(filter(None, told), None)
    return own or (SaveError(line) if line else None)

  def _steps(self) -> list[int]:
    """Steps of all folders that look like checkpoints, whole or not, ascending.

    On a disk a folder gets its name when it is finished; in a bucket, which cannot rename, the file
    COMMITTED then.
    """
    if not self._directory.is_dir():
      return []
    found = sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdigit())
    if not places.is_bucket(self._directory):
      return found
    committed = places.stamps([self._directory / str(step) / COMMITTED for step in found])
    return [step for step, stamp in zip(found, committed, strict=True) if stamp is not None]

  def latest(self) -> int | None:
    """Step of the newest checkpoint that this process sees, or None."""
    return self._manager.latest_step()

  def agree_on_latest(self) -> int | None:
    """Step of the newest checkpoint that process 0 sees, on all; all must call it.

    The listing of a network file system may lag on one machine, and must not part the processes.
    """
    return json.loads(distributed.broadcast("newest", json.dumps(self.latest())))

  def read_newest_meta(self) -> dict[str, Any] | None:
    """The JSON description of the newest checkpoint that has one; all must call it.

    Those without are damaged, which a warning says, and `restore` passes over them too.

    Raises:
      TransientError: storage failed.
    """
    found: Any = None
    if distributed.process_index() == 0:
      try:
        found = self._newest_meta()
      except Exception as error:
        found = {"failed": failures.one_line(error)}
    found = json.loads(distributed.broadcast("newest description", json.dumps(found)))
    if found and "failed" in found:
      raise failures.TransientError(f"{self._directory} cannot be read: {found['failed']}")
    return found

  def _newest_meta(self) -> dict[str, Any] | None:
    here = distributed.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    handler = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    for step in reversed(self._steps()):
      try:
        return handler.restore(epath.Path(self._directory) / str(step) / "meta")
      except Exception as error:  # Orbax raises many kinds for a damaged checkpoint
        if failures.is_transient(error):
          raise
        why = failures.one_line(error, limit=200)
        logging.warning("checkpoint %d in %s is passed over: %s", step, self._directory, why)
    return None

  def restore(self, abstract: Any, *, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """(state, meta) of checkpoint `step`, or of the newest one that all processes can read.

    Of several processes those read that hold the first replica of an array (`replicas`).

    Args:
      abstract: ShapeDtypeStructs, with shardings, of the state or of a part of it.
      step: a certain checkpoint; then a damaged one is an error.

    Raises:
      ValueError: no such checkpoint, none can be read, or one of another model.
    """
    listed = distributed.broadcast("checkpoints", json.dumps(self._steps()))
    steps = json.loads(listed)[::-1]
    if step is not None and step not in steps:
      raise ValueError(f"{self._directory} has no checkpoint of step {step}; it has {steps[::-1]}.")
    if not steps:
      raise ValueError(f"{self._directory} holds no checkpoint. Train first, or check --workdir.")
    if distributed.process_count() > 1 and (why := replicas.why_not(abstract)):
      logging.warning("%s: every process reads for itself: %s", self._directory, why)
    reason, damaged = "", []
    for candidate in steps if step is None else [step]:
      restored, reason = self._read_again(candidate, abstract)
      if not reason:
        self._damaged = damaged
        self._results.forget_after(candidate)
        return restored
      if reason.startswith(_OTHER_MODEL):
        raise ValueError(f"{self._directory}: checkpoint {candidate} is {reason}")
      damaged.append(candidate)
      logging.warning(
        "checkpoint %d in %s cannot be read and is passed over: %s",
        candidate,
        self._directory,
        reason,
      )
    if step is None:
      listed = distributed.broadcast("checkpoints again", json.dumps(self._steps()))
      if set(json.loads(listed)) - set(steps):  # a run that goes on has replaced them meanwhile
        return self.restore(abstract)
    which = "none of the checkpoints" if step is None else f"checkpoint {step}"
    raise ValueError(
      f"{self._directory}: {which} of steps {steps[::-1]} can be read ({reason}). "
      "Restore a copy, or start in a new workdir."
    )

  def _read_again(self, step: int, abstract: Any) -> tuple[Any, str]:
    """`_read` by all processes together, tried again before a checkpoint counts as damaged.

    Raises:
      TransientError: storage failed every time, so that the checkpoint may be whole.
    """
    restored, reason, storage, told = None, "", False, []
    for number, wait in enumerate((0.0, *WAITS)):
      if number > 1 and not any(failed for _, failed, _ in told):
        return None, reason  # damage does not go away; one more look is for what has other names
      if wait:
        logging.warning(
          "checkpoint %d in %s cannot be read (%s); trying again in %g s",
          step, self._directory, reason, wait,
        )  # fmt: skip
        time.sleep(wait)
      if restored is None:
        restored, own, storage = self._read(step, abstract)
      # A file that one process alone cannot read must not part it from the others, nor leave them
      # in a program for all.
      told = _gather("restored", [own, storage, restored and restored[1]])
      reason = next((r for r, *_ in told if r), "")
      if not reason:
        return (replicas.spread(restored[0], abstract), told[0][2]), ""
      if reason.startswith(_OTHER_MODEL):
        return None, reason
    if not json.loads(distributed.broadcast("is there", json.dumps(step in self._steps()))):
      return None, reason  # a run that goes on has replaced it
    raise failures.TransientError(
      f"{self._directory}: checkpoint {step} cannot be read ({reason}), though it may be whole. "
      "Mend the storage, and start again."
    )

  def _read(self, step: int, abstract: Any) -> tuple[Any, str, bool]:
    """((state, meta), '', False) of a checkpoint, or (None, why not, whether storage failed).

    It waits for no other process, and has what `replicas.to_read` says; process 0 has the meta.
    """
    here = distributed.process_index()
    item = replicas.to_read(abstract, here)
    if here and all(leaf is ocp.PLACEHOLDER for leaf in jax.tree.leaves(item)):
      return (item, None), "", False
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    folder = epath.Path(self._directory) / str(step)
    try:
      # The handlers by themselves: what is around them would wait for the other processes.
      handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
      saved = handler.metadata(folder / "state")
      difference = trees.first_difference(saved.tree, abstract)
      if difference:
        why = f"{_OTHER_MODEL}: {difference}. Use a new workdir, or the model's own config."
        return None, why, False
      state = handler.restore(
        folder / "state",
        args=ocp.args.PyTreeRestore(
          item=item,
          restore_args=ocp.checkpoint_utils.construct_restore_args(item),
          partial_restore=True,
        ),
      )
      metas = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
      meta = metas.restore(folder / "meta") if here == 0 else None
    except Exception as error:  # Orbax raises many kinds for a damaged checkpoint
      return None, failures.one_line(error, limit=200), failures.is_transient(error)
    return (state, meta), "", False

  def record(self, step: int, results: dict[str, float]) -> None:
    """Notes the evaluation of checkpoint `step`, by which the best are kept; see `BestResults`."""
    self._results.record(step, results)

  def best(self) -> int | None:
    """Step of the best result on record, the earliest of equal ones; None without any."""
    return self._results.best()

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Orbax asks which of `checkpoints` (ascending) stay: the newest and the best."""
    del context
    steps = [info.step for info in checkpoints]
    later = [step for step in steps if step] or steps  # the fresh state goes with the first one
    newest = later if self._keep is None else later[-self._keep :]
    best = [step for step in self._results.ranked() if step in later][: self._keep_best]
    return [step in newest or step in best for step in steps]

  def wait(self) -> None:
    """Returns when everything saved is on disk; all must call it.

    Raises:
      SaveError: it could not be written; on all processes.
    """
    failure = self._settle()
    if failure is not None:
      raise failure

  def close(self) -> None:
    """Waits and lets go of the directory."""
    if not self._read_only:
      self.wait()
    self._manager.close()


def _gather(name: str, value: Any) -> list[Any]:
  """The JSON-able `value` of every process, which may have slower storage than this one."""
  told = distributed.gather(name, json.dumps(value), seconds=_SLOW)
  return [json.loads(text) for text in told]


_OTHER_MODEL = "of another model"
