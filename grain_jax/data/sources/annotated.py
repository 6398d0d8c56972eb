"""What `grain_jax.annotate` wrote of the images of a source, looked up by their keys.

A folder of it has manifest.json, which names its stage and is written last, and
annotations/*.jsonl, an object a line:

  {"key": "images/0001.jpg", "captions": ["a brown dog sleeps on a sofa"],
   "descriptions": ["a brown dog"],
   "regions": [{"description": "a brown dog", "box": [0.2, 0.1, 0.9, 0.7], "score": 0.8,
                "negatives": ["a black dog"]}],
   "negatives": [{"caption": "a brown dog sleeps on a table", "kind": "object"}]}

All but the key may be missing. Boxes are (ymin, xmin, ymax, xmax) as fractions of the image as it
is shown. Captions come after the source's own; regions and negatives take the place of its own. Of
lines with one key the first counts, as of images with one key.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from grain_jax import schema, textfiles
from grain_jax.data import records
from grain_jax.data.building import inputs, on_disk
from grain_jax.data.sources import base

MANIFEST, LINES = "manifest.json", "annotations"
FLAGS = (base.Flag("annotated", "folder that grain_jax.annotate wrote, of these images"),)


@dataclasses.dataclass(frozen=True)
class Annotated:
  """A folder of annotations: indexed once with `prepare`, then asked in any process."""

  folder: pathlib.Path

  @classmethod
  def from_flag(cls, value: str | pathlib.Path) -> Annotated:
    """Raises ValueError: there is no such folder, or it is not finished; one line."""
    folder = base.existing(value, "--annotated")
    if not (folder / MANIFEST).is_file():
      raise ValueError(
        f"--annotated={folder} has no {MANIFEST}: it is no folder of grain_jax.annotate, or one "
        "that is not finished. The same command goes on with it."
      )
    manifest = textfiles.read_json(folder / MANIFEST, name=f"--annotated={folder}: {MANIFEST}")
    if not isinstance(manifest, Mapping) or "stage" not in manifest:
      raise ValueError(
        f"--annotated={folder}: its {MANIFEST} is not that of a stage of grain_jax.annotate. Give "
        "the folder that one of them wrote."
      )
    return cls(folder)

  def settings(self) -> dict[str, Any]:
    """JSON; a build with equal settings adds the same."""
    return {"annotated": inputs.stamp(self.folder / MANIFEST)}

  def files(self) -> list[pathlib.Path]:
    return sorted((self.folder / LINES).glob("*.jsonl"))

  def prepare(self, scratch: pathlib.Path) -> None:
    """Indexes all lines by their keys."""
    on_disk.LineIndex.make(scratch, self.files(), _keys).close()

  def open(self, scratch: pathlib.Path) -> on_disk.LineIndex:
    """The index, whose `find(key)` gives a line's object, {} where there is none."""
    return on_disk.LineIndex.open(scratch, self.files())

  def first_key(self) -> str | None:
    """The key of the first line; None where there is no line."""
    return next((key for path in self.files() for key, _, _ in _keys(path)), None)


def _keys(path: pathlib.Path) -> Iterator[tuple[str, int, int]]:
  """(key, offset, length) of each line."""
  for line in textfiles.iterate_lines(path):
    try:
      entry = textfiles.parse_json(line.text())
    except ValueError as error:
      raise ValueError(f"{path} line {line.number} is not JSON: {error}. Mend it.") from None
    key = entry.get("key") if isinstance(entry, Mapping) else None
    if not isinstance(key, str):
      raise ValueError(f"{path} line {line.number} is no object with a key. Mend it.")
    yield key, line.offset, len(line.data)


def merge(
  checked: records.Checked, line: Mapping[str, Any], *, need_caption: bool = True
) -> records.Checked:
  """A checked record with what was annotated, which is checked too.

  `line`: {} where nothing was. `need_caption`: one that has no caption, of either, is dropped.
  """
  if checked.record is None:
    return checked
  record = checked.record
  added = records.check(
    {
      schema.RECORD_KEY: record[schema.RECORD_KEY],
      schema.RECORD_IMAGE: record[schema.RECORD_IMAGE],
      schema.RECORD_CAPTIONS: [*record[schema.RECORD_CAPTIONS], *line.get("captions", ())],
      schema.RECORD_REGIONS: line.get("regions", ()),
      schema.RECORD_NEGATIVES: line.get("negatives", ()),
    },
    tolerance=0.05,
    check_image=False,
    need_caption=need_caption,
  )
  if added.record is None:
    return records.Checked(None, [*checked.dropped, *added.dropped], checked.fates, bool(line))
  joined = {**record, schema.RECORD_CAPTIONS: added.record[schema.RECORD_CAPTIONS]}
  for name in (schema.RECORD_REGIONS, schema.RECORD_NEGATIVES):
    if name in line:
      joined[name] = added.record[name]
  return records.Checked(joined, [*checked.dropped, *added.dropped], checked.fates, bool(line))
