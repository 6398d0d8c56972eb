"""`python -m grain_jax.annotate.descriptors --classes=FILE --out=FILE.json --model=NAME ...`

Asks a language model what each class looks like, and writes {class: [descriptor, ...]}, as
`zero_shot` evaluations read it (after Menon and Vondrick, ICLR 2023). --backend=transformers asks a
model in this process instead, of the folder --model.

FILE.json is written when all classes have descriptors, not before; replies are kept beside it, in
FILE.replies.jsonl, and a class that stands in either is not asked again. Both are of one prompt and
model, which FILE.settings.json tells; for others the command ends.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import fcntl
import hashlib
import json
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from grain_jax import failures, helptext, places, textfiles
from grain_jax.annotate import language_models
from grain_jax.data.building import flags as build_flags

_PROGRAM = "python -m grain_jax.annotate.descriptors"
PROMPT = pathlib.Path(__file__).parent / "prompts" / "descriptors.txt"
_LONGEST = 100  # characters of a descriptor
_REFUSAL = re.compile(
  r"\b(i'?m sorry|i am sorry|i cannot|i can'?t|as an ai|i'?m unable|i am unable)\b", re.IGNORECASE
)
NO_LIST, REFUSAL = "no_list", "refusal"


class Parsed(NamedTuple):
  """The descriptors of a reply."""

  descriptors: list[str]
  losses: list[str]  # why a line, or the whole, is no descriptor


def parse(reply: language_models.Reply, name: str, *, most: int) -> Parsed:
  """The descriptors of a reply: the lines of a list, or a JSON array of texts.

  Args:
    reply: of the model.
    name: of the class.
    most: descriptors that are kept.
  """
  entries = language_models.listed(reply)
  losses, kept = [], []
  if not entries:
    return Parsed([], [REFUSAL if _REFUSAL.search(reply.text.replace("’", "'")) else NO_LIST])
  for entry in entries:
    descriptor = " ".join(entry.replace("**", "").split()).strip(' .;,"')
    why = _fault(descriptor, name, kept)
    if not why and len(kept) == most:
      why = "too_many"
    losses += [why] if why else []
    kept += [] if why else [descriptor]
  return Parsed(kept, losses)


def _fault(descriptor: str, name: str, kept: Sequence[str]) -> str:
  """Why a line is no descriptor; '' if it is one."""
  if not any(map(str.isalnum, descriptor)):
    return "empty_or_cut"
  if len(descriptor) > _LONGEST:
    return "too_long"
  if _REFUSAL.search(descriptor.replace("’", "'")):
    return REFUSAL
  try:
    descriptor.encode()
  except UnicodeEncodeError:
    return "not_text"
  plain = descriptor.casefold()
  if plain in map(str.casefold, kept):
    return "duplicate"
  own = re.escape(" ".join(name.replace("_", " ").casefold().split()))
  return "names_the_class" if re.search(rf"(?<!\w){own}(?!\w)", plain) else ""


def read_classes(path: pathlib.Path) -> list[str]:
  """The names in a file, a line each or a JSON array; a one-line ValueError if there is none."""
  name = f"--classes={path}"
  if path.suffix == ".json":
    found = textfiles.read_json(path, name=name)
    if not isinstance(found, list) or not all(isinstance(n, str) and n.strip() for n in found):
      raise ValueError(f"{name}: an array of class names is needed.")
  else:
    found = textfiles.read_lines(path, name=name)
  names = [name.strip() for name in found]
  twice = [n for n, count in collections.Counter(names).items() if count > 1]
  if twice:
    raise ValueError(f"{name} names {twice[0]!r} twice. Name each class once.")
  if not names:
    raise ValueError(f"{name} names no class. Write one a line.")
  return names


def read_prompt(path: pathlib.Path) -> str:
  """A prompt with {class} in it, and {number} if it likes; a one-line ValueError if it has none."""
  text = textfiles.read_text(path, name=f"--prompt={path}").strip()
  if "{class}" not in text:
    raise ValueError(f"--prompt={path} lacks {{class}}, where the name goes. Write it in.")
  return text


def read_written(out: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, list[str]]:
  """What stands in `out`; {} where there is no such file.

  Raises:
    ValueError: it is a folder, no {class: [descriptor, ...]}, or of other settings; one line.
  """
  name = f"--out={out}"
  if out.is_dir():
    raise ValueError(f"{name} is a folder. Name a file in it: {out / 'descriptors.json'}.")
  if not out.exists():
    return {}
  found, wrong = textfiles.read_json(out, name=name), ""
  if not isinstance(found, dict):
    wrong = f"a {type(found).__name__}"
  else:
    wrong = next((f"{key!r}: {own!r:.80}" for key, own in found.items() if not _are_texts(own)), "")
  if wrong:
    raise ValueError(
      f"{name} is there and holds {wrong}, which is no {{class: [descriptor, ...]}}. Move it away, "
      "or choose another --out."
    )
  settings_file = _beside(out, "settings.json")
  if found and settings_file.is_file():
    _check_settings(out, textfiles.read_json(settings_file), settings)
  return found


def _are_texts(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def _beside(out: pathlib.Path, name: str) -> pathlib.Path:
  return out.with_name(f"{out.name.removesuffix('.json')}.{name}")


def _check_settings(out: pathlib.Path, found: Any, settings: Mapping[str, Any]) -> None:
  """Raises where what is there is of other settings; the line names all that would be taken."""
  if found != settings:
    files = [file for file in (out, _beside(out, "replies.jsonl")) if file.exists()]
    raise ValueError(
      f"{' and '.join(map(str, files))}: these are replies to another prompt or of another model. "
      "Move or remove what is named here, or choose another --out."
    )


class Replies:
  """The replies so far, in a file of JSON lines that one process at a time adds to."""

  def __init__(self, out: pathlib.Path, settings: Mapping[str, Any]):
    """`out`: beside which they are; ValueError: of other settings, or another process writes."""
    path = _beside(out, "replies.jsonl")
    self._file = path.open("a+b")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f"another command writes {path}. Wait for it, or stop it.") from None
    self._file.seek(0)
    data = self._file.read()
    whole = data[: data.rfind(b"\n") + 1]  # what was being written when it was killed is gone
    self._file.truncate(len(whole))
    try:
      lines = [json.loads(line) for line in whole.splitlines()]
      first, self.of = lines[0] if lines else None, {}
      for line in lines[1:]:
        self.of[line["class"]] = line
    except (ValueError, KeyError, TypeError):
      raise ValueError(
        f"{path} is no file of replies. Remove it, or choose another --out."
      ) from None
    alone = len(lines) == 1 and isinstance(first, dict) and "settings" in first
    if not lines or alone:  # nobody has replied
      self._file.truncate(0)
      self._write({"settings": settings})
    else:
      _check_settings(out, first, {"settings": settings})

  def add(self, line: dict[str, Any]) -> None:
    self._write(line)
    self.of[line["class"]] = line

  def _write(self, line: Any) -> None:
    self._file.write((json.dumps(line) + "\n").encode())
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def make(
  classes: Sequence[str],
  out: pathlib.Path,
  chat: language_models.Chat,
  *,
  prompt: str,
  settings: Mapping[str, Any],
  most: int = 10,
  allow_failed: bool = False,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Descriptors of all classes, written to `out` when all are there.

  Args:
    classes: names.
    out: JSON file to write, and the folder of the replies.
    chat: who is asked.
    prompt: with {class} and {number}.
    settings: JSON, of which replies that are there must be.
    most: descriptors of a class.
    allow_failed: classes without descriptors get [], the class name alone.
    say: takes lines of progress.

  Returns:
    {counts, losses, totals}.

  Raises:
    ValueError: classes have no descriptors, or `out` is something else; one line.
    failures.TransientError: the server does not answer; the same call goes on.
  """
  before, settings_file = read_written(out, settings), _beside(out, "settings.json")
  is_known = not before or settings_file.is_file()  # of which settings that is
  replies = Replies(out, settings)
  try:
    known = {n for n in classes if before.get(n) or replies.of.get(n, {}).get("descriptors")}
    todo = [name for name in classes if name not in known]
    if known:
      of = "" if is_known else f"; {out} is taken, of whatever prompt and model it may be"
      say(f"{len(known):,} of {len(classes):,} classes are there{of}")
    if todo:
      chat.check()
      _ask_all(todo, chat, replies, prompt=prompt, most=most, say=say)
    losses, found = collections.Counter[str](), dict(before)
    for name in classes:
      line = replies.of.get(name)
      if not before.get(name):
        found[name] = line["descriptors"] if line else []
        losses.update(line["losses"] if line else [])
    failed = [name for name in classes if not found[name]]
    counts = {"classes": len(classes), "asked": len(todo), "failed": len(failed)}
    counts["descriptors"] = sum(len(found[name]) for name in classes)
    if failed and not allow_failed:
      told = ", ".join(f"{why} {number:,}" for why, number in losses.most_common(3))
      raise ValueError(
        f"{len(failed):,} of {len(classes):,} classes have no descriptors ({told}), {failed[0]!r} "
        f"first: {out} is not written. Ask again by the same command, or give --allow_failed."
      )
    if is_known:
      places.write_text(settings_file, json.dumps(settings) + "\n")
    places.write_text(out, json.dumps(found, indent=4, ensure_ascii=False) + "\n")
  finally:
    replies.close()
  return {"counts": counts, "losses": dict(losses), "totals": dict(chat.totals())}


