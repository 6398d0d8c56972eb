"""What an evaluation reads, as a digest: processes that evaluate together must read the same."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np


def describe(contents: Sequence[Any], root: pathlib.Path | None = None) -> str:
  """ "1,000 items, digest 1f0c...": equal where the contents are.

  Args:
    contents: the items first, then whatever else is read: texts, numbers, paths, arrays,
      and sequences, sets, mappings and dataclasses of them.
    root: paths below it count from there, since it may lie elsewhere on another machine.
  """
  digest = hashlib.blake2b(digest_size=8)
  for piece in _pieces(contents, root):
    digest.update(len(piece).to_bytes(8, "little"))
    digest.update(piece)
  return f"{len(contents[0]):,} items, digest {digest.hexdigest()}"


def _pieces(value: Any, root: pathlib.Path | None) -> Iterator[bytes]:
  """Bytes that tell values apart, each with the kind of what it is a part of."""
  if isinstance(value, str):
    yield b"s" + value.encode("utf-8", "surrogatepass")
  elif isinstance(value, bytes):
    yield b"b" + value
  elif isinstance(value, pathlib.PurePath):
    below = root is not None and value.is_relative_to(root)
    name = value.relative_to(root).as_posix() if below else value.as_posix()
    yield b"p" + name.encode("utf-8", "surrogatepass")
  elif isinstance(value, np.ndarray):
    yield f"a{value.dtype}{value.shape}".encode()
    yield np.ascontiguousarray(value).tobytes()
  elif dataclasses.is_dataclass(value):
    yield b"d"
    for field in dataclasses.fields(value):
      yield from _pieces(getattr(value, field.name), root)
  elif isinstance(value, Mapping):
    yield f"m{len(value)}".encode()
    for item in value.items():
      yield from _pieces(item, root)
  elif isinstance(value, Set):
    yield from _pieces(sorted(value), root)
  elif isinstance(value, Sequence):
    yield f"l{len(value)}".encode()
    for item in value:
      yield from _pieces(item, root)
  elif value is None or isinstance(value, (bool, int, float, np.number)):
    yield f"n{value!r}".encode()
  else:
    raise TypeError(f"contents hold a {type(value).__name__}, of which no digest is made.")
