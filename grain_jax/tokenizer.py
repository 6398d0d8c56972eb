"""Text to token ids with CLIP's vocabulary, and packing of several texts into one row.

The vocabulary is OpenAI's byte-pair encoding of CLIP (MIT licence, `grain_jax/vocabulary`), read by
`transformers`. Text is repaired by `ftfy`, unescaped, lower-cased and its white space collapsed, as
in the original, so that the ids are the original's.

A packed row holds the texts of one image (or many prompts) one after the other. `segments` tells
them apart for the attention mask, `positions` restart at 0 in each, `ends` points at each text's
last token, where the text tower reads its feature.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import os
import pathlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ftfy
import numpy as np

VOCABULARY = pathlib.Path(__file__).parent / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
VOCAB_SIZE = 49408
START = 49406  # id of <|startoftext|>
END = 49407  # id of <|endoftext|>
PAD = 0
_MERGES = 49152 - 256 - 2  # of the file's merges, those that CLIP uses
_CLEAN_VERSION = "ftfy+unescape2+strip+lower"  # part of the hash: change it with `clean`
_SLOTS = 1 << 16  # texts whose ids are kept: about 25 MB
_NOTHING = np.zeros(0, np.int32)


class Packed(NamedTuple):
  """Texts packed into rows. A leading [N] axis where several rows were packed at once."""

  tokens: np.ndarray  # i32 [L], 0 pads
  segments: np.ndarray  # i32 [L], 1 + slot of the text a token belongs to; 0 is padding
  positions: np.ndarray  # i32 [L], within the token's own text
  ends: np.ndarray  # i32 [T], column of each text's last token; 0 if absent
  text_mask: np.ndarray  # bool [T], the text exists and fits
  dropped: int | np.ndarray  # texts that did not fit


class PackedRows(NamedTuple):
  """Many texts packed into as few rows as first-fit finds, and where each one went."""

  tokens: np.ndarray  # i32 [N, L]
  segments: np.ndarray  # i32 [N, L]
  positions: np.ndarray  # i32 [N, L]
  ends: np.ndarray  # i32 [N, T]
  text_mask: np.ndarray  # bool [N, T]
  row: np.ndarray  # i64 [texts]
  slot: np.ndarray  # i64 [texts]: embeddings [N, T, E] -> embeddings[row, slot]


def clean(text: str) -> str:
  """Repairs, unescapes and lower-cases `text` and collapses its white space, as CLIP does."""
  # ftfy and the unescaping leave printable ASCII without "&" as it is: most captions.
  if not (text.isascii() and text.isprintable() and "&" not in text):
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return " ".join(text.split()).lower()


_LOADING = threading.Lock()


def _backend():
  """The `tokenizers` object of the vocabulary; threads that ask at once wait for one loading."""
  with _LOADING:
    return _load_backend()


@functools.lru_cache(maxsize=1)
def _load_backend():
  """Builds it with `transformers`, whose lazy import is not safe in several threads."""
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the caller's threads suffice
  import transformers  # slow to import: only where text is encoded
  from tokenizers import normalizers

  lines = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8").split("\n")
  merges = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]
  alphabet = _byte_alphabet()
  words = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
  words += ["<|startoftext|>", "<|endoftext|>"]
  tokenizer = transformers.CLIPTokenizer(
    vocab={word: i for i, word in enumerate(words)}, merges=merges
  )
  backend = tokenizer.backend_tokenizer
  backend.normalizer = normalizers.Sequence([])  # `clean` has done it
  return backend


def _byte_alphabet() -> list[str]:
  """The 256 printable characters that stand for bytes, in the order of their ids.

  Printable bytes of Latin-1 stand for themselves and come first; the others follow from U+0100.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def vocabulary_json() -> str:
  """The tokenizer in the format of the `tokenizers` library: vocabulary, merges, rules."""
  return _backend().to_str()


