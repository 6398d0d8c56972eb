"""`python -m grain_jax.evaluate --workdir=DIR`: evaluations on a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh

from grain_jax import addresses, checkpoint, cli, distributed, metrics, steps
from grain_jax import config as configs
from grain_jax import mesh as meshes
from grain_jax import tokenizer as tokenizers
from grain_jax.data import pipeline
from grain_jax.evals import grounding, report, retrieval, zero_shot
from grain_jax.models import grain


@dataclasses.dataclass(frozen=True)
class Encoders:
  """What the evaluations know of a model: NumPy in, NumPy out, any number of rows."""

  image: Callable[[np.ndarray], np.ndarray]  # u8 [n, H, W, 3] -> f32 [n, E], L2-normalised
  text: Callable[[Sequence[str]], np.ndarray]  # n texts -> f32 [n, E], L2-normalised
  # u8 [n, H, W, 3] -> f32 [n, Q, E], L2-normalised, and boxes (cx, cy, w, h) f32 [n, Q, 4]
  regions: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Results of all evaluations, and pictures for the report."""

  results: dict[str, float]
  examples: Sequence[grounding.Example] = ()


def make_encoders(
  config: ml_collections.ConfigDict,
  model: grain.Grain,
  params: Any,
  *,
  mesh: Mesh,
  tokenizer: tokenizers.Tokenizer,
  on_batch: Callable[[], None] = lambda: None,
) -> Encoders:
  """Encoders that cut their input into batches of `config.eval_batch_size`, padded at the end.

  They call `on_batch` after each.
  """
  jitted = steps.make_encoders(model, mesh)
  size = config.eval_batch_size
  sharding = meshes.batch_sharding(mesh)

  def call(function: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """Applies a jitted encoder to rows of any number, in batches of one shape."""
    rows = len(arrays[0])
    parts = []
    for start in range(0, rows, size):
      chunk = [a[start : start + size] for a in arrays]
      pad = size - len(chunk[0])
      chunk = [np.pad(c, [(0, pad)] + [(0, 0)] * (c.ndim - 1)) for c in chunk]
      # Every process has all rows and puts its own part on its devices.
      placed = [
        jax.make_array_from_callback(c.shape, sharding, lambda index, c=c: c[index]) for c in chunk
      ]
      parts.append(jax.tree.map(lambda x: np.asarray(x)[: size - pad], function(params, *placed)))  # noqa: B023
      on_batch()
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

  def text(texts: Sequence[str]) -> np.ndarray:
    length = config.data.row_length
    rows = tokenizer.pack_texts(texts, row_length=length, texts_per_row=max(length // 8, 1))
    out = call(jitted["text"], rows.tokens, rows.segments, rows.positions, rows.ends)
    return out[rows.row, rows.slot]

  return Encoders(
    image=lambda images: call(jitted["image"], images),
    text=text,
    regions=lambda images: call(jitted["regions"], images),
  )


def _zero_shot(config: Any, encoders: Encoders, dataset: pipeline.Dataset) -> Outcome:
  """Top-1 and top-5 on a labelled split; seen and unseen classes apart where the data has them."""
  classes = dataset.class_names
  unseen = set(dataset.unseen_pairs)
  groups = None
  if unseen:
    groups = {
      "seen": [i for i in range(len(classes)) if i not in unseen],
      "unseen": sorted(unseen),
    }
  descriptors = dataset.descriptors
  if config.zero_shot.descriptors:
    descriptors = zero_shot.load_descriptors(config.zero_shot.descriptors, classes)
  return Outcome(
    zero_shot.evaluate(
      encoders.image,
      encoders.text,
      _batches(config, dataset, config.zero_shot.split),
      classes=classes,
      templates=config.zero_shot.templates,
      descriptors=descriptors,
      groups=groups,
    )
  )


def _retrieval(config: Any, encoders: Encoders, dataset: pipeline.Dataset) -> Outcome:
  """R@1/5/10 both ways, one caption an image."""
  batches = _batches(config, dataset, config.retrieval.split)
  return Outcome(retrieval.evaluate(encoders.image, encoders.text, batches))


def _grounding(config: Any, encoders: Encoders, dataset: pipeline.Dataset) -> Outcome:
  """Boxes and descriptions of the matched region queries."""
  batches = _batches(config, dataset, config.grounding.split)
  result = grounding.evaluate(encoders.regions, encoders.text, batches, keep=12)
  return Outcome(result.metrics, result.examples)


# Name -> evaluation, and the config key of the split that it reads.
EVALS: dict[str, Callable[[Any, Encoders, pipeline.Dataset], Outcome]] = {
  "zero_shot": _zero_shot,
  "retrieval": _retrieval,
  "grounding": _grounding,
}


def _batches(
  config: ml_collections.ConfigDict, dataset: pipeline.Dataset, split: str
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
  """(batch, extras by name) of a split, descriptions filled up with '' to one a region."""
  regions = config.data.max_regions
  for batch, extras in pipeline.eval_batches(dataset, split, config):
    described = [texts + [""] * (regions - len(texts)) for texts in extras.descriptions]
    yield batch, {**extras._asdict(), "descriptions": described}


def check(config: ml_collections.ConfigDict, dataset: pipeline.Dataset) -> None:
  """Raises a one-line ValueError where `config.evals` asks for what cannot be had."""
  for name in config.evals:
    if name not in EVALS:
      raise ValueError(f"config.evals: {name!r} is unknown. Choose from {', '.join(EVALS)}.")
    if name == "grounding" and config.method == "clip":
      continue
    split = config[name].split
    if split not in dataset.splits:
      raise ValueError(
        f"config.{name}.split = {split!r} is not in {config.data.dir}, which has "
        f"{', '.join(dataset.splits)}. Set it, or leave {name!r} out of config.evals."
      )


def run(
  config: ml_collections.ConfigDict,
  model: grain.Grain,
  params: Any,
  dataset: pipeline.Dataset,
  *,
  mesh: Mesh,
  tokenizer: tokenizers.Tokenizer,
  on_batch: Callable[[], None] = lambda: None,
) -> Outcome:
  """All of `config.evals`; a model without region queries is not asked to ground.

  `on_batch` is called after each encoded batch.
  """
  encoders = make_encoders(config, model, params, mesh=mesh, tokenizer=tokenizer, on_batch=on_batch)
  results: dict[str, float] = {}
  examples: Sequence[grounding.Example] = ()
  for name in config.evals:
    if name == "grounding" and (config.method == "clip" or not config.data.max_regions):
      continue
    outcome = EVALS[name](config, encoders, dataset)
    results |= outcome.results
    examples = outcome.examples or examples
  return Outcome(results, examples)


def write(folder: pathlib.Path, outcome: Outcome, *, step: int) -> None:
  """results.json and figures/ into a workdir, and the table on the terminal."""
  text = json.dumps({"step": step, **outcome.results}, indent=2) + "\n"
  temporary = folder / "results.json.tmp"
  temporary.write_text(text)
  temporary.replace(folder / "results.json")
  print(report.format_table(outcome.results))
  written = report.write(
    folder / "figures", metrics.read_jsonl(folder / "metrics.jsonl"), examples=outcome.examples
  )
  print("wrote " + ", ".join(map(str, [folder / "results.json", *written])), flush=True)


def load(workdir: str, *, step: int | None = None) -> tuple[Any, Any, int]:
  """(config, parameters, step) of a run's checkpoint; the newest unless `step` says otherwise.

  Where a run keeps a mean of its parameters (`optimizer.ema_decay`), they are that mean.
  """
  folder = pathlib.Path(workdir)
  path = folder / "config.json"
  if not path.is_file():
    raise ValueError(f"--workdir={workdir}: there is no config.json; no run was started here.")
  config = configs.from_json(path.read_text())
  model = grain.build(config)
  params = jax.eval_shape(lambda: steps.init_params(model, config))
  config.mesh.update(data=-1, fsdp=1, tensor=1)  # whatever devices there are now
  whole = meshes.replicated(meshes.create(config))
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", read_only=True)
  kept = "ema" if config.optimizer.get("ema_decay", 0.0) else "params"
  state, meta = checkpoints.restore({kept: abstract}, step=step)
  checkpoints.close()
  return config, state[kept], meta["step"]


def main() -> None:
  with distributed.session(addresses.from_flags()):
    _main(flags.FLAGS)


def _main(flag: flags.FlagValues) -> None:
  config, params, step = load(flag.workdir, step=flag.step)
  if flag.evals:
    config.evals = tuple(flag.evals)
  if flag.data_dir:
    config.data.dir = flag.data_dir
  dataset = pipeline.open_dataset(config.data.dir)
  check(config, dataset)
  asked = {"--workdir": flag.workdir, "step": step, "evals": config.evals}
  distributed.agree("command", asked)
  mesh = meshes.create(config)
  tokenizer = tokenizers.Tokenizer(context=config.model.text.context)
  with jax.set_mesh(mesh):
    outcome = run(config, grain.build(config), params, dataset, mesh=mesh, tokenizer=tokenizer)
  if distributed.index() == 0:
    write(pathlib.Path(flag.workdir), outcome, step=step)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)
  flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest by default.")
  flags.DEFINE_list("evals", None, f"Which of {', '.join(EVALS)}; the run's own by default.")
  flags.DEFINE_string("data_dir", None, "Another place of the run's data.")
  cli.run(main)
