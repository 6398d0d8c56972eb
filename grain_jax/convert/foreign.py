"""What a foreign checkpoint is, once read: weights, what it says of the model, and its table."""

from __future__ import annotations

import dataclasses
import logging
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from grain_jax import sentencepiece, tokenizer, tokenizing
from grain_jax.convert import layout

# Pixels of OpenAI's CLIP (Radford et al., 2021), in [0, 1], and how it sees an image.
CLIP_PIXELS = {
  "model.image.mean": (0.48145466, 0.4578275, 0.40821073),
  "model.image.std": (0.26862954, 0.26130258, 0.27577711),
  "data.eval_resize": "center_crop",
}


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
  """A checkpoint of another project; `facts`, `assumed` and `carried` map config keys to values."""

  where: str  # the file, for errors
  state: layout.State  # its weights, dead ones left out
  rules: Callable[[ml_collections.ConfigDict], Sequence[layout.Rule]]  # the table for a model
  facts: Mapping[str, Any]  # what the file says or its shapes show
  assumed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # conventions, not in it
  carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # a whole configuration
  image_size: int | None = None  # in pixels, where positions are to be resized to another
  part: str | None = None  # the one tower that it is, 'image' or 'text'; None: a whole model


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Sizes seen in a state dict, with errors that say what it lacks."""

  state: layout.State
  where: str
  what: str  # the architecture that it should be, for errors

  def shape_of(self, key: str, rank: int) -> tuple[int, ...]:
    """Shape of a weight that every such model has.

    Raises:
      ValueError: there is no such weight, or it has another number of dimensions.
    """
    if key not in self.state:
      raise ValueError(
        f"{self.where} is not {self.what}: it lacks {key}; it has "
        f"{layout.few(list(self.state)) or 'no weights'}."
      )
    shape = self.state[key].shape
    if len(shape) != rank or 0 in shape:
      raise ValueError(f"{self.where} is not {self.what}: {key} has the shape {shape}.")
    return shape

  def depth(self, pattern: str) -> int:
    """1 + the largest number that stands for the group of the regex, at the start of a key."""
    found = [re.match(pattern, key) for key in self.state]
    return 1 + max((int(match[1]) for match in found if match), default=0)

  def pixels(self, positions: int, patch: int) -> int:
    """Side of the image of which `positions` are a class token and a square of patches."""
    side = round((positions - 1) ** 0.5)
    if side < 1 or side * side != positions - 1:
      raise ValueError(
        f"{self.where} has {positions} positions, which is not a class token and a square of "
        "patches."
      )
    return side * patch


def tokenizer_in(folder: pathlib.Path) -> str:
  """The folder, for `config.model.text.tokenizer`; where it has none, a warning and 'none'."""
  if any((folder / name).is_file() for name in sentencepiece.FILES):
    return str(folder)
  warn_without_tokenizer(f"{folder} has no {' or '.join(sentencepiece.FILES)}")
  return tokenizing.NONE


def warn_without_tokenizer(why: str) -> None:
  """Warns that a text tower is imported that takes token ids alone."""
  logging.getLogger(__name__).warning(
    "%s: the model takes texts as token ids alone. With the tokenizer (--tokenizer=FOLDER, or its "
    "files beside the weights) it reads texts.",
    why,
  )


def words(text: str) -> frozenset[str]:
  """The words of a text, for long sets of names."""
  return frozenset(text.split())


def channels(value: Any, name: str) -> tuple[float, ...]:
  """Three numbers, a mean or (by its name) a deviation of an image's channels.

  Raises:
    ValueError: it is something else; one line.
  """
  numbers = isinstance(value, list) and len(value) == 3
  if not numbers or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in value):
    raise ValueError(f"{name} = {value!r} is not 3 numbers, of red, green and blue.")
  if name.endswith("std") and min(value) <= 0:
    raise ValueError(f"{name} = {value!r} divides by what is not positive.")
  return tuple(float(v) for v in value)


def check_vocabulary(size: int, *, where: str) -> None:
  """Raises where the token embedding is of another vocabulary than `grain_jax.tokenizer` has."""
  if size != tokenizer.VOCAB_SIZE:
    raise ValueError(
      f"{where} has a vocabulary of {size} tokens; only CLIP's {tokenizer.VOCAB_SIZE} are known."
    )
