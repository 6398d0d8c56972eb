"""Where a build is made and where it goes: beside `out` on a disk, or from there into a bucket."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
from collections.abc import Callable

from grain_jax import places
from grain_jax.data import dataset

UNFINISHED = ".unfinished"  # lies in a bucket's folder as long as a build is copied there


def part_of(out: pathlib.Path, scratch: str) -> pathlib.Path:
  """The local folder in which `out` is built; the same for the same `out`, so that it goes on.

  Args:
    out: what is built.
    scratch: of --scratch, for what goes into a bucket; '': in the user's cache folder.
  """
  if not places.is_bucket(out):
    if scratch:
      raise ValueError(f"--scratch={scratch} is for --out=gs://...; {out} is built beside itself.")
    return out.with_name(f"{out.name}.part")
  places.check(scratch, "--scratch")
  folder = pathlib.Path(scratch).expanduser() if scratch else places.user_cache() / "builds"
  digest = hashlib.sha256(str(out).encode()).hexdigest()[:12]
  return folder / f"{out.name}-{digest}.part"


def is_unfinished(out: pathlib.Path) -> bool:
  """Whether a build was cut off while it was copied to `out`."""
  return places.is_bucket(out) and (out / UNFINISHED).exists()


def deliver(
  built: pathlib.Path, out: pathlib.Path, part: pathlib.Path, say: Callable[[str], None]
) -> None:
  """Makes a finished dataset `out`, whole or not at all, in the place of one that is there.

  In a bucket the manifest, without which nobody opens it, is removed first and copied last. What is
  there already (by its MD5) is not copied again.

  Raises:
    OSError, failures.TransientError: it cannot be; the same call goes on.
  """
  if not places.is_bucket(out):
    if out.exists():
      shutil.rmtree(part / "old", ignore_errors=True)  # of a build that was cut off here
      out.rename(part / "old")
    built.rename(out)
    return
  files = [path for path in built.rglob("*") if path.is_file()]
  size = sum(path.stat().st_size for path in files)
  say(f"copying {len(files):,} files, {size / 1e9:.1f} GB, to {out}")
  old = list(out.iterdir()) if out.is_dir() else []
  (out / UNFINISHED).write_text("a build is being copied here\n")
  (out / dataset.MANIFEST).unlink(missing_ok=True)
  names = {path.relative_to(built).parts[0] for path in files}
  for path in old:
    if path.name not in names | {UNFINISHED, dataset.MANIFEST}:
      places.remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)
  places.upload(built, out, last=(dataset.MANIFEST,))
  (out / UNFINISHED).unlink(missing_ok=True)
