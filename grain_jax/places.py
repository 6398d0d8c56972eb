"""Places that a user names: paths of a file system. Addresses on the net are refused."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

# Of two letters at least: C:/ is a path. A pathlib.Path has one slash where an address had two.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)


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


def check_all(values: Mapping[str, Any]) -> None:
  """`check` of every text or path, and of every list of them, among named values."""
  for name, value in values.items():
    for item in value if isinstance(value, list | tuple) else (value,):
      if isinstance(item, str | os.PathLike):
        check(item, name)
