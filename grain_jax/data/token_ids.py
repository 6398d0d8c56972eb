"""Token ids of texts, written into shards when data are built and read from there in training.

A record holds the ids of each of its texts as bytes, in one order (`records.encode`); the manifest
says under KEY which tokenizer they are of. Ids are those of `Tokenizer.encode` without pads, cut to
`context` tokens with the end kept: for a shorter context they are cut further, to the same ids that
encoding gives. Another tokenizer, or a longer context, encodes anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grain_jax import sentencepiece
from grain_jax import tokenizer as tokenizers

KEY = "tokens"  # in the manifest
NONE = "none"  # in the place of a tokenizer's folder: no ids are written
CONTEXT = 77  # tokens, CLIP's


@dataclasses.dataclass(frozen=True)
class Writer:
  """Encodes the texts of records for their shards."""

  tokenizer: tokenizers.Tokenizer
  about: Mapping[str, Any]  # as the manifest holds it

  def encode(self, texts: Sequence[str]) -> list[bytes]:
    """Ids of each text as bytes of `about['dtype']`."""
    kind = self.about["dtype"]
    return [ids.astype(kind).tobytes() for ids in self.tokenizer.encode_batch(texts)]


@functools.lru_cache(maxsize=4)
def make_writer(folder: str = "", context: int = CONTEXT) -> Writer | None:
  """The writer for a tokenizer; None where no ids are to be written.

  Args:
    folder: of a SentencePiece tokenizer, as `config.model.text.tokenizer`; '': CLIP's; NONE.
    context: longest text in tokens.

  Raises:
    ValueError: there is no tokenizer in the folder, or the context is too short; one line.
  """
  if folder == NONE:
    return None
  if folder:
    made: tokenizers.Tokenizer = sentencepiece.SentencePiece(folder, context)
  else:
    made = tokenizers.Tokenizer(context)
  small = made.vocabulary_size <= np.iinfo(np.uint16).max + 1
  about = {
    "tokenizer": folder,
    "hash": made.hash,
    "vocabulary": made.vocabulary_hash,  # of it all but the context
    "context": context,
    "dtype": "<u2" if small else "<i4",
  }
  return Writer(made, about)


@dataclasses.dataclass(frozen=True)
class Reader:
  """Ids that a shard holds, as a tokenizer would give them."""

  dtype: np.dtype
  context: int
  pads: bool
  pad: int

  def read(self, stored: bytes) -> np.ndarray:
    """[n] of one text, cut or padded to the context."""
    ids = np.frombuffer(stored, self.dtype)
    if len(ids) > self.context:
      ids = np.append(ids[: self.context - 1], ids[-1:])
    if self.pads:
      ids = np.pad(ids.astype(np.int32), (0, self.context - len(ids)), constant_values=self.pad)
    return ids


def why_not(about: Mapping[str, Any] | None, tokenizer: tokenizers.Tokenizer) -> str:
  """Why ids of a dataset cannot be used for a tokenizer; '' where they can."""
  if about is None:
    return "its shards hold no token ids"
  if about["vocabulary"] != tokenizer.vocabulary_hash:
    return f"its token ids are of another tokenizer ({about['tokenizer'] or 'CLIP'})"
  if about["context"] < tokenizer.context:
    return f"its token ids are for {about['context']} tokens a text, not {tokenizer.context}"
  return ""


def make_reader(about: Mapping[str, Any] | None, tokenizer: tokenizers.Tokenizer) -> Reader | None:
  """What reads the ids of a dataset for a tokenizer; None where texts are encoded anew."""
  if about is None or why_not(about, tokenizer):
    return None
  return Reader(np.dtype(about["dtype"]), tokenizer.context, tokenizer.pads, tokenizer.pad)


def describe(datasets: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> list[str]:
  """A line for each dataset whose texts are encoded while training.

  Args:
    datasets: {directory: what its manifest holds under KEY, or None}.
    tokenizer: of the run.
  """
  return [
    f"{directory}: texts are encoded while training, for {why}. Built anew with --overwrite, "
    "--tokenizer and --context as this run has them, it spares that."
    for directory, about in datasets.items()
    if (why := why_not(about, tokenizer))
  ]
