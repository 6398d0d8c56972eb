"""Text to token ids with a vocabulary from a folder (T5's, SigLIP's, Gemma's), by `transformers`.

What becomes of a text is said by `tokenizer_class` in the folder's tokenizer_config.json:
  SiglipTokenizer: lower-cased, ASCII punctuation removed, white space collapsed (SigLIP). With
    tokenizer.json a text that spells a special token is text; spiece.model: as transformers has it.
  GemmaTokenizer, Siglip2Tokenizer: lower-cased (SigLIP 2).
  another, or no such file: as it is (T5).
Each text ends with the folder's end token.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import string
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from grain_jax import local_files, places, textfiles, tokenizer

FILES = ("tokenizer.json", "spiece.model")  # either holds the vocabulary; the first is preferred
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_SPACE = "\u2581"  # SentencePiece's
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LOADING = threading.Lock()


class Kind(NamedTuple):
  """What a class of tokenizers does with a text, and its tokens where the folder names none."""

  name: str  # 't5', 'siglip' or 'gemma'
  end: str
  pad: str


_T5 = Kind("t5", end="</s>", pad="<pad>")
_SIGLIP = Kind("siglip", end="</s>", pad="</s>")
_GEMMA = Kind("gemma", end="<eos>", pad="<pad>")
_CLASSES = {"SiglipTokenizer": _SIGLIP, "GemmaTokenizer": _GEMMA, "Siglip2Tokenizer": _GEMMA}


def find_file(folder: str | os.PathLike) -> pathlib.Path:
  """The file of the vocabulary in a folder.

  Raises:
    ValueError: there is none; one line.
  """
  for name in FILES:
    if (places.at(folder) / name).is_file():
      return places.at(folder) / name
  raise ValueError(
    f"config.model.text.tokenizer = {str(folder)!r}: there is no {' or '.join(FILES)} in such a "
    "folder. Name the folder of a SentencePiece tokenizer, or leave the key empty for CLIP's."
  )


def read_kind(folder: str | os.PathLike) -> Kind:
  """What the tokenizer of a folder does, by its class; end and pad as its files name them.

  Raises:
    ValueError: a file is damaged, or it pads on the left; one line.
  """
  values: dict[str, Any] = {}
  for name in reversed(SETTINGS):  # the first has the last word
    path = places.at(folder) / name
    if path.is_file():
      read = textfiles.read_json(path)
      if not isinstance(read, dict):
        raise ValueError(f"{path} is not a JSON object.")
      values |= read
  kind = _CLASSES.get(str(values.get("tokenizer_class")).removesuffix("Fast"), _T5)
  if kind is _T5:
    return kind
  if values.get("padding_side", "right") != "right":
    raise ValueError(
      f"{folder}: padding_side = {values['padding_side']!r} in its {SETTINGS[0]}, but SigLIP's "
      "texts are padded on the right. Change it there."
    )
  if not values.get("do_lower_case", True):
    raise ValueError(
      f"{folder}: do_lower_case = false in its {SETTINGS[0]}, but SigLIP's texts are lower-cased."
    )

  def token(key: str, default: str) -> str:
    found = values.get(key) or default
    return str(found.get("content", default) if isinstance(found, dict) else found)

  return kind._replace(end=token("eos_token", kind.end), pad=token("pad_token", kind.pad))


def canonicalize(text: str) -> str:
  """SigLIP's form of a text: lower case, no ASCII punctuation, white space collapsed."""
  text = text.replace(_SPACE, " ").lower().translate(_NO_PUNCTUATION)
  return re.sub(r"\s+", " ", text).strip()


