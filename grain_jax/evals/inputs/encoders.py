"""What an evaluation knows of a model: functions from NumPy to NumPy, and how it sees an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from grain_jax import tokenizer as tokenizers
from grain_jax.data import decoding
from grain_jax.evals.inputs.process_shard import SINGLE_PROCESS, ProcessShard


def _no_patches(images: np.ndarray) -> np.ndarray:
  raise ValueError(f"these encoders give no patch features (asked for {len(images)} images).")


def _no_token_ids(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
  raise ValueError(f"these encoders take no token ids (asked for {len(ids)} texts).")


@dataclasses.dataclass(frozen=True)
class Encoders:
  """The encoders of one model. Each takes any number of rows and gives back one result a row.

  All embeddings are float32 and L2-normalised; Q = 0 for a model without region queries.
  """

  image: Callable[[np.ndarray], np.ndarray]  # u8 [n, size, size, 3] -> [n, E]
  text: Callable[[Sequence[str]], np.ndarray]  # n texts -> [n, E]
  # u8 [n, size, size, 3] -> [n, Q, E] and boxes (cx, cy, w, h) in [0, 1], f32 [n, Q, 4]
  regions: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  # u8 [n, size, size, 3] -> [n, rows, columns, E]: patches in the space of the texts
  patches: Callable[[np.ndarray], np.ndarray] = _no_patches
  # ids i32 [n, L] and mask [n, L] of texts -> [n, E]
  token_ids: Callable[[np.ndarray, np.ndarray], np.ndarray] = _no_token_ids
  size: int = 224  # side of the images in pixels
  resize: str = "squash"  # how images are brought to that size: one of `transforms.RESIZES`
  interpolation: str = "bicubic"  # by which: one of `transforms.INTERPOLATIONS`
  max_pixels: int = decoding.MAX_PIXELS  # of the largest image that is read
  batch_size: int = 256  # images or rows of text in one call of the compiled program
  context: int = 77  # tokens of a text, start and end included; longer ones are cut
  tokenizer: tokenizers.Tokenizer = dataclasses.field(default_factory=tokenizers.Tokenizer)
  has_regions: bool = True  # whether there are region queries
  templates: tuple[str, ...] = ("a photo of a {}.",)  # prompts where a dataset brings none
  # Of the text encoder: equal only where equal texts embed equally; '' where it cannot be told.
  fingerprint: Callable[[], str] = lambda: ""
  shard: ProcessShard = SINGLE_PROCESS  # of the images, that this process reads

  def require_regions(self, what: str) -> None:
    """Raises a one-line ValueError where `what` needs region queries and there are none."""
    if not self.has_regions:
      raise ValueError(
        f"{what} needs region queries: this model has no decoder (method 'clip'). Give a GRAIN "
        "checkpoint, or leave it out."
      )
