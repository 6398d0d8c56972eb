"""`python -m grain_jax.evaluate --workdir=DIR`: evaluations on a checkpoint.

    --workdir=runs/mine                        a run: its own evaluations, on its own data
    --workdir=runs/mine --evals=zero_shot:food101,composition:sugarcrepe --datasets=DIR
    --checkpoint=weights/clip-b16 --evals=zero_shot:paper,retrieval:coco --datasets=DIR

A name without a colon is an evaluation on data that `grain_jax.data.build` wrote; FAMILY:SET is one
on an outside dataset. Results go to results.json, figures/ and report.html.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags
from jax.sharding import Mesh

import grain_jax
from grain_jax import cli, places, tokenizing, trees
from grain_jax import encoders as encoders_lib
from grain_jax import tokenizer as tokenizers
from grain_jax.convert import weights
from grain_jax.data import dataset as dataset_lib
from grain_jax.data import pipeline
from grain_jax.evals import built
from grain_jax.evals.built import EVALS, Outcome
from grain_jax.evals.inputs import attempts
from grain_jax.evals.inputs.options import DEFAULTS, PROTOCOLS, Options
from grain_jax.evals.page import results as results_lib
from grain_jax.evals.sets import suite
from grain_jax.models import attention, grain
from grain_jax.runtime import addresses, compile_cache, devices, distributed
from grain_jax.runtime import mesh as meshes


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
  """A checkpoint to be evaluated, as it was read."""

  path: str
  config: ml_collections.ConfigDict
  params: Any
  step: int | None  # None: an export, which has no steps
  limit: int = 0  # of each outside set: see `Options`


def check(
  config: ml_collections.ConfigDict,
  dataset: dataset_lib.Dataset | None,
  options: Options = DEFAULTS,
  *,
  say: Callable[[str], None] = lambda line: None,
  required: bool = False,
) -> None:
  """Raises a one-line ValueError where `config.evals` asks for what cannot be had.

  `say` gets a line on what is asked for and will be left out; with `required` that raises too.
  """
  ours, outside = _split_names(config.evals)
  if ours and dataset is None:
    raise ValueError(
      f"--evals={','.join(ours)} read a dataset that grain_jax.data.build wrote: give --data_dir."
    )
  for name in ours:
    built.check(name, config, dataset)
  if line := built.left_out(ours, config):
    if required:
      raise ValueError(f"--evals: {line}. Give a GRAIN checkpoint, or leave them out.")
    say(line)
  suite.check(suite.parse(outside), options, has_regions=config.method != "clip")


def check_alike(
  config: ml_collections.ConfigDict,
  dataset: dataset_lib.Dataset | None,
  options: Options = DEFAULTS,
) -> None:
  """Raises the same one-line ValueError on all processes where they would not read the same.

  Each process finds files, and which sets are at hand, on its own disk; all must call it.
  """
  if distributed.process_count() == 1:
    return
  ours, outside = _split_names(config.evals)
  settings = {"batch_size": config.eval_batch_size, "limit": options.limit}
  settings |= {"protocols": options.protocols, "alphas": options.alphas}
  found = built.describe_contents(ours, config, dataset) if ours and dataset is not None else {}
  found |= suite.describe_contents(suite.parse(outside), options)
  distributed.check_equal(
    "evaluation",
    {**settings, **found},
    hint="Start all with the same command, and give all the same files.",
  )


def run(
  config: ml_collections.ConfigDict,
  model: grain.Grain,
  params: Any,
  dataset: dataset_lib.Dataset | None,
  *,
  mesh: Mesh,
  tokenizer: tokenizers.Tokenizer,
  on_batch: Callable[[], None] = lambda: None,
  options: Options = DEFAULTS,
  say: Callable[[str], None] = lambda line: None,
) -> Outcome:
  """All of `config.evals`; a model without region queries is not asked to ground.

  All processes must call it, with the same files: see `check_alike`. `on_batch` is called after
  each encoded batch. Results have `results.DIGITS` digits after the point: what follows depends on
  the number of devices, whose batches sum in another order.
  """
  encoders = encoders_lib.make(
    config, model, params, mesh=mesh, tokenizer=tokenizer, on_batch=on_batch
  )
  ours, outside = _split_names(config.evals)
  left_out = [line] if (line := built.left_out(ours, config)) else []

  def warn(line: str) -> None:
    left_out.append(line)
    given.warn(line)

  given, options = options, options.with_warn(warn)
  attempt = attempts.Attempts(warn, _agree)
  outcome = built.run(ours, config, encoders, dataset, attempt=attempt)
  found = suite.run(suite.parse(outside), encoders, options, say=say, attempt=attempt)
  results = results_lib.rounded(outcome.results | found)
  data = dataset.whole_fingerprint() if ours and dataset is not None else ""
  return dataclasses.replace(
    outcome,
    results=results,
    errors=attempt.errors,
    data=data,
    left_out=tuple(dict.fromkeys(left_out)),
  )


def _agree(name: str, line: str) -> list[str]:
  """What each process says of an evaluation; one that failed does not wait long for the others."""
  return distributed.gather(f"evaluation {name}", line, seconds=60 if line else 3600)


def describe(evaluated: EvaluatedModel) -> dict[str, str]:
  """What a reader of the report wants to know of the model and of this evaluation."""
  config, step = evaluated.config, evaluated.step
  image = config.model.image
  facts = {
    "model": f"{config.method}, image tower {image.width} wide and {image.depth} deep, patches of "
    f"{image.patch} at {image.size} pixels",
    "parameters": f"{trees.count(evaluated.params) / 1e6:.1f} M",
    "checkpoint": evaluated.path if step is None else f"{evaluated.path}, step {step}",
    results_lib.CONFIGURATION: str(places.at(evaluated.path) / "config.json"),
    "data": config.data.dir or "outside datasets alone",
  }
  if step:  # an imported model is step 0 of no run
    length = f" of {config.steps:,}" if config.steps else f", in a run of {config.epochs:g} epochs"
    facts |= {
      "steps": f"{step:,}{length}",
      "images seen": f"{step * config.batch_size:,}, in batches of {config.batch_size:,}",
      "seed": str(config.seed),
    }
  if evaluated.limit:
    facts["a trial"] = (
      f"the first {evaluated.limit} pictures of each outside set alone (of composition: items of "
      "each file)"
    )
  now = datetime.datetime.now(datetime.UTC)
  facts |= {
    "evaluated": f"{now:%Y-%m-%d %H:%M} UTC",
    "version": f"grain_jax {grain_jax.__version__}",
  }
  return facts | ({"command": command} if (command := cli.command_line()) else {})


def evaluate(
  path: str | os.PathLike,
  evals: Sequence[str] = (),
  *,
  data_dir: str = "",
  step: int | None = None,
  batch_size: int = 0,
  options: Options = DEFAULTS,
  say: Callable[[str], None] = lambda line: None,
  required: bool = False,
) -> tuple[Outcome, EvaluatedModel]:
  """Evaluates a checkpoint and writes nothing.

  Args:
    path: workdir of a run, or a folder of `grain_jax.convert`, or an export.
    evals: names as in --evals; empty: those of the run's own configuration.
    data_dir: another place of the run's data.
    step: which checkpoint of a run; the newest by default.
    batch_size: images or rows of text at a time, over all devices, >= 0; 0: the run's own.
    options: of the evaluations on outside datasets; `root` and `limit`, where they are None, are
      those of the run's own configuration.
    say: gets a line before each of those, and on what is left out.
    required: whether an evaluation of `evals` that the model cannot do is an error.

  Returns:
    Results with examples for the report's figures, and the checkpoint as it was read.

  Raises:
    ValueError: one line, before anything is encoded where that can be.
  """
  if batch_size < 0:
    raise ValueError(f"batch_size = {batch_size} must be positive, or 0: the run's own.")
  evaluated = EvaluatedModel(str(path), *weights.open_checkpoint(path, step=step))
  config = evaluated.config
  if evals:
    config.evals = tuple(evals)
  if data_dir:
    config.data.dir = data_dir
  if batch_size:
    config.eval_batch_size = batch_size
  if not config.evals:
    raise ValueError(
      f"{path} has no evaluations of its own (config.evals is empty): name some with --evals, "
      f"{', '.join(EVALS)} or FAMILY:SET."
    )
  ours, outside = _split_names(config.evals)
  dataset = pipeline.open_dataset(config.data.dir) if ours and config.data.dir else None
  if outside:
    options = _with_settings_of_run(options, config, say)
    evaluated = dataclasses.replace(evaluated, limit=options.limit or 0)
  check(config, dataset, options, say=say, required=required and bool(evals))
  distributed.check_equal(
    "command", {"path": str(path), "step": evaluated.step, "evals": config.evals}
  )
  check_alike(config, dataset, options)
  mesh = meshes.create(config, batches=("eval_batch_size",))
  tokenizer = tokenizing.make(config)
  with jax.set_mesh(mesh):
    outcome = run(
      config,
      grain.build(config),
      evaluated.params,
      dataset,
      mesh=mesh,
      tokenizer=tokenizer,
      options=options,
      say=say,
    )
  model_of = encoders_lib.model_fingerprint(config, evaluated.params)
  outcome = dataclasses.replace(outcome, model=model_of)
  if data_dir:  # results of an earlier evaluation may be of the run's own data
    families = {name.partition("/")[0] for name in outcome.results}
    own = {family: name for family, name in outcome.sets.items() if family in families}
    outcome = dataclasses.replace(outcome, sets=own)
  return outcome, evaluated


def _with_settings_of_run(
  options: Options, config: ml_collections.ConfigDict, say: Callable[[str], None]
) -> Options:
  """`options` with the outside datasets and the limit of a run, where they say nothing of them."""
  taken: dict[str, Any] = {}
  if options.root is None and config.datasets:
    taken["root"] = places.at(config.datasets)
    if not taken["root"].is_dir():
      raise ValueError(
        f"config.datasets = {config.datasets!r} of the run: there is no such folder here. Give "
        "--datasets=DIR."
      )
    say(f"outside sets are those of the run: --datasets={config.datasets}")
  if options.limit is None and config.eval_limit:
    taken["limit"] = config.eval_limit
    say(f"a trial, as those of the run: --limit={config.eval_limit}; --limit=0 is all of them")
  return dataclasses.replace(options, **taken)


def _split_names(evals: Sequence[str]) -> tuple[list[str], list[str]]:
  """Names of evaluations on built data, and on outside datasets; unknown ones raise."""
  for name in evals:
    if ":" not in name and name not in EVALS:
      near = difflib.get_close_matches(name, EVALS, n=1)
      hint = f"Did you mean {near[0]}? " if near else ""
      raise ValueError(
        f"config.evals: {name!r} is unknown. {hint}Choose from {', '.join(EVALS)}; or FAMILY:SET "
        f"with FAMILY one of {', '.join(suite.FAMILIES)}."
      )
  return [n for n in evals if ":" not in n], [n for n in evals if ":" in n]


def main() -> None:
  with distributed.session(addresses.from_flags()), devices.explaining(devices.ENCODING):
    _main(flags.FLAGS)


def _main(flag: flags.FlagValues) -> None:
  if bool(flag.workdir) == bool(flag.checkpoint):
    raise ValueError(
      "give either --workdir (a run) or --checkpoint (an imported model). See --help."
    )
  path = flag.workdir or flag.checkpoint
  where = "--out" if flag.out else "--workdir" if flag.workdir else "--checkpoint"
  out = places.open_place(flag.out or path, where)
  first = distributed.process_index() == 0

  def warn(line: str) -> None:
    if first:
      print(f"warning: {line}", flush=True)

  options = Options(
    root=places.at(flag.datasets) if flag.datasets else None,
    tfds_dir=flag.tfds_dir,
    download=flag.download,
    limit=flag.limit,
    protocols=tuple(flag.protocols),
    descriptors=places.at(flag.descriptors) if flag.descriptors else None,
    cache=out / "prompts",
    warn=warn,
  )
  if first and (flag.out or out.is_dir()):  # else there is no checkpoint, which is said below
    results_lib.prepare(out, name=where)
  devices.check_found()
  compile_cache.use()
  outcome, evaluated = evaluate(
    path,
    flag.evals,
    data_dir=flag.data_dir,
    step=flag.step,
    batch_size=flag.batch_size,
    options=options,
    say=lambda line: print(line, flush=True) if first else None,
    required=True,
  )
  if first:
    results_lib.write(out, outcome, step=evaluated.step, facts=describe(evaluated))
    if line := attention.summary():
      print(line, flush=True)
  if error := attempts.error_of(outcome.errors, kept=str(out / "results.json")):
    raise error


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Folder of a run; by default --checkpoint is given.")
  flags.DEFINE_string(
    "checkpoint", None, "Folder of grain_jax.convert or of an export; by default --workdir is."
  )
  flags.DEFINE_string("out", None, "Folder of the results; by default that of the checkpoint.")
  flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest by default.")
  flags.DEFINE_integer(
    "batch_size", 0, "Images or rows of text at a time; 0: the run's own.", lower_bound=0
  )
  flags.DEFINE_list(
    "evals",
    [],
    f"Which of {', '.join(EVALS)} on built data, or FAMILY:SET on outside datasets, such as "
    "zero_shot:food101, zero_shot:paper (the eleven sets), retrieval:coco, composition:sugarcrepe; "
    "the run's own by default.",
  )
  flags.DEFINE_string(
    "data_dir", "", "Another place of the built data; by default that of the run."
  )
  flags.DEFINE_string(
    "datasets",
    None,
    "Folder of outside datasets, a sub-folder each; by default that of the run, if any.",
  )
  flags.DEFINE_string(
    "tfds_dir", None, "Where TFDS keeps prepared datasets; ~/tensorflow_datasets by default."
  )
  flags.DEFINE_boolean("download", False, "Let TFDS download and prepare what it can.")
  flags.DEFINE_integer(
    "limit",
    None,
    "The first so many pictures of each outside set (of composition: items of each file); 0: all; "
    "by default as many as in the run.",
  )
  flags.DEFINE_list("protocols", ["templates"], f"Zero-shot protocols: {', '.join(PROTOCOLS)}.")
  flags.DEFINE_string(
    "descriptors", None, "Folder of SET.json, {class: [descriptor, ...]}; by default none."
  )
  cli.run(main)
