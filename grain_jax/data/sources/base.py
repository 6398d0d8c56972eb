"""What a source is: records in blocks, each of which any process reads by itself."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from grain_jax import places, schema
from grain_jax.data import records

if TYPE_CHECKING:
  from grain_jax.data.sources import folder_lines

OUTSIDE = "outside_the_folder"  # why a record is refused, unless --allow_outside is given
# JSON that says where a part of a source lies.
Block = Mapping[str, Any]
# (split, record as `schema` has it, or why there is none)
Item = tuple[str, "dict[str, Any] | records.Refused"]


class Flag(NamedTuple):
  """A flag of `grain_jax.data.build` for some sources."""

  name: str
  help: str
  default: Any = None
  kind: Any = str  # of its value; bool: true where it stands
  choices: Sequence[str] | None = None
  many: bool = False  # a list of values
  required: bool = False


COMMON_FLAGS = (
  Flag("val_fraction", "part of train that goes to val", 0.0, float),
  Flag("licence", "of the images, for the manifest", ""),
  Flag("max_pixels", "of the largest image kept", schema.MAX_PIXELS, int),
)
OUTSIDE_FLAG = Flag("allow_outside", "read images that lie outside the folder too", False, bool)


def tolerance_flag(default: float) -> Flag:
  return Flag("tolerance", "how far outside a box may lie (clipped)", default, float)


@dataclasses.dataclass(frozen=True)
class Source:
  """Where records come from.

  A source with `blocks` is read by `read(block, scratch)`, one of another kind by `read()`, whole.
  `scratch` is a folder of the build's own, the same in all processes.
  """

  name: str
  settings: Mapping[str, Any]  # JSON; a build with equal settings need not be repeated
  read: Callable[..., Iterator[Item]]
  about: Mapping[str, Any]  # into the manifest: licence, class_names, ...
  blocks: Callable[[pathlib.Path], Iterable[Block]] | None = None  # of scratch; the same each time
  prepare: Callable[[pathlib.Path], None] | None = None  # writes into scratch what `read` looks up
  recipe: Mapping[str, Any] | None = None  # for `sources.make`; None: for this process alone
  total: int | None = None  # records, where that is known beforehand
  with_mask: bool = False
  with_label: bool = False
  check_image: bool = True  # decode each image; off where it has just been encoded
  tolerance: float = 1e-3  # how far outside a box may lie, as a fraction of the image
  max_pixels: int = schema.MAX_PIXELS  # of the largest image that is kept
  max_side: int = 0  # pixels of the longer side beyond which an image is made smaller; 0: never
  rules: Any = None  # a `region_rules.Rules`; None: all regions stay
  exclusion: Any = None  # an `exclusion.Exclusion`; None: no image is left out
  annotated: Any = None  # an `annotated.Annotated`, what is to be added; None: nothing
  images: Callable[[], Iterator[pathlib.Path]] | None = None  # files of all records, if they have
  box_format: str = "yxyx"  # of the regions' boxes, of `box_formats.FORMATS`
  box_units: str = "fractions"  # of `box_formats.UNITS`
  flags_for_boxes: bool = False  # the two are the user's to choose
  oddities: folder_lines.Oddities | None = None  # of the annotations; counted while they are read


def iterate(source: Source) -> Iterator[Item]:
  """All records of a source, in their order."""
  if source.blocks is None:
    yield from source.read()
    return
  with tempfile.TemporaryDirectory() as folder:
    scratch = pathlib.Path(folder)
    if source.prepare is not None:
      source.prepare(scratch)
    for block in source.blocks(scratch):
      yield from source.read(block, scratch)


def existing(path: str | pathlib.Path, flag: str) -> pathlib.Path:
  """The file or folder that a flag names, as an absolute path; one line where there is none."""
  places.check(path, flag)
  found = pathlib.Path(path).expanduser().resolve()
  if not str(path) or not found.exists():
    raise ValueError(f"{flag} = {path}: there is no such file or folder. Correct the path.")
  return found


def check_common(*, val_fraction: float, max_pixels: int) -> None:
  """Raises the line for a value of `COMMON_FLAGS` that cannot be."""
  if not 0 <= val_fraction < 1:
    raise ValueError(f"--val_fraction = {val_fraction}: not a part of the data. Use [0, 1).")
  schema.check_max_pixels(max_pixels, "--max_pixels")


def chance(key: str) -> float:
  """A number in [0, 1) that depends on the key alone."""
  digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:6], "big") / 2**48


def split_of(key: str, split: str, val_fraction: float) -> str:
  """The split of a record: a part of train goes to val, by a hash of the key."""
  return "val" if split == "train" and chance(key) < val_fraction else split


def is_outside(root: pathlib.Path, image: str) -> bool:
  """Whether the path in a file of annotations leads out of the folder, by ".." or from "/".

  Links inside the folder are followed, for its owner put them there; `LINK/../x` is no way out.
  """
  path = pathlib.PurePath(image)
  inside = not path.is_absolute() or places.find_file(path).is_relative_to(root)
  if ".." not in path.parts and inside:
    return False
  try:
    return not pathlib.Path(os.path.realpath(root / path)).is_relative_to(root)
  except ValueError:  # a NUL, half a character: `records.check` counts what is no path
    return False


def unusual(usual: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
  """Settings that came later, where they are not what a dataset without them was built with."""
  return {name: value for name, value in settings.items() if value != usual[name]}
