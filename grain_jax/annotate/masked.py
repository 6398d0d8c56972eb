"""A masked language model of `transformers`: words for a place in a text, and how probable."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

_AT_ONCE = 32  # sequences a call of the model
_NEEDS = "negatives need {}: pip install -r requirements-annotate.txt."


class Proposal(NamedTuple):
  """A word for a place."""

  word: str
  probability: float | None  # among all tokens of the model; None: not known
  similarity: float | None  # to the word that stands there: cosine of the centred input embeddings


class Place(NamedTuple):
  """A word in a text, from character to character."""

  text: str
  start: int
  end: int


class MaskedModel:
  """Loaded from a folder, on a GPU where there is one."""

  def __init__(self, folder: str):
    """Raises ValueError: it is no masked language model with a fast tokenizer; one line."""
    try:
      import torch
      import transformers
    except ImportError as error:
      raise ValueError(_NEEDS.format("torch and transformers")) from error
    self._torch = torch
    if not (pathlib.Path(folder) / "config.json").is_file():
      raise ValueError(
        f"--model={folder} has no config.json. Give the folder of a masked language model of "
        "transformers, such as distilroberta-base."
      )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
      local = {"local_files_only": True, "trust_remote_code": False}
      self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
      self._model = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, **local, use_safetensors=True, dtype=torch.float32
      )
    except Exception as error:  # KeyError, OSError, ValueError, by what is wrong
      reason = " ".join(str(error).split())[:200]
      raise ValueError(
        f"--model={folder} is no masked language model that transformers reads ({reason})."
      ) from error
    if not self._tokenizer.is_fast or self._tokenizer.mask_token_id is None:
      raise ValueError(f"--model={folder} has no fast tokenizer with a mask. Choose another model.")
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    self._model.to(self._device).eval()
    table = self._model.get_input_embeddings().weight.detach().float()
    table = table - table.mean(0)
    self._table = table / table.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    ids, self._words = _whole_words(self._tokenizer, len(table))
    if not ids:
      raise ValueError(f"--model={folder}: its vocabulary holds no whole words. Choose another.")
    self._ids = torch.tensor(ids, device=self._device)
    self._limit = min(
      self._tokenizer.model_max_length,
      getattr(self._model.config, "max_position_embeddings", 512) - 2,  # RoBERTa counts from 2
    )

  def propose(self, places: Sequence[Place], *, top: int) -> list[list[Proposal]]:
    """For each place the most probable words, the best first.

    The word's own tokens, found by their place, give way to one mask. [] where they are not tokens
    of that word alone.
    """
    found: list[list[Proposal]] = [[] for _ in places]
    ready = []
    for number, place in enumerate(places):
      masked = self._mask(place)
      if masked is not None:
        ready.append((number, *masked))
    ready.sort(key=lambda entry: len(entry[1]))
    for start in range(0, len(ready), _AT_ONCE):
      self._ask(ready[start : start + _AT_ONCE], found, top)
    return found

  def _mask(self, place: Place) -> tuple[list[int], int, list[int]] | None:
    """(ids with a mask, its index, ids of the word)."""
    encoded = self._tokenizer(place.text, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    own = [
      i
      for i, (a, b) in enumerate(encoded["offset_mapping"])
      if a < place.end and b > place.start and b > a
    ]
    if not own or own != list(range(own[0], own[-1] + 1)):
      return None
    covered = place.text[
      encoded["offset_mapping"][own[0]][0] : encoded["offset_mapping"][own[-1]][1]
    ]
    if covered.strip() != place.text[place.start : place.end]:
      return None
    word = [ids[i] for i in own]
    ids[own[0] : own[-1] + 1] = [self._tokenizer.mask_token_id]
    at = own[0]
    if len(ids) > self._limit:  # a window around it, between the tokens of start and end
      room = self._limit - 2
      first = min(max(at - room // 2, 1), len(ids) - 1 - room)
      ids = [ids[0], *ids[first : first + room], ids[-1]]
      at = at - first + 1
    return ids, at, word

  def _ask(self, ready: list[Any], found: list[list[Proposal]], top: int) -> None:
    torch = self._torch
    longest, pad = max(len(ids) for _, ids, _, _ in ready), self._tokenizer.pad_token_id or 0
    ids = torch.tensor([e[1] + [pad] * (longest - len(e[1])) for e in ready])
    mask = torch.tensor([[1] * len(e[1]) + [0] * (longest - len(e[1])) for e in ready])
    with torch.inference_mode():
      logits = self._model(
        input_ids=ids.to(self._device), attention_mask=mask.to(self._device)
      ).logits
      rows = logits[torch.arange(len(ready)), torch.tensor([e[2] for e in ready])].float()
      best = rows.softmax(-1)[:, self._ids].topk(min(top, len(self._words)))
      for (number, _, _, word), values, indices in zip(ready, *best, strict=True):
        near = self._similarity(word, indices)
        found[number] = [
          Proposal(self._words[i], p, s)
          for i, p, s in zip(indices.tolist(), values.tolist(), near, strict=True)
        ]

  def _similarity(self, word: list[int], indices: Any) -> list[float]:
    own = self._table[word].mean(0)
    own = own / own.norm().clamp(min=1e-9)
    return (self._table[self._ids[indices]] @ own).tolist()


def _whole_words(tokenizer: Any, size: int) -> tuple[list[int], list[str]]:
  """(ids, words) of the tokens that are a whole word of letters."""
  special = set(tokenizer.all_special_ids)
  tokens = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
  marks = [m for m in ("Ġ", "▁") if any(t and t.startswith(m) for t in tokens)]  # of a word's start
  ids, words = [], []
  for i, token in enumerate(tokens):
    if token is None or i in special or token.startswith("##"):
      continue
    if marks and not token.startswith(marks[0]):
      continue
    word = tokenizer.decode([i]).strip()
    if len(word) > 1 and word.isalpha() and word == word.lower():
      ids.append(i)
      words.append(word)
  return ids, words
