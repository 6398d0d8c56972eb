"""Evaluations on the splits of a dataset that `data.build` wrote, the embedded scenes above all."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from grain_jax.data import dataset as dataset_lib
from grain_jax.data import pipeline, records
from grain_jax.evals import (
  composition,
  detection,
  grounding,
  region_classification,
  retrieval,
  segmentation,
  zero_shot,
)
from grain_jax.evals.inputs import attempts, contents
from grain_jax.evals.inputs.attempts import Attempt
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.process_shard import ProcessShard


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Results of evaluations by flat name, images for the report, and what failed."""

  results: dict[str, float | int]
  examples: Sequence[grounding.Example] = ()
  segmented: Sequence[segmentation.Example] = ()
  errors: Mapping[str, Exception] = dataclasses.field(default_factory=dict)  # by evaluation
  sets: Mapping[str, str] = dataclasses.field(default_factory=dict)  # family -> "scenes/objects"
  data: str = ""  # fingerprint of the built data; empty: none was read
  model: str = ""  # fingerprint of the model (`encoders.model_fingerprint`); empty: not known
  left_out: Sequence[str] = ()  # lines on what the results lack

  def merge(self, other: Outcome) -> Outcome:
    """Both together; images of the later one where it has some."""
    return Outcome(
      self.results | other.results,
      other.examples or self.examples,
      other.segmented or self.segmented,
      {**self.errors, **other.errors},
      {**self.sets, **other.sets},
      other.data or self.data,
      other.model or self.model,
      (*self.left_out, *other.left_out),
    )


def _zero_shot(config: Any, encoders: Encoders, dataset: dataset_lib.Dataset) -> Outcome:
  """Top-1 and top-5 on a labelled split; seen and unseen classes apart where the data has them."""
  classes = dataset.class_names
  unseen = set(dataset.unseen_pairs)
  groups = None
  if unseen:
    groups = {
      "seen": [i for i in range(len(classes)) if i not in unseen],
      "unseen": sorted(unseen),
    }
  descriptors = _descriptors(config, dataset)
  return Outcome(
    zero_shot.evaluate(
      encoders.image,
      encoders.text,
      _batches(config, encoders, dataset, split_of(config, "zero_shot"), whole=True),
      classes=classes,
      templates=config.zero_shot.templates,
      descriptors=descriptors,
      groups=groups,
    )
  )


def _descriptors(
  config: Any, dataset: dataset_lib.Dataset, warn: Callable[[str], None] = lambda line: None
) -> dict[str, list[str]]:
  if config.zero_shot.descriptors:
    return zero_shot.load_descriptors(config.zero_shot.descriptors, dataset.class_names, warn=warn)
  return dataset.descriptors


def _retrieval(config: Any, encoders: Encoders, dataset: dataset_lib.Dataset) -> Outcome:
  """R@1/5/10 both ways, one caption an image."""
  batches = _batches(config, encoders, dataset, split_of(config, "retrieval"), whole=True)
  return Outcome(retrieval.evaluate(encoders.image, encoders.text, batches))


def _grounding(config: Any, encoders: Encoders, dataset: dataset_lib.Dataset) -> Outcome:
  """Boxes and descriptions of the matched region queries."""
  batches = _batches(config, encoders, dataset, split_of(config, "grounding"))
  costs = {"l1_cost": config.loss.box_l1_cost, "giou_cost": config.loss.box_giou_cost}
  result = grounding.evaluate(encoders.regions, encoders.text, batches, keep=12, **costs)
  return Outcome(result.metrics, result.examples)


def _composition(config: Any, encoders: Encoders, dataset: dataset_lib.Dataset) -> Outcome:
  """Captions against captions with one thing changed."""
  split = split_of(config, "composition")
  batches = _batches(config, encoders, dataset, split, whole=True)
  own = _has_negatives(dataset, split)
  return Outcome(
    composition.evaluate_built(encoders.image, encoders.text, batches, own_negatives=own)
  )


def _has_negatives(dataset: dataset_lib.Dataset, split: str) -> bool:
  """Whether composition reads the records' own false captions; those of the scenes it writes."""
  return dataset.manifest.get("name") != "scenes" and bool(dataset.num_negatives(split))


