"""Images with one label each, as a stream: TFDS datasets by name, and folders of images.

`vocabularies/SET.json` says of a set known by name: `tfds` and `split`, `names` {label as TFDS
spells it: name in prompts} in the order of TFDS's labels, `templates` of prompts, `source`,
`licence`, `notes` (what the split is), and `get` where it must be fetched by hand.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grain_jax import places
from grain_jax.evals.inputs import annotations
from grain_jax.evals.inputs import files as files_lib
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs import names as names_lib
from grain_jax.evals.inputs.options import Options, find

VOCABULARIES = pathlib.Path(__file__).parent / "vocabularies"
spell = names_lib.spell  # what two spellings of a class have in common


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Where a known set comes from and what its classes are called."""

  tfds: str  # name and configuration in TFDS
  split: str  # what is evaluated, in TFDS's notation
  names: Mapping[str, str]  # label -> name in prompts, in the order of TFDS's labels
  templates: tuple[str, ...]  # prompts with one {} for the name
  get: str  # what to do by hand before TFDS can prepare it, {manual} its folder; '' if nothing


@dataclasses.dataclass(frozen=True)
class Labelled:
  """A labelled set: C classes and a stream of images."""

  labels: tuple[str, ...]  # as the set spells them, C of them
  classes: tuple[str, ...]  # as prompts spell them, in the same order; may repeat
  templates: tuple[str, ...]  # of prompts, one {} in each; () where the set brings none
  # A new pass over (image, index of its class), always in the same order.
  read: Callable[[], Iterator[tuple[images_lib.Source, int]]]
  items: Sequence[Any] = ()  # what tells them apart, without a picture read: (path, class), ...


def load(name: str, options: Options, *, what: str, how: str = "") -> Labelled:
  """A set by name: the folder ROOT/NAME if there is one, else the TFDS dataset of its vocabulary.

  Args:
    name: of a set with a vocabulary, or of any folder below `options.root`.
    options: `root`, `tfds_dir`, `download`.
    what: the evaluation as the user named it, for messages.
    how: how to get a set without a vocabulary.

  Raises:
    ValueError: it is not there, holds no image, or its classes are not those expected.
  """
  vocabulary = read_vocabulary(name)
  folder = None if options.root is None else options.root / name
  if folder is not None and folder.is_dir():
    return _folder(folder, vocabulary, what=what)
  if vocabulary is None:
    how = how or "Make it a folder with one sub-folder of pictures a class."
    find(options, name, what=what, how=how)
    raise ValueError(f"{what}: {folder} is a file. {how}")
  return _tfds(vocabulary, options, what=what)


def read_vocabulary(name: str) -> Vocabulary | None:
  """The vocabulary of a set known by name; None for any other."""
  path = VOCABULARIES / f"{name}.json"
  if not re.fullmatch(r"\w+", name) or not path.exists():
    return None
  held = json.loads(path.read_text(encoding="utf-8"))
  return Vocabulary(
    tfds=held["tfds"],
    split=held["split"],
    names=held["names"],
    templates=tuple(held["templates"]),
    get=held.get("get", ""),
  )


