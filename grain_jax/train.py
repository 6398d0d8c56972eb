"""The training loop, from configuration to results, read from top to bottom."""

from __future__ import annotations

import collections
import ctypes
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
import ml_collections
from absl import logging
from clu import metric_writers

from grain_jax import checkpoint, evaluate, metrics, steps, trees, weights
from grain_jax import config as configs
from grain_jax import mesh as meshes
from grain_jax import tokenizer as tokenizers
from grain_jax.data import pipeline, sampler
from grain_jax.models import grain

# Steps whose results the host may be behind; on CPUs of several processes one (see below).
_IN_FLIGHT = 2

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
  """Trains `config` in `workdir`, from its latest checkpoint if there is one.

  Writes config.json, checkpoints/, metrics.jsonl, TensorBoard events, and at the end results.json
  and figures/.

  Returns:
    The final evaluations, flat names such as 'zero_shot/top1' to fractions.

  Raises:
    ValueError: configuration, data, devices or workdir cannot work; one line.
    FloatingPointError: loss or gradient is no longer finite; the last good checkpoint stays.
  """
  config = configs.resolve(config)
  configs.check(config)
  dataset = pipeline.open_dataset(config.data.dir)
  steps_per_epoch = sampler.steps_per_epoch(
    dataset.num_records(config.data.split), config.batch_size
  )
  total_steps = config.steps or round(config.epochs * steps_per_epoch)
  evaluate.check(config, dataset)
  if config.compile_cache:
    jax.config.update("jax_compilation_cache_dir", config.compile_cache)
  if config.deterministic:  # read when the first program is compiled
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
  if jax.default_backend() == "cpu":
    _keep_freed_memory()
  mesh = meshes.create(config)
  model = grain.build(config)
  init, abstract, shardings, optimizer = steps.create_state(
    model, config, mesh, total_steps=total_steps, steps_per_epoch=steps_per_epoch
  )
  tokenizer = tokenizers.Tokenizer(context=config.model.text.context)

  folder = pathlib.Path(workdir)
  _claim(folder, config)
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints)
  with jax.set_mesh(mesh):
    if checkpoints.latest() is None:
      state = init()
      if config.init.image or config.init.text:
        state = state.replace(params=weights.start_from(config, state.params))
        if state.ema is not None:
          state = state.replace(ema=jax.tree.map(jax.numpy.copy, state.params))
    else:
      state, meta = checkpoints.restore(abstract)
      if meta["tokenizer"] != tokenizer.hash:
        raise ValueError(
          f"{folder}: its checkpoints were trained with another tokenizer "
          f"({meta['tokenizer'][:12]} instead of {tokenizer.hash[:12]}). Use a new workdir."
        )
    step = int(state.step)
    train_step = steps.make_train_step(model, config, mesh, optimizer, shardings)
    writer = metrics.create_writer(folder, start_step=step)
    _say(
      f"{config.method}: {trees.count(state.params) / 1e6:.1f} M parameters, "
      f"{dataset.num_records(config.data.split)} records, batch {config.batch_size} on "
      f"{mesh.size} device(s), step {step} of {total_steps} in {folder}"
    )
    run_evals = lambda state: evaluate.run(  # noqa: E731
      config, model, state.eval_params, dataset, mesh=mesh, tokenizer=tokenizer
    )
    meta = {"config": config.to_dict(), "tokenizer": tokenizer.hash}
    if step < total_steps:
      state = _loop(
        config, state, train_step, dataset,
        mesh=mesh, checkpoints=checkpoints, writer=writer, total_steps=total_steps,
        run_evals=run_evals, meta=meta,
      )  # fmt: skip
    results: dict[str, float] = {}
    if config.evals:
      began = time.monotonic()
      outcome = run_evals(state)
      results = outcome.results
      _say(f"evaluated in {metrics.clock(time.monotonic() - began)}")
      writer.write_scalars(total_steps, results)
      writer.flush()
      if jax.process_index() == 0:
        evaluate.write(folder, outcome, step=total_steps)
    writer.close()
    checkpoints.close()
  return results


