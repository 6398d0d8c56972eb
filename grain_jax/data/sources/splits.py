"""Splits as the files of published sets name them."""

from __future__ import annotations

import pathlib
import re

_NAMES = {"valid": "val", "validation": "val", "dev": "val", "training": "train"}
_KNOWN = re.compile(
  r"(?:^|[-_.])(train|training|val|valid|validation|dev|test)(?=[-_.\d]|$)", re.IGNORECASE
)


def usual(name: str) -> str:
  """'val' for 'validation', 'valid' and 'dev'."""
  return _NAMES.get(name.lower(), name)


def of_file(path: str | pathlib.PurePath) -> str:
  """The split that a part of a path names, the file's own first; train where none does."""
  for part in reversed(pathlib.PurePath(path).parts):
    if found := _KNOWN.search(part):
      return usual(found.group(1).lower())
  return "train"
