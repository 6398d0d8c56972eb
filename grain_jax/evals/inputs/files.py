"""The files of images, labels and texts that a user names: a folder, a list, a table."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from grain_jax import failures, places, textfiles

# Pictures by their names: what cannot be decoded all the same is counted where it is read.
SUFFIXES = (
  ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jpe", ".jfif", ".jp2",
  ".avif", ".heic", ".heif", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".dib",
)  # fmt: skip
_NO_PICTURES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".md", ".npy", ".npz", ".db")
_MAGIC = re.compile(
  rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|BM.{4}\0{4}|II\*\0|MM\0\*", re.DOTALL
)
# What systems put into people's folders, besides names that begin with a dot.
_SYSTEM_FOLDERS = frozenset(
  {
    "__MACOSX", "__pycache__", "@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN",
    "System Volume Information", "lost+found",
  }
)  # fmt: skip


def is_picture(path: str | os.PathLike) -> bool:
  """Whether a file is a picture by its suffix or, where that says nothing, by its first bytes."""
  name = os.path.basename(os.fspath(path)).lower()
  if name.startswith(".") or name.endswith(_NO_PICTURES) or os.path.isdir(path):
    return False
  if name.endswith(SUFFIXES):  # a link that leads nowhere too: it is counted
    return True
  if not os.path.isfile(path):  # to open a pipe would wait
    return False
  try:
    with pathlib.Path(path).open("rb") as file:
      return _MAGIC.match(file.read(12)) is not None
  except OSError as error:
    if failures.is_storage(error):
      raise failures.lost(path, error) from error
    return False


def is_system_folder(name: str) -> bool:
  """Whether a folder of this name is hidden or the system's (.git, __MACOSX, @eaDir, ...)."""
  return name.startswith(".") or name in _SYSTEM_FOLDERS


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Images to embed."""

  files: Sequence[pathlib.Path]  # n of them
  paths: Sequence[str]  # of each, as it is written into the result
  labels: np.ndarray | None = None  # i64 [n]
  label_names: Sequence[str] | None = None


def find(images: str, *, labels: str = "") -> Inputs:
  """The images of --images.

  Args:
    images: a folder, or a .txt or .csv file; see the module.
    labels: 'folders': an image's label is the sub-folder that it lies in, of the first level.

  Raises:
    ValueError: there is nothing there, or no image in it; one line.
  """
  places.check(images, "--images")
  path = places.at(images)
  if labels and not path.is_dir():
    raise ValueError(f"--labels={labels} is for a folder of pictures, and --images={path} is none.")
  if path.is_dir():
    return _find_in_folder(path, labels=labels)
  if not path.is_file():
    raise ValueError(f"--images={path}: there is no such folder or file. Correct the path.")
  if path.suffix.lower() == ".txt":
    names, own = read_lines(path, "--images"), None
  elif path.suffix.lower() == ".csv":
    names, own = _columns(path)
  else:
    raise ValueError(
      f"--images={path} is no folder, and no .txt (a path a line) or .csv file (columns image, "
      "label). Give one of them."
    )
  if not names:
    raise ValueError(f"--images={path} names no picture. Write the path of one into each line.")
  places.check_all({f"--images={path}: image": names})
  found = Inputs([path.parent / name for name in names], names)
  return found if own is None else dataclasses.replace(found, **_numbered(own))


def _find_in_folder(folder: pathlib.Path, *, labels: str) -> Inputs:
  files = (pathlib.Path(file) for file in _walk(str(folder), frozenset()))
  paths = sorted(file.relative_to(folder).as_posix() for file in files)
  if not paths:
    raise ValueError(
      f"--images={folder} holds no picture ({', '.join(SUFFIXES[:6])}, ...), nor do its "
      "sub-folders. Give another folder."
    )
  found = Inputs([folder / path for path in paths], paths)
  if not labels:
    return found
  loose = [path for path in paths if "/" not in path]
  if loose:
    raise ValueError(
      f"--labels=folders: {len(loose)} pictures of {folder} lie in no class folder, the first is "
      f"{loose[0]}. Move them into FOLDER/CLASS/, or leave --labels away."
    )
  names = [path.split("/")[0] for path in paths]
  return dataclasses.replace(found, **_by_name(names))


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
  """Images below a folder; links are followed, but not back to a folder that they lie in."""
  real = os.path.realpath(folder)
  if real in above:
    return
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.is_dir():
        if not is_system_folder(entry.name):
          yield from _walk(entry.path, above | {real})
      elif is_picture(entry.path):
        yield entry.path


def read_lines(path: pathlib.Path, flag: str) -> list[str]:
  """Lines that are not blank, without the white space around them."""
  return textfiles.read_lines(path, name=f"{flag}={path}")


def _columns(path: pathlib.Path) -> tuple[list[str], list[str] | None]:
  """The columns image and, if there is one, label of a CSV file; white space around them goes."""
  name = f"--images={path}"
  columns, rows = textfiles.read_table(path, name=name)
  spelled = {column.strip(): column for column in columns}
  if "image" not in spelled:
    raise ValueError(
      f"{name} has the columns {', '.join(columns)}: no column image. Write image,label "
      "into its first line."
    )
  images, labels = [], []
  for row in rows:
    image, label = (
      (row.values.get(spelled.get(column)) or "").strip() or None for column in ("image", "label")
    )
    if not image or ("label" in spelled and not label):
      raise ValueError(
        f"{name}, row {row.number}: picture {image!r} has the label {label!r}. Give each line both."
      )
    if row.surplus:
      raise ValueError(
        f"{name}, row {row.number}: {row.surplus[0]!r} is in no column. Quote what has a comma."
      )
    images.append(image)
    labels.append(label)
  return images, labels if "label" in spelled else None


def _numbered(labels: Sequence[str]) -> dict[str, Any]:
  """Labels that are all numbers of an i64 as they are; others by their place among the names."""
  numbers = [_number(label) for label in labels]
  return _by_name(labels) if None in numbers else {"labels": np.array(numbers, np.int64)}


def _number(label: str) -> int | None:
  """None where it is no whole number, or one beyond an i64: of what names a class."""
  digits = label.lstrip("0") or "0"
  if not (label.isascii() and label.isdigit()) or len(digits) > 19 or int(digits) >= 2**63:
    return None
  return int(digits)


def _by_name(labels: Sequence[str]) -> dict[str, Any]:
  # macOS writes an accent as a character of its own: the same name in another form.
  labels = [unicodedata.normalize("NFC", label) for label in labels]
  names, index = np.unique(labels, return_inverse=True)
  return {"labels": index.astype(np.int64), "label_names": names.tolist()}
