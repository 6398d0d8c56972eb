"""What is asked of a model and what it says: a dialogue of each picture, whatever the model is."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

from grain_jax.annotate import stages


class Request(NamedTuple):
  """One question, of a picture or of none."""

  name: str  # of the prompt
  prompt: str
  image: bytes | None  # JPEG; None: the prompt is all
  failure: Callable[[str], str | None]  # why a reply cannot be used; None: it can
  schema: dict[str, Any] | None = None  # JSON schema of the reply, where the model can keep to it


class Reply(NamedTuple):
  """What was said, in the end."""

  text: str | None  # None: nothing that can be used
  why: str = ""  # there is none, a word of snake_case
  cut: bool = False  # at the most tokens that it may have
  raw: str | None = None  # the last that was said
  attempts: int = 1

  def told(self, request: Request) -> dict[str, Any]:
    """For `raw`: JSON."""
    found = {"prompt": request.name, "reply": self.raw, "attempts": self.attempts}
    return found if self.text is not None else {**found, "failed": self.why}


# Asks, gets the replies in the same order, asks again, and in the end has the result.
Dialogue = Generator[Sequence[Request], Sequence[Reply], stages.Result]


def rounds(
  dialogues: Iterable[Dialogue], ask: Callable[[Sequence[Request]], Sequence[Reply]]
) -> list[stages.Result]:
  """The results of dialogues that go on side by side: `ask` gets what all of them ask by now."""
  results: dict[int, stages.Result] = {}
  running = list(enumerate(dialogues))
  questions = {}
  for number, dialogue in running:
    _go_on(number, dialogue, None, questions, results)
  while questions:
    flat = [request for requests in questions.values() for request in requests]
    replies = iter(ask(flat))
    answered = {n: [next(replies) for _ in requests] for n, requests in questions.items()}
    questions = {}
    for number, dialogue in running:
      if number in answered:
        _go_on(number, dialogue, answered[number], questions, results)
  return [results[number] for number in range(len(running))]


def _go_on(number: int, dialogue: Dialogue, replies, questions: dict, results: dict) -> None:
  try:
    questions[number] = next(dialogue) if replies is None else dialogue.send(replies)
  except StopIteration as stop:
    results[number] = stop.value
