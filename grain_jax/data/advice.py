"""What to do about a directory that is no built data."""

from __future__ import annotations

import pathlib

_BUILD = "python -m grain_jax.data.build --source="
OF_SCENES, _OF_FOLDER = f"{_BUILD}scenes --out=", f"{_BUILD}folder --input="


def how_to_build(path: pathlib.Path) -> str:
  """A sentence: the command that writes built data there, as far as its name and content say."""
  for name in ("annotations.jsonl", "annotations.csv"):
    if (path / name).is_file():
      return (
        f"It holds {name}: build it. {_OF_FOLDER}{path} --out=OUT, and set config.data.dir=OUT."
      )
  if path.name.startswith("scenes"):
    more = " --negatives=true" * ("negatives" in path.name)
    return f"Build it: {OF_SCENES}{path}{more}"
  return (
    f"Build it: {_OF_FOLDER}PICTURES --out={path} (or another --source), or name the directory "
    "where it lies (--config.data.dir, or --data_dir of evaluate); a relative one starts from "
    "where the command does."
  )
