"""`python -m grain_jax.main --config=configs/cc12m.py --workdir=DIR`: trains, or goes on."""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from grain_jax import cli
from grain_jax.runtime import addresses

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, FILE or FILE:argument.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, results.")
_CONTINUE_AS = flags.DEFINE_list(
  "continue_as", [], "Keys in which a run goes on otherwise than it began: steps,optimizer.lr,..."
)
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
  address = addresses.from_flags()
  from grain_jax.runtime import distributed  # after the flags: a wrong one answers at once

  distributed.prepare(_CONFIG.value)
  with distributed.session(address, limit=_CONFIG.value.watchdog_seconds):
    from grain_jax.training import loop

    keys = [key.removeprefix("config.") for key in _CONTINUE_AS.value]
    loop.train(_CONFIG.value, _WORKDIR.value, continue_as=keys)


if __name__ == "__main__":
  cli.run(main)
