"""What `describe` asks a server before anything is spent: is it one, does it see, what is the cost.

Three requests at most, with a picture of 64 pixels; then a few pictures of the source that there is
something to ask of, of which the tokens of all are estimated.
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from grain_jax import failures, schema
from grain_jax.annotate import asking, chat, stages
from grain_jax.data.building import block as block_lib
from grain_jax.data.sources import base

_LOOKED_AT = 1000  # pictures, for some that have what is asked of
_COLOUR = {
  "type": "object",
  "properties": {"colour": {"type": "string"}},
  "required": ["colour"],
  "additionalProperties": False,
}


def check(
  stage: Any, settings: Mapping[str, Any], source: base.Source, *, say: Callable[[str], None]
) -> Mapping[str, float]:
  """What it spent; one line where the server cannot be used, or costs more than --max_cost.

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
  spent = collections.Counter(client.totals())
  spent.update(_estimate(stage, settings, source, say))
  return spent


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
) -> Mapping[str, float]:
  """Describes a few pictures; says tokens and cost of all, and what was said of them.

  Of boxes, where they are described, instead of pictures. Returns what was spent.
  """
  if not settings["sample"]:
    return {}
  what = "boxes" if settings["region_captions"] else "pictures"
  found, looked_at = _sample(source, settings["sample"], what)
  if not found:
    _raise_if_unknown(settings, looked_at == _LOOKED_AT, f"{looked_at:,} pictures have no boxes")
    say(f"the first {looked_at:,} pictures have no {what}: nothing is described of them")
    return {}
  results = stage.annotate(found)
  spent = stage.totals()
  for item, result in zip(found, results, strict=True):
    line = result.line or {}
    told = line.get("descriptions") or [r["description"] for r in line.get("regions", ())]
    why = ", ".join(f"{what} {why}" for what, why in result.losses)
    say(f"  {item.key}: {'; '.join(told) or f'nothing ({why})'}"[:300])
  unknown = not spent.get("tokens_in") or bool(spent.get("without_usage"))
  _raise_if_unknown(settings, unknown, "the server does not tell the tokens of each reply")
  if not spent.get("tokens_in"):
    say(f"{len(found)} pictures described; the server tells no tokens, so the cost is not known.")
    return spent
  described = sum(_number(item.regions, what) for item in found)
  total = source.total if what == "pictures" else None
  if total is None and settings["max_cost"]:
    total = _count(source, what)
  whole = "each 1,000" if total is None else f"all {total:,}"
  total = 1000 if total is None else total
  tokens = [spent[name] / described * total for name in ("tokens_in", "tokens_out")]
  cost = spent["cost"] / described * total
  priced = settings["price_in"] or settings["price_out"]
  dollars = f", ${cost:,.2f}" if priced else " (--price_in, --price_out: the cost too)"
  say(
    f"estimated of {described} {what}, {whole}: {tokens[0]:,.0f} tokens in, {tokens[1]:,.0f} "
    f"out{dollars}"
  )
  if settings["max_cost"] and cost > settings["max_cost"]:
    raise ValueError(
      f"estimated ${cost:,.2f} is more than --max_cost={settings['max_cost']:g}. Raise it, take a "
      "cheaper model, --stages=1 or --no_caption, or smaller pictures by --max_side."
    )
  return spent


def _raise_if_unknown(settings: Mapping[str, Any], unknown: bool, why: str) -> None:
  if unknown and settings["max_cost"]:
    raise ValueError(
      f"--max_cost={settings['max_cost']:g} cannot be held: {why}. Leave it out, and look after "
      "the cost yourself."
    )


def _number(regions: Any, what: str) -> int:
  """How much a picture counts in the estimate."""
  return len(regions) if what == "boxes" else 1


def _sample(source: base.Source, most: int, what: str) -> tuple[list[stages.Item], int]:
  """(the first pictures that there is something to ask of, how many were looked at for them)."""
  found: list[stages.Item] = []
  looked_at = 0
  with tempfile.TemporaryDirectory() as scratch:
    for item in itertools.islice(_items(source, pathlib.Path(scratch)), _LOOKED_AT):
      looked_at += 1
      if _number(item.regions, what):
        found.append(item)
      if len(found) == most:
        break
  return found, looked_at


def _count(source: base.Source, what: str) -> int:
  """All pictures, or boxes, of a source; those that cannot be used too."""
  if what == "pictures":
    return sum(1 for _ in base.iterate(source))
  total = 0
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    known = None
    if source.annotated is not None:
      source.annotated.prepare(pathlib.Path(folder))
      known = source.annotated.open(pathlib.Path(folder))
      stack.callback(known.close)
    for _, record in base.iterate(source):
      if isinstance(record, dict):
        line = {} if known is None else known.find(record[schema.RECORD_KEY])
        total += len(line.get("regions", record[schema.RECORD_REGIONS]) or ())
  return total


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
