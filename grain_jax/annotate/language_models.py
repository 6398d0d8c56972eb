"""Answers of a language model to texts: of a server of OpenAI's protocol, or in this process."""

from __future__ import annotations

import asyncio
import pathlib
import re
import threading
import weakref
from collections.abc import Coroutine, Mapping
from concurrent import futures
from typing import Any, NamedTuple, Protocol, TypeVar

from grain_jax import failures, textfiles
from grain_jax.annotate import asking, chat

_NEEDS = "{} needs {}: pip install -r requirements-annotate.txt."
_TRIES = 5  # of a request
_BASE = 1.0  # seconds before the second
_BULLET = re.compile(r"^\s*(?:[-*•–—+]|\(?\d{1,2}[.):])\s+(.*)$")
_EMPTY = "empty_reply"
NO_REPLY = "no_reply"
_PROBE = "Which colour has snow? Answer with one word."
_NO_ANSWER = (
  chat.RATE_LIMITED, chat.SERVER_ERROR, chat.TIMEOUT, chat.NO_CONNECTION, chat.CUT_REPLY,
)  # fmt: skip
_NAMES = {"tokens_in": "prompt_tokens", "tokens_out": "completion_tokens"}
_T = TypeVar("_T")


class Reply(NamedTuple):
  """What a model said."""

  text: str  # '': `why`
  is_cut: bool = False  # at the limit of tokens
  why: str = ""  # there is none


def listed(reply: Reply) -> list[str]:
  """The entries of a list in a reply: its lines with bullets or numbers, or a JSON array of texts.

  The last one is '' where it was cut; [] where there is no list.
  """
  found = _json_list(reply.text)
  if found is not None:
    return found
  lines = [line for line in reply.text.splitlines() if line.strip()]
  entries = [match[1] for line in lines if (match := _BULLET.match(line))]
  if reply.is_cut and lines and _BULLET.match(lines[-1]):
    entries[-1] = ""
  return entries


def _json_list(text: str) -> list[str] | None:
  text = re.sub(r"^```\w*\s*|\s*```$", "", text.strip())
  if not text.startswith("["):
    return None
  try:
    found = textfiles.parse_json(text)
  except ValueError:
    return None
  if isinstance(found, list) and all(isinstance(entry, str) for entry in found):
    return found
  return None


class Chat(Protocol):
  """A language model."""

  at_once: int  # threads that may ask

  def check(self) -> None:
    """Raises ValueError where it cannot answer; one line."""

  def ask(self, prompt: str) -> Reply:
    """Its answer, or why there is none."""

  def totals(self) -> Mapping[str, int]:
    """What was spent."""


