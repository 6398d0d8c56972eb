"""What a run is, settled and checked before anything expensive: configuration, data, length."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from grain_jax import config as configs
from grain_jax import evaluate, places, tokenizing
from grain_jax import tokenizer as tokenizers
from grain_jax.convert import start
from grain_jax.data import dataset as dataset_lib
from grain_jax.data import local_copy, mixture, pipeline, sampler, token_ids
from grain_jax.evals.inputs.options import Options
from grain_jax.models import attention, norm_kernels
from grain_jax.runtime import compile_cache, devices, distributed
from grain_jax.runtime import mesh as meshes
from grain_jax.training import continuation, preconditions, sizing, validation

# What may differ from machine to machine.
_MACHINE_KEYS = frozenset({"config.data.dir", "config.data.threads", "config.data.prefetch",
                           "config.data.workers", "config.data.local_copy",
                           "config.compile_cache", "config.datasets",
                           "config.model.text.tokenizer"})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """A run as it will be trained."""

  config: ml_collections.ConfigDict  # whole, resolved, checked; nothing is left open
  folder: pathlib.Path  # workdir
  dataset: dataset_lib.Dataset  # of evaluations and validation
  training: dataset_lib.Dataset | mixture.Mixture
  tokenizer: tokenizers.Tokenizer
  options: Options  # of evaluations on outside datasets
  total_steps: int
  steps_per_epoch: int
  fingerprints: dict[str, str]  # of tokenizer and data

  @property
  def length(self) -> dict[str, int]:
    return {"total_steps": self.total_steps, "steps_per_epoch": self.steps_per_epoch}


def settle(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  continue_as: Sequence[str],
  say: Callable[[str], None],
  warn: Callable[[str], None],
) -> Run:
  """The run of a configuration: shapes adopted, sizes chosen, all of it checked.

  Args:
    config: as a recipe gives it.
    workdir: of the run; what has begun there keeps its shapes and sizes.
    continue_as: keys in which it goes on otherwise (`continuation`).
    say: gets a line for what was chosen.
    warn: gets a line where an evaluation leaves something out.

  Raises:
    ValueError: configuration, data or devices cannot work; one line.
  """
  folder = places.open_place(workdir, "--workdir")
  config = configs.resolve(start.adopt(config, folder, say=say))
  config = continuation.continue_as(sizing.keep(config, folder), folder, continue_as, say=say)
  configs.check(config)
  distributed.prepare(config)
  compile_cache.keep_in(config.compile_cache)
  if config.data.sources and not config.data.dir:
    config.data.dir = config.data.sources[0]["dir"]
    say(f"evaluations and validation read config.data.sources[0], {config.data.dir}")
  devices.check_found()
  local_copy.check(config.data.local_copy)
  dataset = pipeline.open_dataset(config.data.dir, local_copy=config.data.local_copy)
  training = mixture.open_training(config) if config.data.sources else dataset
  local_copy.check_room(config.data.local_copy, local_copy.splits_of(training, config.data.split))
  records = training.num_records(config.data.split)
  asked, shards = config, meshes.batch_shards(config, jax.device_count())
  config = sizing.choose(
    config,
    records=records,
    devices=shards,
    platform=jax.default_backend(),
    memory=_device_memory(),
    bfloat16=devices.has_bfloat16(jax.local_devices()[0]),
  )
  config = sizing.available(config, dataset, say=say)
  devices.check_dtype(config.model.dtype)
  if line := sizing.describe(asked, config, records=records, platform=jax.default_backend()):
    say(line)
  configs.check(config, settled=True)
  steps_per_epoch = sampler.steps_per_epoch(records, config.batch_size)
  options = Options(
    root=places.at(config.datasets) if config.datasets else None,
    limit=config.eval_limit,
    cache=folder / "prompts",
    warn=warn,
    flag="--config.datasets",
  )
  evaluate.check(config, dataset, options, say=say)
  validation.check(config, dataset)
  preconditions.check_regions(config, training)
  preconditions.check_negatives(config, training)
  preconditions.check_teacher(config, warn)
  preconditions.check_empty_slots(config, warn)
  tokenizer = tokenizing.make(config)
  parts = [part.dataset for part in getattr(training, "parts", ())] or [dataset]
  for line in token_ids.describe({str(p.directory): p.tokens for p in parts}, tokenizer):
    say(line)
  fingerprints = {"tokenizer": tokenizer.hash, "data": training.fingerprint(config.data.split)}
  _check_processes_agree(config, workdir, continue_as=",".join(continue_as), **fingerprints)
  evaluate.check_alike(config, dataset, options)
  if config.compile_cache and config.method == "grain" and config.loss.matcher == "host":
    logging.warning(
      "config.compile_cache: JAX keeps no program that calls the host, as the train step does with "
      "config.loss.matcher='host'. With 'device' it is kept too."
    )
  return Run(
    config=config,
    folder=folder,
    dataset=dataset,
    training=training,
    tokenizer=tokenizer,
    options=options,
    total_steps=config.steps or round(config.epochs * steps_per_epoch),
    steps_per_epoch=steps_per_epoch,
    fingerprints=fingerprints,
  )


def check_same_program() -> None:
  """Ends a run whose processes chose different kernels while they traced a program; all call it.

  Each tries cuDNN and the kernels of LayerNorm on its own device (`models.fused_attention`), and
  different programs hang in their collectives, or exchange what does not belong together.
  """
  chosen = {
    f"attention of the {part}": what.partition(" (")[0]  # without the reason
    for part, what in sorted(attention.implementations().items())
  }
  hint = (
    "Their devices or drivers differ; their logs say why. Set config.model.attention=xla and "
    "config.model.norm=xla, or run on equal machines."
  )
  distributed.check_equal("program", chosen | norm_kernels.implementations(), hint=hint)


def _device_memory() -> int | None:
  """Bytes that a program may use on the first device of process 0; None: it does not say."""
  stats = jax.local_devices()[0].memory_stats() or {}
  told = distributed.broadcast("device memory", str(stats.get("bytes_limit") or ""))
  return int(told) if told else None


def _check_processes_agree(config: ml_collections.ConfigDict, workdir: str, **others: Any) -> None:
  """Ends a run whose processes were started differently, before it can hang."""
  values = {f"config.{key}": value for key, value in configs.flatten(config)}
  values = {key: value for key, value in values.items() if key not in _MACHINE_KEYS}
  distributed.check_equal("configuration", {**values, "--workdir": workdir, **others})
