"""The state that a run begins with: fresh, from other weights, or of its newest checkpoint."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections

from grain_jax.convert import start
from grain_jax.runtime import checkpoint, distributed, workdirs
from grain_jax.training import continuation, provenance, steps


def make(
  config: ml_collections.ConfigDict,
  init: Any,
  abstract: Any,
  checkpoints: checkpoint.Checkpoints,
  *,
  folder: pathlib.Path,
  meta: dict[str, Any],
  changing: Sequence[str],
  say: Callable[[str], None],
) -> steps.TrainState:
  """The fresh state, or that of the newest checkpoint; the workdir has taken a checkpoint of it.

  Args:
    config: whole and settled.
    init: makes the fresh state.
    abstract: its shapes and shardings.
    checkpoints: of the run.
    folder: its workdir.
    meta: what is written with a checkpoint, to be compared with what is there.
    changing: keys in which the run goes on otherwise (`continuation`).
    say: gets a line for what weights to start from give.

  Raises:
    ValueError: another model, configuration or data than the run's; a workdir that takes nothing.
    TransientError: its storage fails.
  """
  if checkpoints.agree_on_latest() is not None:
    state, found = checkpoints.restore(abstract)
    others = {name: value for name, value in meta.items() if name != "config"}
    provenance.check_checkpoint(folder, found, config, others, changing=changing)
    continuation.check_step(config, int(state.step), folder)
    workdirs.prove_saving(folder, lambda: workdirs.save_probe(folder, state))
    return state
  state = init()
  if start.chosen(config):
    state = state.replace(params=start.start_from(config, state.params, say=say))
    if state.ema is not None:
      state = state.replace(ema=jax.tree.map(jax.numpy.copy, state.params))
    if state.teacher is not None:
      state = state.replace(teacher=jax.tree.map(jax.numpy.copy, state.params))

  def save() -> None:
    distributed.report_progress("saving", 0)  # a bucket that does not answer is asked for long
    checkpoints.save(0, state, {**meta, "step": 0})
    checkpoints.wait()
    distributed.report_progress("starting", 0)

  workdirs.prove_saving(folder, save)
  return state
