"""What `--help` prints: what a command is for, then its flags with their defaults.

absl's own list has other libraries' flags among a command's and ends with code 1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from absl import flags

ASKED = ("--help", "-help", "-h", "--helpshort", "-helpshort", "--helpfull", "-helpfull")
_TITLES = {  # of the flags that a module of this project adds to the command's own
  "grain_jax.runtime.addresses": "several processes",
  "grain_jax.cli": "of every command",
}
_KINDS = {"int": "N", "float": "X", "config object": "RECIPE"}
_INDENT = 6


class ArgparseFormatter(
  argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
  """For a command that argparse reads: defaults in its help, its text line by line."""

  def _get_help_string(self, action: argparse.Action) -> str | None:
    """argparse's own but for switches, and for what the text says in words."""
    return action.help if action.default in (None, False) else super()._get_help_string(action)


def asked(argv: Sequence[str]) -> str | None:
  """'--help' or '--helpfull' where the arguments ask for help; None: they do not."""
  found = [arg for arg in argv[1:] if arg in ASKED]
  if not found:
    return None
  return "--helpfull" if any(arg.endswith("full") for arg in found) else "--help"


def page(about: str, *, full: bool = False) -> str:
  """All that a command says of itself.

  Args:
    about: what it is for, and how it is called.
    full: the flags of libraries (logging, JAX) too.
  """
  parts = [about.strip()]
  others = []
  for title, own, found in _groups():
    if own:
      parts.append(f"{title}:\n" + "\n".join(_entry(flag) for flag in found))
    else:
      others += [f"{title}:\n" + "\n".join(_entry(flag) for flag in found)]
  always = textwrap.indent("--help, --helpfull\n    This page; with the flags of libraries.", "  ")
  return "\n\n".join([*parts, *(others if full else []), always]) + "\n"


def own_flags() -> list[str]:
  """Names of the flags that are this project's."""
  return [flag.name for _, own, found in _groups() if own for flag in found]


def _groups() -> Iterator[tuple[str, bool, list[flags.Flag]]]:
  """(title, whether it is this project's, flags): the command's own first."""
  by_module = dict(flags.FLAGS.flags_by_module_dict())
  main = sys.argv[0]
  order = [main, *(m for m in _TITLES if m in by_module), *by_module]
  for module in dict.fromkeys(m for m in order if by_module.get(m)):
    own = module == main or module.startswith(("grain_jax.", "bench."))
    title = "flags" if module == main else _TITLES.get(module, f"flags of {module}")
    found = [flag for flag in by_module[module] if "." not in flag.name]  # no --config.KEY
    yield title, own, found


def _entry(flag: flags.Flag) -> str:
  """A flag, its text and its default."""
  if flag.boolean:
    name = f"--[no]{flag.name}"
  else:
    values = [value for value in getattr(flag.parser, "enum_values", ()) if value]
    kind = "|".join(values) or _KINDS.get(flag.flag_type(), "VALUE")
    name = f"--{flag.name}={'A,B' if 'list' in flag.flag_type() else kind}"
  width = min(shutil.get_terminal_size((100, 24)).columns, 100)
  text = re.sub(r"^<.*?>: ", "", flag.help or "")  # absl's list of an enumeration's values
  text = f"{' '.join(text.split())} {default(flag)}".rstrip()
  indent = " " * _INDENT
  lines = textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
  return f"  {name}\n{lines}"


def default(flag: flags.Flag) -> str:
  """'(default: 8)'; where there is none the flag's own text says what that means."""
  if any("must have a value other than None" in v.message for v in flag.validators):
    return "(must be given)"
  if flag.boolean and flag.default is not None:
    return f"(default: {'yes' if flag.default else 'no'})"
  if flag.default in (None, "", []):
    return ""
  shown = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
  return f"(default: {shown})"
