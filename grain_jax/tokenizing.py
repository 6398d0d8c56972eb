"""The tokenizer of a configuration, and its files in the folder of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable

import ml_collections
import numpy as np

from grain_jax import places, sentencepiece
from grain_jax import tokenizer as tokenizers

NONE = "none"  # in the place of its folder: a text tower whose tokenizer is not there
FOLDER = "tokenizer"  # within the folder of a model, named so in its config.json
# Files of a tokenizer that are copied.
_COPIED = (*sentencepiece.FILES, *sentencepiece.SETTINGS)


class IdsAlone(tokenizers.Tokenizer):
  """Of a text tower whose tokenizer is not there: texts are given as ids, or not at all."""

  pad = 1  # SigLIP's; nothing else is padded

  def encode(self, text: str | bytes) -> np.ndarray:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Iterable[str | bytes]) -> list[np.ndarray]:
    raise ValueError(_NOT_THERE)

  @property
  def vocabulary_hash(self) -> str:
    return NONE

  @property
  def hash(self) -> str:
    return NONE


_NOT_THERE = (
  f"config.model.text.tokenizer = {NONE!r}: the tokenizer of this text tower was not beside its "
  "weights. Import them again with --tokenizer=FOLDER or with its files beside them, or train with "
  "--config.model.text.tokenizer=FOLDER; load(...).encode_token_ids takes ids without it."
)


def make_or_ids(config: ml_collections.ConfigDict) -> tokenizers.Tokenizer:
  """`make`, or `IdsAlone` where the tokenizer is not there."""
  text = config.model.text
  if text.tokenizer == NONE:
    return IdsAlone(text.context, pads=text.kind == "siglip")
  return make(config)


def make(config: ml_collections.ConfigDict) -> tokenizers.Tokenizer:
  """The tokenizer that `config.model.text` names; for the tower of kind 'siglip' it pads.

  Raises:
    ValueError: there is none in the folder named, or it has more tokens than the text tower; one
      line.
  """
  text = config.model.text
  if text.tokenizer == NONE:
    raise ValueError(_NOT_THERE)
  pads = text.kind == "siglip"
  if text.tokenizer:
    made: tokenizers.Tokenizer = sentencepiece.SentencePiece(
      text.tokenizer, text.context, pads=pads
    )
  else:
    made = tokenizers.Tokenizer(text.context, pads=pads)
  if made.vocabulary_size > text.vocab_size:
    name = text.tokenizer or "CLIP's tokenizer"
    raise ValueError(
      f"config.model.text.vocab_size = {text.vocab_size} is fewer than the {made.vocabulary_size} "
      f"tokens of {name} (config.model.text.tokenizer). Name the tokenizer of this text tower, or "
      "raise vocab_size for a fresh one."
    )
  return made


def vocabulary_hash(config: ml_collections.ConfigDict) -> str:
  """Of all that decides the ids of a text but the context; where the folder is gone, its name."""
  text = config.model.text
  if text.tokenizer == NONE:
    return NONE
  if not text.tokenizer:
    return tokenizers.Tokenizer(text.context).vocabulary_hash
  try:
    return _vocabulary(text.tokenizer)
  except ValueError:  # `make` says it where texts are to be read
    return text.tokenizer


def _vocabulary(folder: str | os.PathLike) -> str:
  return sentencepiece.SentencePiece(folder).vocabulary_hash


def into_folder(
  config: ml_collections.ConfigDict, folder: str | os.PathLike
) -> ml_collections.ConfigDict:
  """The configuration for the config.json of a folder, with the tokenizer's files in the folder.

  They are copied to FOLDER and named relative to the folder, which may then be moved.

  Raises:
    ValueError: there is no tokenizer in the folder that the configuration names, or another one in
      `folder`; one line.
  """
  source = config.model.text.tokenizer
  if source in ("", NONE):
    return config
  sentencepiece.find_file(source)
  target = places.at(folder) / FOLDER
  if not any((target / name).is_file() for name in sentencepiece.FILES):
    files = [places.at(source) / name for name in reversed(_COPIED)]  # the vocabulary last
    contents = {file.name: file.read_bytes() for file in files if file.is_file()}
    remote = places.is_bucket(target)
    temporary = target if remote else target.with_name(f".{FOLDER}.tmp")  # all or nothing
    places.remove_tree(temporary)
    temporary.mkdir()
    for name, content in contents.items():
      (temporary / name).write_bytes(content)
    if not remote:
      places.remove_tree(target)
      temporary.rename(target)
  elif not target.samefile(places.at(source)) and _vocabulary(target) != _vocabulary(source):
    raise ValueError(
      f"{target} is another tokenizer than config.model.text.tokenizer = {source!r}. Use a new "
      "workdir, or the tokenizer of the old one."
    )
  written = ml_collections.ConfigDict(config.to_dict())
  written.model.text.tokenizer = FOLDER
  return written
