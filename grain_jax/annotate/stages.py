"""What a stage of the annotation is, and the table of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

# Command -> what it does, in a few words. The module has the command's name, and in it `FLAGS`
# (`sources.base.Flag`), `settings(values of the flags) -> JSON`, which checks them, `make(settings)
# -> Stage`, and, where they are needed, `check(settings, source, say=)`, called before anything
# else is spent, which gives what it spent; `ADDRESSES`, flags that are no paths; `NEUTRAL`,
# settings that change nothing in what is written, so that a run goes on with others.
STAGES: dict[str, str] = {
  "describe": "a language model that sees: descriptions of what is in a picture, and a caption",
  "ground": "a detector: a box for each description",
  "negatives": "false captions and false descriptions, each wrong in one thing",
}


class Item(NamedTuple):
  """A picture and what is known of it."""

  key: str
  image: bytes  # a JPEG, upright
  captions: list[str]
  descriptions: list[str]
  # {description, box (ymin, xmin, ymax, xmax) in [0, 1], score, negatives}; and `of`, the short
  # description, where a long one took its place
  regions: list[dict[str, Any]]
  negatives: list[dict[str, str]]  # {caption, kind}


class Result(NamedTuple):
  """What a stage says of a picture."""

  line: (
    dict[str, Any] | None
  )  # to be added to what is known of it (`sources.annotated`); None: it failed
  losses: list[tuple[str, str]] = []  # (what: pictures | descriptions | regions | ..., why)
  raw: list[Any] = []  # JSON: the models' replies as they came


class Stage(Protocol):
  """A stage, in the process that does it; models are loaded when it is first asked."""

  batch_size: int  # pictures that it takes at a time
  num_gpus: float  # of a worker, where the cluster has some

  def annotate(self, items: Sequence[Item]) -> list[Result]:
    """A result for each picture, in their order; errors of one picture are its losses."""

  def totals(self) -> Mapping[str, float]:
    """What was spent since it was last asked: tokens, requests, ..."""


def module(name: str) -> ModuleType:
  """The module of a stage."""
  return importlib.import_module(f"grain_jax.annotate.{name}")


def make(name: str, settings: Mapping[str, Any]) -> Stage:
  """A stage of its settings, in any process."""
  return module(name).make(settings)
