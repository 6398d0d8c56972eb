"""What a build may ask of every source: rules for regions, images left out, smaller pictures."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from grain_jax.data.sources import annotated, base, exclusion, region_rules

FLAGS = (
  base.Flag(
    "max_side", "store images no larger than so many pixels a side; 0: as they are", 0, int
  ),
  *region_rules.FLAGS,
  *exclusion.FLAGS,
  *annotated.FLAGS,
)


def apply(source: base.Source, options: Mapping[str, Any]) -> base.Source:
  """The source with the options that are not the default.

  Args:
    source: as its module gives it.
    options: JSON, by the names of `FLAGS`; what is missing is the default.
  """
  defaults = {flag.name: flag.default for flag in FLAGS}
  unknown = options.keys() - defaults.keys()
  if unknown:
    raise ValueError(f"--{min(unknown)} is no option of a source.")
  asked = {name: value for name, value in options.items() if value != defaults[name]}
  if not asked:
    return source
  values = {**defaults, **asked}
  if values["max_side"] < 0:
    raise ValueError(f"--max_side = {values['max_side']}: no number of pixels. Use 0 for all.")
  names = [field.name for field in dataclasses.fields(region_rules.Rules)]
  rules = region_rules.Rules(**{name: values[name] for name in names})
  left_out = exclusion.Exclusion.from_flags(
    values["exclude"], values["exclude_ids"], values["exclude_distance"]
  )
  settings = {**source.settings, **rules.settings()}
  if values["max_side"]:
    settings["max_side"] = values["max_side"]
  more = None if not values["annotated"] else annotated.Annotated.from_flag(values["annotated"])
  parts = [part for part in (left_out, more) if part is not None]
  for part in parts:
    settings |= part.settings()

  def prepare(scratch: pathlib.Path) -> None:
    if source.prepare is not None:
      source.prepare(scratch)
    for part in parts:
      part.prepare(scratch)

  recipe = None if source.recipe is None else {**source.recipe, "options": asked}
  return dataclasses.replace(
    source,
    settings=settings,
    prepare=prepare,
    recipe=recipe,
    max_side=values["max_side"],
    rules=rules if rules.settings() else None,
    exclusion=left_out,
    annotated=more,
  )