def _loop(
  config: ml_collections.ConfigDict,
  state: steps.TrainState,
  train_step: Any,
  dataset: pipeline.Dataset,
  *,
  mesh: jax.sharding.Mesh,
  checkpoints: checkpoint.Checkpoints,
  writer: metric_writers.MetricWriter,
  total_steps: int,
  run_evals: Any,
  meta: dict[str, Any],
) -> steps.TrainState:
  """Steps from `state.step` to `total_steps`, with metrics, checkpoints and evaluations between."""
  first = int(state.step)
  batches = pipeline.train_batches(
    dataset,
    config,
    start_step=first,
    host=jax.process_index(),
    num_hosts=jax.process_count(),
  )
  progress = metrics.Progress(total_steps=total_steps, batch_size=config.batch_size)
  # Several CPU processes that run ahead of each other hang in the collectives.
  lockstep = jax.process_count() > 1 and jax.default_backend() == "cpu"
  in_flight: collections.deque[Any] = collections.deque()
  pending: list[metrics.Pairs] = []
  waited = 0.0
  for step in range(first + 1, total_steps + 1):
    began = time.monotonic()
    batch = meshes.to_global(next(batches), mesh)
    waited += time.monotonic() - began
    state, values = train_step(state, batch)
    pending.append(values)
    in_flight.append(values["loss"])
    if lockstep or len(in_flight) > _IN_FLIGHT:
      jax.block_until_ready(in_flight.popleft())
    if step == first + 1:
      jax.block_until_ready(values)
      _say(f"first step after {metrics.clock(time.monotonic() - began)} of compilation")
      progress.start(step)
      waited = 0.0
    save = step % config.save_every == 0 or step == total_steps
    if step % config.log_every == 0 or save:
      summary = metrics.summarize(pending)
      pending.clear()
      _check_finite(summary, step, checkpoints)
      if step > first + 1:
        speed, left = progress.speed(step)
        summary["train/samples_per_second"] = speed
        summary["train/data_wait_seconds"] = waited
        waited = 0.0
        if jax.process_index() == 0:
          _say(progress.line(step, summary, left))
      writer.write_scalars(step, summary)
    if save:
      began = time.monotonic()
      checkpoints.save(step, state, {**meta, "step": step})
      progress.pause(time.monotonic() - began)
    if config.eval_every and step % config.eval_every == 0 and step < total_steps:
      began = time.monotonic()
      writer.write_scalars(step, run_evals(state).results)
      progress.pause(time.monotonic() - began)
  checkpoints.wait()
  writer.flush()
  return state


def _check_finite(
  summary: dict[str, float], step: int, checkpoints: checkpoint.Checkpoints
) -> None:
  """Stops before a state with a NaN in it can be saved."""
  if summary["train/nonfinite"]:
    checkpoints.wait()
    last = checkpoints.latest()
    kept = "there is no checkpoint yet" if last is None else f"checkpoint {last} is kept"
    raise FloatingPointError(
      f"loss or gradient is not finite by step {step}; {kept}. Lower config.optimizer.lr, set "
      "config.optimizer.clip_norm, or look at the data of these steps."
    )


def _claim(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Writes config.json into the workdir, or checks that the one there is of the same run."""
  path = folder / "config.json"
  if path.exists():
    try:
      old = configs.from_json(path.read_text())
    except json.JSONDecodeError as error:
      raise ValueError(f"{path} is not JSON ({error}). Use a new workdir.") from error
    difference = configs.first_difference(old, config)
    if difference:
      key, was, now = difference
      raise ValueError(
        f"{folder} was made by another config: config.{key} was {was!r} and is {now!r}. "
        "Use a new workdir, or the config of the old one."
      )
  folder.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(configs.to_json(config))
    temporary.replace(path)


def _keep_freed_memory() -> None:
  """Tells glibc to keep freed memory: a CPU step otherwise maps and clears its buffers anew.

  Measured on 2 cores (gradient of the quickstart's image tower, median of 15, two processes):
  193 and 203 ms instead of 240, and 5 and 7 ms in the kernel instead of 136. Nothing happens where
  the C library is another.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is not None:
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _say(line: str) -> None:
  if jax.process_index() == 0:
    print(line, flush=True)
  logging.debug(line)
