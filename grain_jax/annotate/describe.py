"""describe: what is in each picture, in words, by a language model that sees.

Of each picture it asks for the main visual subjects, then for what can be seen of each of them, as
at most ten short descriptions, and for a caption of one sentence (--stages=1: for the descriptions
at once). The model is behind any server that speaks the OpenAI protocol,

  python -m grain_jax.annotate describe --input=FOLDER --out=DIR --server=http://HOST:8000/v1 \\
    --model=NAME [--api_key_env=OPENAI_API_KEY]

or in this process, from a folder: --backend=transformers --model=FOLDER. What it writes,
`grain_jax.annotate ground` turns into boxes. Descriptions that were known are replaced.

--region_captions asks for something else: a long description of each box that is known, from the
box cut out with a margin. It takes the place of the short one, whose false texts go with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grain_jax.annotate import (
  asking,
  chat,
  describe_check,
  dialogues,
  local_models,
  prompt_files,
  stages,
)
from grain_jax.data.sources import base

SERVER, TRANSFORMERS = "server", "transformers"
ADDRESSES = ("server",)  # flags that are no paths
NEUTRAL = (
  "server", "api_key_env", "concurrency", "retries", "timeout", "backoff", "price_in", "price_out",
  "max_cost", "sample", "batch_size",
)  # fmt: skip
FLAGS = (
  base.Flag("backend", "where the model is", SERVER, choices=(SERVER, TRANSFORMERS)),
  base.Flag("server", "address of an OpenAI-compatible server: http://HOST:PORT/v1", ""),
  base.Flag("model", "its name on the server; a folder with --backend=transformers", ""),
  base.Flag("api_key_env", "NAME of the environment variable with the key; none: no key", ""),
  base.Flag("concurrency", "requests at a time, of each worker", 8, int),
  base.Flag("retries", "of a request that failed, before its picture is skipped", 4, int),
  base.Flag("timeout", "seconds for a whole reply", 120.0, float),
  base.Flag("backoff", "seconds before the first retry, doubled for each", 1.0, float),
  base.Flag("max_tokens", "of a reply", 512, int),
  base.Flag("price_in", "dollars for a million tokens of prompts and pictures", 0.0, float),
  base.Flag("price_out", "dollars for a million tokens of replies", 0.0, float),
  base.Flag("max_cost", "dollars; nothing is begun that is estimated dearer; 0: any", 0.0, float),
  base.Flag("sample", "pictures described first, to estimate tokens and cost", 3, int),
  base.Flag("stages", "2: subjects, then descriptions of each; 1: descriptions", 2, int, (1, 2)),
  base.Flag("prompts", "folder with prompts of your own, of the names in annotate/prompts", ""),
  base.Flag("no_caption", "ask for no caption", False, bool),
  base.Flag("any_script", "keep descriptions that are not in Latin letters", False, bool),
  base.Flag("region_captions", "long descriptions of the boxes that are known", False, bool),
  base.Flag("margin", "of a box that is cut out, as a part of its sides", 0.1, float),
  base.Flag("batch_size", "questions at a time, of --backend=transformers", 8, int),
)
_NUMBERS = {  # flag -> (smallest, largest)
  "concurrency": (1, 1024), "retries": (0, 20), "timeout": (0.001, 3600), "backoff": (0, 60),
  "max_tokens": (1, 32_768), "price_in": (0, 1e6), "price_out": (0, 1e6), "max_cost": (0, 1e9),
  "sample": (0, 1000), "margin": (0, 1), "batch_size": (1, 1024),
}  # fmt: skip


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
  """JSON of the flags, the prompts in it, the key not; one line where they cannot be."""
  for name, (least, most) in _NUMBERS.items():
    if not least <= values[name] <= most:
      raise ValueError(f"--{name} = {values[name]:g}: use a number from {least:g} to {most:,}.")
  if values["backend"] not in (SERVER, TRANSFORMERS):
    raise ValueError(f"--backend={values['backend']}: use {SERVER} or {TRANSFORMERS}.")
  if not values["model"]:
    raise ValueError("--model is missing: the model's name on the server, or its folder.")
  found = dict(values)
  if values["backend"] == SERVER:
    if values["max_cost"] and not (values["price_in"] or values["price_out"]):
      raise ValueError("--max_cost needs the prices: --price_in and --price_out.")
    if values["max_cost"] and not values["sample"]:
      raise ValueError("--max_cost is held against an estimate: give a --sample of 1 or more.")
    if not values["server"]:
      raise ValueError(
        "--server is missing: the address of an OpenAI-compatible server, such as "
        "http://localhost:8000/v1. Or give a folder: --backend=transformers --model=FOLDER."
      )
    chat.check_url(values["server"])
    chat.key_of(values["api_key_env"])
    chat.import_httpx()
  else:
    if values["server"]:
      raise ValueError("--server goes with --backend=server. Leave one of the two out.")
    found["model"] = local_models.check_folder(values["model"])
  if values["region_captions"]:
    names = ("region",)
  else:
    names = ("subjects", "features") if values["stages"] == 2 else ("descriptions",)
    names += () if values["no_caption"] else ("caption",)
  found["prompts"] = prompt_files.read(names, values["prompts"])
  return found


def make(settings: Mapping[str, Any]) -> stages.Stage:
  """The stage, which has asked nobody yet."""
  return Describer(settings)


def check(
  settings: Mapping[str, Any], source: base.Source, *, say: Callable[[str], None]
) -> Mapping[str, float]:
  """Asks the server before anything else is spent; what it spent. See `describe_check`."""
  if settings["backend"] != SERVER:
    return {}
  return describe_check.check(Describer(settings), settings, source, say=say)


class Describer:
  """Descriptions and captions of pictures, or long descriptions of their boxes."""

  def __init__(self, settings: Mapping[str, Any]):
    self.settings = settings
    if settings["backend"] == SERVER:
      self.backend: Any = chat.Chat(settings)
      # More than are asked at a time, so that a slow picture does not hold the others up.
      self.batch_size, self.num_gpus = max(32, 8 * settings["concurrency"]), 0.0
    else:
      self.backend = local_models.Local(settings)
      self.batch_size, self.num_gpus = settings["batch_size"], 1.0
    names = [field.name for field in dataclasses.fields(dialogues.Dialogues)]
    self._dialogues = dialogues.Dialogues(**{name: settings[name] for name in names})

  def annotate(self, items: Sequence[stages.Item]) -> list[stages.Result]:
    """A result for each picture, in their order."""
    return self.backend.run([self.dialogue(item) for item in items])

  def dialogue(self, item: stages.Item) -> asking.Dialogue:
    """What is asked of a picture."""
    regions = self.settings["region_captions"]
    return self._dialogues.regions(item) if regions else self._dialogues.describe(item)

  def totals(self) -> Mapping[str, float]:
    """Requests, retries, tokens and cost since it was last asked."""
    return self.backend.totals()
