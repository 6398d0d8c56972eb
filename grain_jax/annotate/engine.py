"""Runs a stage over a source, block by block: what is finished is never done again.

OUT holds annotations/NNNNNN.jsonl, raw/NNNNNN.jsonl and facts/NNNNNN.json of each block, the facts
last, each written aside and renamed; and, when all blocks are there, manifest.json. The blocks are
those of `data.build`. Where failed pictures are to be done again, the facts of their block lie in
again/ until it is: the other pictures keep what they have.
"""

from __future__ import annotations

import collections
import json
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from grain_jax import failures, textfiles
from grain_jax.annotate import stages
from grain_jax.data import records, sources
from grain_jax.data.building import block as block_lib
from grain_jax.data.building import locks, tasks
from grain_jax.data.sources import annotated, base

_VERSION = 1  # of what a block's files are
_EXAMPLES = 10  # keys of each kind of loss
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
    number, facts = task["number"], file_of(self.out, "facts", task["number"])
    if facts.is_file():
      return
    began, counts = time.monotonic(), collections.Counter[str]()
    before = _Before(self.out, number)
    losses, kept = _Losses(), before.losses  # of all, and of what would not be done again
    lines, raws, failed = before.lines, before.raws, []
    losses.add(kept.entries)
    for items, known in self._batches(task["block"], losses.lose, counts, before.done):
      for item, line, result in zip(items, known, self.stage.annotate(items), strict=True):
        for what, why in result.losses:
          losses.lose(item.key, what, why)
          if result.line is not None:
            kept.lose(item.key, what, why)
        raws += [{"key": item.key, "raw": reply} for reply in result.raw]
        if result.line is None:
          failed.append(item.key)
        whole = {"key": item.key, **line, **(result.line or {})}
        captions = [*line.get("captions", ()), *(result.line or {}).get("captions", ())]
        if captions:  # they come one after another, as those of a source and of a stage do
          whole["captions"] = list(dict.fromkeys(captions))
        lines.append(whole)
    counts["failed"] = len(failed)
    for what in ("descriptions", "regions", "negatives"):
      counts[what] = sum(len(line.get(what, ())) for line in lines)
    _write_lines(file_of(self.out, "annotations", number), lines)
    _write_lines(file_of(self.out, "raw", number), raws)
    told = {"counts": counts, "losses": losses.entries}
    before.totals.update(self.stage.totals())  # `+` would leave out what is 0
    told["totals"] = before.totals
    told["seconds"] = before.seconds + time.monotonic() - began
    told["failed"], told["kept"] = failed, kept.entries
    _write_lines(facts, [told])
    before.forget()

  def _batches(
    self,
    block: Any,
    lose: Callable[[str, str, str], None],
    counts: collections.Counter[str],
    done: Collection[str],
  ) -> Iterator[tuple[list[stages.Item], list[dict[str, Any]]]]:
    """(pictures, what was known of each) of a block, as many as the stage takes at a time.

    `done`: keys of those that are counted, and left out.
    """
    if self.source.annotated is not None and self._known is None:
      self._known = self.source.annotated.open(self.out / "scratch")
    items: list[stages.Item] = []
    known: list[dict[str, Any]] = []
    for _, key, _, checked in block_lib.checked_records(
      self.source, block, self.out / "scratch", threads=1, need_caption=False
    ):
      for what, why in checked.dropped:
        lose(key, "pictures" if what == "records" else what, why)
      counts["pictures"] += 1
      if checked.record is None:
        continue
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


