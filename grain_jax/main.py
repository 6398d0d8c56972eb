"""`python -m grain_jax.main --config=configs/cc12m.py --workdir=DIR`: trains, or goes on."""

from __future__ import annotations

import textwrap

from absl import flags
from ml_collections import config_flags

from grain_jax import cli, failures, recipes
from grain_jax.runtime import addresses

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "By name or the path of a file, either with :argument; see above."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, results.")
_CONTINUE_AS = flags.DEFINE_list(
  "continue_as",
  [],
  "Keys in which a run goes on otherwise than it began: steps,optimizer.lr (default: none).",
)
flags.mark_flags_as_required(["config", "workdir"])

# Of the many keys those that most runs set.
_FIRST_KEYS = (
  "data.dir", "batch_size", "steps", "epochs", "optimizer.lr", "optimizer.warmup_steps", "seed",
  "method", "model.image.variant", "model.image.size", "model.dtype", "accumulate", "init.image",
  "init.text", "evals", "eval_every", "log_every", "save_every",
)  # fmt: skip
_PAGE = """
usage: python -m grain_jax.main --config=RECIPE --workdir=DIR [--config.KEY=VALUE ...]
       grain-jax train ... is the same where grain_jax is installed.

Trains a model in the folder DIR, or goes on with the run that is there.

Recipes, by name or by path (--config=quickstart, --config=configs/quickstart.py, --config=own.py):
{recipes}
  RECIPE:runlocal         shrunk to a minute on a CPU, on the embedded scenes, which
                          `python -m grain_jax.data.build --source=scenes --out=data/scenes` draws
  RECIPE:KEY=VALUE,...    with these keys; also RECIPE:runlocal,steps=10

Keys, set after the recipe has: --config.optimizer.lr=3e-4; --config.data.flip and
--noconfig.data.flip; --config.evals=retrieval,grounding. A wrong one ends in a line with the
nearest.
{keys}
Defaults are those of {common},
which has every key, and so has --helpfull; a recipe states what differs.

Going on: the same command goes on from the newest checkpoint in DIR. A run that has ended is
evaluated again. Another configuration than DIR/config.json ends in a line that names the first key
that differs, unless it is one that does not touch what is learned (log_every, evals, mesh, ...) or
is named by --continue_as, as for a longer run: --config.steps=2600 --continue_as=steps.

Several processes, one a machine or a GPU, find each other by SLURM's, Kubernetes' or the TPU's
variables, or by the flags below; each is started with the same command. launch/ has scripts.

Exit codes:
  0    done
  1    something must be changed: one line says what, where and what to do; --traceback shows more
  2    a wrong command line, likewise
  {restart}   told to stop (SIGTERM) and saved, or storage or a process was lost: start it again
  {interrupted}  Ctrl-C, saved; a second Ctrl-C ends at once

DIR and config.data.dir may be in a bucket, gs://BUCKET/FOLDER; docs/buckets.md says what differs.

DIR gets config.json, checkpoints/, metrics.jsonl, TensorBoard events, and at the end results.json,
figures/ and report.html.
"""


def page(*, full: bool = False) -> str:
  """What `--help` says above the flags: recipes, keys, exit codes; with every key if `full`."""
  named = recipes.described()
  keys = recipes.keys()
  return _PAGE.format(
    recipes="\n".join(_line(name, text) for name, text in named.items()),
    keys="\n".join(
      _line(name, f"{keys[name].comment} (default: {keys[name].default})")
      for name in (keys if full else _FIRST_KEYS)
    ),
    common=recipes.FOLDER / "common.py",
    restart=failures.EXIT_RESTART,
    interrupted=failures.EXIT_INTERRUPTED,
  )


def _line(name: str, text: str) -> str:
  start = f"  {name:<23} "
  return textwrap.fill(text, 100, initial_indent=start, subsequent_indent=" " * 26)


def main() -> None:
  address = addresses.from_flags()
  # After the flags: a wrong one answers at once.
  from grain_jax.runtime import compile_cache, distributed

  distributed.prepare(_CONFIG.value)
  compile_cache.keep_in(_CONFIG.value.compile_cache)
  with distributed.session(address, limit=_CONFIG.value.watchdog_seconds):
    from grain_jax.runtime import devices
    from grain_jax.training import loop

    keys = [key.removeprefix("config.") for key in _CONTINUE_AS.value]
    with devices.explaining(devices.TRAINING):
      loop.train(_CONFIG.value, _WORKDIR.value, continue_as=keys)


if __name__ == "__main__":
  cli.run(main, about=page)
