"""The client of any server that speaks the OpenAI protocol of chat completions.

Nothing that it prints, raises or returns has the key or a picture in it: what a server says is
shown without them.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import json
import os
import random
import re
import time
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from email import utils as email_utils
from typing import Any, NamedTuple

from grain_jax import failures
from grain_jax.annotate import asking, stages

_MOST_WAIT = 300.0  # seconds between two attempts, whatever the server asks for
_MOST_BYTES = 4 << 20  # of a reply
_SECRET = 8  # characters of the shortest key that is one: local servers take "EMPTY" and the like
_ADAPTED = 4  # requests at most, where the server lacks parameters that it can do without
RATE_LIMITED, SERVER_ERROR, TIMEOUT = "rate_limited", "server_error", "timeout"
NO_CONNECTION, CUT_REPLY, GARBAGE = "no_connection", "cut_reply", "garbage"
REQUEST_REFUSED = "request_refused"  # 400, 404, 413, ...: asked again, it is refused again
REFUSAL, CONTENT_FILTER = "refusal", "content_filter"
_FINAL = (REQUEST_REFUSED,)
_LATER = (408, 409, 425)  # may do better when asked again, as 429 and 5xx
_LONG_TEXT = re.compile(r"[A-Za-z0-9+/=_-]{64,}")  # a picture
_BEARER = re.compile(r"(?i)(bearer\s+|\bsk-)[^\s\"']+")


class Answer(NamedTuple):
  """What came of one request."""

  text: str | None  # None: `why`
  why: str = ""
  cut: bool = False
  raw: str | None = None  # without key and pictures
  status: int = 0  # of HTTP; 0: none came
  wait: float | None = None  # seconds that the server asks for


def import_httpx():
  try:
    import httpx
  except ImportError as error:
    raise ValueError("this needs httpx: pip install -r requirements-annotate.txt.") from error
  return httpx


def check_url(url: str, flag: str = "--server") -> str:
  """The address of the chat completions below a base such as http://host:8000/v1; one line else."""
  try:
    parts = urllib.parse.urlsplit(url.strip())
    host, _ = parts.hostname, parts.port
  except ValueError:
    host, parts = None, urllib.parse.urlsplit("")
  if parts.username or parts.password:
    raise ValueError(
      f"{flag} has a name or a password in it, which would be written down. Put the key into an "
      "environment variable and name that with --api_key_env."
    )
  if parts.scheme not in ("http", "https") or not host or re.search(r"\s", url.strip()):
    shown = url.partition("?")[0][:100]
    raise ValueError(
      f"{flag}={shown}: not an address of the form http://HOST:PORT/v1 or https://HOST/v1."
    )
  if parts.query or parts.fragment:
    raise ValueError(f"{flag}: leave out what follows the path ({parts.path or '/'}).")
  path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
  return f"{parts.scheme}://{parts.netloc}{path}/chat/completions"


def key_of(variable: str | None, flag: str = "--api_key_env") -> str | None:
  """The key in an environment variable; one line, which does not have what was given."""
  if not variable:
    return None
  key = os.environ.get(variable, "").strip() if "\0" not in variable and "=" not in variable else ""
  if not key:
    raise ValueError(
      f"{flag} is not the name of an environment variable that is set. Give the name, not the key: "
      f"export OPENAI_API_KEY=..., then {flag}=OPENAI_API_KEY."
    )
  if not key.isascii() or not key.isprintable() or " " in key:
    raise ValueError(f"{flag}={variable}: what the variable holds is no key. Correct it.")
  return key


