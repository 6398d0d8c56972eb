"""Answers of a language model to texts: of a server of OpenAI's protocol, or in this process."""

from __future__ import annotations

import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol
from urllib import parse

from grain_jax import failures, textfiles

_NEEDS = "{} needs {}: pip install -r requirements-annotate.txt."
_TRIES = 5  # of a request
_LONGEST_WAIT = 60.0  # seconds between two of them
_BASE = 1.0  # seconds before the second
_BULLET = re.compile(r"^\s*(?:[-*•–—+]|\(?\d{1,2}[.):])\s+(.*)$")
_REFUSED = (401, 403)
_LATER = (408, 409, 425, 429)  # and 5xx


class Reply(NamedTuple):
  """What a model said."""

  text: str
  is_cut: bool = False  # at the limit of tokens


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

  def ask(self, prompt: str) -> Reply | None:
    """Its answer; None where what came is none."""

  def totals(self) -> Mapping[str, int]:
    """What was spent."""


class ServerChat:
  """A server of OpenAI's protocol (vLLM and many others)."""

  def __init__(
    self,
    url: str,
    model: str,
    *,
    key_variable: str = "OPENAI_API_KEY",
    max_tokens: int = 400,
    timeout: float = 120.0,
    at_once: int = 8,
    sleep: Callable[[float], Any] = time.sleep,
  ):
    """`key_variable`: the environment variable with the key, which is shown nowhere."""
    try:
      import httpx
    except ImportError as error:
      raise ValueError(_NEEDS.format("--server", "httpx")) from error
    parts = parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
      raise ValueError(
        f"--server={url!r} is no http or https address, as http://localhost:8000 is."
      )
    if parts.username or parts.password:
      raise ValueError(f"--server holds a password: put it into the variable {key_variable}.")
    self._httpx, self._sleep, self.at_once = httpx, sleep, at_once
    self._name, self._model, self._max_tokens = url, model, max_tokens
    self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
    key = os.environ.get(key_variable, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    self._key_variable = key_variable
    self._client = httpx.Client(headers=headers, timeout=timeout)
    self._lock = threading.Lock()
    self._spent = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}

  def totals(self) -> Mapping[str, int]:
    return dict(self._spent)

  def take_totals(self) -> Mapping[str, int]:
    """What was spent since it was last taken."""
    with self._lock:
      taken, self._spent = self._spent, dict.fromkeys(self._spent, 0)
    return taken

  def check(self) -> None:
    try:
      answer = self._client.get(f"{self._url}/models")
    except self._httpx.HTTPError as error:
      raise ValueError(
        f"--server={self._name} does not answer ({failures.one_line(error, limit=100)}). Start it, "
        "or correct the address."
      ) from None
    self._check_key(answer.status_code)
    try:
      names = [entry["id"] for entry in answer.json()["data"]]
    except (ValueError, KeyError, TypeError):
      return  # it has no such list
    if names and self._model not in names:
      raise ValueError(
        f"--model={self._model}: --server={self._name} has {', '.join(map(str, names[:5]))}. "
        "Name one of them."
      )

  def _check_key(self, status: int) -> None:
    if status in _REFUSED:
      raise ValueError(
        f"--server={self._name} refuses the key ({status}). Put a valid one into the variable "
        f"{self._key_variable}."
      )

  def ask(self, prompt: str) -> Reply | None:
    """Raises failures.TransientError where it does not answer in several tries."""
    body = {
      "model": self._model, "messages": [{"role": "user", "content": prompt}],
      "max_tokens": self._max_tokens, "temperature": 0, "seed": 0,
    }  # fmt: skip
    why = ""
    for attempt in range(_TRIES):
      wait = min(_BASE * 2.0**attempt, _LONGEST_WAIT)
      try:
        answer = self._client.post(f"{self._url}/chat/completions", json=body)
      except self._httpx.HTTPError as error:
        why = type(error).__name__
      else:
        status, why = answer.status_code, f"status {answer.status_code}"
        self._count("requests", 1)
        if status == 200:
          reply = self._read(answer)
          if reply is not None:
            return reply
          why = ""
        elif status not in _LATER and status < 500:
          self._check_key(status)
          raise ValueError(
            f"--server={self._name} refuses the request (status {status}). Check --model and the "
            "server's log."
          )
        wait = _seconds(answer.headers.get("retry-after"), wait)
      if attempt + 1 < _TRIES:
        self._sleep(wait)
    if why:
      raise failures.TransientError(
        f"--server={self._name} gave no answer in {_TRIES} tries ({why}). The same command goes on."
      )
    return None

  def _read(self, answer: Any) -> Reply | None:
    try:
      found = answer.json()
      choice = found["choices"][0]
      text = choice["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError):
      return None
    if not isinstance(text, str):
      return None
    usage = found.get("usage")
    for name in ("prompt_tokens", "completion_tokens"):
      spent = usage.get(name) if isinstance(usage, dict) else None
      self._count(name, spent if isinstance(spent, int) else 0)
    return Reply(text, choice.get("finish_reason") == "length")

  def _count(self, name: str, number: int) -> None:
    with self._lock:
      self._spent[name] += number


def _seconds(value: str | None, default: float) -> float:
  """What Retry-After asks for, within reason; it may also be a date."""
  try:
    return min(max(float(value or ""), 0.0), _LONGEST_WAIT)
  except ValueError:
    return default


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
      self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
      self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # KeyError, OSError, ValueError, by what is wrong
      reason = " ".join(str(error).split())[:200]
      raise ValueError(
        f"--model={folder} is no causal language model that transformers reads ({reason})."
      ) from error
    self._torch, self._max_tokens = torch, max_tokens
    self._model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    self._spent = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}

  def totals(self) -> Mapping[str, int]:
    return dict(self._spent)

  def check(self) -> None:
    """It was loaded."""

  def ask(self, prompt: str) -> Reply | None:
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
