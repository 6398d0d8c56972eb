"""Runs a stage over a source, block by block: what is finished is never done again.

The blocks are those of `data.build`; OUT holds the files of each (`block_files`), plan.json, which
says what they are of, checks.jsonl, what was spent before the first, and, when all blocks are
there, manifest.json.
"""

from __future__ import annotations

import collections
import json
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from grain_jax.annotate import block_files, stages
from grain_jax.data import records, sources
from grain_jax.data.building import block as block_lib
from grain_jax.data.building import inputs, locks, tally, tasks
from grain_jax.data.sources import annotated, base

_VERSION = 1  # of what a block's files are
_PLAN, _CHECKS = "plan.json", "checks.jsonl"
_HOPELESS = 3  # blocks after which a run ends of whose pictures more than half failed


class Job:
  """A stage over a source: what any process needs to do its blocks."""

  def __init__(self, job: Mapping[str, Any]):
    """`job`: JSON: stage, settings (of it), source (`base.Source.recipe`), out."""
    self.out = pathlib.Path(job["out"])
    self.source = sources.make(job["source"])
    self._stage_of = lambda: stages.make(job["stage"], job["settings"])
    self._stage: stages.Stage | None = None
    self._known: Any = None

  @property
  def stage(self) -> stages.Stage:
    """Made when it is first needed."""
    if self._stage is None:
      self._stage = self._stage_of()
    return self._stage

  def perform(self, task: tasks.Task) -> None:
    """Does a block, unless it is there: {'number', 'block'}."""
    number = task["number"]
    if block_files.file_of(self.out, "facts", number).is_file():
      return
    saved, counts = block_files.Saved(self.out, number), collections.Counter[str]()
    losses = block_files.Losses()
    try:
      for items, known in self._batches(task["block"], losses.lose, counts, saved.done):
        results = self.stage.annotate(items)
        saved.add(list(map(_picture, items, known, results)), self.stage.totals())
    finally:  # what was asked before something failed was spent too
      saved.add([], {} if self._stage is None else self._stage.totals())
    counts["failed"] = len(saved.failed)
    for what in ("descriptions", "regions", "negatives"):
      counts[what] = sum(len(line.get(what, ())) for line in saved.lines)
    saved.finish(counts, losses)

  def _batches(
    self,
    block: Any,
    lose: Callable[[str, str, str], None],
    counts: collections.Counter[str],
    done: Collection[str],
  ) -> Iterator[tuple[list[stages.Item], list[dict[str, Any]]]]:
    """(pictures, what was known of each) of a block, as many as the stage takes at a time.

    `done`: keys of those that are counted, and left out. A key is done once.
    """
    if self.source.annotated is not None and self._known is None:
      self._known = self.source.annotated.open(self.out / "scratch")
    items: list[stages.Item] = []
    known: list[dict[str, Any]] = []
    seen: set[str] = set()
    for _, key, _, checked in block_lib.checked_records(
      self.source, block, self.out / "scratch", threads=1, need_caption=False
    ):
      for what, why in checked.dropped:
        lose(key, "pictures" if what == "records" else what, why)
      counts["pictures"] += 1
      if checked.record is None:
        continue
      if key in seen:
        lose(key, "pictures", tally.DUPLICATE_KEY)
        continue
      seen.add(key)
      counts["read"] += 1
      if key in done:
        continue
      line = {} if self._known is None else dict(self._known.find(key))
      line.pop("key", None)
      items.append(_item(checked, line))
      known.append(line)
      if len(items) == self.stage.batch_size:
        yield items, known
        items, known = [], []
    if items:
      yield items, known


def _picture(item: stages.Item, line: Mapping[str, Any], result: stages.Result) -> dict[str, Any]:
  """What is kept of a picture: what was known of it, and what the stage says."""
  whole = {"key": item.key, **line, **(result.line or {})}
  captions = [*line.get("captions", ()), *(result.line or {}).get("captions", ())]
  if captions:  # they come one after another, as those of a source and of a stage do
    whole["captions"] = list(dict.fromkeys(captions))
  told = {"key": item.key, "line": whole, "raw": result.raw, "losses": result.losses}
  return {**told, "failed": result.line is None}