def _segmentation(config: Any, encoders: Encoders, dataset: dataset_lib.Dataset) -> Outcome:
  """Patches by prompts, and patches grouped without any."""
  found = segmentation.evaluate_built(
    encoders.patches,
    encoders.text,
    _batches(config, encoders, dataset, split_of(config, "segmentation")),
    classes=dataset.mask_names,
    keep=8,
  )
  return Outcome(found.metrics, segmented=found.examples)


def _detection(config: Any, encoders: Encoders, dataset: dataset_lib.Dataset) -> Outcome:
  """COCO's average precision, a category for each distinct description."""
  batches = _batches(config, encoders, dataset, split_of(config, "grounding"))
  return Outcome(detection.evaluate_built(encoders.regions, encoders.text, batches))


def _region_classification(
  config: Any, encoders: Encoders, dataset: dataset_lib.Dataset
) -> Outcome:
  """The description of a given box among those with another colour."""
  batches = _batches(config, encoders, dataset, split_of(config, "grounding"))
  return Outcome(region_classification.evaluate_built(encoders, batches))


class Eval(NamedTuple):
  """An evaluation by name: what runs it, the config section of its split, what it needs."""

  run: Callable[[Any, Encoders, dataset_lib.Dataset], Outcome]
  section: str
  serves: Callable[[records.Parsed], Any]  # whether it can use a record
  needs: str  # what such a record has
  regions: bool = False  # it needs region queries


def _described(record: records.Parsed) -> bool:
  return any(text.strip() for text in record.descriptions)


def _composable(record: records.Parsed) -> list[Any]:
  own = record.negatives if record.captions else []
  return own or composition.from_captions([text.decode() for text in record.captions])


EVALS: dict[str, Eval] = {
  "zero_shot": Eval(_zero_shot, "zero_shot", lambda r: r.label >= 0, "a label"),
  "retrieval": Eval(_retrieval, "retrieval", lambda r: any(r.captions), "a caption"),
  "grounding": Eval(_grounding, "grounding", _described, "a described region", regions=True),
  "composition": Eval(
    _composition,
    "composition",
    _composable,
    "false captions ('negatives'), or a caption that names coloured objects, as those of the "
    "scenes do ('a red apple above a blue cat')",
  ),
  "segmentation": Eval(_segmentation, "segmentation", lambda r: r.mask, "a mask"),
  "detection": Eval(_detection, "grounding", _described, "a described region", regions=True),
  "region_classification": Eval(
    _region_classification, "grounding", _described, "a described region"
  ),
}


def split_of(config: ml_collections.ConfigDict, section: str) -> str:
  """The split that a section of the configuration names."""
  return config[section].split


class NotServed(ValueError):
  """The data, or the configuration, cannot serve an evaluation: `why`, and what to do."""

  def __init__(self, why: str, mend: str):
    super().__init__(why + mend)
    self.why = why


def check(name: str, config: ml_collections.ConfigDict, dataset: dataset_lib.Dataset) -> None:
  """Raises a one-line `NotServed` where the data cannot serve the evaluation.

  It may lack the split, prompts, descriptors, or a single record with what is needed: records are
  read up to the first that will do.
  """
  if not wanted(name, config):
    return
  evaluation = EVALS[name]
  section = evaluation.section
  split = split_of(config, section)
  leave_out = f"leave {name!r} out of config.evals"
  if name == "segmentation" and not dataset.mask_names:
    raise NotServed(f"{config.data.dir} has no masks", f": {leave_out}.")
  if split not in dataset.splits:
    raise NotServed(
      f"config.{section}.split = {split!r} is not in {config.data.dir}, which has "
      f"{', '.join(dataset.splits)}",
      f". Set it, or {leave_out}.",
    )
  if evaluation.serves is _described and not config.data.max_regions:
    raise NotServed(f"{name} needs regions and config.data.max_regions = 0", f": {leave_out}.")
  if name == "zero_shot" and dataset.class_names:
    try:
      zero_shot.class_prompts(dataset.class_names, config.zero_shot.templates)
      _descriptors(config, dataset, logging.getLogger(__name__).warning)
    except ValueError as error:
      raise ValueError(f"config.zero_shot: {error}") from error
  if not any(map(evaluation.serves, _readable(dataset, split))):
    raise NotServed(
      f"{name}: none of the {dataset.num_records(split)} records of split {split!r} in "
      f"{config.data.dir} has {evaluation.needs}",
      f". Set config.{section}.split, or {leave_out}.",
    )