class _Losses:
  """{'what/why': {'count', 'first': some keys}}."""

  def __init__(self):
    self.entries: dict[str, dict[str, Any]] = {}

  def lose(self, key: str, what: str, why: str) -> None:
    self.add({f"{what}/{why}": {"count": 1, "first": [key]}})

  def add(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
    for name, entry in entries.items():
      own = self.entries.setdefault(name, {"count": 0, "first": []})
      own["count"] += entry["count"]
      own["first"] = (own["first"] + entry["first"])[:_EXAMPLES]


class _Before:
  """What a block has whose failed pictures are done again; of another block nothing."""

  def __init__(self, out: pathlib.Path, number: int):
    self._file = file_of(out, "again", number)
    self.lines: list[dict[str, Any]] = []
    self.raws: list[dict[str, Any]] = []
    self.done: set[str] = set()
    self.losses, self.totals, self.seconds = _Losses(), collections.Counter[str](), 0.0
    if not self._file.is_file():
      return
    told = json.loads(self._file.read_text())
    if "failed" not in told:  # of before it was written down which: all again
      return
    failed = set(told["failed"])
    self.lines, self.raws = (
      [entry for entry in _read_lines(file_of(out, what, number)) if entry["key"] not in failed]
      for what in ("annotations", "raw")
    )
    self.done = {line["key"] for line in self.lines}
    self.losses.add(told["kept"])
    self.totals, self.seconds = collections.Counter(told["totals"]), told["seconds"]

  def forget(self) -> None:
    self._file.unlink(missing_ok=True)


def _item(checked: records.Checked, line: Mapping[str, Any]) -> stages.Item:
  record = checked.record
  assert record is not None
  return stages.Item(
    key=record["key"], image=record["image"], captions=record["captions"],
    descriptions=list(line.get("descriptions", ())), regions=record["regions"],
    negatives=record["negatives"],
  )  # fmt: skip


def file_of(out: pathlib.Path, what: str, number: int) -> pathlib.Path:
  return out / what / f"{number:06d}.{'json' if what in ('facts', 'again') else 'jsonl'}"


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  return [json.loads(line.data) for line in textfiles.iterate_lines(path)]


def _write_lines(path: pathlib.Path, lines: Sequence[Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = block_lib.aside(path)
  temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
  temporary.replace(path)


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
    say: takes lines of progress.

  Raises:
    ValueError: OUT is of something else, or more pictures failed than may; one line.
    failures.TransientError: storage or a worker failed; the same call goes on.
  """
  if source.recipe is None:
    raise ValueError(f"the source {source.name} can be read in one process alone.")
  with locks.held(out, say):
    what = {
      "version": _VERSION,
      "stage": stage,
      "settings": {name: value for name, value in settings.items() if name not in neutral},
      "source": source.settings,
    }
    what = json.loads(json.dumps(what))
    blocks = _plan(source, out, what)
    job = {"stage": stage, "settings": settings, "source": source.recipe}
    job["out"] = str(out.resolve())  # in a cluster, processes have other folders
    if retry_failed:
      for number in range(len(blocks)):
        facts = file_of(out, "facts", number)
        if facts.is_file() and json.loads(facts.read_text())["counts"].get("failed"):
          again = file_of(out, "again", number)
          again.parent.mkdir(exist_ok=True)
          (out / annotated.MANIFEST).unlink(missing_ok=True)  # not finished until all are there
          facts.replace(again)
    there = {n for n in range(len(blocks)) if file_of(out, "facts", n).is_file()}
    if there:
      say(f"goes on in {out}: {len(there):,} of {len(blocks):,} blocks are there")
    began, seen = time.monotonic(), collections.Counter[str]()

    def done(task: tasks.Task) -> None:
      there.add(task["number"])
      seen.update(json.loads(file_of(out, "facts", task["number"]).read_text())["counts"])
      seen["blocks"] += 1
      _check_hopeless(seen, out)
      left = (time.monotonic() - began) * (len(blocks) / len(there) - 1)
      say(f"{len(there):,} of {len(blocks):,} blocks, {left:,.0f} s left")

    todo = ({"number": n, "block": b} for n, b in enumerate(blocks) if n not in there)
    execute(job, todo, done)
    manifest = {**what, **_summary(out, len(blocks))}
    _check_failures(manifest, max_failures, out)
    _write_lines(out / annotated.MANIFEST, [manifest])
    return manifest


def _plan(source: base.Source, out: pathlib.Path, what: Mapping[str, Any]) -> list[Any]:
  """The blocks, those of before where it is the same."""
  file, scratch = out / "plan.json", out / "scratch"
  if file.is_file():
    known = json.loads(file.read_text())
    if known["what"] != what:
      changed = [key for key in what if known["what"].get(key) != what[key]]
      raise ValueError(
        f"--out={out} holds annotations of another {' and '.join(changed)}. Choose another folder, "
        "or remove it."
      )
    return known["blocks"]
  scratch.mkdir(exist_ok=True)
  if source.prepare is not None:
    source.prepare(scratch)
  blocks = list(source.blocks(scratch)) if source.blocks is not None else [None]
  _write_lines(file, [{"what": what, "blocks": blocks}])
  return blocks


def _summary(out: pathlib.Path, blocks: int) -> dict[str, Any]:
  """{counts, losses, totals, seconds} over all blocks."""
  counts, totals = collections.Counter[str](), collections.Counter[str]()
  losses, seconds = _Losses(), 0.0
  for number in range(blocks):
    facts = json.loads(file_of(out, "facts", number).read_text())
    counts.update(facts["counts"])
    totals.update(facts["totals"])
    seconds += facts["seconds"]
    losses.add(facts["losses"])
  told = {"counts": counts, "losses": losses.entries, "totals": totals}
  return {**told, "seconds": round(seconds, 1)}


def _check_hopeless(seen: Mapping[str, int], out: pathlib.Path) -> None:
  """Ends a run of which so many pictures fail that the cause is none of theirs."""
  failed, read = seen.get("failed", 0), seen.get("read", 0)
  if seen["blocks"] >= _HOPELESS and failed > read / 2:
    raise failures.TransientError(
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