def _item(checked: records.Checked, line: Mapping[str, Any]) -> stages.Item:
  record = checked.record
  assert record is not None
  # A record's regions have what goes into shards alone.
  of = {r["description"]: {"of": r["of"]} for r in line.get("regions", ()) if "of" in r}
  return stages.Item(
    key=record["key"], image=record["image"], captions=record["captions"],
    descriptions=list(line.get("descriptions", ())),
    regions=[{**region, **of.get(region["description"], {})} for region in record["regions"]],
    negatives=record["negatives"],
  )  # fmt: skip


# (job, tasks, function called with each that is done): does them
Executor = Callable[[Mapping[str, Any], Iterator[tasks.Task], Callable[[tasks.Task], None]], None]


def here(
  job: Mapping[str, Any], todo: Iterator[tasks.Task], done: Callable[[tasks.Task], None]
) -> None:
  """In this process, one block after the other."""
  made = Job(job)
  for task in todo:
    made.perform(task)
    done(task)


def run(
  source: base.Source,
  stage: str,
  settings: Mapping[str, Any],
  out: pathlib.Path,
  *,
  execute: Executor,
  max_failures: float = 0.05,
  retry_failed: bool = False,
  neutral: Sequence[str] = (),
  check: Callable[[], Mapping[str, float] | None] = lambda: None,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Annotates what is not annotated yet; the manifest.

  Args:
    source: of the pictures, with `annotated` what is known of them.
    stage: one of `stages.STAGES`.
    settings: of it, JSON.
    out: folder to write.
    execute: who does the blocks.
    max_failures: part of the pictures that may fail.
    retry_failed: do the pictures again that failed.
    neutral: settings with which what is there goes on, whatever they were (how fast, from where).
    check: called before there is something to do; what it spent.
    say: takes lines of progress.

  Raises:
    ValueError: OUT is of something else or of pictures that changed, or more of them failed than
      may; one line.
    failures.TransientError: storage or a worker failed; the same call goes on.
  """
  if source.recipe is None:
    raise ValueError(f"the source {source.name} can be read in one process alone.")
  begun = (out / _PLAN).is_file()
  spent = None if begun else check()  # before there is a folder
  with locks.held(out, say):
    what = {
      "version": _VERSION,
      "stage": stage,
      "settings": {name: value for name, value in settings.items() if name not in neutral},
      "source": source.settings,
    }
    what = json.loads(json.dumps(what))
    if source.images is not None:
      what["inputs"] = {"images": inputs.images(source.images())}
    blocks = _plan(source, out, what, say=say)
    job = {"stage": stage, "settings": settings, "source": source.recipe}
    job["out"] = str(out.resolve())  # in a cluster, processes have other folders
    if retry_failed:
      block_files.redo_failed(out, len(blocks))
    there = {n for n in range(len(blocks)) if block_files.file_of(out, "facts", n).is_file()}
    if there:
      say(f"goes on in {out}: {len(there):,} of {len(blocks):,} blocks are there")
    if begun and len(there) < len(blocks):
      spent = check()
    if spent:
      block_files.append_line(out / _CHECKS, spent)
    began, seen = time.monotonic(), collections.Counter[str]()

    def done(task: tasks.Task) -> None:
      there.add(task["number"])
      seen.update(block_files.read_facts(out, task["number"])["counts"])
      seen["blocks"] += 1
      _check_hopeless(seen, out)
      left = (time.monotonic() - began) / seen["blocks"] * (len(blocks) - len(there))
      say(f"{len(there):,} of {len(blocks):,} blocks, {left:,.0f} s left")

    todo = ({"number": n, "block": b} for n, b in enumerate(blocks) if n not in there)
    execute(job, todo, done)
    manifest = {**what, **_summary(out, len(blocks))}
    _check_failures(manifest, max_failures, out)
    _write_manifest(out / annotated.MANIFEST, manifest)
    return manifest


def _write_manifest(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  """Unless it is there: the next stage goes by the time of the file."""
  if not path.is_file() or path.read_bytes() != block_files.text_of([manifest]).encode():
    block_files.write_lines(path, [manifest])


def _plan(
  source: base.Source, out: pathlib.Path, what: Mapping[str, Any], *, say: Callable[[str], None]
) -> list[Any]:
  """The blocks, those of before where it is the same."""
  file, scratch = out / _PLAN, out / "scratch"
  if file.is_file():
    known = json.loads(file.read_text(encoding="utf-8"))
    _raise_if_other(known["what"], what, out)
    if "inputs" in what and "inputs" not in known["what"]:
      say(f"{out}: an older version began it, so whether its pictures have changed is not known")
    return known["blocks"]
  scratch.mkdir(exist_ok=True)
  if source.prepare is not None:
    source.prepare(scratch)
  blocks = list(source.blocks(scratch)) if source.blocks is not None else [None]
  block_files.write_lines(file, [{"what": what, "blocks": blocks}])
  return blocks


def _raise_if_other(known: Mapping[str, Any], what: Mapping[str, Any], out: pathlib.Path) -> None:
  """`known`: what OUT is of; an older one does not hold all."""
  changed = [key for key in what if known.get(key, what[key]) != what[key]]
  if changed == ["inputs"]:
    words = inputs.describe_images(known["inputs"]["images"], what["inputs"]["images"])
    raise ValueError(
      f"--out={out} is of pictures that have changed since ({words}). Choose another folder for "
      "what is there now, or bring back what was there."
    )
  if changed:
    raise ValueError(
      f"--out={out} holds annotations of another {' and '.join(changed)}. Choose another folder, "
      "or remove it."
    )


def _summary(out: pathlib.Path, blocks: int) -> dict[str, Any]:
  """{counts, losses, totals, seconds} over all blocks."""
  counts, totals = collections.Counter[str](), collections.Counter[str]()
  losses, seconds = block_files.Losses(), 0.0
  for number in range(blocks):
    facts = block_files.read_facts(out, number)
    counts.update(facts["counts"])
    totals.update(facts["totals"])
    seconds += facts["seconds"]
    losses.add(facts["losses"])
  if (out / _CHECKS).is_file():
    for spent in block_files.read_lines(out / _CHECKS):
      totals.update(spent)
  told = {"counts": counts, "losses": losses.entries, "totals": totals}
  return {**told, "seconds": round(seconds, 1)}


def _check_hopeless(seen: Mapping[str, int], out: pathlib.Path) -> None:
  """Ends a run of which so many pictures fail that the cause is none of theirs.

  A ValueError: a new start would only spoil further blocks. A server that does not answer at all is
  a `failures.TransientError` of the stage, which leaves its pictures undone.
  """
  failed, read = seen.get("failed", 0), seen.get("read", 0)
  if seen["blocks"] >= _HOPELESS and failed > read / 2:
    raise ValueError(
      f"{failed:,} of the last {read:,} pictures failed: the model, or its server, does not answer "
      f"as it should (facts of {out}). Mend that, then the same command with --retry_failed."
    )


def _check_failures(manifest: Mapping[str, Any], allowed: float, out: pathlib.Path) -> None:
  counts = manifest["counts"]
  failed, read = counts.get("failed", 0), counts.get("read", 0)
  if not read:
    raise ValueError(f"no picture of the source can be read ({_most(manifest)}). Check its paths.")
  if failed > allowed * read:
    raise ValueError(
      f"{failed:,} of {read:,} pictures failed ({_most(manifest)}), more than --max_failures="
      f"{allowed:g}. Mend the cause and try their blocks again with --retry_failed, or raise it."
    )


def _most(manifest: Mapping[str, Any]) -> str:
  entries = sorted(manifest["losses"].items(), key=lambda entry: -entry[1]["count"])
  return ", ".join(f"{name} {entry['count']:,}" for name, entry in entries[:3]) or "no reason"
