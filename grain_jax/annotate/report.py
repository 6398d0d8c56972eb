"""report: one HTML page on what was annotated, to be read before more is spent.

`python -m grain_jax.annotate.report --annotated=DIR --source=KIND --input=FOLDER --out=FILE.html`:
--annotated is the folder of the last stage, --source and its flags are those that the stages were
given. On the page: a contact sheet with boxes and descriptions, descriptions and boxes an image,
scores, the share of descriptions without a box, where the describer and the detector disagree, what
was dropped and why, the most frequent descriptions, images with text alone, time and cost. Figures
of the stages before the last one come from their folders, which its manifest names. The page is one
file: its images are in it, and it needs no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from grain_jax import failures, helptext, places
from grain_jax.annotate import report_counts, report_page
from grain_jax.data import sources
from grain_jax.data.building import block as block_lib
from grain_jax.data.building import flags as build_flags
from grain_jax.data.building import preview
from grain_jax.data.sources import annotated, base

_PROGRAM = "python -m grain_jax.annotate.report"
IMAGES = 24  # of the contact sheet: all that `preview.Preview` takes


def write(source: base.Source, folder: pathlib.Path, out: pathlib.Path) -> report_counts.Counts:
  """Writes the page.

  Args:
    source: that was annotated, without `annotated`.
    folder: of the last stage.
    out: file of the page.

  Returns:
    What was counted.

  Raises:
    ValueError: the folder is not finished, or of another source; one line.
  """
  annotated.Annotated.from_flag(folder)
  stages = report_counts.chain(folder)
  if not stages.manifests or not (folder / "plan.json").is_file():
    raise ValueError(
      f"--annotated={folder}: its {annotated.MANIFEST} or plan.json is not that of a stage of "
      "grain_jax.annotate. Give a folder that one of them wrote."
    )
  plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
  given = {name: value for name, value in plan["what"]["source"].items() if name != "annotated"}
  if given != json.loads(json.dumps(source.settings)):
    changed = [n for n in {**given, **source.settings} if given.get(n) != source.settings.get(n)]
    raise ValueError(
      f"--annotated={folder} is of another source ({', '.join(sorted(changed))} differ), or its "
      "files have changed. Give the --source, --input and other flags of its stages."
    )
  counts = report_counts.count(folder, IMAGES)
  shown = _contact_sheet(source, folder, plan["blocks"], counts.chosen())
  page = report_page.page(folder.name, counts, report_counts.asked(stages), stages, shown)
  out.parent.mkdir(parents=True, exist_ok=True)
  temporary = block_lib.aside(out)
  temporary.write_text(page, encoding="utf-8")
  temporary.replace(out)
  return counts


def _contact_sheet(
  source: base.Source,
  folder: pathlib.Path,
  blocks: Sequence[Any],
  chosen: Sequence[report_counts.Chosen],
) -> list[report_page.Shown]:
  """The chosen images, small; blocks without one of them are not read."""
  wanted = {one.key: one for one in chosen}
  found: dict[str, report_page.Shown] = {}
  with tempfile.TemporaryDirectory() as temporary:
    scratch = folder / "scratch"
    if not scratch.is_dir():
      scratch = pathlib.Path(temporary)
      if source.prepare is not None:
        source.prepare(scratch)
    few = dataclasses.replace(source, read=lambda *place: _of_keys(source.read(*place), wanted))
    for number in sorted({one.block for one in chosen}):
      for split, key, given, checked in block_lib.checked_records(
        few, blocks[number], scratch, 1, need_caption=False
      ):
        if key in found or checked.record is None:
          continue
        merged = annotated.merge(checked, wanted[key].line, need_caption=False)
        # It makes a small picture of the image.
        page = preview.Preview()
        page.add(split, given, merged._replace(dropped=[]), [])
        small = page.take()["images"][0][1]
        missing = report_counts.without_box(wanted[key].line)
        texts = {text.casefold(): text for text in wanted[key].line.get("descriptions", ())}
        found[key] = report_page.Shown(
          key, small["jpeg"], small["size"], small["captions"], small["regions"],
          [text for name, text in texts.items() if name in missing],
        )  # fmt: skip
  return [found[one.key] for one in chosen if one.key in found]


def _of_keys(items, wanted):
  """Those records of a source whose keys are wanted; what was refused has no image."""
  return (item for item in items if isinstance(item[1], dict) and item[1]["key"] in wanted)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--source", nargs="?", default="folder")
  kind = first.parse_known_args(arguments)[0].source
  parser = build_flags.Parser(
    prog=_PROGRAM,
    description=__doc__,
    formatter_class=helptext.ArgparseFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--out", required=True, help="HTML file to write (must be given)")
  parser.add_argument(
    "--source", choices=tuple(sources.KINDS), default="folder", help="of the images"
  )
  if kind in sources.KINDS:
    build_flags.add_flags(parser, build_flags.of_source(kind))
  found = parser.parse_args(arguments)
  with build_flags.as_error_of(parser):
    places.check_all({f"--{name}": value for name, value in vars(found).items()})
  if not found.annotated:
    parser.error("--annotated: give the folder of the stage to report on")
  return found


def main(arguments: Sequence[str] | None = None) -> int:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  flags = _parse(sys.argv[1:] if arguments is None else list(arguments))
  try:
    folder = base.existing(flags.annotated, "--annotated")
    flags.annotated = ""
    out = pathlib.Path(flags.out).expanduser()
    if out.is_dir():
      raise ValueError(f"--out={out} is a folder. Give the file of the page: {out}/report.html.")
    counts = write(build_flags.source(flags), folder, out)
  except (ValueError, ImportError, OSError, failures.TransientError) as error:
    print(f"{_PROGRAM}: {failures.one_line(error)}", file=sys.stderr)
    again = failures.restart_helps(error)
    return failures.EXIT_RESTART if again else 2
  print(f"{out}: {counts.images:,} images, {counts.regions:,} boxes")
  return 0


if __name__ == "__main__":
  from grain_jax import cli

  cli.prepare()
  sys.exit(main())