def class_index(labels: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
  """Spelling (`spell`) -> class, of labels and of names in prompts.

  What two labels or two names share is left out; a label goes before another class's name.
  """
  found: dict[str, int] = {}
  for names in (labels, classes):
    spelled = [spell(name) for name in names]
    count = collections.Counter(spelled)
    for i, name in enumerate(spelled):
      if name and count[name] == 1:
        found.setdefault(name, i)
  return found


def _tfds(vocabulary: Vocabulary, options: Options, *, what: str) -> Labelled:
  """A dataset that TFDS has prepared, or may prepare now."""
  from grain_jax.data import host_tensorflow  # here, since others can do without its slow import

  tfds = host_tensorflow.datasets()
  folder = None if options.tfds_dir is None else places.at(options.tfds_dir)
  builder = tfds.builder(vocabulary.tfds, data_dir=folder)
  if not builder.is_prepared():
    root = os.fspath(builder.data_dir_root)
    by_hand = vocabulary.get.format(manual=f"{root}/downloads/manual")
    prepare = (
      f'{by_hand}{"; then" if by_hand else "To"} prepare it: python -c "import tensorflow_datasets'
      f" as tfds; tfds.builder('{vocabulary.tfds}', data_dir='{root}').download_and_prepare()\""
    )
    if not options.download:
      others = f"{options.flag}=DIR with a folder of pictures"
      if options.flag == "--datasets":  # the flags of `evaluate`
        others = f"--download, --tfds_dir=DIR where it is, or {others}"
      raise ValueError(
        f"{what}: TFDS has no {builder.info.full_name} in {root}. {prepare} (or give {others})."
      )
    try:
      builder.download_and_prepare()
    except Exception as error:
      reason = " ".join(str(error).split())
      raise ValueError(
        f"{what}: TFDS cannot prepare {builder.info.full_name}: {type(error).__name__}: {reason}. "
        f"{prepare}."
      ) from error
  labels = tuple(vocabulary.names)
  check_labels(builder.info.features["label"].names, labels, what=f"{what}: {vocabulary.tfds}")
  splits = builder.info.splits
  if vocabulary.split.split("[")[0] not in splits or not splits[vocabulary.split].num_examples:
    raise ValueError(
      f"{what}: split {vocabulary.split} of {builder.info.full_name} in {builder.data_dir} is "
      "empty or was not prepared. Remove that folder and prepare the dataset again."
    )

  def read() -> Iterator[tuple[images_lib.Source, int]]:
    dataset = builder.as_dataset(
      split=vocabulary.split,
      shuffle_files=False,
      # Decoding is ours, so that a broken image is counted and stops nothing.
      decoders=tfds.decode.PartialDecoding(
        {"image": True, "label": True}, decoders={"image": tfds.decode.SkipDecoding()}
      ),
    )
    for i, example in enumerate(tfds.as_numpy(dataset)):
      label = int(example["label"])
      if not 0 <= label < len(labels):
        raise ValueError(
          f"{what}: picture {i} of split {vocabulary.split} has the label {label}; there are "
          f"{len(labels)} classes. This split cannot be evaluated."
        )
      yield example["image"], label

  items = [(builder.info.full_name, vocabulary.split)] * splits[vocabulary.split].num_examples
  return Labelled(labels, tuple(vocabulary.names.values()), vocabulary.templates, read, items)


def check_labels(found: Sequence[str], expected: Sequence[str], *, what: str) -> None:
  """Raises a one-line ValueError unless TFDS's labels are the vocabulary's, in order.

  TFDS calls labels "0", "1", ... where it knows no names; then only their number can be compared.
  """
  if len(found) != len(expected):
    raise ValueError(
      f"{what} has {len(found)} classes, the vocabulary {len(expected)}. Use the TFDS version that "
      "the vocabulary is of."
    )
  if list(found) == list(map(str, range(len(found)))):
    return
  for i, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
    if theirs != ours:
      raise ValueError(
        f"{what}: class {i} is {theirs!r} there and {ours!r} in the vocabulary. Use the TFDS "
        "version that the vocabulary is of."
      )


def _folder(folder: pathlib.Path, vocabulary: Vocabulary | None, *, what: str) -> Labelled:
  """A folder with one sub-folder a class, an image of each class in turn.

  Hidden folders, those of the system and those without a picture are no classes.
  """
  pictures = {
    entry.name: sorted(path for path in entry.iterdir() if files_lib.is_picture(path))
    for entry in folder.iterdir()
    if entry.is_dir() and not files_lib.is_system_folder(entry.name)
  }
  if not pictures:
    raise ValueError(f"{what}: {folder} has no sub-folder. Make one of each class, pictures in it.")
  subs = _ordered([sub for sub, own in pictures.items() if own])
  if not subs:
    shown = ", ".join(files_lib.SUFFIXES[:6])
    raise ValueError(
      f"{what}: no picture ({shown}, ...) in the {len(pictures)} sub-folders of {folder}. Put "
      "each class's pictures into its own."
    )
  if len(set(map(names_lib.nfc, subs))) < len(subs):
    raise ValueError(
      f"{what}: two sub-folders of {folder} have one name in two forms of Unicode. Merge them."
    )
  if vocabulary is None:
    names = _class_names(folder, subs, what=what)
    labels, classes, templates = tuple(map(names_lib.nfc, subs)), tuple(names), ()
    index = {sub: i for i, sub in enumerate(subs)}
  else:
    labels, classes = tuple(vocabulary.names), tuple(vocabulary.names.values())
    templates = vocabulary.templates
    index = _known_folders(folder, subs, labels, classes, what=what)
  own = folder / "templates.json"
  if own.exists():
    templates = tuple(_strings(own, annotations.read_json(own), what=what))

  files = [(turn, index[sub], path) for sub in subs for turn, path in enumerate(pictures[sub])]
  files.sort()  # a class after another, so that the first N images are of all of them

  def read() -> Iterator[tuple[images_lib.Source, int]]:
    for _, label, path in files:
      yield path, label

  items = [(path, label) for _, label, path in files]
  return Labelled(labels, classes, templates, read, items)


def _known_folders(
  folder: pathlib.Path,
  subs: Sequence[str],
  labels: Sequence[str],
  classes: Sequence[str],
  *,
  what: str,
) -> dict[str, int]:
  """Sub-folder -> class of a known set, by label, by name in prompts, or 0 to C - 1."""
  if _are_numbers(subs) and [int(sub) for sub in subs] == list(range(len(labels))):
    return {sub: int(sub) for sub in subs}
  by_name = class_index(labels, classes)
  index = {sub: by_name[spell(sub)] for sub in subs if spell(sub) in by_name}
  free = {form: i for form, i in by_name.items() if i not in index.values()}
  others = [sub for sub in subs if sub not in index]
  forms = list(free)
  for form, sub in zip(forms, names_lib.find_keys(others, [[f] for f in forms]), strict=True):
    if sub is not None:
      index[sub] = free[form]
  unknown = [sub for sub in subs if sub not in index]
  if unknown:
    raise ValueError(
      f"{what}: {_some(unknown)} in {folder} is no class of this set. Name sub-folders as the set "
      f"names its classes, such as {labels[0]!r} or {classes[0]!r}, or 0 to {len(labels) - 1}."
    )
  missing = [classes[i] for i in sorted(set(range(len(labels))) - set(index.values()))]
  if missing:
    raise ValueError(
      f"{what}: {folder} has {len(labels) - len(missing)} of {len(labels)} classes; missing: "
      f"{_some(missing)}. Add them, or give the folder another name with its own classes."
    )
  return index


def _are_numbers(subs: Sequence[str]) -> bool:
  return all(sub.isascii() and sub.isdigit() for sub in subs)


def _ordered(subs: Sequence[str]) -> list[str]:
  """Sub-folders by their names; by their numbers where all are numbers: 2 before 10."""
  return sorted(subs, key=lambda sub: (int(sub), sub)) if _are_numbers(subs) else sorted(subs)


def _check_order(subs: Sequence[str], path: pathlib.Path, *, what: str) -> None:
  """Refuses a list of names where it is open which name is of which sub-folder."""
  how = "Give {sub-folder: name}."
  if _are_numbers(subs):
    numbers = [int(sub) for sub in subs]
    if numbers != list(range(numbers[0], numbers[0] + len(subs))) or numbers[0] > 1:
      raise ValueError(
        f"{what}: {path} is a list, and the sub-folders are not numbered from 0 or 1 without a "
        f"gap ({_some(subs)}). {how}"
      )
    return
  counted = sorted(subs, key=_by_numbers)
  if counted != list(subs):
    first = next(a for a, b in zip(subs, counted, strict=True) if a != b)
    raise ValueError(
      f"{what}: {path} is a list, and the alphabetical order of the sub-folders is not that of "
      f"their numbers (from {first!r}). {how}"
    )


def _by_numbers(name: str) -> list[str | int]:
  """Texts and numbers in turn, the first a text: "a10b" -> "a", 10, "b"."""
  return [int(x) if i % 2 else x for i, x in enumerate(re.split(r"([0-9]+)", name))]


def _class_names(folder: pathlib.Path, subs: Sequence[str], *, what: str) -> list[str]:
  """The name in prompts of each sub-folder: of classes.json, or the folder's own."""
  path = folder / "classes.json"
  if not path.exists():
    return [" ".join(names_lib.nfc(sub).replace("_", " ").split()) for sub in subs]
  held = annotations.read_json(path)
  if isinstance(held, list):
    names = _strings(path, held, what=what)
    if len(names) != len(subs):
      raise ValueError(
        f"{what}: {path} names {len(names)} classes, and there are {len(subs)} sub-folders "
        "with pictures. Give one name for each, in alphabetical order, or {sub-folder: name}."
      )
    _check_order(subs, path, what=what)
    return names
  if not isinstance(held, dict):
    raise ValueError(f"{what}: {path} holds a {type(held).__name__}. Give {{sub-folder: name}}.")
  _strings(path, list(held.values()), what=what)
  held = {names_lib.nfc(sub): name for sub, name in held.items()}
  subs = [names_lib.nfc(sub) for sub in subs]
  for here, there, where in ((subs, held, "classes.json"), (held, subs, "the folder")):
    lacking = [name for name in here if name not in there]
    if lacking:
      raise ValueError(
        f"{what}: {where} lacks {_some(lacking)} ({len(held)} classes in {path}, {len(subs)} "
        "sub-folders with pictures). Each sub-folder needs one name."
      )
  return [held[sub] for sub in subs]


def _strings(path: pathlib.Path, held: Any, *, what: str) -> list[str]:
  if not isinstance(held, list) or not held:
    raise ValueError(f"{what}: {path} holds no list of strings.")
  for value in held:
    if not isinstance(value, str) or not value.strip():
      raise ValueError(f"{what}: {path} holds {value!r}: non-empty strings are needed.")
  return held


def _some(names: Sequence[str]) -> str:
  return ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
