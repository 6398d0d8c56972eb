"""The embedded images (`grain_jax.data.scenes`): drawn, not read."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from grain_jax.data.sources import base

BLOCK = 1024  # scenes a block


def flags() -> tuple[base.Flag, ...]:
  """A flag for each setting of the scenes."""
  from grain_jax.data.scenes import scenes

  found = []
  for field in dataclasses.fields(scenes.SceneSettings):
    default = field.default
    if isinstance(default, bool):
      found.append(base.Flag(field.name, "true or false", default, _boolean))
    elif isinstance(default, int | float | str):
      kind = type(default)
      found.append(base.Flag(field.name, f"of the scenes: {kind.__name__}", default, kind))
  names = "concepts by name, with commas between, instead of --concepts"
  return (*found, base.Flag("names", names, ""))


def _boolean(text: str) -> bool:
  if text.lower() not in ("true", "false"):
    raise ValueError(f"{text!r} is neither true nor false")
  return text.lower() == "true"


def source(settings: Any = None, **values: Any) -> base.Source:
  """The embedded images.

  Args:
    settings: a `scenes.SceneSettings`, or its fields as JSON has them; or
    **values: fields of it, `names` as a text with commas between.
  """
  from grain_jax.data.scenes import concepts
  from grain_jax.data.scenes import scenes as scenes_lib

  if settings is None:
    names = tuple(n.strip() for n in values.pop("names", "").split(",") if n.strip())
    settings = scenes_lib.SceneSettings(**values, names=names)
  elif not isinstance(settings, scenes_lib.SceneSettings):
    settings = scenes_lib.from_dict(settings)
  scenes = scenes_lib.Scenes(settings)
  sizes = scenes.split_sizes
  known = dataclasses.asdict(settings)
  recipe = {"kind": "scenes", "arguments": {"settings": dict(known)}}
  if not settings.negatives:
    del known["negatives"]  # a setting that came later: data built before are of equal settings
  else:
    known["false_texts"] = 3  # without unseen pairs, and some exchanged between two

  def blocks(scratch: pathlib.Path) -> Iterator[base.Block]:
    for split in scenes_lib.SPLITS:
      for start in range(0, sizes[split], BLOCK):
        yield {"split": split, "start": start, "stop": min(start + BLOCK, sizes[split])}

  def read(block: base.Block, scratch: pathlib.Path) -> Iterator[base.Item]:
    for index in range(block["start"], block["stop"]):
      yield block["split"], scenes.record(block["split"], index)

  return base.Source(
    name="scenes",
    settings=known,
    read=read,
    blocks=blocks,
    recipe=recipe,
    about={
      "licence": "CC BY-SA 4.0",
      "attribution": concepts.attribution(),
      "class_names": scenes_lib.class_names(settings),
      "unseen_pairs": scenes_lib.unseen_pairs(settings),
      "descriptors": scenes_lib.descriptors(settings),
      "mask_names": scenes_lib.concept_names(settings),
    },
    total=sum(sizes.values()),
    with_mask=settings.masks,
    with_label=True,
    check_image=False,
  )
