"""Checkpoints by Orbax, behind four verbs: save, restore, latest, wait."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils


class Checkpoints:
  """The checkpoints of a workdir; each holds a state and a JSON description.

  Saving is asynchronous and atomic: what is half-written when the process dies is never listed.
  """

  def __init__(self, directory: str | pathlib.Path, *, keep: int | None = None):
    """Opens (and creates) `directory`; `keep` is the number of newest checkpoints kept."""
    self._directory = pathlib.Path(directory).resolve()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self._directory, options=options)
    self._damaged: list[int] = []  # passed over by `restore`

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts to write `state` and the JSON-able `meta` as checkpoint `step`.

    Damaged checkpoints that `restore` passed over are first renamed to 'damaged-STEP': they would
    be in the way of the step, and count among the newest that are kept.
    """
    if self._damaged:
      self._set_damaged_aside()
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)),
      force=True,
    )

  def _set_damaged_aside(self) -> None:
    if jax.process_index() == 0:
      for step in self._damaged:
        target, number = self._directory / f"damaged-{step}", 1
        while target.exists():
          target, number = self._directory / f"damaged-{step}-{number}", number + 1
        (self._directory / str(step)).rename(target)
    multihost_utils.sync_global_devices("damaged checkpoints set aside")
    self._damaged = []
    self._manager.reload()

  def latest(self) -> int | None:
    """Step of the newest checkpoint, or None."""
    return self._manager.latest_step()

  def restore(self, abstract: Any, *, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """(state, meta) of checkpoint `step`, or of the newest one that can be read.

    Args:
      abstract: ShapeDtypeStructs, with shardings, of the state or of a part of it.
      step: a certain checkpoint; then a damaged one is an error.

    Raises:
      ValueError: no such checkpoint, or none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    if step is not None and step not in steps:
      raise ValueError(f"{self._directory} has no checkpoint of step {step}; it has {steps[::-1]}.")
    if not steps:
      raise ValueError(f"{self._directory} holds no checkpoint. Train first, or check --workdir.")
    reason, damaged = "", []
    for candidate in steps if step is None else [step]:
      try:
        restored = self._manager.restore(
          candidate,
          args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
              item=abstract,
              restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
              partial_restore=True,
            ),
            meta=ocp.args.JsonRestore(),
          ),
        )
        self._damaged = damaged
        return restored.state, restored.meta
      except Exception as error:  # Orbax raises many kinds for a damaged checkpoint
        reason = " ".join(str(error).split())[:200]
        damaged.append(candidate)
        logging.warning(
          "checkpoint %d in %s cannot be read and is passed over: %s",
          candidate,
          self._directory,
          reason,
        )
    which = "none of the checkpoints" if step is None else f"checkpoint {step}"
    raise ValueError(
      f"{self._directory}: {which} of steps {steps[::-1]} can be read ({reason}). "
      "Restore a copy, or start in a new workdir."
    )

  def wait(self) -> None:
    """Returns when everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and lets go of the directory."""
    self._manager.close()