class TextCache:
  """Ids of texts, each in the one slot that its hash names, in the place of what was there.

  An insertion writes one slot however many texts came before, and threads need no lock. Classes and
  templates come again, and the texts of small data; those of large data cost the one write.
  """

  def __init__(self, slots: int = _SLOTS):
    self._slots: list[tuple[str | bytes, np.ndarray] | None] = [None] * slots

  def get(self, text: str | bytes) -> np.ndarray | None:
    """The ids of `text`; None where they are not here."""
    entry = self._slots[hash(text) % len(self._slots)]
    return entry[1] if entry is not None and entry[0] == text else None

  def put(self, text: str | bytes, ids: np.ndarray) -> None:
    """Keeps the ids of `text`."""
    self._slots[hash(text) % len(self._slots)] = (text, ids)


class Tokenizer:
  """CLIP's tokenizer. Some encoded texts are kept in memory, see `TextCache`.

  Args:
    context: longest text in tokens, start and end included; longer ones are cut, the end kept.
    pads: every text is padded to the context, with pads that are tokens like others (SigLIP).
  """

  pad = PAD  # id

  def __init__(self, context: int = 77, *, pads: bool = False):
    if context < 2:
      raise ValueError(
        f"context = {context}: a text needs a start and an end token. Use at least 2 (CLIP: 77)."
      )
    self.context, self.pads = context, pads
    self._cache = TextCache()

  def with_context(self, context: int) -> Tokenizer:
    """The same tokenizer for longer or shorter texts, without pads: it tells how long they are."""
    return Tokenizer(context)

  @property
  def vocabulary_size(self) -> int:
    """1 + the largest id that a text may hold."""
    return VOCAB_SIZE

  @functools.cached_property
  def vocabulary_hash(self) -> str:
    """Hex sha256 of all that decides which ids a text gets but the context."""
    return hashlib.sha256(VOCABULARY.read_bytes() + _CLEAN_VERSION.encode()).hexdigest()

  @functools.cached_property
  def hash(self) -> str:
    """Hex sha256 of the vocabulary and all that decides which ids a text gets."""
    digest = hashlib.sha256(VOCABULARY.read_bytes())
    digest.update(f"|{_CLEAN_VERSION}|context={self.context}|pad={PAD}".encode())
    digest.update(b"|padded" if self.pads else b"")
    return digest.hexdigest()

  def encode(self, text: str | bytes) -> np.ndarray:
    """Ids of one text with start and end, cut or padded to the context: i32 [n], read-only."""
    ids = self._cache.get(text)
    return self._encode_missing([text])[0] if ids is None else ids

  def encode_batch(self, texts: Iterable[str | bytes]) -> list[np.ndarray]:
    """`encode` of each text; bytes are UTF-8."""
    texts = list(texts)
    cached = [self._cache.get(text) for text in texts]
    missing = list(dict.fromkeys(t for t, ids in zip(texts, cached, strict=True) if ids is None))
    if not missing:
      return cached  # type: ignore[return-value]
    fresh = dict(zip(missing, self._encode_missing(missing), strict=True))
    return [fresh[t] if ids is None else ids for t, ids in zip(texts, cached, strict=True)]

  def _encode_missing(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
    strings = [t.decode("utf-8", "replace") if isinstance(t, bytes) else t for t in texts]
    encodings = _backend().encode_batch_fast([clean(s) for s in strings], add_special_tokens=False)
    return self._keep(texts, [[START, *e.ids[: self.context - 2], END] for e in encodings])

  def _keep(self, texts: Sequence[str | bytes], found: Iterable[list[int]]) -> list[np.ndarray]:
    """Read-only arrays of the ids of each text, padded if need be; in the cache too."""
    result = []
    for text, numbers in zip(texts, found, strict=True):
      if self.pads:
        numbers += [self.pad] * (self.context - len(numbers))
      ids = np.array(numbers, np.int32)
      ids.flags.writeable = False
      result.append(ids)
      self._cache.put(text, ids)
    return result

  def tokenize(self, texts: Sequence[str]) -> np.ndarray:
    """Ids of each text, a row each, padded (CLIP: with 0): i32 [texts, context]."""
    rows = np.full((len(texts), self.context), self.pad, np.int32)
    for row, ids in zip(rows, self.encode_batch(texts), strict=True):
      row[: len(ids)] = ids
    return rows

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids up to the first end token, without start and end, white space collapsed."""
    kept: list[int] = []
    for i in map(int, ids):
      if i == END:
        break
      if i != START:
        kept.append(i)
    text = _backend().decode(kept, skip_special_tokens=False)
    return " ".join(text.replace("</w>", " ").split())

  def pack(
    self,
    texts: Sequence[str | None],
    *,
    row_length: int,
    scores: Sequence[float] | None = None,
    regions: int,
    negatives: int = 0,
  ) -> Packed:
    """Packs one image's texts into one row.

    The caption is kept, cut to the row if need be. Of the others, as long as they do not fit, the
    description of lowest score is dropped, and after the descriptions the last negative.

    Args:
      texts: caption, `regions` descriptions, `negatives` negatives; None or blank: absent. Missing
        texts at the end count as absent.
      row_length: tokens in the row (L).
      scores: of the descriptions, one each; default: all equal, the last one goes first.
      regions: slots for descriptions (R).
      negatives: slots for negatives (K).

    Returns:
      Arrays of one row, T = 1 + R + K.
    """
    slots = 1 + regions + negatives
    if len(texts) > slots:
      raise ValueError(
        f"{len(texts)} texts for {slots} slots (1 caption, {regions} descriptions, {negatives} "
        "negatives): raise regions or negatives, or hand over fewer."
      )
    padded = [*texts, *[None] * (slots - len(texts))]
    weights = np.zeros((1, regions))
    if scores is not None:
      weights[0, : len(scores)] = scores
    packed = self.pack_batch([padded], row_length=row_length, scores=weights)
    return Packed(*(value[0] for value in packed[:-1]), dropped=int(packed.dropped[0]))

  def pack_batch(
    self,
    texts: Sequence[Sequence[str | bytes | None]],
    *,
    row_length: int,
    scores: np.ndarray,
    region_negatives: int = 0,
    known: Sequence[Sequence[np.ndarray | None]] | None = None,
  ) -> Packed:
    """`pack` of many images at once, without a loop over them.

    Negatives of regions go first where texts do not fit, the last one first: without them a
    description still means something.

    Args:
      texts: [N][T] texts in the order caption, R descriptions, K negatives, and of each region its
        negatives; None or blank: absent.
      row_length: tokens in a row (L).
      scores: of the descriptions, [N, R].
      region_negatives: slots a region for negatives.
      known: [N][T] ids of the texts, as `encode` would give them; None: to be encoded.

    Returns:
      Arrays [N, ...]; `dropped` i32 [N].
    """
    if row_length < 2:
      raise ValueError(f"row_length = {row_length}: a text needs at least 2 tokens. Raise it.")
    slots = len(texts[0]) if texts else 1
    flat = [
      text if text is not None and not text.isspace() else "" for row in texts for text in row
    ]
    if known is None:
      ids = self.encode_batch(flat)
    else:
      ids = self._encode_unknown(flat, [ids for row in known for ids in row])
    lengths = np.array([len(i) if t else 0 for t, i in zip(flat, ids, strict=True)], np.int64)
    lengths = lengths.reshape(len(texts), slots)
    lengths[:, 0] = np.minimum(lengths[:, 0], row_length)
    kept = _select_fitting(lengths, np.asarray(scores, np.float64), row_length, region_negatives)
    dropped = ((lengths > 0) & ~kept).sum(axis=1, dtype=np.int32)
    lengths = np.where(kept, lengths, 0)
    token_ids = [_truncate(i, n) for i, n in zip(ids, lengths.ravel(), strict=True) if n]
    return Packed(*_lay_out(token_ids, lengths, row_length), dropped=dropped)

  def _encode_unknown(
    self, texts: Sequence[str | bytes], known: list[np.ndarray | None]
  ) -> list[np.ndarray]:
    """Ids of each text, those known as they are; of an absent text ("") nothing that counts."""
    places = [i for i, (t, ids) in enumerate(zip(texts, known, strict=True)) if t and ids is None]
    found: list[Any] = [_NOTHING if ids is None else ids for ids in known]
    for place, ids in zip(places, self.encode_batch([texts[i] for i in places]), strict=True):
      found[place] = ids
    return found

  def pack_texts(self, texts: Sequence[str], *, row_length: int, texts_per_row: int) -> PackedRows:
    """Packs many texts (prompts of a classifier), each into the first row that has room.

    Args:
      texts: any number; a text longer than a row is cut to it, an empty one is start and end.
      row_length: tokens in a row (L).
      texts_per_row: most texts in a row (T).

    Returns:
      N rows, and the row and slot of each text in the order given.
    """
    if row_length < 2 or texts_per_row < 1:
      raise ValueError(
        f"row_length = {row_length}, texts_per_row = {texts_per_row}: a row needs at least 2 "
        "tokens and 1 text. Raise them."
      )
    ids = [_truncate(i, min(len(i), row_length)) for i in self.encode_batch(texts)]
    sizes = np.array([len(i) for i in ids], np.int64)
    shortest = sizes.min(initial=row_length)
    free, used = np.full(len(ids), row_length), np.zeros(len(ids), np.int64)
    row, slot = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    first = rows = 0  # the first row that may still take a text; rows begun
    for i, size in enumerate(sizes):
      fits = free[first : rows + 1] >= size
      row[i] = first + int(np.argmax(fits & (used[first : rows + 1] < texts_per_row)))
      slot[i] = used[row[i]]
      free[row[i]] -= size
      used[row[i]] += 1
      rows = max(rows, int(row[i]) + 1)
      while first < rows and (free[first] < shortest or used[first] == texts_per_row):
        first += 1
    lengths = np.zeros((rows, texts_per_row), np.int64)
    lengths[row, slot] = sizes
    order = np.lexsort((slot, row))
    return PackedRows(*_lay_out([ids[i] for i in order], lengths, row_length), row=row, slot=slot)


def _truncate(ids: np.ndarray, length: int) -> np.ndarray:
  return ids if len(ids) == length else np.append(ids[: length - 1], ids[-1])


def _select_fitting(
  lengths: np.ndarray, scores: np.ndarray, row_length: int, region_negatives: int
) -> np.ndarray:
  """Which texts stay: bool [N, T]. `lengths` [N, T] with 0 for absent, `scores` [N, R]."""
  count, slots = lengths.shape
  regions = scores.shape[1]
  # The order of dropping: negatives of regions from the last, descriptions by score from the lowest
  # (the later first where equal), then negatives of the caption from the last. Each goes only while
  # what is left is longer than the row.
  scores = np.where(np.isnan(scores), -np.inf, scores)[:, ::-1]
  order = regions - np.argsort(scores, axis=1, kind="stable")  # slots 1..R
  last = slots - regions * region_negatives  # of the negatives of captions, and one more
  of_captions = np.broadcast_to(np.arange(last - 1, regions, -1), (count, last - 1 - regions))
  of_regions = np.broadcast_to(np.arange(slots - 1, last - 1, -1), (count, slots - last))
  order = np.concatenate([of_regions, order, of_captions], axis=1)
  going = np.take_along_axis(lengths, order, axis=1)
  left = lengths.sum(axis=1, keepdims=True) - (np.cumsum(going, axis=1) - going)
  kept = lengths > 0
  np.put_along_axis(kept, order, (going > 0) & (left <= row_length), axis=1)
  return kept


def _lay_out(token_ids: Sequence[np.ndarray], lengths: np.ndarray, row_length: int) -> tuple:
  """tokens, segments, positions [N, L], ends, text_mask [N, T] of texts laid one after the other.

  Args:
    token_ids: ids of the texts whose length is positive, row by row, in the order of the slots.
    lengths: i64 [N, T], 0 for absent.
    row_length: L.
  """
  mask = lengths > 0
  starts = np.cumsum(lengths, axis=1) - lengths
  sizes = lengths[mask]
  position = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  rows, slots = np.nonzero(mask)
  where = (np.repeat(rows, sizes), np.repeat(starts[mask], sizes) + position)
  tokens, segments, positions = np.zeros((3, len(lengths), row_length), np.int32)
  if token_ids:
    tokens[where] = np.concatenate(token_ids)
    segments[where] = np.repeat(slots + 1, sizes)
    positions[where] = position
  ends = np.where(mask, starts + lengths - 1, 0).astype(np.int32)
  return tokens, segments, positions, ends, mask
