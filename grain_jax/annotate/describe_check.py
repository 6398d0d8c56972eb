"""What `describe` asks a server before anything is spent: is it one, does it see, what is the cost.

Three requests at most, with a picture of 64 pixels; then a few pictures of the source, of which the
tokens of all are estimated.
"""

from __future__ import annotations

import io
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from grain_jax import failures
from grain_jax.annotate import asking, chat, stages
from grain_jax.data.building import block as block_lib
from grain_jax.data.sources import base

_COLOUR = {
  "type": "object",
  "properties": {"colour": {"type": "string"}},
  "required": ["colour"],
  "additionalProperties": False,
}


def check(
  stage: Any, settings: Mapping[str, Any], source: base.Source, *, say: Callable[[str], None]
) -> None:
  """Raises one line where the server cannot be used, or costs more than --max_cost.

  Raises:
    ValueError: no server, no such model, a refused key, a model that does not see, a dear one.
    failures.TransientError: the server is busy or starts.
  """
  client: chat.Chat = stage.backend
  answer = client.ask_once(_question())
  where = f"--server={settings['server']}"
  _raise_if_no_server(answer, where, settings)
  if answer.status in (400, 404, 413, 415, 422) or answer.why == chat.SERVER_ERROR:
    blind = client.ask_once(_question()._replace(image=None))
    if blind.text is not None:
      raise ValueError(
        f"--model={settings['model']} answers texts but refuses a picture ({answer.status}: "
        f"{_said(answer)}). Take a model that sees."
      )
    if answer.why == chat.SERVER_ERROR:
      raise failures.TransientError(f"{where} fails ({answer.status}: {_said(answer)}). Try later.")
    raise ValueError(
      f"{where} refuses requests ({answer.status}: {_said(answer)}). Give the address up to /v1, "
      "and a --model that it serves."
    )
  if answer.text is None and answer.why not in (chat.REFUSAL, chat.CONTENT_FILTER):
    raise failures.TransientError(f"{where} is busy ({answer.why}: {_said(answer)}). Try later.")
  if client.schema is False:
    say(f"{where} takes no JSON schema: lines of text are asked for.")
  if "red" not in (answer.text or "").lower():
    say(
      f"{where}: asked for the colour of a red picture, the model said {_said(answer)!r}. Look at "
      "what it writes of yours: does it see?"
    )
  client.totals()
  _estimate(stage, settings, source, say)


def _raise_if_no_server(answer: chat.Answer, where: str, settings: Mapping[str, Any]) -> None:
  if answer.why == chat.NO_CONNECTION:
    raise ValueError(f"{where}: nobody answers there. Start the server, or correct the address.")
  if answer.why == chat.TIMEOUT:
    raise ValueError(
      f"{where}: no reply within --timeout={settings['timeout']:g} s. Wait until the server is "
      "ready, or raise it."
    )
  if answer.why in (chat.GARBAGE, chat.CUT_REPLY):
    raise ValueError(
      f"{where} answers, but not as an OpenAI-compatible server does ({_said(answer)}). Give the "
      "address of one, up to /v1."
    )
  if 300 <= answer.status < 400:
    raise ValueError(f"{where} sends elsewhere ({answer.status}). Give the address itself.")


def _question() -> asking.Request:
  from PIL import Image

  encoded = io.BytesIO()
  Image.new("RGB", (64, 64), (225, 20, 20)).save(encoded, "JPEG")
  prompt = "Which colour is this picture? Answer with one word."
  return asking.Request("colour", prompt, encoded.getvalue(), lambda text: None, _COLOUR)


def _said(answer: chat.Answer) -> str:
  return " ".join((answer.raw or answer.why).split())[:200]


def _estimate(
  stage: Any, settings: Mapping[str, Any], source: base.Source, say: Callable[[str], None]
) -> None:
  """Describes a few pictures; says tokens and cost of all, and what was said of them."""
  if not settings["sample"]:
    return
  with tempfile.TemporaryDirectory() as scratch:
    found = list(itertools.islice(_items(source, pathlib.Path(scratch)), settings["sample"]))
  if not found:
    return
  results = stage.annotate(found)
  spent = stage.totals()
  for item, result in zip(found, results, strict=True):
    line = result.line or {}
    told = line.get("descriptions") or [r["description"] for r in line.get("regions", ())]
    why = ", ".join(f"{what} {why}" for what, why in result.losses)
    say(f"  {item.key}: {'; '.join(told) or f'nothing ({why})'}"[:300])
  if not spent.get("tokens_in"):
    say(f"{len(found)} pictures described; the server tells no tokens, so the cost is not known.")
    return
  total = source.total
  if total is None and settings["max_cost"]:
    total = sum(1 for _ in base.iterate(source))
  whole = "each 1,000" if total is None else f"all {total:,}"
  total = 1000 if total is None else total
  tokens = [spent[name] / len(found) * total for name in ("tokens_in", "tokens_out")]
  cost = spent["cost"] / len(found) * total
  priced = settings["price_in"] or settings["price_out"]
  dollars = f", ${cost:,.2f}" if priced else " (--price_in, --price_out: the cost too)"
  say(
    f"estimated of {len(found)} pictures, {whole}: {tokens[0]:,.0f} tokens in, {tokens[1]:,.0f} "
    f"out{dollars}"
  )
  if settings["max_cost"] and cost > settings["max_cost"]:
    raise ValueError(
      f"estimated ${cost:,.2f} is more than --max_cost={settings['max_cost']:g}. Raise it, take a "
      "cheaper model, --stages=1 or --no_caption, or smaller pictures by --max_side."
    )


def _items(source: base.Source, scratch: pathlib.Path) -> Iterator[stages.Item]:
  """The pictures of a source, as the engine gives them to a stage."""
  if source.prepare is not None:
    source.prepare(scratch)
  known = None if source.annotated is None else source.annotated.open(scratch)
  blocks = source.blocks(scratch) if source.blocks is not None else [None]
  for block in blocks:
    for _, key, _, checked in block_lib.checked_records(
      source, block, scratch, threads=1, need_caption=False
    ):
      record = checked.record
      if record is not None:
        line = {} if known is None else known.find(key)
        yield stages.Item(
          key=key,
          image=record["image"],
          captions=record["captions"],
          descriptions=list(line.get("descriptions", ())),
          regions=record["regions"],
          negatives=record["negatives"],
        )
