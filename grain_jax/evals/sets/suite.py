"""Evaluations on outside datasets by name: `FAMILY:SET`, such as `zero_shot:food101`.

A family is a module with SETS (what it knows), check (before anything is encoded), contents (what
all processes must read alike) and run.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from grain_jax.evals.inputs import attempts, contents
from grain_jax.evals.inputs.attempts import Attempt
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import classification, waterbirds
from grain_jax.evals.sets import composition as composition_sets
from grain_jax.evals.sets import detection as detection_sets
from grain_jax.evals.sets import fine_grained as fine_grained_sets
from grain_jax.evals.sets import grounding as grounding_sets
from grain_jax.evals.sets import grouping as grouping_sets
from grain_jax.evals.sets import region_classification as region_classification_sets
from grain_jax.evals.sets import retrieval as retrieval_sets
from grain_jax.evals.sets import segmentation as segmentation_sets

Results = dict[str, float | int]


class Family(Protocol):
  """What a module of a family offers."""

  SETS: Mapping[str, Any]

  def check(self, name: str, options: Options) -> None:
    """Raises a one-line ValueError where the set cannot be evaluated."""

  def contents(self, name: str, options: Options) -> Sequence[Any]:
    """What is read of the set, the items first; see `contents.describe`."""

  def run(self, encoders: Encoders, name: str, options: Options) -> Results:
    """The results of one set by flat name."""


FAMILIES: dict[str, Family] = {
  "zero_shot": classification,
  "retrieval": retrieval_sets,
  "composition": composition_sets,
  "grounding": grounding_sets,
  "detection": detection_sets,
  "region_classification": region_classification_sets,
  "fine_grained": fine_grained_sets,
  "segmentation": segmentation_sets,
  "grouping": grouping_sets,
  "waterbirds": waterbirds,
}
# Several sets by one name.
GROUPS: dict[str, Sequence[str]] = {
  "zero_shot:paper": classification.PAPER,
  "composition:aro": tuple(name for name in composition_sets.SETS if name.startswith("aro_")),
  "fine_grained:fg_ovd": tuple(fine_grained_sets.SETS),
}
# Families whose check takes any name, as a folder of the user's own.
_OPEN = (
  "zero_shot",
  "retrieval",
  "grounding",
  "detection",
  "region_classification",
  "fine_grained",
)

_NEED_REGIONS = ("grounding", "detection")


class Spec(NamedTuple):
  """An evaluation on an outside dataset."""

  family: str
  name: str


def parse(names: Sequence[str]) -> list[Spec]:
  """Specs in the order asked for, groups spelt out, each once.

  Raises:
    ValueError: a family or a set that is not known, with the nearest ones that are.
  """
  specs: dict[Spec, None] = {}
  for text in names:
    family, colon, name = text.partition(":")
    if family not in FAMILIES:
      raise ValueError(f"--evals: {text!r} is unknown. Families: {', '.join(FAMILIES)}.")
    for member in GROUPS.get(text, (name,)):
      known = FAMILIES[family].SETS
      if not colon or (member not in known and family not in _OPEN):
        near = difflib.get_close_matches(member, known, n=2) or list(known)
        raise ValueError(
          f"--evals: {text!r} is unknown. Sets of {family}: "
          f"{', '.join(f'{family}:{n}' for n in near)}."
        )
      specs[Spec(family, member)] = None
  return list(specs)


def check(specs: Sequence[Spec], options: Options, *, has_regions: bool = True) -> None:
  """Raises the first thing that keeps one of the sets from being evaluated.

  Args:
    specs: what is asked for.
    options: of the evaluations.
    has_regions: whether the model has region queries.
  """
  for spec in specs:
    by_regions = spec.family == "zero_shot" and "regions" in options.protocols
    if not has_regions and (by_regions or spec.family in _NEED_REGIONS):
      raise ValueError(
        f"{spec.family}:{spec.name}{' by protocol regions' if by_regions else ''} needs region "
        "queries: this model has no decoder (method 'clip'). Give a GRAIN checkpoint, or leave it "
        "out."
      )
    FAMILIES[spec.family].check(spec.name, options)


def run(
  specs: Sequence[Spec],
  encoders: Encoders,
  options: Options,
  *,
  say: Callable[[str], None] = lambda line: None,
  attempt: Attempt = attempts.once,
) -> Results:
  """Results of all sets, with `FAMILY/SET/limit` where it was a trial.

  With composition always the zero-shot average beside it.

  What teaches a model to tell captions apart can cost it what it knew of classes (CE-CLIP: eleven
  sets 61.0 -> 45.7 %), so the sets of the paper that are at hand are evaluated too.
  """
  wanted = with_average(specs, options)
  results: Results = {}
  for i, spec in enumerate(wanted):
    say(f"evaluating {spec.family}:{spec.name} ({i + 1} of {len(wanted)})")
    call = functools.partial(FAMILIES[spec.family].run, encoders, spec.name, options)
    found = attempt(f"{spec.family}:{spec.name}", call) or {}
    if found and options.limit:  # the same names as of the whole set: a trial must say so
      found[f"{spec.family}/{spec.name}/limit"] = options.limit
    results |= found
  return results | classification.average(results)


def with_average(specs: Sequence[Spec], options: Options) -> list[Spec]:
  """What is evaluated: with composition the sets at hand of the zero-shot average too."""
  asked = any(spec.family == "composition" for spec in specs)
  return [*specs, *(_at_hand(specs, options) if asked else [])]


def describe_contents(specs: Sequence[Spec], options: Options) -> dict[str, str]:
  """What is read of each set that is evaluated, in words to compare: {"zero_shot:pets": ...}."""
  options = dataclasses.replace(options, warn=lambda line: None)  # `run` says it
  found = {}
  for spec in with_average(specs, options):
    held = FAMILIES[spec.family].contents(spec.name, options)
    found[f"{spec.family}:{spec.name}"] = contents.describe(held, options.root)
  return found


def merge(older: Mapping[str, Any], newer: Results) -> Results:
  """Results of two evaluations of the same checkpoint; the later one where both have a name.

  What the older one has of a set stays only where it is of the same images (counts and limit):
  a figure of a trial must not stand beside the counts of the whole. Averages are made anew.
  """
  gone = (classification.AVERAGE, *(f"{name}/" for name in of_other_images(older, newer)))
  merged = {name: v for name, v in older.items() if not name.startswith(gone)} | newer
  return classification.average(merged) | merged


def of_other_images(older: Mapping[str, Any], newer: Results) -> list[str]:
  """FAMILY/SET of the sets of which both have results, but not of the same images."""
  found = []
  for name in newer:
    prefix, _, metric = name.rpartition("/")
    if metric == "rows" and prefix.count("/") == 1:  # FAMILY/SET
      counts = [f"{prefix}/{key}" for key in ("rows", "examples", "limit")]
      differ = any(older.get(count) != newer.get(count) for count in counts)
      if differ and any(key.startswith(f"{prefix}/") for key in older):
        found.append(prefix)
  return found


def _at_hand(specs: Sequence[Spec], options: Options) -> list[Spec]:
  """Sets of the zero-shot average that can be evaluated and are not asked for."""
  options = dataclasses.replace(options, download=False)  # these were not asked for
  asked = {spec.name for spec in specs if spec.family == "zero_shot"}
  found, missing = [], []
  for name in classification.PAPER:
    if name in asked:
      continue
    try:
      classification.check(name, options)
      found.append(Spec("zero_shot", name))
    except ValueError:
      missing.append(name)
  if missing:
    options.warn(
      f"zero_shot:average11: beside composition {len(missing)} of {len(classification.PAPER)} sets "
      f"are not at hand: {', '.join(missing)}"
    )
  return found
