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

For --out=gs://BUCKET/DIR the folder DIR.part is on the local disk (--scratch), and what is finished
is copied: the manifest, without which it is no dataset, as the last of its files.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grain_jax import failures, places
from grain_jax.data import dataset, token_ids
from grain_jax.data.building import destination, inputs, locks, preview, run, tally, tasks
from grain_jax.data.building import flags as build_flags
from grain_jax.data.sources import base


def build(
  source: base.Source,
  out: str | pathlib.Path,
  *,
  overwrite: bool = False,
  shard_size: int = build_flags.SHARD_SIZE,
  workers: int | None = None,
  allow_dropped: float = tally.ALLOWED,
  ray_address: str = "",
  tokenizer: str = "",
  context: int = token_ids.CONTEXT,
  scratch: str = "",
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
    tokenizer: whose ids of all texts are written with them: the folder of a SentencePiece
      tokenizer, '' for CLIP's, 'none' for no ids.
    context: tokens of the longest text.
    scratch: folder in which `out` is built where it is in a bucket; '': in the user's cache.
    say: takes lines of progress.

  Returns:
    The manifest.

  Raises:
    ValueError: what cannot be built, or more is dropped than may be; one line.
    failures.TransientError: storage failed or is full, a worker was killed; the same call goes on.
  """
  if shard_size < 1:
    raise ValueError(f"--shard_size = {shard_size}: a shard holds at least one record. Raise it.")
  if not 0 <= allow_dropped <= 1:
    raise ValueError(f"--allow_dropped = {allow_dropped}: not a part of the data. Use [0, 1].")
  if workers is not None and workers < 0:
    raise ValueError(f"--workers = {workers}: less than none cannot work. 0 reads in this process.")
  out = places.open_place(out, "--out").expanduser()
  part = destination.part_of(out, scratch)
  settings = json.loads(json.dumps({**source.settings, "source": source.name}))
  tokens = {"folder": tokenizer, "context": context}
  writer = token_ids.make_writer(**tokens)
  present = _present(source, out, settings, writer, overwrite, shard_size, say)
  if present is not None:
    say(f"{out} is already built with these settings: {_summary(present)}.")
    return present
  with locks.held(part, say):
    build = run.Build(
      source, settings, tasks.Place(part), out.name, shard_size, allow_dropped, tokens, say
    )
    try:
      manifest = build.run(workers=workers, ray_address=ray_address)
    except ValueError as error:
      if build.is_long:  # a cluster that does not answer, a disk that is not mounted: hours of work
        raise ValueError(f"{error} What was read is kept in {part}.") from error
      build.place.discard()
      raise
    except OSError as error:
      if failures.is_no_room(error):
        raise tasks.of_a_full_disk(error) from error
      raise
    destination.deliver(build.place.dataset, out, part, say)
    build.place.discard()
  say(f"{out}: {_summary(manifest)} in {manifest['seconds']:.0f} s. Look at {out / preview.NAME}.")
  return manifest


def _present(
  source, out: pathlib.Path, settings, writer, overwrite, shard_size, say
) -> dict | None:
  """The manifest of `out` if it holds the same; ValueError if `out` is in the way."""
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return None
  if destination.is_unfinished(out):
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
    tokens=writer and writer.about,
    find_images=lambda: run.images_of(source, say),
  )
  if not changes:
    if source.images is not None and not manifest.get("inputs", {}).get("images"):
      say(f"{out} does not say which images it was built from: changes in them are not seen.")
    return dict(manifest)
  raise ValueError(
    f"--out={out} holds a dataset of other settings or inputs ({'; '.join(changes)}). Choose "
    "another directory, or add --overwrite to replace it."
  )


def _summary(manifest: Mapping[str, Any]) -> str:
  return ", ".join(f"{split} {entry['records']:,}" for split, entry in manifest["splits"].items())


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
      tokenizer=flags.tokenizer,
      context=flags.context,
      scratch=flags.scratch,
      say=lambda line: print(line, flush=True),
    )
  except (ValueError, ImportError, OSError, failures.TransientError) as error:
    print(f"python -m grain_jax.data.build: {error}", file=sys.stderr)
    again = failures.restart_helps(error)
    return failures.EXIT_RESTART if again else 2
  except KeyboardInterrupt:
    print("python -m grain_jax.data.build: interrupted; the same command goes on.", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  from grain_jax import cli

  cli.prepare()
  sys.exit(main())
