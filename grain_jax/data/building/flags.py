"""Command-line flags of `grain_jax.data.build`: common ones and those of the source chosen."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence

from grain_jax import helptext, places
from grain_jax.data import sources, token_ids
from grain_jax.data.building import tally
from grain_jax.data.sources import base
from grain_jax.data.sources import options as options_lib

SHARD_SIZE = 16_384  # records: the 10 M of CC12M are 611 shards, few enough to stay open


class Parser(argparse.ArgumentParser):
  """One line on a wrong value, without the usage."""

  def error(self, message: str):
    self.exit(2, f"{self.prog}: {message}. See --help.\n")


def _parser(kind: str | None, description: str) -> argparse.ArgumentParser:
  parser = Parser(
    prog="python -m grain_jax.data.build",
    description=description,
    formatter_class=helptext.ArgparseFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  kinds = "\n".join(f"{name}: {what}." for name, what in sources.KINDS.items())
  add(
    "--source",
    required=True,
    choices=tuple(sources.KINDS),
    help=f"what to build; with --help, the flags and the format of that source. {kinds}",
  )
  add("--out", required=True, help="directory to write")
  add("--overwrite", action="store_true", help="replace a dataset that is there")
  add("--shard_size", type=int, default=SHARD_SIZE, help="records a shard")
  add("--workers", type=int, default=None, help="processes that read (default: one per core)")
  add(
    "--ray_address",
    default="",
    help="of a Ray cluster that reads instead, or 'local' (requirements-annotate.txt); the folder "
    "of --out and the input must be where all of its machines see them",
  )
  add(
    "--tokenizer",
    default="",
    help="whose ids of all texts are stored with them, to spare encoding them in training: the "
    "folder that config.model.text.tokenizer will name, CLIP's by default, 'none' for no ids",
  )
  add(
    "--context",
    type=int,
    default=token_ids.CONTEXT,
    help="tokens of the longest text; a run may have a shorter config.model.text.context",
  )
  add(
    "--scratch",
    default="",
    help="folder in which --out=gs://... is built before it is copied there (default: in the "
    "user's cache folder)",
  )
  add(
    "--allow_dropped",
    type=float,
    default=tally.ALLOWED,
    help="part of the images, captions, regions or negatives that may be dropped; where more "
    "is, nothing is built",
  )
  if kind in sources.KINDS:
    add_flags(parser, of_source(kind))
  return parser


def of_source(kind: str) -> list[base.Flag]:
  """The flags of a source, its own and those that all have."""
  return [*flags_of(kind), *_options_of(kind)]


def add_flags(parser: argparse.ArgumentParser, flags: Sequence[base.Flag]) -> None:
  """Adds flags to a parser."""
  add = parser.add_argument
  for flag in flags:
    name, options = f"--{flag.name}", {"help": flag.help, "default": flag.default}
    if flag.kind is bool:
      add(name, action="store_true", help=flag.help)
    elif flag.many:
      add(name, nargs="*", **options)
    else:
      kind_of = {} if flag.kind is str else {"type": _told(flag.kind)}
      add(name, choices=flag.choices, required=flag.required, **options, **kind_of)


def _told(kind):
  """A type of argparse whose ValueError is the message."""

  def parse(text: str):
    try:
      return kind(text)
    except ValueError as error:
      plain = kind in (int, float)
      raise argparse.ArgumentTypeError(
        f"invalid {kind.__name__} value: {text!r}" if plain else str(error)
      ) from None

  return parse


def flags_of(kind: str) -> Sequence[base.Flag]:
  """The flags of a source."""
  module = sources.module(kind)
  return module.FLAGS if hasattr(module, "FLAGS") else module.flags()


def _options_of(kind: str) -> list[base.Flag]:
  """The flags that all sources have, but for what this one calls so itself."""
  own = {flag.name for flag in flags_of(kind)}
  return [flag for flag in options_lib.FLAGS if flag.name not in own]


def parse(arguments: Sequence[str], *, description: str) -> argparse.Namespace:
  """Flags of a build; ends the program with one line and code 2 where one is wrong."""
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--source", nargs="?")
  kind = first.parse_known_args(arguments)[0].source
  known = kind in sources.KINDS
  if known:
    description = f"{description}\n{sources.module(kind).__doc__}"
  parser = _parser(kind, description)
  given = [a.partition("=")[0] for a in arguments if a.startswith(("--box_format", "--box_units"))]
  if given and known and not any(f"--{flag.name}" == given[0] for flag in flags_of(kind)):
    parser.error(
      f"{given[0]}: --source={kind} has boxes of one format, which it knows. Leave it out"
    )
  found = parser.parse_args(arguments)
  with as_error_of(parser):
    values = {f"--{name}": value for name, value in vars(found).items()}
    places.check_all(values, buckets=("--out",))
    if places.is_bucket(found.out) and found.ray_address and not found.scratch:
      raise ValueError(
        f"--out={found.out} with --ray_address needs --scratch=DIR, a folder that all machines see."
      )
  return found


@contextlib.contextmanager
def as_error_of(parser: argparse.ArgumentParser) -> Iterator[None]:
  """A ValueError within ends the program as a wrong flag does."""
  try:
    yield
  except ValueError as error:
    parser.error(str(error).removesuffix("."))


def source(flags: argparse.Namespace) -> base.Source:
  """The source that the flags describe."""
  values = vars(flags)
  names = [flag.name for flag in flags_of(flags.source)]
  made = sources.module(flags.source).source(**{name: values[name] for name in names})
  asked = {flag.name: values[flag.name] for flag in _options_of(flags.source)}
  return options_lib.apply(made, asked)
