"""What a build must look up and memory cannot hold: keys met, and where members of JSON files lie.

Both are SQLite files in a folder of the build's own, which goes when the build ends, however it
ends. SQLite keeps `_CACHE` of them in memory, whatever their size.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import posixpath
import sqlite3
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from grain_jax import failures, jsonfiles

_MEMBERS, _LINES = "members.sqlite", "lines.sqlite"
_CACHE = 64 << 20  # bytes of an index that stay in memory
_BATCH = 20_000  # entries sorted and inserted together: neighbours in the tree, a page at a time


class SeenKeys:
  """Tells keys that were met before from new ones, by 64 bits of a hash."""

  def __init__(self, folder: pathlib.Path):
    (folder / "seen_keys.sqlite").unlink(missing_ok=True)
    self._database = _create(
      folder / "seen_keys.sqlite", "CREATE TABLE seen (hash INTEGER PRIMARY KEY)"
    )
    with _told():
      self._database.execute("CREATE TABLE respelt (hash INTEGER)")

  def add(self, key: str) -> bool:
    """Whether the key is new."""
    plain = posixpath.normpath(key)
    with _told():
      row = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (_hash(key),))
      if row.rowcount == 1 and plain != key and "://" not in key:
        self._database.execute("INSERT INTO respelt VALUES (?)", (_hash(plain),))
    return row.rowcount == 1

  def count_respelt(self) -> int:
    """How many keys are, as paths, others that were met: ./a.jpg beside a.jpg."""
    with _told():
      (count,) = self._database.execute(
        "SELECT count(*) FROM respelt WHERE hash IN (SELECT hash FROM seen)"
      ).fetchone()
    return count

  def close(self) -> None:
    self._database.close()


class MemberIndex:
  """Finds the members of JSON files that are one object each, {key: value}, without holding them.

  It is the objects that `json.loads` gives: of a key that a file has twice, the last value.
  """

  def __init__(self, database: sqlite3.Connection, files: Sequence[pathlib.Path]):
    """See `make` and `open`."""
    self._files = [_File(path) for path in files]
    self._first: list[str | None] = [None] * len(files)
    self._database = database

  @classmethod
  def open(cls, folder: pathlib.Path, files: Sequence[pathlib.Path]) -> MemberIndex:
    """The index that `make` wrote into the folder, of the same files, to be looked up."""
    address = f"{(folder / _MEMBERS).resolve().as_uri()}?nolock=1&mode=ro"
    with _told():
      database = sqlite3.connect(address, uri=True, check_same_thread=False)
    return cls(database, files)

  @classmethod
  def make(cls, folder: pathlib.Path, files: Sequence[pathlib.Path]) -> MemberIndex:
    """Reads all files once.

    Args:
      folder: where the index goes: 30 bytes a member.
      files: JSON files; errors name them.

    Raises:
      ValueError: a file that is no JSON object, in one line.
    """
    (folder / _MEMBERS).unlink(missing_ok=True)
    database = _create(
      folder / _MEMBERS,
      "CREATE TABLE members (hash INTEGER, file INTEGER, offset INTEGER, length INTEGER, "
      "PRIMARY KEY (hash, file, offset)) WITHOUT ROWID",
    )
    self = cls(database, files)
    batch: list[tuple[int, int, int, int]] = []
    for number, path in enumerate(files):
      for member in jsonfiles.iterate_object(path):
        if self._first[number] is None:
          self._first[number] = member.key
        batch.append((_hash(_nfc(member.key)), number, member.offset, member.length))
        if len(batch) == _BATCH:
          self._insert(batch)
    self._insert(batch)
    with _told():
      database.execute("COMMIT")
    return self

  def first_key(self, file: int) -> str | None:
    """The first key of a file; None where it has none."""
    return self._first[file]

  def find(self, key: str) -> dict[int, Any]:
    """{number of the file: value} of the files that have the key, by rising number.

    Where a file spells an accent as a character of its own and the key does not, or the other way
    round, it is the same key, unless the file has it as it stands too.
    """
    with _told():
      rows = self._database.execute(
        "SELECT file, offset, length FROM members WHERE hash = ? ORDER BY file, offset",
        (_hash(_nfc(key)),),
      ).fetchall()
    found: dict[int, Any] = {}
    near: dict[int, Any] = {}
    for file, offset, length in rows:
      name, value = jsonfiles.parse_member(self._files[file].read(offset, length))
      if name == key:
        found[file] = value
      elif _nfc(name) == _nfc(key):  # another one may have the same hash
        near[file] = value
    return dict(sorted((near | found).items()))

  def close(self) -> None:
    self._database.close()
    for file in self._files:
      file.close()

  def _insert(self, batch: list[tuple[int, int, int, int]]) -> None:
    batch.sort()
    with _told():
      self._database.executemany("INSERT INTO members VALUES (?, ?, ?, ?)", batch)
    batch.clear()


class LineIndex:
  """Finds lines of files of JSON lines by the key of their object; of two the first one."""

  def __init__(self, database: sqlite3.Connection, files: Sequence[pathlib.Path]):
    """See `make` and `open`."""
    self._files, self._database = [_File(path) for path in files], database

  @classmethod
  def open(cls, folder: pathlib.Path, files: Sequence[pathlib.Path]) -> LineIndex:
    """The index that `make` wrote into the folder, of the same files, to be looked up."""
    address = f"{(folder / _LINES).resolve().as_uri()}?nolock=1&mode=ro"
    with _told():
      database = sqlite3.connect(address, uri=True, check_same_thread=False)
    return cls(database, files)

  @classmethod
  def make(
    cls,
    folder: pathlib.Path,
    files: Sequence[pathlib.Path],
    keys: Callable[[pathlib.Path], Iterator[tuple[str, int, int]]],
  ) -> LineIndex:
    """Reads all files once.

    Args:
      folder: where the index goes: 30 bytes a line.
      files: of JSON lines.
      keys: file -> (key, offset, length) of its lines.
    """
    (folder / _LINES).unlink(missing_ok=True)
    database = _create(
      folder / _LINES,
      "CREATE TABLE lines (hash INTEGER PRIMARY KEY, file INTEGER, offset INTEGER, length INTEGER, "
      "more INTEGER)",
    )
    for number, path in enumerate(files):
      rows = ((_hash(key), number, offset, length) for key, offset, length in keys(path))
      while batch := list(itertools.islice(rows, _BATCH)):
        with _told():
          database.executemany(
            "INSERT INTO lines VALUES (?, ?, ?, ?, 0) ON CONFLICT DO UPDATE SET more = more + 1",
            batch,
          )
    with _told():
      database.execute("COMMIT")
    return cls(database, files)

  def find(self, key: str) -> dict[str, Any]:
    """The object of the key's line; {} where there is none."""
    with _told():
      row = self._database.execute(
        "SELECT file, offset, length FROM lines WHERE hash = ?", (_hash(key),)
      ).fetchone()
    if row is None:
      return {}
    found = json.loads(self._files[row[0]].read(row[1], row[2]))
    return found if found["key"] == key else {}  # another one may have the same hash

  def count_unread(self) -> int:
    """How many lines come after one of the same key."""
    with _told():
      (count,) = self._database.execute("SELECT total(more) FROM lines").fetchone()
    return int(count)

  def close(self) -> None:
    self._database.close()
    for file in self._files:
      file.close()


