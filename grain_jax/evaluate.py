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
import json
import os
import pathlib
import urllib.parse
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
from grain_jax.evals.page import page, report
from grain_jax.evals.sets import suite
from grain_jax.models import attention, grain
from grain_jax.runtime import addresses, compile_cache, devices, distributed, metrics
from grain_jax.runtime import mesh as meshes

DIGITS = 6  # of results, after the point
_CONFIGURATION = "configuration"  # of the facts that `describe` gives, the one that is a file


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
  """A checkpoint to be evaluated, as it was read."""

  path: str
  config: ml_collections.ConfigDict
  params: Any
  step: int | None  # None: an export, which has no steps


def check(
  config: ml_collections.ConfigDict,
  dataset: dataset_lib.Dataset | None,
  options: Options = DEFAULTS,
  *,
  say: Callable[[str], None] = lambda line: None,
) -> None:
  """Raises a one-line ValueError where `config.evals` asks for what cannot be had.

  `say` gets a line on what is asked for and will be left out.
  """
  ours, outside = _split_names(config.evals)
  if ours and dataset is None:
    raise ValueError(
      f"--evals={','.join(ours)} read a dataset that grain_jax.data.build wrote: give --data_dir."
    )
  for name in ours:
    built.check(name, config, dataset)
  if line := built.left_out(ours, config):
    say(line)
  suite.check(suite.parse(outside), options, has_regions=config.method != "clip")


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

  `on_batch` is called after each encoded batch. Results have `DIGITS` digits after the point: what
  follows depends on the number of devices, whose batches sum in another order.
  """
  encoders = encoders_lib.make(
    config, model, params, mesh=mesh, tokenizer=tokenizer, on_batch=on_batch
  )
  ours, outside = _split_names(config.evals)
  attempt = attempts.Attempts(options.warn, _agree)
  outcome = built.run(ours, config, encoders, dataset, attempt=attempt)
  found = suite.run(suite.parse(outside), encoders, options, say=say, attempt=attempt)
  results = _rounded(outcome.results | found)
  data = dataset.whole_fingerprint() if ours and dataset is not None else ""
  return dataclasses.replace(outcome, results=results, errors=attempt.errors, data=data)


def _rounded(results: dict[str, float | int]) -> dict[str, float | int]:
  return {k: round(v, DIGITS) if isinstance(v, float) else v for k, v in results.items()}


def _agree(name: str, line: str) -> list[str]:
  """What each process says of an evaluation; one that failed does not wait long for the others."""
  return distributed.gather(f"evaluation {name}", line, seconds=60 if line else 3600)


def write(
  folder: pathlib.Path,
  outcome: Outcome,
  *,
  step: int | None,
  facts: dict[str, str] | None = None,
  warnings: Sequence[str] = (),
) -> None:
  """results.json, figures/ and report.html into a folder, and the table on the terminal.

  Results and figures that the folder has of other evaluations of the same step and data stay
  (`suite.merge`); results of another step or of other data are kept in results.before.json.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path, of_data = folder / "results.json", folder / "results.data"
  older = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
  data = of_data.read_text(encoding="utf-8") if older and of_data.is_file() else ""
  results = dict(outcome.results)
  other = ""
  if step is None or older.get("step") != step:
    other = f"of step {older.get('step')}"
  elif data and outcome.data and data != outcome.data:
    other = "of other data"
  if older and other:
    path.replace(folder / "results.before.json")
    print(f"the {path} that was there is {other}: kept as results.before.json", flush=True)
  same = bool(older) and not other
  if same:
    older.pop("step")
    results = _rounded(suite.merge(older, results))
    if facts and "command" in facts and results.keys() - outcome.results.keys():
      facts = {"last command" if key == "command" else key: facts[key] for key in facts}
  if data := outcome.data or (data if same else ""):
    places.write_text(of_data, data)
  else:
    of_data.unlink(missing_ok=True)
  text = json.dumps({"step": step, **results}, indent=2) + "\n"
  places.write_text(path, text)
  print(report.format_table(outcome.results))
  written = report.write(
    folder / "figures",
    metrics.read_jsonl(folder / "metrics.jsonl"),
    examples=outcome.examples,
    segmented=outcome.segmented,
    results=results,
  )
  facts = facts or {"step": str(step)}
  config = places.at(facts.get(_CONFIGURATION, ""))
  page.write(
    folder / "report.html",
    results,
    title=f"{folder.resolve().name}: evaluation",
    facts=facts,
    figures=sorted((folder / "figures").glob("*.png")) if same else written,
    warnings=warnings,
    links={_CONFIGURATION: _relative(config, folder)} if config.is_file() else None,
    sets=outcome.sets,
  )
  print("wrote " + ", ".join(map(str, [path, *written, folder / "report.html"])), flush=True)


