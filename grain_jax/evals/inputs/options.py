"""What the user says about evaluations on outside datasets, and the errors about their files."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from collections.abc import Callable

from grain_jax import places

PROTOCOLS = ("name", "templates", "descriptors", "regions")


@dataclasses.dataclass(frozen=True)
class Options:
  """Where the datasets lie and how they are to be evaluated."""

  root: pathlib.Path | None = None  # --datasets: a folder with one sub-folder for each dataset
  tfds_dir: str | None = None  # --tfds_dir: where TFDS keeps its datasets; None: its default
  download: bool = False  # whether TFDS may download what it can
  # Evaluate the first so many images of each set (of composition: items of each file), for a trial;
  # 0: all. None: all, or as many as in the run that is evaluated.
  limit: int | None = None
  protocols: tuple[str, ...] = ("templates",)  # of zero-shot classification, from `PROTOCOLS`
  descriptors: pathlib.Path | None = None  # folder of files SET.json: {class: [descriptor, ...]}
  alphas: tuple[float, ...] = tuple(i / 10 for i in range(11))  # protocol 'regions': weights tried
  cache: pathlib.Path | None = None  # folder where embeddings of prompts are kept
  warn: Callable[[str], None] = print  # gets one line where something was left out
  flag: str = "--datasets"  # what gives the root, for messages

  def __post_init__(self):
    places.check_all(
      {self.flag: self.root, "--tfds_dir": self.tfds_dir, "--descriptors": self.descriptors}
    )
    for protocol in self.protocols:
      if protocol not in PROTOCOLS:
        raise ValueError(f"protocols: {protocol!r} is unknown. Choose from {', '.join(PROTOCOLS)}.")
    if self.root is not None and not self.root.is_dir():
      raise ValueError(f"{self.flag}={self.root}: there is no such folder.")
    if self.limit is not None and self.limit < 0:
      raise ValueError(f"limit = {self.limit} must be 0 (all) or a number of images.")

  def with_warn(self, warn: Callable[[str], None]) -> Options:
    """The same with another `warn`; the places are not looked at again."""
    other = copy.copy(self)
    object.__setattr__(other, "warn", warn)  # as `dataclasses.replace` would, without the checks
    return other


DEFAULTS = Options()


def find(options: Options, *names: str, what: str, how: str) -> pathlib.Path:
  """The file or folder ROOT/names[0]/names[1]/...; a one-line ValueError where it is missing.

  Args:
    options: with the root.
    *names: parts of the path below the root.
    what: the evaluation that needs it, as the user named it.
    how: how to get it: "Get ... from ... ".
  """
  below = pathlib.PurePath(*names)
  if options.root is None:
    raise ValueError(f"{what} needs DIR/{below}: give {options.flag}=DIR. {how}")
  path = places.find_file(options.root / below)
  if not path.exists():
    raise ValueError(f"{what}: there is no {path}. {how}")
  return path