@functools.lru_cache(maxsize=8)
def _load(path: str, digest: str, kind: Kind):
  """The `tokenizers` object of a file with this content; of SigLIP's .model its own tokenizer."""
  del digest
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the caller's threads suffice
  if not path.endswith(".json") and kind.name == "gemma":
    raise ValueError(f"{path}: of this tokenizer_class the tokenizer.json is read. Put it beside.")
  if not path.endswith(".json") and importlib.util.find_spec("sentencepiece") is None:
    raise ValueError(
      f"{path} is read by the package sentencepiece, which is not installed: pip install "
      "sentencepiece, or put the tokenizer.json of the same tokenizer beside it."
    )
  import transformers  # slow to import: only where text is encoded

  try:
    if not path.endswith(".json") and kind.name == "siglip":
      return transformers.SiglipTokenizer.from_pretrained(
        os.path.dirname(path), local_files_only=True
      )
    if path.endswith(".json"):  # as the file says, whatever a class would make of it
      loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    else:
      loaded = transformers.T5Tokenizer.from_pretrained(
        os.path.dirname(path), local_files_only=True
      )
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if kind.name == "gemma":
      from tokenizers import normalizers

      given = [] if backend.normalizer is None else [backend.normalizer]
      backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *given])
  except Exception as error:  # their readers raise many kinds
    reason = " ".join(str(error).split())[:200]
    raise ValueError(
      f"{path} is not read as a SentencePiece vocabulary ({reason}). Put a tokenizer.json of the "
      "`tokenizers` library beside it: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
    ) from error
  return backend


class SentencePiece(tokenizer.Tokenizer):
  """A tokenizer of a folder behind the interface of CLIP's; the folder's end token ends a text.

  Args:
    folder: with tokenizer.json or spiece.model; what else is in it is said above.
    context: longest text in tokens, the end included; longer ones are cut, the end kept.
    pads: every text is padded to the context with the folder's pad.

  Raises:
    ValueError: no such file, or of another kind; one line.
  """

  def __init__(self, folder: str | os.PathLike, context: int = 256, *, pads: bool = False):
    super().__init__(context, pads=pads)
    self.folder = places.at(folder)
    folder = local_files.fetch(folder)  # which `transformers` opens itself
    path = find_file(folder)
    self._kind = kind = read_kind(folder)
    digest = hashlib.sha256(path.read_bytes())
    if kind is not _T5:  # its class decides too
      digest.update(repr(tuple(kind)).encode())
    self.vocabulary_hash = digest.hexdigest()  # of its file, and what is done to a text
    with _LOADING:  # the lazy import of transformers is not safe in several threads
      self._backend = _load(str(path.absolute()), self.vocabulary_hash, kind)
    self._end = self._id(kind.end, path, "ends each text")
    if kind is not _T5:
      self.pad = self._id(kind.pad, path, "pads")

  def _id(self, token: str, path: pathlib.Path, what: str) -> int:
    found = self._vocabulary.get(token)
    if found is None:
      raise ValueError(f"{path} has no token {token}, which {what} here.")
    return found

  @functools.cached_property
  def _vocabulary(self) -> dict[str, int]:
    return self._backend.get_vocab()  # with added tokens

  def with_context(self, context: int) -> SentencePiece:
    return SentencePiece(self.folder, context)

  @functools.cached_property
  def vocabulary_size(self) -> int:
    return 1 + max(self._vocabulary.values())

  @functools.cached_property
  def hash(self) -> str:
    rule = f"{self.vocabulary_hash}|end={self._kind.end}|context={self.context}|pad={self.pad}"
    rule += "|padded" if self.pads else ""
    return hashlib.sha256(rule.encode()).hexdigest()

  def _encode_missing(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
    strings = [t.decode("utf-8", "replace") if isinstance(t, bytes) else t for t in texts]
    return self._keep(texts, [[*ids[: self.context - 1], self._end] for ids in self._ids(strings)])

  def _ids(self, strings: list[str]) -> list[list[int]]:
    """Without ends."""
    if not hasattr(self._backend, "encode_batch_fast"):  # SiglipTokenizer does it all
      return [self._backend.encode(s, add_special_tokens=False) for s in strings]
    if self._kind.name == "siglip":
      strings = [canonicalize(s) for s in strings]
    encodings = self._backend.encode_batch_fast(strings, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids up to the first end token."""
    kept: list[int] = []
    for i in map(int, ids):
      if i == self._end:
        break
      kept.append(i)
    return self._backend.decode(kept, skip_special_tokens=False)