class Chat:
  """Asks a server, many requests at a time."""

  def __init__(self, settings: Mapping[str, Any]):
    """`settings`: server, model, api_key_env, concurrency, retries, timeout, backoff, max_tokens,
    price_in, price_out (dollars a million tokens)."""
    self._httpx = import_httpx()
    self.url = check_url(settings["server"])
    self._key = key_of(settings["api_key_env"])
    self.settings = settings
    self.spent = collections.Counter[str]()
    self.schema: bool | None = None  # whether the server takes one; None: not known
    self._limit = "max_tokens"  # what the server calls it
    self._temperature = True
    self._random = random.Random(0)  # of the waiting

  def totals(self) -> dict[str, float]:
    """What was spent since it was last asked."""
    spent, self.spent = self.spent, collections.Counter()
    cost = spent["tokens_in"] * self.settings["price_in"]
    cost += spent["tokens_out"] * self.settings["price_out"]
    return {**spent, "cost": cost / 1e6}

  def run(self, dialogues: Iterable[asking.Dialogue]) -> list[stages.Result]:
    """The results of dialogues, in their order, at most `concurrency` requests at a time.

    Raises:
      ValueError: the server refuses the key; one line.
      failures.TransientError: nobody answers at the address, for any of them; one line.
    """
    outcomes = collections.Counter[str]()
    results = asyncio.run(self._run(list(dialogues), outcomes))
    if outcomes[NO_CONNECTION] and outcomes[NO_CONNECTION] == outcomes.total():
      raise failures.TransientError(
        f"--server={self.settings['server']} does not answer any more. Start it; the same command "
        "goes on."
      )
    return results

  def ask_once(self, request: asking.Request) -> Answer:
    """One request, for a check; tried again where it failed, of time-outs once, unless nobody
    answers or it is refused."""

    async def ask() -> Answer:
      async with self.client() as client:
        for attempt in range(self.settings["retries"] + 1):
          answer = await self._attempt(client, request)
          if answer.text is not None or answer.why in (*_FINAL, NO_CONNECTION):
            break
          if answer.why in (REFUSAL, CONTENT_FILTER) or (answer.why == TIMEOUT and attempt):
            break
          if attempt < self.settings["retries"]:
            await self._wait(attempt, answer)
        return answer

    return asyncio.run(ask())

  async def _wait(self, attempt: int, answer: Answer) -> None:
    """After attempt 0, 1, ...: longer each time, or as long as the server asks."""
    wait = self.settings["backoff"] * 2**attempt * self._random.uniform(1.0, 1.5)
    await asyncio.sleep(min(max(wait, answer.wait or 0.0), _MOST_WAIT))

  def client(self):
    """An `httpx.AsyncClient` with the key; it serves one event loop."""
    headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
    limits = self._httpx.Limits(max_connections=self.settings["concurrency"])
    return self._httpx.AsyncClient(headers=headers, limits=limits, timeout=None)

  async def _run(self, dialogues: Sequence[asking.Dialogue], outcomes) -> list[stages.Result]:
    places = asyncio.Semaphore(self.settings["concurrency"])
    async with self.client() as client:

      async def ask(request: asking.Request) -> asking.Reply:
        async with places:  # waiting for another attempt too: a busy server gets less
          reply = await self.ask(client, request)
        outcomes[reply.why] += 1
        return reply

      async def hold(dialogue: asking.Dialogue) -> stages.Result:
        try:
          requests = next(dialogue)
          while True:
            requests = dialogue.send(await asyncio.gather(*map(ask, requests)))
        except StopIteration as stop:
          return stop.value

      try:
        async with asyncio.TaskGroup() as group:
          held = [group.create_task(hold(dialogue)) for dialogue in dialogues]
      except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
    return [task.result() for task in held]

  async def ask(self, client, request: asking.Request) -> asking.Reply:
    """One reply by `client`, after retries; ValueError where the key is refused."""
    attempts = 0
    while True:
      answer = await self._attempt(client, request)
      attempts += 1
      why = answer.why if answer.text is None else request.failure(answer.text)
      if not why:
        return asking.Reply(answer.text, "", answer.cut, answer.raw, attempts)
      if why in _FINAL or attempts > self.settings["retries"]:
        return asking.Reply(None, why, answer.cut, answer.raw, attempts)
      self.spent["retries"] += 1
      await self._wait(attempts - 1, answer)

  async def check_model(self, client) -> None:
    """Asks which models there are, which costs nothing.

    Raises:
      ValueError: nobody answers, the key is refused, or others are there; one line.
    """
    where, model = f"--server={self.settings['server']}", self.settings["model"]
    found = await self._send(client, "GET", self.url.removesuffix("chat/completions") + "models")
    if isinstance(found, Answer):
      if found.why == GARBAGE:
        return  # it has no such list
      raise ValueError(
        f"{where} does not answer ({found.why}). Start the server, or correct the address."
      )
    response, data = found
    self._check_key(response.status_code)
    try:
      names = [str(entry["id"]) for entry in json.loads(data)["data"]]
    except (ValueError, KeyError, TypeError, RecursionError):
      return  # it has no such list
    if names and model not in names:
      told = self._shown(", ".join(names[:5]))
      raise ValueError(f"--model={model}: {where} has {told}. Name one of them.")

  async def _attempt(self, client, request: asking.Request) -> Answer:
    """One answer; asked anew where the server lacks a parameter that it can do without."""
    schema = request.schema is not None and self.schema is not False
    for _ in range(_ADAPTED):
      limit, temperature = self._limit, self._temperature
      answer = await self._post(client, self._body(request, schema))
      if answer.status not in (400, 422):
        break
      said = (answer.raw or "").lower()
      if "max_completion_tokens" in said and limit == "max_tokens":
        self._limit = "max_completion_tokens"
      elif "temperature" in said and temperature:
        self._temperature = False
      elif schema and self.schema is None:
        schema = False
      else:
        break
    if answer.text is not None and request.schema is not None and self.schema is None:
      self.schema = schema
    return answer

  def _body(self, request: asking.Request, schema: bool) -> dict[str, Any]:
    content: str | list[dict[str, Any]] = request.prompt
    if request.image is not None:
      url = f"data:image/jpeg;base64,{base64.b64encode(request.image).decode()}"
      content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": request.prompt},
      ]
    body: dict[str, Any] = {
      "model": self.settings["model"],
      "messages": [{"role": "user", "content": content}],
      self._limit: self.settings["max_tokens"],
    }
    if self._temperature:
      body["temperature"] = 0
    if schema:
      body["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": request.name, "schema": request.schema, "strict": True},
      }
    return body

  async def _post(self, client, body: Mapping[str, Any]) -> Answer:
    self.spent["requests"] += 1
    found = await self._send(client, "POST", self.url, json=body)
    return found if isinstance(found, Answer) else self._read(*found)

  async def _send(self, client, method: str, url: str, **more: Any) -> Answer | tuple[Any, bytes]:
    """(response, its body), or why there is none."""
    httpx = self._httpx
    try:
      async with asyncio.timeout(self.settings["timeout"]):
        async with client.stream(method, url, **more) as response:
          data = bytearray()
          async for piece in response.aiter_bytes():
            data += piece
            if len(data) > _MOST_BYTES:
              return Answer(None, GARBAGE, status=response.status_code)
    except (TimeoutError, httpx.TimeoutException):
      return Answer(None, TIMEOUT)
    except httpx.ConnectError:
      return Answer(None, NO_CONNECTION)
    except httpx.DecodingError:
      return Answer(None, GARBAGE)
    except httpx.HTTPError:
      return Answer(None, CUT_REPLY)
    return response, bytes(data)

  def _read(self, response, data: bytes) -> Answer:
    status, text = response.status_code, data.decode("utf-8", "replace")
    self._check_key(status)
    raw = _BEARER.sub("(key)", self._shown(text))[:2000]
    if status == 429:
      return Answer(None, RATE_LIMITED, raw=raw, status=status, wait=_wait(response.headers))
    if status >= 500 or status in _LATER:
      return Answer(None, SERVER_ERROR, raw=raw, status=status, wait=_wait(response.headers))
    if status != 200:
      return Answer(None, REQUEST_REFUSED, raw=raw, status=status)
    try:
      value = json.loads(text)
      choice, usage = value["choices"][0], value.get("usage")
      content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
      finish = choice.get("finish_reason")
      if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
      if not isinstance(content, str | None):
        raise TypeError
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
      return Answer(None, GARBAGE, raw=raw, status=status)
    self._count(usage)
    if finish == CONTENT_FILTER or refusal:
      raw = self._shown(refusal) if isinstance(refusal, str) else raw
      return Answer(None, CONTENT_FILTER if finish == CONTENT_FILTER else REFUSAL, raw=raw)
    text = self._without_key(content or "")  # `replies` takes no word as long as a picture
    return Answer(text, cut=finish == "length", raw=self._shown(text), status=status)

  def _check_key(self, status: int) -> None:
    if status in (401, 403):
      raise ValueError(
        f"--server={self.settings['server']} refuses the key ({status}). Put a valid one into an "
        "environment variable and name that with --api_key_env."
      )

  def _count(self, usage: Any) -> None:
    found = usage if isinstance(usage, Mapping) else {}
    numbers = [found.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if all(isinstance(n, int) and n >= 0 for n in numbers):
      self.spent["tokens_in"] += numbers[0]
      self.spent["tokens_out"] += numbers[1]
    else:
      self.spent["without_usage"] += 1

  def _shown(self, text: str) -> str:
    """What a server said, without the key and pictures."""
    return _LONG_TEXT.sub("(long text)", self._without_key(text))

  def _without_key(self, text: str) -> str:
    """What a server said, without the key, as UTF-8 can hold it."""
    text = text.encode("utf-8", "replace").decode()
    if self._key and len(self._key) >= _SECRET:
      text = text.replace(self._key, "(key)")
    return text


def _wait(headers: Mapping[str, str]) -> float | None:
  """Seconds that Retry-After asks for."""
  value = headers.get("retry-after", "").strip()
  try:
    return max(0.0, float(value)) if value[:1].isdigit() else _until(value)
  except (TypeError, ValueError, OverflowError):
    return None


def _until(date: str) -> float | None:
  return max(0.0, email_utils.parsedate_to_datetime(date).timestamp() - time.time())
