"""`python -m grain_jax.annotate STAGE --source=KIND --input=FOLDER --out=DIR ...`

STAGE is describe, ground or negatives: a stage over the pictures of a source (`python -m
grain_jax.data.build --help` lists them), given what the stage before wrote as --annotated=DIR. A
command that was stopped goes on when it is given again. Blocks are done by Ray, on this machine or
on a cluster (--ray_address), or here in this process (--ray_address=none). `report` makes a page of
what a stage wrote, `descriptors` descriptors of class names: `report --help`, `descriptors --help`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grain_jax import failures, helptext, places
from grain_jax.annotate import descriptors, engine, report, stages
from grain_jax.data import sources
from grain_jax.data.building import flags as build_flags
from grain_jax.data.building import ray_tasks, tasks
from grain_jax.data.sources import base

_PROGRAM = "python -m grain_jax.annotate"
NO_RAY = "none"
_OTHERS = {"report": report.main, "descriptors": descriptors.main}  # commands that are no stage


class Annotator(ray_tasks.Doer):
  """Does blocks of a stage in a process of a Ray cluster."""

  def make(self, job: Mapping[str, Any]) -> engine.Job:
    return engine.Job(job)

  def perform(self, made: engine.Job, task: tasks.Task) -> None:
    made.perform(task)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("stage", nargs="?")
  first.add_argument("--source", nargs="?", default="folder")
  known, _ = first.parse_known_args(arguments)
  stage = known.stage if known.stage in stages.STAGES else None
  description = f"{__doc__}\n{stages.module(stage).__doc__}" if stage else __doc__
  parser = build_flags.Parser(
    prog=_PROGRAM,
    description=description,
    formatter_class=helptext.ArgparseFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  told = "\n".join(f"{name}: {what}." for name, what in stages.STAGES.items())
  others = f"{' and '.join(_OTHERS)} have flags of their own: see their --help."
  choices = (*stages.STAGES, *_OTHERS)
  add("stage", choices=choices, help=f"what to do; with --help, its flags. {told} {others}")
  add("--out", required=True, help="folder to write (must be given)")
  add("--source", choices=tuple(sources.KINDS), default="folder", help="of the pictures")
  add(
    "--ray_address",
    default=ray_tasks.LOCAL,
    help="of a Ray cluster; 'local' starts one on this machine, 'none' works in this process",
  )
  add("--max_failures", type=float, default=0.05, help="part of the pictures that may fail")
  add("--retry_failed", action="store_true", help="do pictures again that failed")
  if stage:
    build_flags.add_flags(parser, stages.module(stage).FLAGS)
  if known.source in sources.KINDS:
    build_flags.add_flags(parser, build_flags.of_source(known.source))
  found = parser.parse_args(arguments)
  if found.stage in _OTHERS:
    parser.error(f"{found.stage} is to be the first word: {_PROGRAM} {found.stage} ...")
  addresses = getattr(stages.module(stage), "ADDRESSES", ()) if stage else ()
  with build_flags.as_error_of(parser):
    paths = {name: value for name, value in vars(found).items() if name not in addresses}
    places.check_all({f"--{name}": value for name, value in paths.items()})
  return found


def _executor(address: str, stage: str, settings: Mapping[str, Any], say: Any) -> engine.Executor:
  if address == NO_RAY:
    return engine.here

  def execute(
    job: Mapping[str, Any], todo: Iterator[tasks.Task], done: Callable[[tasks.Task], None]
  ) -> None:
    ray_tasks.start(address)
    say(ray_tasks.describe())
    num_gpus = stages.make(stage, settings).num_gpus
    ray_tasks.run(Annotator, job, todo, done, num_gpus=num_gpus)

  return execute


def main(arguments: Sequence[str] | None = None) -> int:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  given = sys.argv[1:] if arguments is None else list(arguments)
  if given and given[0] in _OTHERS:
    return _OTHERS[given[0]](given[1:])
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  flags = _parse(given)

  def say(line: str) -> None:
    print(line, flush=True)

  try:
    module = stages.module(flags.stage)
    settings = module.settings({flag.name: getattr(flags, flag.name) for flag in module.FLAGS})
    source: base.Source = build_flags.source(flags)
    out = pathlib.Path(flags.out).expanduser()

    def check() -> Mapping[str, float] | None:
      spent = module.check(settings, source, say=say) if hasattr(module, "check") else None
      if flags.ray_address != NO_RAY:
        ray_tasks.start(flags.ray_address)  # where that cannot be, before the source is read
      return spent

    manifest = engine.run(
      source,
      flags.stage,
      settings,
      out,
      execute=_executor(flags.ray_address, flags.stage, settings, say),
      max_failures=flags.max_failures,
      retry_failed=flags.retry_failed,
      neutral=getattr(module, "NEUTRAL", ()),
      check=check,
      say=say,
    )
  except (ValueError, ImportError, OSError, failures.TransientError) as error:
    print(f"{_PROGRAM}: {failures.one_line(error)}", file=sys.stderr)
    again = failures.restart_helps(error)
    return failures.EXIT_RESTART if again else 2
  except KeyboardInterrupt:
    print(f"{_PROGRAM}: interrupted; the same command goes on.", file=sys.stderr)
    return failures.EXIT_INTERRUPTED
  for name, count in manifest["counts"].items():
    say(f"  {name:12} {count:>12,}")
  for name, entry in manifest["losses"].items():
    say(f"  {name}: {entry['count']:,} (first: {', '.join(map(str, entry['first'][:3]))})")
  for name, total in manifest["totals"].items():
    say(f"  {name:12} {total:>12,.{0 if total == int(total) else 4}f}")
  say(f"{out}: {flags.stage} in {manifest['seconds']:,.0f} s of work")
  return 0


if __name__ == "__main__":
  from grain_jax import cli

  cli.prepare()
  sys.exit(main())