def describe(evaluated: EvaluatedModel) -> dict[str, str]:
  """What a reader of the report wants to know of the model and of this evaluation."""
  config, step = evaluated.config, evaluated.step
  image = config.model.image
  facts = {
    "model": f"{config.method}, image tower {image.width} wide and {image.depth} deep, patches of "
    f"{image.patch} at {image.size} pixels",
    "parameters": f"{trees.count(evaluated.params) / 1e6:.1f} M",
    "checkpoint": evaluated.path if step is None else f"{evaluated.path}, step {step}",
    _CONFIGURATION: str(places.at(evaluated.path) / "config.json"),
    "data": config.data.dir or "outside datasets alone",
  }
  if step:  # an imported model is step 0 of no run
    length = f" of {config.steps:,}" if config.steps else f", in a run of {config.epochs:g} epochs"
    facts |= {
      "steps": f"{step:,}{length}",
      "images seen": f"{step * config.batch_size:,}, in batches of {config.batch_size:,}",
      "seed": str(config.seed),
    }
  now = datetime.datetime.now(datetime.UTC)
  facts |= {
    "evaluated": f"{now:%Y-%m-%d %H:%M} UTC",
    "version": f"grain_jax {grain_jax.__version__}",
  }
  return facts | ({"command": command} if (command := cli.command_line()) else {})


def _relative(path: pathlib.Path, folder: pathlib.Path) -> str:
  """The address of a file as seen from a page in `folder`."""
  if places.is_bucket(path) != places.is_bucket(folder):
    return str(path)
  return urllib.parse.quote(pathlib.Path(os.path.relpath(path, folder)).as_posix())


def evaluate(
  path: str | os.PathLike,
  evals: Sequence[str] = (),
  *,
  data_dir: str = "",
  step: int | None = None,
  batch_size: int = 0,
  options: Options = DEFAULTS,
  say: Callable[[str], None] = lambda line: None,
) -> tuple[Outcome, EvaluatedModel]:
  """Evaluates a checkpoint and writes nothing.

  Args:
    path: workdir of a run, or a folder of `grain_jax.convert`, or an export.
    evals: names as in --evals; empty: those of the run's own configuration.
    data_dir: another place of the run's data.
    step: which checkpoint of a run; the newest by default.
    batch_size: images or rows of text at a time, over all devices; 0: the run's own.
    options: of the evaluations on outside datasets.
    say: gets a line before each of those, and on what is left out.

  Returns:
    Results with examples for the report's figures, and the checkpoint as it was read.

  Raises:
    ValueError: one line, before anything is encoded where that can be.
  """
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
  ours, _ = _split_names(config.evals)
  dataset = pipeline.open_dataset(config.data.dir) if ours and config.data.dir else None
  check(config, dataset, options, say=say)
  distributed.check_equal(
    "command", {"path": str(path), "step": evaluated.step, "evals": config.evals}
  )
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
  if data_dir:  # results of an earlier evaluation may be of the run's own data
    families = {name.partition("/")[0] for name in outcome.results}
    own = {family: name for family, name in outcome.sets.items() if family in families}
    outcome = dataclasses.replace(outcome, sets=own)
  return outcome, evaluated


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
  out = places.open_place(flag.out or path, "--out" if flag.out else "--workdir")
  first = distributed.process_index() == 0
  warnings: list[str] = []

  def warn(line: str) -> None:
    warnings.append(line)
    if first:
      print(f"warning: {line}", flush=True)

  options = Options(
    root=pathlib.Path(flag.datasets) if flag.datasets else None,
    tfds_dir=flag.tfds_dir,
    download=flag.download,
    limit=flag.limit,
    protocols=tuple(flag.protocols),
    descriptors=pathlib.Path(flag.descriptors) if flag.descriptors else None,
    cache=out / "prompts",
    warn=warn,
  )
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
  )
  if first:
    facts = describe(evaluated)
    if options.limit:
      facts["a trial"] = f"the first {options.limit} pictures of each outside set alone"
    write(out, outcome, step=evaluated.step, facts=facts, warnings=warnings)
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
  flags.DEFINE_integer("batch_size", 0, "Images or rows of text at a time; 0: the run's own.")
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
    "datasets", None, "Folder of outside datasets, a sub-folder each; none by default."
  )
  flags.DEFINE_string(
    "tfds_dir", None, "Where TFDS keeps prepared datasets; ~/tensorflow_datasets by default."
  )
  flags.DEFINE_boolean("download", False, "Let TFDS download and prepare what it can.")
  flags.DEFINE_integer("limit", 0, "The first so many pictures of each outside set; 0: all.")
  flags.DEFINE_list("protocols", ["templates"], f"Zero-shot protocols: {', '.join(PROTOCOLS)}.")
  flags.DEFINE_string(
    "descriptors", None, "Folder of SET.json, {class: [descriptor, ...]}; by default none."
  )
  cli.run(main)
