"""The training loop, from configuration to results, read from top to bottom."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import ml_collections
import numpy as np
import optax
from absl import logging

from grain_jax import encoders as encoders_lib
from grain_jax import evaluate, schema, trees
from grain_jax.data import local_copy, pipeline
from grain_jax.evals.inputs import attempts
from grain_jax.evals.page import results as results_lib
from grain_jax.models import attention, grain
from grain_jax.runtime import checkpoint, distributed, memory, metrics, preemption, workdirs
from grain_jax.runtime import mesh as meshes
from grain_jax.training import (
  first_state,
  notices,
  optim,
  provenance,
  setup,
  steps,
  utilization,
  validation,
)
from grain_jax.training.failed_evaluations import FailedEvaluations

if TYPE_CHECKING:
  from clu import metric_writers

# Steps whose results the host may be behind; on CPUs of several processes one (see below).
_IN_FLIGHT = 2


def train(
  config: ml_collections.ConfigDict, workdir: str, *, continue_as: Sequence[str] = ()
) -> dict[str, float]:
  """Trains `config` in `workdir`, from its latest checkpoint if there is one.

  With `continue_as` it goes on otherwise than it began, in these keys: see `continuation`.

  Writes config.json, checkpoints/, metrics.jsonl, TensorBoard events, and at the end results.json
  and figures/.

  Returns:
    The final evaluations, flat names such as 'zero_shot/top1' to fractions.

  Raises:
    ValueError: configuration, data, devices or workdir cannot work; one line.
    FloatingPointError: loss or gradient is no longer finite; the last good checkpoint stays.
    preemption.Preempted: SIGTERM or Ctrl-C came; everything is saved.
    failures.TransientError: storage failed; the same command may succeed later.
  """
  run = setup.settle(config, workdir, continue_as=continue_as, say=_say, warn=_warn)
  config, dataset, folder = run.config, run.dataset, run.folder
  if jax.default_backend() == "cpu":
    memory.keep_freed_memory()
  mesh = meshes.create(config)
  model = grain.build(config)
  init, abstract, shardings, optimizer = steps.create_state(model, config, mesh, **run.length)
  learning_rate = optim.schedule(config, **run.length)
  provenance.check_workdir(folder, config, changing=continue_as)
  workdirs.make(folder)
  with (
    workdirs.hold(folder),
    preemption.Preemption(several=distributed.process_count() > 1) as stopping,
  ):
    workdirs.prove_shared(folder)
    checkpoints = checkpoint.Checkpoints(
      folder / "checkpoints",
      keep=config.keep_checkpoints,
      best_metric=config.checkpoint.best_metric,
      keep_best=config.checkpoint.keep_best,
    )
    batch_shards = meshes.num_shards(mesh)
    meta = {"config": config.to_dict(), **run.fingerprints, "batch_shards": batch_shards}
    failed = FailedEvaluations(folder)
    with jax.set_mesh(mesh):
      state = first_state.make(
        config, init, abstract, checkpoints, folder=folder, meta=meta, changing=continue_as,
        say=_say,
      )  # fmt: skip
      provenance.write_config(folder, config)
      step, total_steps = int(state.step), run.total_steps
      train_step = steps.make_train_step(
        model, config, mesh, optimizer, shardings, steps_per_epoch=run.steps_per_epoch
      )
      # Loads TensorFlow, which takes seconds: after what may be wrong.
      from grain_jax.runtime import writers

      writer = writers.create_writer(folder, start_step=step)
      several = (
        f" of {distributed.process_count()} processes" if distributed.process_count() > 1 else ""
      )
      _say(
        f"{config.method}: {trees.count(state.params) / 1e6:.1f} M parameters, "
        f"{run.training.num_records(config.data.split)} records, batch {config.batch_size} on "
        f"{mesh.size} device(s){several}, step {step} of {total_steps} in {folder}"
      )

      validate = None
      if config.validation.batches:
        validate = validation.Validation(config, model, mesh, dataset)

      def run_evals(state: steps.TrainState) -> evaluate.Outcome:
        at = int(state.step)

        def on_batch() -> None:
          distributed.report_progress("evaluating", at)
          stopping.check()

        distributed.report_progress("evaluating", at)
        outcome = evaluate.run(
          config, model, state.eval_params, dataset,
          mesh=mesh, tokenizer=run.tokenizer, on_batch=on_batch, options=run.options,
        )  # fmt: skip
        outcome.results.update(validation.attempt(validate, state, on_batch))
        failed.note(at, outcome.errors)
        best = config.checkpoint.best_metric
        if best in outcome.results or not outcome.errors:
          checkpoints.record(at, outcome.results)
        return outcome

      if step < total_steps:
        shards, num_shards = meshes.process_batch_shards(mesh.devices, jax.process_index())
        batches = pipeline.train_batches(
          run.training, config, start_step=step, host=shards, num_hosts=num_shards
        )
        profiler = metrics.Profiler(config.profile, folder / "profile")
        parts = local_copy.splits_of(run.training, config.data.split)
        copier = local_copy.Copier(config.data.local_copy, parts, say=_say)
        with contextlib.closing(copier), contextlib.closing(batches), contextlib.closing(profiler):
          state = _loop(
            config, state, train_step, batches,
            mesh=mesh, checkpoints=checkpoints, writer=writer, total_steps=total_steps,
            run_evals=run_evals, meta=meta, stopping=stopping, profiler=profiler, folder=folder,
            learning_rate=learning_rate, copier=copier,
          )  # fmt: skip
      results = _evaluate_last(
        config, state, run_evals, writer=writer, folder=folder, stopping=stopping
      )
      writer.close()
      checkpoints.close()
  if error := attempts.error_of(failed.take(), kept=f"{folder}, and so is the model"):
    raise error
  return results


def _evaluate_last(
  config: ml_collections.ConfigDict,
  state: steps.TrainState,
  run_evals: Any,
  *,
  writer: metric_writers.MetricWriter,
  folder: pathlib.Path,
  stopping: preemption.Preemption,
) -> dict[str, float]:
  """Results of the evaluations at the end of a run, written down."""
  if not config.evals and not config.validation.batches:
    return {}
  step, began = int(state.step), time.monotonic()
  try:
    outcome = run_evals(state)
  except preemption.StopRequested:
    raise _stopped(step, stopping) from None
  _say(f"evaluated in {metrics.format_duration(time.monotonic() - began)}")
  writer.write_scalars(step, outcome.results)
  writer.flush()
  model = encoders_lib.model_fingerprint(config, state.eval_params)  # on all processes
  if distributed.process_index() == 0:
    limit = config.eval_limit if any(":" in name for name in config.evals) else 0
    evaluated = evaluate.EvaluatedModel(str(folder), config, state.eval_params, step, limit)
    outcome = dataclasses.replace(outcome, model=model)
    results_lib.write(folder, outcome, step=step, facts=evaluate.describe(evaluated))
  return outcome.results


def _stopped(step: int, stopping: preemption.Preemption) -> preemption.Preempted:
  """The end of a run that was told to stop and is saved, the same on all processes."""
  told = distributed.gather("interrupted", str(stopping.interrupted))
  return preemption.Preempted(step, interrupted="True" in told)


def _loop(
  config: ml_collections.ConfigDict,
  state: steps.TrainState,
  train_step: Any,
  batches: pipeline.TrainBatches,
  *,
  mesh: jax.sharding.Mesh,
  checkpoints: checkpoint.Checkpoints,
  writer: metric_writers.MetricWriter,
  total_steps: int,
  run_evals: Any,
  meta: dict[str, Any],
  stopping: preemption.Preemption,
  profiler: metrics.Profiler,
  folder: pathlib.Path,
  learning_rate: optax.Schedule,
  copier: local_copy.Copier,
) -> steps.TrainState:
  """Steps from `state.step` to `total_steps`, with metrics, checkpoints and evaluations between."""
  first = int(state.step)
  skipped = first - optim.updates_done(state.opt_state)  # steps that the schedule did not count
  progress = metrics.Progress(total_steps=total_steps, batch_size=config.batch_size)
  used = utilization.Utilization(config, mesh.size)
  # Several CPU processes that run ahead of each other hang in the collectives.
  lockstep = jax.process_count() > 1 and jax.default_backend() == "cpu"
  in_flight: collections.deque[Any] = collections.deque()
  pending: list[metrics.Pairs] = []
  # The line of a step is written when the next one is under way, so that no device waits for it.
  late: tuple[int, list[metrics.Pairs]] | None = None
  notes = notices.Notices(config)

  def report(step: int, values: list[metrics.Pairs]) -> None:
    nonlocal skipped
    summary = metrics.summarize(values)  # waits for the step
    _check_finite(summary, step, checkpoints)
    skipped += round(summary["train/skipped_updates"])
    # Of the last update up to `step`.
    summary["train/learning_rate"] = float(learning_rate(max(step - 1 - skipped, 0)))
    opens, dropped = batches.shard_opens_per_1000(), batches.dropped_negatives()
    if dropped is not None:
      summary["train/dropped_negatives"] = dropped
    for line in notes.lines(summary, len(values) * config.batch_size):
      _warn(line)
    if step > first + 1:
      summary["train/shard_opens_per_1000"] = opens
      speed = progress.speed(step)
      summary["train/samples_per_second"] = speed.samples_per_second
      summary["train/data_wait_seconds"] = speed.waited
      summary["train/data_wait_share"] = speed.waited_share
      summary |= used.metrics(speed.samples_per_second) | utilization.memory()
      _say(progress.line(step, summary, speed.left))
    writer.write_scalars(step, summary)

  def evaluate_now(step: int, state: steps.TrainState) -> None:
    began = time.monotonic()
    results = run_evals(state).results
    writer.write_scalars(step, results)
    progress.pause(time.monotonic() - began)

  def describe(step: int) -> dict[str, Any]:
    rate = float(learning_rate(step - skipped))
    return {**meta, "step": step, "learning_rate": rate, "skipped": skipped}

  def stop(step: int, state: steps.TrainState, *, saved: bool) -> NoReturn:
    distributed.report_progress("saving", step)
    if not saved:
      checkpoints.save_surely(step, state, describe(step))
    distributed.report_progress("closing", step)
    batches.close()
    checkpoints.close()
    writer.close()
    raise _stopped(step, stopping)

  every = config.eval_every or total_steps  # the last evaluation comes after the loop
  if first and first % every == 0 and not provenance.has_evaluation(folder, first):
    try:
      evaluate_now(first, state)
    except preemption.StopRequested:
      stop(first, state, saved=True)
  for step in range(first + 1, total_steps + 1):
    began = time.monotonic()
    distributed.report_progress("data", step)
    host_batch = next(batches)
    if step == first + 1:
      _check_batch(host_batch, config)
    batch = meshes.to_global(host_batch, mesh)
    progress.waited(time.monotonic() - began)
    distributed.report_progress("step" if step > first + 1 else "compiling", step)
    if jax.process_count() > 1 and step == first + 1:
      train_step.trace(state, batch)  # which tries kernels, and is not done again by the step
      setup.check_same_program()
    if lockstep and step == first + 1:
      # Gloo gives up on a process that still compiles: first all compile, then all begin.
      train_step = train_step.lower(state, batch).compile()
      distributed.gather("compiled", "", seconds=3600)
    profiler.before(step)
    state, values = train_step(state, batch)
    pending.append(values)
    in_flight.append(values["loss"])
    if lockstep or len(in_flight) > _IN_FLIGHT:
      jax.block_until_ready(in_flight.popleft())
    profiler.after(step, values)
    if step == first + 1:
      jax.block_until_ready(values)
      _say(f"first step after {metrics.format_duration(time.monotonic() - began)} of compilation")
      if line := attention.summary():
        _say(line)
      progress.start(step)
      stopping.watch()
    told = stopping.reached()
    evals = step % every == 0 and step < total_steps
    save = step % config.save_every == 0 or step == total_steps or told
    save = save or (evals and bool(config.checkpoint.best_metric))  # what is judged can be kept
    if late is not None:
      report(*late)
      late = None
    if step % config.log_every == 0 or save:
      late, pending = (step, pending), []
    if (save or evals) and late is not None:  # nothing that is not finite is saved
      report(*late)
      late = None
    checkpoints.check()
    copier.check()
    if told and (step < total_steps or config.evals or config.validation.batches):
      stop(step, state, saved=False)
    if save:
      began = time.monotonic()
      distributed.report_progress("saving", step)
      last = step == total_steps
      writer.flush()  # in a bucket lines come late: none of a step that is kept may be missing
      keep = checkpoints.save_surely if last else checkpoints.save
      keep(step, state, describe(step))
      progress.pause(time.monotonic() - began)
    if evals:
      try:
        evaluate_now(step, state)
      except preemption.StopRequested:
        stop(step, state, saved=save)
  distributed.report_progress("closing", total_steps)
  batches.close()
  writer.flush()
  return state


def _check_batch(batch: dict[str, np.ndarray], config: ml_collections.ConfigDict) -> None:
  """Checks that a host batch is what `schema` says, before the step is compiled for it."""
  schema.check_batch(
    batch,
    batch=len(batch["example_mask"]),
    image_size=config.model.image.size,
    row_length=config.data.row_length,
    regions=config.data.max_regions,
    negatives=config.data.negatives,
    region_negatives=config.data.negatives_per_region,
    sources=len(config.data.sources),
  )


def _check_finite(
  summary: dict[str, float], step: int, checkpoints: checkpoint.Checkpoints
) -> None:
  """Stops before a state with a NaN in it can be saved."""
  if summary["train/nonfinite"]:
    checkpoints.wait()
    last = checkpoints.latest()
    kept = "there is no checkpoint yet" if last is None else f"checkpoint {last} is kept"
    raise FloatingPointError(
      f"loss or gradient is not finite by step {step}; {kept}. Lower config.optimizer.lr or set "
      "config.optimizer.clip_norm, in a new workdir, or look at the data of these steps."
    )


def _warn(line: str) -> None:
  _say(f"warning: {line}")


def _say(line: str) -> None:
  if distributed.process_index() == 0:
    print(line, flush=True)
  logging.debug(line)
