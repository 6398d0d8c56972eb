"""Words for a place in a text, from a language model that is asked: in the place of `masked`."""

from __future__ import annotations

import concurrent.futures
import pathlib
from collections.abc import Sequence

from grain_jax import textfiles
from grain_jax.annotate import language_models, masked

PROMPT = pathlib.Path(__file__).parent / "prompts" / "negative_words.txt"
_NUMBER = 10  # words that are asked for


class AskedModel:
  """Proposes words as `masked.MaskedModel` does, without probability or similarity."""

  def __init__(self, chat: language_models.Chat, prompt: str):
    """`prompt`: of `read_prompt`."""
    self.chat, self._prompt = chat, prompt.replace("{number}", str(_NUMBER))

  def propose(self, places: Sequence[masked.Place], *, top: int) -> list[list[masked.Proposal]]:
    """For each place the words of the reply, in its order; [] where it is no list.

    Raises:
      failures.TransientError: the server does not answer.
    """
    with concurrent.futures.ThreadPoolExecutor(self.chat.at_once) as pool:
      replies = list(pool.map(self._ask, places))
    return [
      [masked.Proposal(word, None, None) for word in _words(reply)][:top] for reply in replies
    ]

  def _ask(self, place: masked.Place) -> language_models.Reply:
    text, start, end = place
    marked = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    return self.chat.ask(self._prompt.replace("{text}", marked))


def _words(reply: language_models.Reply) -> list[str]:
  entries = language_models.listed(reply)
  return [entry.replace("**", "").strip(" .,;\"'").lower() for entry in entries]


def read_prompt(path: pathlib.Path) -> str:
  """A prompt with {text} in it; a one-line ValueError if it has none."""
  text = textfiles.read_text(path, name=f"--prompt={path}").strip()
  if "{text}" not in text:
    raise ValueError(f"--prompt={path} lacks {{text}}, where the caption goes. Write it in.")
  return text
