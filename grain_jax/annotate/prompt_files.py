"""The prompts of `describe`: text files beside this one, each of which a user can replace."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

FOLDER = pathlib.Path(__file__).with_name("prompts")
# Prompt -> (placeholders that it must have, those that it may have).
PLACEHOLDERS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
  "subjects": (frozenset({"caption"}), frozenset({"most"})),
  "features": (frozenset({"subjects"}), frozenset({"caption", "most"})),
  "descriptions": (frozenset({"caption"}), frozenset({"most"})),
  "caption": (frozenset({"caption"}), frozenset()),
  "region": (frozenset({"description"}), frozenset({"caption"})),
}
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_MOST = 20_000  # characters of a prompt: what is larger is another file
_CONTEXT = 1500  # characters of a text that is put into a prompt


def read(names: tuple[str, ...], folder: str | pathlib.Path | None = None) -> dict[str, str]:
  """The prompts of these names.

  Args:
    names: of `PLACEHOLDERS`.
    folder: of NAME.txt files that take the place of ours; what is not there stays ours.

  Raises:
    ValueError: no such folder, a file in it that is no prompt, no UTF-8, or without its
      placeholder; one line.
  """
  own = {}
  if folder:
    given = pathlib.Path(folder).expanduser()
    if not given.is_dir():
      raise ValueError(f"--prompts={folder}: there is no such folder. Correct the path.")
    own = {path.stem: path for path in sorted(given.glob("*.txt"))}
    if unknown := own.keys() - PLACEHOLDERS.keys():
      raise ValueError(
        f"--prompts={folder}: {min(unknown)}.txt is no prompt. They are "
        f"{', '.join(f'{name}.txt' for name in PLACEHOLDERS)}."
      )
    if not own:
      raise ValueError(
        f"--prompts={folder} holds no prompt. Put one of "
        f"{', '.join(f'{name}.txt' for name in PLACEHOLDERS)} into it."
      )
  return {name: _read(name, own.get(name, FOLDER / f"{name}.txt")) for name in names}


def _read(name: str, path: pathlib.Path) -> str:
  try:
    text = path.read_text("utf-8-sig").strip()
  except UnicodeDecodeError:
    raise ValueError(f"{path}: not UTF-8. Save it as UTF-8.") from None
  if len(text) > _MOST:
    raise ValueError(f"{path}: {len(text):,} characters are no prompt. Use at most {_MOST:,}.")
  must, may = PLACEHOLDERS[name]
  found = set(_PLACEHOLDER.findall(text))
  for what, wrong in (
    ("no placeholder", must - found),
    ("an unknown placeholder", found - must - may),
  ):
    if wrong:
      known = ", ".join(f"{{{x}}}" for x in sorted(must | may))
      raise ValueError(
        f"{path}: {what} {{{min(wrong)}}}. A prompt {name} has {known}, of which it needs "
        f"{', '.join(f'{{{x}}}' for x in sorted(must))}."
      )
  return text


def fill(prompt: str, values: Mapping[str, object]) -> str:
  """The prompt with its placeholders replaced, once: a value that looks like one stays as it is."""

  def value(found: re.Match[str]) -> str:
    text = str(values[found[1]]).strip()
    return text if len(text) <= _CONTEXT else text[:_CONTEXT].rstrip() + "..."

  return _PLACEHOLDER.sub(value, prompt)