class ServerChat:
  """A server of OpenAI's protocol (vLLM and many others), for texts: `chat.Chat`, from any thread.

  What is asked runs in one event loop, in a thread of its own, as long as this is there.
  """

  def __init__(
    self,
    url: str,
    model: str,
    *,
    api_key_env: str = "",
    max_tokens: int = 400,
    timeout: float = 120.0,
    at_once: int = 8,
  ):
    """`api_key_env`: the environment variable with the key; '': no key.

    Raises:
      ValueError: no address, or no such variable; one line.
    """
    self.at_once, self._name = at_once, url
    self._chat = chat.Chat({
      "server": url, "model": model, "api_key_env": api_key_env, "concurrency": at_once,
      "retries": _TRIES - 1, "timeout": timeout, "backoff": _BASE, "max_tokens": max_tokens,
      "price_in": 0.0, "price_out": 0.0,
    })  # fmt: skip
    self._client = self._chat.client()
    self._lock, self._spent = threading.Lock(), _nothing_spent()
    self._answers = False  # so far
    ready: futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = futures.Future()
    threading.Thread(target=_hold_loop, args=(self._client, ready), daemon=True).start()
    self._loop, stop = ready.result()
    weakref.finalize(self, self._loop.call_soon_threadsafe, stop.set).atexit = False

  def totals(self) -> Mapping[str, int]:
    with self._lock:
      self._gather()
      return dict(self._spent)

  def take_totals(self) -> Mapping[str, int]:
    """What was spent since it was last taken."""
    with self._lock:
      self._gather()
      taken, self._spent = self._spent, _nothing_spent()
    return taken

  def _gather(self) -> None:
    """Adds what was spent since this was last called; requests that go on are not interrupted."""

    async def take() -> Mapping[str, float]:  # in the loop, where it is counted
      return self._chat.totals()

    for name, number in self._wait_for(take()).items():
      if name != "cost":
        name = _NAMES.get(name, name)
        self._spent[name] = self._spent.get(name, 0) + int(number)

  def check(self) -> None:
    self._wait_for(self._chat.check_model(self._client))

  def ask(self, prompt: str) -> Reply:
    """Its answer; none where it refuses this one, or says nothing, or what is none, several times.

    Raises:
      ValueError: the key or every request is refused; one line.
      failures.TransientError: it does not answer in several tries; one line.
    """
    reply = self._ask(prompt)
    if reply.text is not None:
      self._answers = True
      return Reply(reply.text, reply.cut)
    if reply.why == chat.REQUEST_REFUSED:
      if not self._answers and self._ask(_PROBE).why == chat.REQUEST_REFUSED:
        said = " ".join((reply.raw or "").split())[:100]
        raise ValueError(
          f"--server={self._name} refuses the request ({said or reply.why}). Check --model and the "
          "server's log."
        )
      with self._lock:  # a filter of contents, or too long
        self._answers = True
        self._spent[reply.why] = self._spent.get(reply.why, 0) + 1
      return Reply("", why=reply.why)
    if reply.why in _NO_ANSWER:
      raise failures.TransientError(
        f"--server={self._name} gave no answer in {reply.attempts} tries ({reply.why}). The same "
        "command goes on."
      )
    return Reply("", why=NO_REPLY)

  def _ask(self, prompt: str) -> asking.Reply:
    request = asking.Request("text", prompt, None, lambda text: None if text.strip() else _EMPTY)
    return self._wait_for(self._chat.ask(self._client, request))

  def _wait_for(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _nothing_spent() -> dict[str, int]:
  return {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}


def _hold_loop(client: Any, ready: futures.Future) -> None:
  """Runs an event loop until the event is set that `ready` gets beside it."""

  async def hold() -> None:
    stop = asyncio.Event()
    ready.set_result((asyncio.get_running_loop(), stop))
    async with client:
      await stop.wait()

  asyncio.run(hold())


class TransformersChat:
  """A causal language model of transformers, from a folder, greedy."""

  at_once = 1

  def __init__(self, folder: str, *, max_tokens: int = 400):
    try:
      import torch
      import transformers
    except ImportError as error:
      raise ValueError(_NEEDS.format("--backend=transformers", "torch and transformers")) from error
    if not (pathlib.Path(folder).expanduser() / "config.json").is_file():
      raise ValueError(
        f"--model={folder} has no config.json. Give the folder of a causal language model of "
        "transformers."
      )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = str(pathlib.Path(folder).expanduser())
    try:
      local = {"local_files_only": True, "trust_remote_code": False}
      self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
      self._model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, **local, use_safetensors=True
      )
    except Exception as error:  # KeyError, OSError, ValueError, by what is wrong
      reason = " ".join(str(error).split())[:200]
      raise ValueError(
        f"--model={folder} is no causal language model that transformers reads ({reason})."
      ) from error
    self._torch, self._max_tokens = torch, max_tokens
    self._model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    self._spent = _nothing_spent()

  def totals(self) -> Mapping[str, int]:
    return dict(self._spent)

  def check(self) -> None:
    """It was loaded."""

  def ask(self, prompt: str) -> Reply:
    tokenizer = self._tokenizer
    if tokenizer.chat_template:
      prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
      )
    given = tokenizer(
      prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template
    ).to(self._model.device)
    end = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with self._torch.inference_mode():
      ids = self._model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=self._max_tokens,
        do_sample=False,
        pad_token_id=end,
      )[0, given["input_ids"].shape[1] :]
    self._spent["requests"] += 1
    self._spent["prompt_tokens"] += given["input_ids"].shape[1]
    self._spent["completion_tokens"] += len(ids)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Reply(text, is_cut=len(ids) == self._max_tokens)
