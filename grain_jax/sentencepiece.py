"""Text to token ids with a SentencePiece vocabulary from a folder (T5's), by `transformers`."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from grain_jax import tokenizer

FILES = ("tokenizer.json", "spiece.model")  # either holds the vocabulary; the first is preferred
END, UNKNOWN = "</s>", "<unk>"
_LOADING = threading.Lock()


def find_file(folder: str | os.PathLike) -> pathlib.Path:
  """The file of the vocabulary in a folder.

  Raises:
    ValueError: there is none; one line.
  """
  for name in FILES:
    if (pathlib.Path(folder) / name).is_file():
      return pathlib.Path(folder) / name
  raise ValueError(
    f"config.model.text.tokenizer = {str(folder)!r}: there is no {' or '.join(FILES)} in such a "
    "folder. Name the folder of a SentencePiece tokenizer, or leave the key empty for CLIP's."
  )


@functools.lru_cache(maxsize=8)
def _load(path: str, digest: str):
  """The `tokenizers` object of a file with this content."""
  del digest
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the caller's threads suffice
  if not path.endswith(".json") and importlib.util.find_spec("sentencepiece") is None:
    raise ValueError(
      f"{path} is read by the package sentencepiece, which is not installed: pip install "
      "sentencepiece, or put the tokenizer.json of the same tokenizer beside it."
    )
  import transformers  # slow to import: only where text is encoded

  try:
    if path.endswith(".json"):  # as the file says, whatever a class would make of it
      loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    else:
      loaded = transformers.T5Tokenizer.from_pretrained(
        os.path.dirname(path), local_files_only=True
      )
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
  except Exception as error:  # their readers raise many kinds
    reason = " ".join(str(error).split())[:200]
    raise ValueError(
      f"{path} is not read as a SentencePiece vocabulary ({reason}). Put a tokenizer.json of the "
      "`tokenizers` library beside it: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
    ) from error
  if backend.token_to_id(END) is None:
    raise ValueError(f"{path} has no token {END}, which ends each text of T5's tokenizer.")
  return backend


class SentencePiece(tokenizer.Tokenizer):
  """A SentencePiece tokenizer behind the interface of CLIP's: case is kept, `</s>` ends a text.

  Args:
    folder: with tokenizer.json or spiece.model.
    context: longest text in tokens, the end included; longer ones are cut, the end kept.

  Raises:
    ValueError: no such file, or of another kind; one line.
  """

  def __init__(self, folder: str | os.PathLike, context: int = 256):
    super().__init__(context)
    self.folder = pathlib.Path(folder)
    path = find_file(folder)
    self.vocabulary_hash = hashlib.sha256(path.read_bytes()).hexdigest()  # of its file
    with _LOADING:  # the lazy import of transformers is not safe in several threads
      self._backend = _load(str(path.absolute()), self.vocabulary_hash)
    self._end = self._backend.token_to_id(END)

  def with_context(self, context: int) -> SentencePiece:
    return SentencePiece(self.folder, context)

  @functools.cached_property
  def vocabulary_size(self) -> int:
    return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

  @functools.cached_property
  def hash(self) -> str:
    rule = f"{self.vocabulary_hash}|end={END}|context={self.context}|pad={tokenizer.PAD}"
    return hashlib.sha256(rule.encode()).hexdigest()

  def _encode_missing(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
    strings = [t.decode("utf-8", "replace") if isinstance(t, bytes) else t for t in texts]
    result = []
    for encoding in self._backend.encode_batch_fast(strings, add_special_tokens=False):
      ids = np.array([*encoding.ids[: self.context - 1], self._end], np.int32)
      ids.flags.writeable = False
      result.append(ids)
    for text, ids in zip(texts, result, strict=True):
      self._cache.put(text, ids)
    return result

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids up to the first end token."""
    kept: list[int] = []
    for i in map(int, ids):
      if i == self._end:
        break
      kept.append(i)
    return self._backend.decode(kept, skip_special_tokens=False)