class _File:
  """Parts of a file by their place; opened again where the storage failed."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._file: BinaryIO | None = None

  def read(self, offset: int, length: int) -> bytes:
    data = failures.retry_read(lambda: self._read(offset, length), self._path)
    if len(data) < length:
      raise ValueError(f"{self._path} has become shorter while it was read. Start again.")
    return data

  def _read(self, offset: int, length: int) -> bytes:
    try:
      if self._file is None:
        self._file = self._path.open("rb", buffering=0)
      return os.pread(self._file.fileno(), length, offset)
    except OSError:
      self.close()
      raise

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None


def _create(path: pathlib.Path, table: str) -> sqlite3.Connection:
  # Nobody else opens it: no locks, which some file systems of clusters do not have.
  address = f"{path.resolve().as_uri()}?nolock=1"
  with _told():
    database = sqlite3.connect(address, uri=True, isolation_level=None)
    database.execute("PRAGMA journal_mode = OFF")  # a build that stops throws it all away
    database.execute("PRAGMA synchronous = OFF")
    database.execute(f"PRAGMA cache_size = -{_CACHE >> 10}")
    database.execute(table)
    database.execute("BEGIN")
  return database


@contextlib.contextmanager
def _told() -> Iterator[None]:
  try:
    yield
  except sqlite3.Error as error:
    said = f"the index of the build beside --out cannot be written or read: {error}. "
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
      raise failures.TransientError(f"{said}Make room; the same command goes on.") from error
    raise ValueError(f"{said}Choose another disk.") from error


def _nfc(key: str) -> str:
  return key if key.isascii() else unicodedata.normalize("NFC", key)


def _hash(key: str) -> int:
  """64 bits, as SQLite's signed integers; JSON can carry halves of a character."""
  digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
  return int.from_bytes(digest, "big", signed=True)
