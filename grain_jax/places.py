"""Places that a user names: paths of a file system. Addresses on the net are refused."""

from __future__ import annotations

import os
import pathlib
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

# Of two letters at least: C:/ is a path. A pathlib.Path has one slash where an address had two.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)

_HUB = re.compile(r"(hf:/+|https?:/+(www\.)?(huggingface\.co|hf\.co)/)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check(path: str | os.PathLike, name: str) -> None:
  """Refuses an address such as gs://bucket/run.

  Args:
    path: what the user gave.
    name: where: '--workdir', 'config.data.dir'.

  Raises:
    ValueError: `path` is an address; one line.
  """
  text = os.fspath(path)
  found = _SCHEME.match(text) if isinstance(text, str) else None
  if found is None:
    return
  scheme = found.group(1).lower()
  sign = "=" if name.startswith("-") else " = "
  what = f"{name}{sign}{text} is an address ({scheme}://), not a path of a file system."
  if scheme == "file":
    raise ValueError(f"{what} Write the path alone: /{text[found.end() :].lstrip('/')}.")
  raise ValueError(f"{what} Copy it to a local disk or mount it, and give that path.")


def hub_name(path: str | os.PathLike) -> str | None:
  """'org/name' where a path that leads nowhere may be a model's name on the Hugging Face hub.

  Args:
    path: 'org/name', 'hf://org/name' or 'https://huggingface.co/org/name'.

  Returns:
    None where there is such a file, or a folder `org` in which it may have been meant.
  """
  text = os.fspath(path)
  address = _HUB.match(text)
  name = text[address.end() :] if address else text
  if not (found := _HUB_NAME.match(name)) or (not address and found.group() != name):
    return None
  org, _, model = found.group().partition("/")
  file = re.search(r"\.(pth?|ckpt|bin|tar|safetensors|json|index)$", model)
  if not address and (file or org in (".", "..") or _exists(pathlib.Path(org))):
    return None
  return found.group()


def check_all(values: Mapping[str, Any]) -> None:
  """`check` of every text or path, and of every list of them, among named values."""
  for name, value in values.items():
    for item in value if isinstance(value, list | tuple) else (value,):
      if isinstance(item, str | os.PathLike):
        check(item, name)


def find_file(path: str | os.PathLike) -> pathlib.Path:
  """The path as its file is spelled on the disk; as it is where there is none, or no accent in it.

  macOS and what it writes spell an accent as a character of its own (NFD), other systems within its
  letter (NFC): what stands in a file of annotations may name a file of the other spelling. A path
  with ".." stays: a link that is found so would lead elsewhere than the one that was judged.
  """
  path = pathlib.Path(path)
  if str(path).isascii() or ".." in path.parts or _exists(path):
    return path
  found = pathlib.Path(path.anchor)
  for part in path.relative_to(path.anchor).parts:
    forms = dict.fromkeys([part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))])
    spelled = next((found / form for form in forms if _exists(found / form)), None)
    if spelled is None:
      return path
    found = spelled
  return found


def _exists(path: pathlib.Path) -> bool:
  try:
    return os.path.lexists(path)
  except ValueError:  # a NUL, half a character: no path
    return False
