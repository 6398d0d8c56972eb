"""Annotations by image, on disk: for files that list images and annotations apart, in any order.

A SQLite file in the build's scratch folder. Files are read once, element by element, and memory
stays flat; then any process reads the images of a block, in the order in which they were added,
each with its annotations.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from grain_jax.data import records

NO_IMAGE = "annotation_without_image"
_FILE = "images.sqlite"
_BATCH = 20_000  # rows inserted together
_CACHE = 64 << 20  # bytes of the index that stay in memory
OPTIONAL = ""  # in the place of what is lost, of annotations that files of other images hold too
_INSERTS = {
  "images": "INSERT OR IGNORE INTO images (part, id, data) VALUES (?, ?, ?)",
  "annotations": "INSERT INTO annotations VALUES (?, ?, ?, ?)",
  "refused": "INSERT INTO refused (key, what, why) VALUES (?, ?, ?)",
  "aliases": "INSERT OR IGNORE INTO aliases VALUES (?, ?, ?)",
  "notes": "INSERT OR REPLACE INTO notes VALUES (?, ?)",
}
_TABLES = """
CREATE TABLE images (number INTEGER PRIMARY KEY, part INTEGER, id TEXT, data TEXT);
CREATE UNIQUE INDEX by_id ON images (part, id);
CREATE TABLE annotations (part INTEGER, image TEXT, what TEXT, data TEXT);
CREATE TABLE refused (number INTEGER PRIMARY KEY, key TEXT, what TEXT, why TEXT);
CREATE TABLE aliases (part INTEGER, alias TEXT, id TEXT, PRIMARY KEY (part, alias)) WITHOUT ROWID;
CREATE TABLE notes (name TEXT PRIMARY KEY, data TEXT);
"""


class Entry(NamedTuple):
  """An image with all that is said of it."""

  part: int  # of the source, such as a split
  id: str  # one of its part
  data: Any  # JSON, of the image
  annotations: list[Any]  # JSON, in the order in which they were added


class Writer:
  """Takes what files hold."""

  def __init__(self, database: sqlite3.Connection):
    self._database = database
    self._rows: dict[str, list[tuple]] = {table: [] for table in _INSERTS}

  def image(self, part: int, name: Any, data: Any) -> None:
    """An image; what comes later under the same part and name is not read."""
    self._add("images", (part, _text(name), json.dumps(data)))

  def annotation(self, part: int, image: Any, what: str, data: Any) -> None:
    """What is said of an image, under its name or an alias.

    Args:
      part, image: as they were, or will be, given to `image` or `alias`.
      what: captions | regions: what is lost where there is no such image; or `OPTIONAL`.
      data: JSON.
    """
    self._add("annotations", (part, _text(image), what, json.dumps(data)))

  def alias(self, part: int, alias: Any, name: Any) -> None:
    """Another name, which no image has as its own, for an image; the first one under it counts."""
    self._add("aliases", (part, _text(alias), _text(name)))

  def note(self, name: str, data: Any) -> None:
    """Something that `Index.note` gives back."""
    self._add("notes", (name, json.dumps(data)))

  def refuse(self, refused: records.Refused) -> None:
    """Something that cannot be read."""
    self._add("refused", (_text(refused.key), refused.what, refused.why))

  def _add(self, table: str, row: tuple) -> None:
    rows = self._rows[table]
    rows.append(row)
    if len(rows) == _BATCH:
      self.flush()

  def flush(self) -> None:
    for table, statement in _INSERTS.items():
      self._database.executemany(statement, self._rows[table])
      self._rows[table].clear()


def make(folder: pathlib.Path, fill: Callable[[Writer], None]) -> None:
  """Writes the index of what `fill` adds into a folder."""
  path = folder / _FILE
  path.unlink(missing_ok=True)
  with _told(), contextlib.closing(_connect(path, "nolock=1")) as database:
    for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE >> 10}"):
      database.execute(f"PRAGMA {pragma}")
    database.executescript(_TABLES)
    database.execute("BEGIN")
    writer = Writer(database)
    fill(writer)
    writer.flush()
    if database.execute("SELECT 1 FROM aliases LIMIT 1").fetchone():
      database.execute(
        "UPDATE annotations SET image = found.id FROM aliases AS found "
        "WHERE found.part = annotations.part AND found.alias = annotations.image"
      )
    database.execute("CREATE INDEX by_image ON annotations (part, image)")
    database.execute(
      "INSERT INTO refused (key, what, why) SELECT image, what, ? FROM annotations AS a WHERE "
      "a.what <> '' AND NOT EXISTS "
      "(SELECT 1 FROM images AS i WHERE i.part = a.part AND i.id = a.image)",
      (NO_IMAGE,),
    )
    database.execute("COMMIT")


class Index:
  """What `make` wrote, to be read; in as many processes as there are."""

  def __init__(self, folder: pathlib.Path):
    with _told():
      self._database = _connect(folder / _FILE, "nolock=1&mode=ro")

  def note(self, name: str) -> Any:
    """What was noted; None where nothing was."""
    with _told():
      row = self._database.execute("SELECT data FROM notes WHERE name = ?", (name,)).fetchone()
    return None if row is None else json.loads(row[0])

  def blocks(self, size: int) -> Iterator[dict[str, Any]]:
    """Blocks of so many images, then of what cannot be read."""
    for table in ("images", "refused"):
      with _told():
        (last,) = self._database.execute(f"SELECT max(number) FROM {table}").fetchone()
      for start in range(1, (last or 0) + 1, size):
        yield {"table": table, "start": start, "stop": start + size}

  def read(self, block: Mapping[str, Any]) -> Iterator[Entry | records.Refused]:
    """The images of a block, or what is refused."""
    between = (block["start"], block["stop"])
    if block["table"] == "refused":
      query = "SELECT key, what, why FROM refused WHERE number >= ? AND number < ? ORDER BY number"
      with _told():
        rows = self._database.execute(query, between).fetchall()
      yield from (records.Refused(*row) for row in rows)
      return
    query = "SELECT part, id, data FROM images WHERE number >= ? AND number < ? ORDER BY number"
    with _told():
      images = self._database.execute(query, between).fetchall()
    own = "SELECT data FROM annotations WHERE part = ? AND image = ? ORDER BY rowid"
    for part, name, data in images:
      with _told():
        annotations = self._database.execute(own, (part, name)).fetchall()
      yield Entry(part, name, json.loads(data), [json.loads(row) for (row,) in annotations])


def _connect(path: pathlib.Path, options: str) -> sqlite3.Connection:
  # Nobody else writes it: no locks, which some file systems of clusters do not have.
  address = f"{path.resolve().as_uri()}?{options}"
  return sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)


def _text(name: Any) -> str:
  """A name as SQLite holds it: JSON can carry halves of a character."""
  return str(name).encode("utf-8", "replace").decode("utf-8")


@contextlib.contextmanager
def _told() -> Iterator[None]:
  try:
    yield
  except sqlite3.Error as error:
    raise ValueError(
      f"the index of the build beside --out cannot be written or read: {error}. Make room on that "
      "disk, or choose another."
    ) from error
