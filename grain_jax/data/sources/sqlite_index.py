"""What a source must look up and memory cannot hold: a table in the build's scratch folder."""

from __future__ import annotations

import contextlib
import pathlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_CACHE = 64 << 20  # bytes of an index that stay in memory
_BATCH = 20_000  # entries sorted and inserted together: neighbours in the tree, a page at a time


def make(path: pathlib.Path, columns: str, rows: Iterable[tuple[str, ...]]) -> None:
  """Writes the table `entries`; a row that is there twice is there once.

  Args:
    path: of the file.
    columns: "name TYPE, ...", all of which together, in this order, are the key.
    rows: a value for each column; those that UTF-8 cannot hold are left out.
  """
  path.unlink(missing_ok=True)
  names = [column.split()[0] for column in columns.split(", ")]
  with _told(), contextlib.closing(_connect(path, "rwc")) as database:
    database.execute("PRAGMA journal_mode = OFF")  # a build that stops throws it all away
    database.execute("PRAGMA synchronous = OFF")
    database.execute(
      f"CREATE TABLE entries ({columns}, PRIMARY KEY ({', '.join(names)})) WITHOUT ROWID"
    )
    database.execute("BEGIN")
    places = ", ".join("?" * len(names))

    def insert(batch: list[tuple[str, ...]]) -> None:
      batch.sort()
      database.executemany(f"INSERT OR IGNORE INTO entries VALUES ({places})", batch)
      batch.clear()

    batch: list[tuple[str, ...]] = []
    for row in rows:
      if all(is_text(value) for value in row):
        batch.append(row)
      if len(batch) == _BATCH:
        insert(batch)
    insert(batch)
    database.execute("COMMIT")


class Index:
  """A table that `make` wrote, to be read by any process."""

  def __init__(self, path: pathlib.Path):
    with _told():
      self._database = _connect(path, "ro")

  def rows(self, query: str, values: Sequence[str]) -> list[tuple[Any, ...]]:
    if not all(is_text(value) for value in values):
      return []
    with _told():
      return self._database.execute(query, values).fetchall()

  def close(self) -> None:
    self._database.close()


def is_text(value: str) -> bool:
  """Whether UTF-8 can hold it: JSON can carry halves of a character."""
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    return False
  return True


def _connect(path: pathlib.Path, mode: str) -> sqlite3.Connection:
  # Nobody else writes it: no locks, which some file systems of clusters do not have.
  address = f"{path.resolve().as_uri()}?nolock=1&mode={mode}"
  database = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
  database.execute(f"PRAGMA cache_size = -{_CACHE >> 10}")
  return database


@contextlib.contextmanager
def _told() -> Iterator[None]:
  try:
    yield
  except sqlite3.Error as error:
    raise ValueError(
      f"the index of the build beside --out cannot be written or read: {error}. Make room on that "
      "disk, or choose another."
    ) from error
