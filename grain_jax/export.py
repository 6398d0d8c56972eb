"""`python -m grain_jax.export --workdir=DIR --format=FORMAT --out=PATH`: a run, for others."""

from __future__ import annotations

import pathlib
from typing import Protocol

import jax
import ml_collections
from absl import flags

from grain_jax import cli, places
from grain_jax import config as configs


class Writer(Protocol):
  """Writes one format to `path`, a file or a folder that does not exist yet."""

  def __call__(
    self, path: pathlib.Path, *, config: ml_collections.ConfigDict, params: object, step: int
  ) -> None: ...


def writers() -> dict[str, Writer]:
  """Name -> writer. Imported when asked for: a wrong flag answers at once."""
  from grain_jax.convert import clippy, grain_torch, hf_clip, native

  return {
    "clippy": clippy.save,
    "grain_torch": grain_torch.save,
    "hf_clip": hf_clip.save,
    "safetensors": native.save,
  }


def export(workdir: str, *, format: str, out: str, step: int | None = None) -> int:
  """Writes a checkpoint in another project's format, all or nothing.

  Args:
    workdir: folder of a run; with 'safetensors' also of a tower alone.
    format: one of `writers()`.
    out: file (clippy, grain_torch) or folder to be, which must not exist.
    step: of the checkpoint; the newest by default.

  Returns:
    The step written.

  Raises:
    ValueError: no such format or checkpoint, or a model that the format has no place for.
  """
  from grain_jax.convert import staging, towers, weights
  from grain_jax.runtime import mesh as meshes

  places.check(workdir, "--workdir", bucket=True)
  target, known = places.open_place(out, "--out"), writers()
  if format not in known:
    raise ValueError(f"--format={format} is unknown. Choose from {', '.join(known)}.")
  staging.refuse_existing(target)
  if format == "safetensors" and towers.find(workdir) is not None:
    part, config, params = towers.load(workdir)
    towers.write(target, part=part, config=config, params=params, source={"file": workdir})
    return 0
  config, params, step = weights.load_run(workdir, step=step)
  configs.forget_places(config)
  with staging.staged(target) as path:
    known[format](path, config=config, params=jax.tree.map(meshes.to_host, params), step=step)
  return step


def main() -> None:
  flag = flags.FLAGS
  step = export(flag.workdir, format=flag.format, out=flag.out, step=flag.step)
  print(f"{flag.out}: checkpoint {step} of {flag.workdir} as {flag.format}", flush=True)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)
  flags.DEFINE_integer("step", None, "Checkpoint to export; the newest by default.")
  flags.DEFINE_string("format", None, "clippy, grain_torch, hf_clip or safetensors.", required=True)
  flags.DEFINE_string("out", None, "File or folder to be written; must not exist.", required=True)
  cli.run(main)
