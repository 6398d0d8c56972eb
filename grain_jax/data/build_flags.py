"""Command-line flags of `grain_jax.data.build`: common ones and those of the source chosen."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from grain_jax import helptext, places, schema
from grain_jax.data import box_formats, sources, tally

SHARD_SIZE = 16_384  # records: the 10 M of CC12M are 611 shards, few enough to stay open


class _Parser(argparse.ArgumentParser):
  """One line on a wrong value, without the usage."""

  def error(self, message: str):
    self.exit(2, f"{self.prog}: {message}. See --help.\n")


def _parser(source: str | None, description: str) -> argparse.ArgumentParser:
  parser = _Parser(
    prog="python -m grain_jax.data.build",
    description=description,
    formatter_class=helptext.ArgparseFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add(
    "--source",
    required=True,
    choices=("scenes", "folder", "published"),
    help="what to build; with --help, the flags and the format of that source",
  )
  add("--out", required=True, help="directory to write")
  add("--overwrite", action="store_true", help="replace a dataset that is there")
  add("--shard_size", type=int, default=SHARD_SIZE, help="records a shard")
  add("--workers", type=int, default=None, help="processes or threads (default: one per core)")
  add(
    "--allow_dropped",
    type=float,
    default=tally.ALLOWED,
    help="part of the images, captions, regions or negatives that may be dropped; where more "
    "is, nothing is built",
  )
  if source == "scenes":
    from grain_jax.data.scenes import scenes

    for field in dataclasses.fields(scenes.SceneSettings):
      default = field.default
      if isinstance(default, bool):
        add(f"--{field.name}", type=_boolean, default=default, help="true or false")
      elif isinstance(default, int | float | str):
        kind = type(default)
        add(f"--{field.name}", type=kind, default=default, help=f"of the scenes: {kind.__name__}")
    add("--names", default="", help="concepts by name, with commas between, instead of --concepts")
  elif source in ("folder", "published"):
    near = 1e-3 if source == "folder" else 0.05
    add("--val_fraction", type=float, default=0.0, help="part of train that goes to val")
    add("--tolerance", type=float, default=near, help="how far outside a box may lie (clipped)")
    add("--licence", default="", help="of the images, for the manifest")
    add("--max_pixels", type=int, default=schema.MAX_PIXELS, help="of the largest image kept")
    add("--allow_outside", action="store_true", help="read images that lie outside the folder too")
  if source == "folder":
    add("--input", required=True, help="folder of images")
    add("--annotations", default=None, help="JSONL or CSV; default: the folder's own")
    add(
      "--box_format",
      choices=box_formats.FORMATS,
      default="yxyx",
      help="of all boxes; yxyx is ymin, xmin, ymax, xmax",
    )
    add(
      "--box_units",
      choices=box_formats.UNITS,
      default="fractions",
      help="of all boxes: fractions of the image, or its pixels as it is shown, upright",
    )
  elif source == "published":
    add("--images", required=True, help="folder of images")
    add("--captions", required=True, help="captions_pooled.csv")
    for name in ("generated", "boxes", "descriptions"):
      add(f"--{name}", nargs="*", default=[], help="published JSON files")
  return parser


def _boolean(text: str) -> bool:
  if text.lower() not in ("true", "false"):
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
  return text.lower() == "true"


def parse(arguments: Sequence[str], *, description: str) -> argparse.Namespace:
  """Flags of a build; ends the program with one line and code 2 where one is wrong."""
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--source", nargs="?")
  kind = first.parse_known_args(arguments)[0].source
  parser = _parser(kind, description)
  given = [a.partition("=")[0] for a in arguments if a.startswith(("--box_format", "--box_units"))]
  if given and kind in ("scenes", "published"):
    parser.error(
      f"{given[0]}: --source={kind} has boxes of one format, which it knows. Leave it out"
    )
  found = parser.parse_args(arguments)
  try:
    places.check_all({f"--{name}": value for name, value in vars(found).items()})
  except ValueError as error:
    parser.error(str(error).removesuffix("."))
  return found


def source(flags: argparse.Namespace) -> sources.Source:
  """The source that the flags describe."""
  values = vars(flags)
  if flags.source == "scenes":
    from grain_jax.data.scenes import scenes

    fields = {f.name for f in dataclasses.fields(scenes.SceneSettings)}
    settings = {name: values[name] for name in fields & values.keys()}
    settings["names"] = tuple(n.strip() for n in flags.names.split(",") if n.strip())
    return sources.scenes(scenes.SceneSettings(**settings), workers=flags.workers)
  names = ("val_fraction", "tolerance", "licence", "allow_outside", "max_pixels")
  common = {name: values[name] for name in names}
  if flags.source == "folder":
    boxes = {"box_format": flags.box_format, "box_units": flags.box_units}
    return sources.folder(flags.input, annotations=flags.annotations, **boxes, **common)
  files = {name: values[name] for name in ("captions", "generated", "boxes", "descriptions")}
  return sources.published(flags.images, **files, **common)
