"""What a dataset was built from, as its manifest holds it; and what of that has changed since.

Annotation files are told by path, size and time (in the source's settings); images, all together,
by the paths that the annotations give them, and by their sizes and times.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any

from grain_jax import failures, places
from grain_jax.data import token_ids

_CLIPS = "CLIP's"  # its vocabulary, which comes with the package, in words
_THREADS = 16  # a file system over a network takes a millisecond a file
_CHUNK = 1000


def stamp(file: pathlib.Path) -> dict[str, Any]:
  """Tells a changed file from an unchanged one without reading it."""
  stat = file.stat()
  return {"path": str(file), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def images(paths: Iterable[pathlib.Path]) -> dict[str, Any]:
  """{files, missing, bytes, digest} of images, whatever their order.

  The digest is the sum of hashes of path, size and time: no list of millions is held or sorted.
  """
  totals = [0, 0, 0, 0]
  iterator = iter(paths)
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    while several := list(itertools.islice(iterator, _THREADS * _CHUNK)):
      chunks = [several[i : i + _CHUNK] for i in range(0, len(several), _CHUNK)]
      for found in pool.map(_sums, chunks):
        totals = [a + b for a, b in zip(totals, found, strict=True)]
  files, missing, size, digest = totals
  return {
    "files": files, "missing": missing, "bytes": size, "digest": f"{digest % (1 << 128):032x}",
  }  # fmt: skip


def _sums(paths: Iterable[pathlib.Path]) -> tuple[int, int, int, int]:
  """(files, missing, bytes, sum of hashes) of some images."""
  files = missing = size = total = 0
  for path in paths:
    stat = _stat(path)
    files, missing = files + (stat is not None), missing + (stat is None)
    own = "missing" if stat is None else f"{stat.st_size} {stat.st_mtime_ns}"
    size += 0 if stat is None else stat.st_size
    text = f"{path}\0{own}".encode("utf-8", "surrogatepass")
    total += int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")
  return files, missing, size, total


def describe_changes(
  manifest: Mapping[str, Any],
  settings: Mapping[str, Any],
  *,
  shard_size: int,
  licence: str,
  tokens: Mapping[str, Any] | None,
  find_images: Callable[[], dict[str, Any] | None],
) -> list[str]:
  """What of a build's inputs and flags differs from those of a manifest, in words; [] if nothing.

  Args:
    manifest: of the dataset that is there; what it does not hold (an older one) is not compared.
    settings: of the source.
    shard_size, licence: flags of the build.
    tokens: of the ids of texts that would be written (`token_ids`); None: none.
    find_images: `images` of the source; called only where all else is the same.
  """
  old = manifest["settings"]
  changes = [
    f"{name}: {words}"
    for name in sorted({*old, *settings})
    if (words := _difference(old.get(name), settings.get(name)))
  ]
  inputs = manifest.get("inputs", {})
  if inputs.get("shard_size", shard_size) != shard_size:
    changes.append(f"shard_size: {inputs['shard_size']} -> {shard_size}")
  if manifest.get("licence", licence) != licence:
    changes.append(f"licence: {manifest['licence']!r} -> {licence!r}")
  changes += _changed_tokens(manifest, tokens)
  if changes or not inputs.get("images"):
    return changes
  new = find_images()
  if new is None or new == inputs["images"]:
    return []
  return [f"images: {describe_images(inputs['images'], new)}"]


def describe_images(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  """What of two different results of `images` differs, in words."""
  parts = [
    f"{what} {old[what]:,} -> {new[what]:,}"
    for what in ("files", "missing", "bytes")
    if old[what] != new[what]
  ]
  return ", ".join(parts) or f"the time or name of some of {new['files']:,} files"


def _changed_tokens(manifest: Mapping[str, Any], new: Mapping[str, Any] | None) -> list[str]:
  """What differs in the tokenizer of the ids in the shards, which older ones do not hold."""
  if token_ids.KEY not in manifest:
    return []
  old = manifest[token_ids.KEY]
  if old is None:
    return [f"tokenizer: none -> {new['tokenizer'] or _CLIPS}"] if new else []
  if new and new["hash"] == old["hash"]:
    return []
  if new and new["vocabulary"] == old["vocabulary"]:
    return [f"context: {old['context']} -> {new['context']}"]
  names = (old["tokenizer"] or _CLIPS, "none" if new is None else new["tokenizer"] or _CLIPS)
  return [f"tokenizer: {' -> '.join(names)}"]


def _difference(old: Any, new: Any) -> str:
  """Two values of a setting in words; '' where they are equal."""
  if old == new:
    return ""
  if isinstance(old, list) and isinstance(new, list):
    if len(old) != len(new):
      return f"{len(old)} -> {len(new)}"
    return ", ".join(filter(None, map(_difference, old, new)))
  if _is_stamp(old) and _is_stamp(new):
    if old["path"] != new["path"]:
      return f"{old['path']} -> {new['path']}"
    if old["bytes"] != new["bytes"]:
      return f"{new['path']} has {new['bytes']:,} bytes, had {old['bytes']:,}"
    return f"{new['path']} was written anew"
  shown = ("not given" if value is None else repr(value) for value in (old, new))
  return " -> ".join(shown)


def _is_stamp(value: Any) -> bool:
  return isinstance(value, Mapping) and {"path", "bytes", "mtime_ns"} <= value.keys()


def _stat(path: pathlib.Path) -> os.stat_result | None:
  try:
    file = places.find_file(path)
    return failures.retry_read(lambda: os.stat(file), file)
  except (OSError, ValueError):  # it is not there, or no path: `records.check` counts it
    return None