def _ask_all(todo, chat, replies, *, prompt, most, say) -> None:
  """Asks for each class; replies are written as they come, in any order."""

  stop = threading.Event()  # futures that are cancelled would never be told as completed

  def ask(name: str) -> language_models.Reply | None:
    """None: it was not asked."""
    if stop.is_set():
      return None
    words = prompt.replace("{number}", str(most))
    try:
      return chat.ask(words.replace("{class}", name.replace("_", " ")))
    except BaseException:
      stop.set()
      raise

  failed: BaseException | None = None
  with concurrent.futures.ThreadPoolExecutor(chat.at_once) as pool:
    asked = {pool.submit(ask, name): name for name in todo}
    try:
      for done, future in enumerate(concurrent.futures.as_completed(asked), 1):
        name, error = asked[future], future.exception()
        if error is not None:
          failed = failed or error
          continue
        reply = future.result()
        if reply is None:
          continue
        parsed = Parsed([], [reply.why]) if reply.why else parse(reply, name, most=most)
        text = None if reply.why else reply.text
        replies.add({"class": name, "reply": text, **parsed._asdict()})
        if done % 50 == 0 or done == len(todo):
          say(f"{done:,} of {len(todo):,} classes asked")
    finally:
      stop.set()
  if failed is not None:  # what was asked beside it is kept
    raise failed


