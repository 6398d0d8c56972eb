"""The ids of COCO's images, which other sets took over, from their file names and addresses."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})\.(?:jpg|jpeg|png|webp)", re.I)


def id_in_name(name: Any) -> str:
  """COCO's id in the name of a file or its address, without zeros before it; '' if it has none."""
  if not isinstance(name, str):
    return ""
  found = _NAME.fullmatch(name.replace("\\", "/").rpartition("/")[2])
  return str(int(found[1])) if found else ""


def id_of(entry: Mapping[str, Any]) -> str:
  """COCO's id of an image as a file of annotations describes it; '' if nothing tells it."""
  cocoid = entry.get("cocoid", entry.get("coco_id"))
  if isinstance(cocoid, int) and not isinstance(cocoid, bool):
    return str(cocoid)
  names = (entry.get(key) for key in ("file_name", "filename", "coco_url"))
  return next(filter(None, map(id_in_name, names)), "")


def last_parts(url: str) -> str:
  """'train2017/000000000009.jpg' of an address; '' where it has no folder."""
  parts = pathlib.PurePosixPath(url).parts[-2:]
  return "/".join(parts) if len(parts) == 2 else ""