def _readable(dataset: dataset_lib.Dataset, split: str) -> Iterator[records.Parsed]:
  """The records of a split that are whole, in their order."""
  for index in range(dataset.num_records(split)):
    with contextlib.suppress(ValueError):  # a bad record: counted when it is evaluated
      yield dataset.parse(split, index)


def wanted(name: str, config: ml_collections.ConfigDict) -> bool:
  """Whether the model is asked for it: one without region queries is not, for regions."""
  evaluation = EVALS[name]
  return not evaluation.regions or (config.method != "clip" and config.data.max_regions > 0)


def left_out(names: Sequence[str], config: ml_collections.ConfigDict) -> str:
  """A line on those that the model is not asked for; '' where there are none."""
  names = [name for name in names if not wanted(name, config)]
  if not names:
    return ""
  why = "config.method = clip" if config.method == "clip" else "config.data.max_regions = 0"
  return f"not evaluated: {', '.join(names)}: the model has no region queries ({why})"


def run(
  names: Sequence[str],
  config: ml_collections.ConfigDict,
  encoders: Encoders,
  dataset: dataset_lib.Dataset | None,
  *,
  attempt: Attempt = attempts.once,
) -> Outcome:
  """All evaluations named; a model without region queries is not asked for regions."""
  outcome = Outcome({}, sets=set_names(config) if names else {})
  for name in names:
    evaluation = EVALS[name]
    if wanted(name, config):
      found = attempt(name, functools.partial(evaluation.run, config, encoders, dataset))
      outcome = outcome if found is None else outcome.merge(found)
  return outcome


def describe_contents(
  names: Sequence[str], config: ml_collections.ConfigDict, dataset: dataset_lib.Dataset
) -> dict[str, str]:
  """What evaluations read, in words to compare: {"the built data": ..., "zero_shot": ...}."""
  found = {"the built data": f"of fingerprint {dataset.whole_fingerprint()[:16]}"}
  if "zero_shot" in names:
    texts = (dataset.class_names, config.zero_shot.templates, _descriptors(config, dataset))
    found["zero_shot"] = contents.describe(texts)
  return found


def set_names(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Which split of which folder the results of a family are of: {'zero_shot': 'scenes/objects'}."""
  path = pathlib.Path(config.data.dir)
  folder = path.resolve().name if path.name in ("", "..") else path.name
  sections = {name: evaluation.section for name, evaluation in EVALS.items()}
  sections |= {"grouping": "segmentation", "validation": "validation"}
  return {name: f"{folder}/{split_of(config, section)}" for name, section in sections.items()}


def _batches(
  config: ml_collections.ConfigDict,
  encoders: Encoders,
  dataset: dataset_lib.Dataset,
  split: str,
  *,
  whole: bool = False,
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
  """(batch, extras by name) of a split, descriptions filled up with '' to one a region.

  Each process reads its shard; every process gets full batches. Where embeddings of `whole` images
  are all that is asked for, the model sees them in its own way; else squashed, so that places hold.
  """
  regions, size, shard = config.data.max_regions, config.eval_batch_size, encoders.shard
  for batch, info in pipeline.eval_batches(
    dataset,
    split,
    config,
    host=shard.index,
    num_hosts=shard.count,
    resize=encoders.resize if whole else "squash",
  ):
    extras = info._asdict()
    if shard.count > 1:
      batch = {name: shard.gather_rows(rows, size) for name, rows in batch.items()}
      extras = _gather_info(extras, shard, size)
    extras["descriptions"] = [t + [""] * (regions - len(t)) for t in extras["descriptions"]]
    yield batch, extras


def _gather_info(extras: dict[str, Any], shard: ProcessShard, size: int) -> dict[str, Any]:
  """`pipeline.ExampleInfo` of all processes' rows."""
  columns = {
    **extras,
    "index": extras["index"].tolist(),
    "label": extras["label"].tolist(),
    "mask": [base64.b64encode(mask).decode() for mask in extras["mask"]],
  }
  rows = shard.gather_lists(list(zip(*columns.values(), strict=True)), size)
  joined = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
  return {
    **joined,
    "index": np.asarray(joined["index"], np.int64),
    "label": np.asarray(joined["label"], np.int64),
    "mask": [base64.b64decode(mask) for mask in joined["mask"]],
  }
