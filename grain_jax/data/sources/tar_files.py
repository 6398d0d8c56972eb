"""Samples of a tar file: members whose names differ in the extension alone, next to each other.

What is wrong with a tar costs what it spoils: the samples before and beside it are read.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from grain_jax import failures
from grain_jax.data import records
from grain_jax.data.sources import base

NO_TAR = "not_a_tar"
TRUNCATED = "truncated_tar"
DAMAGED = "damaged_tar"  # what follows a header that is none
TRAILING = "data_after_the_end_of_the_tar"
NO_FILE = "not_a_file"  # a link or a device
NO_EXTENSION = "name_without_extension"
DUPLICATE_NAME = "duplicate_name"
NON_CONTIGUOUS = "non_contiguous_key"
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20


class Member(NamedTuple):
  """Where a member's bytes lie."""

  offset: int
  size: int


class Sample(NamedTuple):
  """The members of a key."""

  key: str
  members: dict[str, Member]  # by extension in lower case: what follows the name's first dot


class _Header(NamedTuple):
  name: str
  is_file: bool
  member: Member


def samples(path: pathlib.Path, name: str) -> list[Sample | records.Refused]:
  """The samples of a tar in its order, and what of it cannot be read.

  Args:
    path: the tar, not compressed.
    name: of the tar, for what is wrong with it as a whole.
  """
  headers, end = failures.retry_read(lambda: _read_headers(path), path)
  found: list[Sample | records.Refused] = []
  runs: list[tuple[str, list[tuple[str, Member]]]] = []  # (key, its members next to each other)
  refused: dict[tuple[str, str], None] = {}
  for header in headers:
    key, extension = _split_name(header.name)
    why = _why_not(header, extension)
    if why:
      refused[key, why] = None
    elif runs and runs[-1][0] == key:
      runs[-1][1].append((extension, header.member))
    else:
      runs.append((key, [(extension, header.member)]))
  found += [records.Refused(key, "records", why) for key, why in refused]
  found += _join(runs, cut=end == TRUNCATED)
  return [*found, records.Refused(name, "records", end)] if end else found


def _join(
  runs: list[tuple[str, list[tuple[str, Member]]]], *, cut: bool
) -> Iterator[Sample | records.Refused]:
  """Samples of runs of members; a key that comes in several runs is refused, once."""
  firsts: dict[str, dict[str, Member]] = {}
  duplicates: list[str] = []
  scattered: set[str] = set()
  for key, members in runs:
    came_before, own = key in firsts, firsts.setdefault(key, {})
    new = [(extension, member) for extension, member in members if extension not in own]
    if came_before and new:
      scattered.add(key)
    for extension, member in new:
      own.setdefault(extension, member)
    if len(dict(new)) < len(members):
      duplicates.append(key)
  if cut and runs:
    # The member that is cut off is lost, and with it what came of its sample, unless that has all
    # that the first one has (of the first itself: an image and a text).
    last, usual = runs[-1][0], firsts[runs[0][0]]
    if usual.keys() - firsts[last].keys() or len(firsts[last]) < 2:
      firsts.pop(last)
      scattered.discard(last)
  for key, members in firsts.items():
    if key in scattered:
      yield records.Refused(key, "records", NON_CONTIGUOUS)
    else:
      yield Sample(key, members)
  yield from (records.Refused(key, "records", DUPLICATE_NAME) for key in duplicates)


def _split_name(name: str) -> tuple[str, str]:
  """(key, extension in lower case) of a member's name, as webdataset splits it."""
  folder, _, file = name.rpartition("/")
  stem, dot, extension = file.partition(".")
  return (f"{folder}/{stem}" if folder else stem) or name, extension.lower() if stem and dot else ""


def _why_not(header: _Header, extension: str) -> str:
  parts = pathlib.PurePosixPath(header.name).parts
  if ".." in parts or header.name.startswith("/"):
    return base.OUTSIDE
  if not header.is_file:
    return NO_FILE
  return "" if extension else NO_EXTENSION


def _read_headers(path: pathlib.Path) -> tuple[list[_Header], str]:
  """(members that are whole, but for folders; why the tar ended before its end, or '')."""
  headers: list[_Header] = []
  size = path.stat().st_size
  with path.open("rb") as file:
    if not size:
      return headers, TRUNCATED
    try:
      tar = tarfile.TarFile(fileobj=file, errors="surrogateescape")
    except (tarfile.TarError, ValueError, EOFError, OverflowError):
      return headers, NO_TAR
    with contextlib.closing(tar):
      try:
        while (info := tar.next()) is not None:
          if info.size < 0 or info.offset_data < 0:
            return headers, DAMAGED
          if info.isreg() and info.offset_data + info.size > size:
            return headers, TRUNCATED
          if not info.isdir():
            member = Member(info.offset_data, info.size)
            headers.append(_Header(info.name, info.isreg() and not info.issparse(), member))
          tar.members.clear()  # it keeps all headers else
      except (tarfile.TarError, ValueError, EOFError, OverflowError, IndexError) as error:
        return headers, TRUNCATED if "unexpected end" in str(error) else DAMAGED
      return headers, _end_of(file, tar.offset, size)


def _end_of(file: BinaryIO, offset: int, size: int) -> str:
  """What is wrong with a tar after its last member, which ends at `offset`; '' if nothing is."""
  file.seek(offset)
  if offset > size:
    return TRUNCATED
  block = file.read(_BLOCK)
  if len(block) < _BLOCK:
    return TRUNCATED
  if block.strip(b"\0"):
    return DAMAGED
  while chunk := file.read(_CHUNK):
    if chunk.strip(b"\0"):
      return TRAILING
  return ""


class Reader:
  """Bytes of members; the file is opened again where the storage failed."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._file: BinaryIO | None = None

  def read(self, member: Member) -> bytes:
    data = failures.retry_read(lambda: self._read(member), self._path)
    if len(data) < member.size:
      raise ValueError(f"{self._path} has become shorter while it was read. Start again.")
    return data

  def _read(self, member: Member) -> bytes:
    try:
      if self._file is None:
        self._file = self._path.open("rb", buffering=0)
      return os.pread(self._file.fileno(), member.size, member.offset)
    except OSError:
      self.close()
      raise

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None