def _flags() -> argparse.ArgumentParser:
  parser = build_flags.Parser(
    prog=_PROGRAM, description=__doc__, formatter_class=helptext.ArgparseFormatter,
    allow_abbrev=False,
  )  # fmt: skip
  add = parser.add_argument
  add("--classes", required=True, help="file of class names, one a line or a JSON array")
  add("--out", required=True, help="JSON file to write")
  add("--model", required=True, help="name that the server knows; a folder with transformers")
  add("--backend", choices=("server", "transformers"), default="server", help="who answers")
  add("--server", default="", help="address of an OpenAI-compatible server: http://HOST:PORT/v1")
  add(
    "--api_key_env", default="", help="NAME of the environment variable with the key; none: no key"
  )
  add("--concurrency", type=int, default=8, help="requests at a time")
  add("--timeout", type=float, default=120.0, help="seconds that a request may take")
  add("--prompt", default=str(PROMPT), help="file with the prompt; {class} is the class's name")
  add("--max_descriptors", type=int, default=10, help="of a class")
  add("--max_tokens", type=int, default=400, help="of a reply")
  add("--allow_failed", action="store_true", help="write classes without descriptors as []")
  return parser


def _chat(flags: argparse.Namespace) -> language_models.Chat:
  if flags.backend == "transformers":
    return language_models.TransformersChat(flags.model, max_tokens=flags.max_tokens)
  if not flags.server:
    raise ValueError("--server is not given. Give its address, or --backend=transformers.")
  return language_models.ServerChat(
    flags.server, flags.model, api_key_env=flags.api_key_env, max_tokens=flags.max_tokens,
    timeout=flags.timeout, at_once=flags.concurrency,
  )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
  parser = _flags()
  flags = parser.parse_args(arguments)
  try:
    places.check_all({f"--{n}": getattr(flags, n) for n in ("classes", "out", "prompt")})
    for name in ("concurrency", "max_descriptors", "max_tokens", "timeout"):
      if not getattr(flags, name) > 0:
        raise ValueError(f"--{name} = {getattr(flags, name)}: must be more than 0.")
    classes = read_classes(places.at(flags.classes))
    prompt = read_prompt(places.at(flags.prompt))
    out = places.at(flags.out)
    if not out.parent.is_dir():
      raise ValueError(f"--out={out}: there is no folder {out.parent}. Make it.")
    settings = {
      "model": flags.model, "prompt": hashlib.sha256(prompt.encode()).hexdigest(),
      "max_descriptors": flags.max_descriptors, "max_tokens": flags.max_tokens,
    }  # fmt: skip
    read_written(out, settings)  # before a model is loaded
    told = make(
      classes, out, _chat(flags), prompt=prompt, settings=settings, most=flags.max_descriptors,
      allow_failed=flags.allow_failed,
    )  # fmt: skip
  except (ValueError, OSError, failures.TransientError) as error:
    print(f"{_PROGRAM}: {failures.one_line(error)}", file=sys.stderr)
    again = failures.restart_helps(error)
    return failures.EXIT_RESTART if again else 2
  except KeyboardInterrupt:
    print(f"{_PROGRAM}: interrupted; the same command goes on.", file=sys.stderr)
    return failures.EXIT_INTERRUPTED
  for part in ("counts", "losses", "totals"):
    for name, count in told[part].items():
      print(f"  {name:20} {count:>12,}")
  print(f"wrote {out}")
  return 0


if __name__ == "__main__":
  from grain_jax import cli

  cli.prepare()
  sys.exit(main())
