"""`grain-jax COMMAND ...`, or `python -m grain_jax COMMAND ...`: every command under one name."""

from __future__ import annotations

import difflib
import runpy
import sys

import grain_jax

COMMANDS = {  # name: (module, what it does)
  "train": ("grain_jax.main", "train a model, or go on"),
  "evaluate": ("grain_jax.evaluate", "evaluate a run or an imported model"),
  "build": ("grain_jax.data.build", "make shards of pictures and annotations"),
  "annotate": ("grain_jax.annotate", "descriptions, boxes and negatives of pictures, by models"),
  "convert": ("grain_jax.convert", "bring weights in"),
  "export": ("grain_jax.export", "take weights out"),
  "embed": ("grain_jax.embed", "embeddings of many pictures or texts"),
  "plan": ("grain_jax.plan", "memory, time and cost of a run on a machine that need not be there"),
}
# What others call them.
_MEANT = {
  "train": "pretrain finetune fine-tune fit run main resume continue",
  "evaluate": "eval test validate val benchmark score report",
  "build": "data dataset prepare preprocess ingest",
  "annotate": "describe ground negatives descriptors label caption",
  "convert": "import load",
  "export": "save",
  "embed": "encode embeddings embedding features predict infer inference",
  "plan": "estimate cost memory dry-run",
}


def usage() -> str:
  """All commands, a line each."""
  lines = [f"  {name:<10}{what} (python -m {module})" for name, (module, what) in COMMANDS.items()]
  return "\n".join(
    ["usage: grain-jax COMMAND [--flag=value ...]", *lines, "grain-jax COMMAND --help lists flags."]
  )


def main() -> None:
  """Runs the module of a command as `python -m` does."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("--help", "-h", "help"):
    print(usage())
    return
  if name == "--version":
    print(f"grain_jax {grain_jax.__version__}")
    return
  if name not in COMMANDS:
    meant = [command for command, words in _MEANT.items() if name in words.split()]
    near = meant or difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(COMMANDS)}."
    print(f"error: grain-jax {name}: no such command. {hint}", file=sys.stderr)
    sys.exit(2)
  module, _ = COMMANDS[name]
  sys.argv = [f"grain-jax {name}", *sys.argv[2:]]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
