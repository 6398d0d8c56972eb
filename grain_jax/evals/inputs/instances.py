"""Annotated boxes in COCO's format: COCO, LVIS, FG-OVD, RefCOCO as MDETR wrote it, or one's own.

A file is an object of `images`, `annotations` and `categories`. LVIS has `coco_url` in the place of
`file_name`, no `iscrowd`, and says for each image which categories were looked for (Gupta et al.,
CVPR 2019); FG-OVD adds to each annotation the captions that are wrong for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from grain_jax import places
from grain_jax.evals.inputs import annotations
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options, find

CLIP_TOLERANCE = 1.0  # pixels that a box may lie outside without being counted as clipped
_OF_IMAGES = ("neg_category_ids", "not_exhaustive_category_ids")  # lists of categories (LVIS)


@dataclasses.dataclass(frozen=True)
class Set:
  """Where the files of a dataset lie below --datasets."""

  annotations: tuple[str, ...]
  # Folder of images named without one; a name such as val2017/1.jpg starts at the folder above.
  images: tuple[str, ...]
  how: str  # to get it

  def file(self, root: pathlib.Path, name: str) -> pathlib.Path:
    """The file of an image by its name in the annotations."""
    folder = self.images[:-1] if "/" in name else self.images
    return root.joinpath(*folder, name)


_COCO = (
  "Get val2017.zip and annotations_trainval2017.zip from cocodataset.org; unpack them into "
  "DIR/coco, so that there are DIR/coco/val2017 and DIR/coco/annotations."
)
SETS: dict[str, Set] = {
  "coco": Set(("coco", "annotations", "instances_val2017.json"), ("coco", "val2017"), _COCO),
  "lvis": Set(
    ("coco", "annotations", "lvis_v1_val.json"),
    ("coco", "val2017"),
    "Get lvis_v1_val.json.zip from lvisdataset.org into DIR/coco/annotations, and COCO's "
    "train2017.zip and val2017.zip from cocodataset.org, unpacked into DIR/coco.",
  ),
}


@dataclasses.dataclass(frozen=True)
class AnnotatedImage:
  """One image with its R annotated boxes."""

  id: int
  name: str  # of its file, as the annotations give it
  height: int  # pixels
  width: int
  boxes: np.ndarray  # (cx, cy, w, h) as fractions of the image, f64 [R, 4]
  category: np.ndarray  # id, i64 [R]
  area: np.ndarray  # of the object (not of the box) in pixels, f64 [R]
  crowd: np.ndarray  # the box is around many objects, bool [R]
  negatives: tuple[tuple[int, ...], ...]  # categories that are wrong for each box; R of them
  absent: frozenset[int]  # categories known not to be in it (LVIS)
  not_exhaustive: frozenset[int]  # categories of which some objects are not annotated (LVIS)
  caption: str = ""  # of the whole image (RefCOCO: of its box)

  def single(self) -> np.ndarray:
    """Indices of the boxes around one object, i64 [<= R]."""
    return np.flatnonzero(~self.crowd)


@dataclasses.dataclass(frozen=True)
class Instances:
  """What an annotation file holds."""

  images: Sequence[AnnotatedImage]
  names: dict[int, str]  # id of a category -> its name in words, in the order of the file
  frequency: dict[int, str]  # id -> r, c or f (LVIS); else empty
  federated: bool  # not every category was looked for in every image
  clipped: int  # boxes that reached out of their image by more than `CLIP_TOLERANCE` pixels
  dropped: int  # boxes without area

  def first(self, count: int) -> Instances:
    """With the first so many images; 0 for all. The counts stay those of the whole file."""
    return dataclasses.replace(self, images=self.images[:count]) if count else self


def spec(name: str, sets: dict[str, Set] = SETS) -> Set:
  """The set of that name, or one's own folder DIR/NAME with instances.json."""
  return sets.get(name) or Set(
    (name, "instances.json"),
    (name, "images"),
    f"Known sets are {', '.join(sets)}; for your own, write DIR/{name}/instances.json in COCO's "
    f"format, with file names that start at DIR/{name} (bare ones at DIR/{name}/images).",
  )


def load(name: str, options: Options, *, what: str, sets: dict[str, Set] = SETS) -> Instances:
  """The annotations of a set, `options.limit` applied; see `read` and `check`."""
  own = spec(name, sets)
  return read(find(options, *own.annotations, what=what, how=own.how)).first(options.limit or 0)


def check(name: str, options: Options, *, what: str, sets: dict[str, Set] = SETS) -> Instances:
  """`load`; a one-line ValueError where boxes or all the images are missing."""
  own, instances = spec(name, sets), load(name, options, what=what, sets=sets)
  if not sum(len(image.single()) for image in instances.images):
    raise ValueError(
      f"{what}: {options.root.joinpath(*own.annotations)} has no box for its "
      f"{len(instances.images)} images. Give a split with annotations."
    )
  files = [own.file(options.root, image.name) for image in instances.images]
  check_files(files, what=what, how=own.how)
  return instances


def check_files(files: Sequence[pathlib.Path], *, what: str, how: str) -> None:
  """Raises a one-line ValueError where none of the images is there (single ones are counted)."""
  if not any(places.find_file(file).is_file() for file in files):
    raise ValueError(f"{what}: none of its {len(files)} pictures is there, not {files[0]}. {how}")


def read(file: pathlib.Path) -> Instances:
  """An annotation file; boxes are clipped to their image, those without area dropped, both counted.

  Raises:
    ValueError: not JSON, not of COCO's format: one line with the entry that is wrong.
  """
  stat = file.stat()
  return _read(file, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)  # several families and their checks read the same large file
def _read(file: pathlib.Path, _changed: int, _bytes: int) -> Instances:
  content = _content(file)
  names, frequency = {}, {}
  for i, entry in enumerate(content["categories"]):
    where = f"{file}: categories[{i}]"
    name = _field(entry, "name", str, where)
    key = _field(entry, "id", int, where)
    if key in names:
      raise ValueError(f"{where}: id {key} stands there twice. Give each category its own.")
    names[key] = name.replace("_", " ").strip()
    if entry.get("frequency") is not None:
      frequency[entry["id"]] = str(entry["frequency"])
  own: dict[int, list[tuple[np.ndarray, dict[str, Any]]]] = {}
  sizes: dict[int, tuple[int, int]] = {}
  for i, image in enumerate(content["images"]):
    where = f"{file}: images[{i}]"
    key, width, height = (_field(image, k, int, where) for k in ("id", "width", "height"))
    if key in own:
      raise ValueError(f"{where}: id {key} stands there twice. Give each image its own.")
    if min(width, height) < 1:
      raise ValueError(f"{where}: {width} x {height} pixels. Give the size of the image.")
    for field in _OF_IMAGES:
      _check_ids(image, field, where)
    own[key], sizes[key] = [], (width, height)
  clipped = dropped = 0
  for i, annotation in enumerate(content["annotations"]):
    where = f"{file}: annotations[{i}]"
    image = _field(annotation, "image_id", int, where)
    category = _field(annotation, "category_id", int, where)
    if image not in own:
      raise ValueError(f"{where}: there is no image {image}. Give the file with its images.")
    if names and category not in names:
      raise ValueError(f"{where}: there is no category {category}. Give the file with all of them.")
    box, outside = _fractions(annotation.get("bbox"), *sizes[image], where)
    if box is None:
      dropped += 1
      continue
    area = annotation.get("area")
    if area is not None and not _is_number(area):
      raise ValueError(f"{where}: area = {area!r} is no number of pixels. Mend it.")
    _check_ids(annotation, "neg_category_ids", where)
    clipped += outside > CLIP_TOLERANCE
    own[image].append((box, annotation))
  found = [
    _annotated_image(image, own[image["id"]], f"{file}: images") for image in content["images"]
  ]
  federated = bool(found) and all(
    image.get(k) is not None for image in content["images"] for k in _OF_IMAGES
  )
  return Instances(found, names, frequency, federated, clipped, dropped)


def batches(
  encoders: Encoders,
  files: Sequence[images_lib.Source],
  *,
  what: str,
  unreadable: images_lib.Unreadable,
  resize: str = "squash",
) -> Iterator[images_lib.Batch]:
  """`images.batches` at the model's size, squashed so that fractions of the image hold.

  Raises:
    ValueError: at the end, none could be read.
  """
  read_any = False
  for batch in images_lib.batches(
    files,
    size=encoders.size,
    resize=resize,
    interpolation=encoders.interpolation,
    batch_size=encoders.batch_size,
    unreadable=unreadable,
    shard=encoders.shard,
    max_pixels=encoders.max_pixels,
  ):
    read_any = True
    yield batch
  if not read_any:
    raise ValueError(f"{what}: {unreadable.line(len(files)) or 'there is no picture in it'}.")


def warn(
  what: str, total: int, unreadable: images_lib.Unreadable, say: Callable[[str], None]
) -> None:
  """One line where images were left out."""
  if unreadable:
    say(f"{what}: {unreadable.line(total)}")


def _content(file: pathlib.Path) -> dict[str, list[Any]]:
  content = annotations.read_json(file)
  for key in ("images", "annotations", "categories"):
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
      raise ValueError(
        f"{file} is not of COCO's format: it has no list {key!r}. Give an object of images, "
        "annotations and categories."
      )
  return content


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
  value = entry.get(key) if isinstance(entry, dict) else None
  if not isinstance(value, kind) or isinstance(value, bool):
    raise ValueError(f"{where} has {key} = {value!r}, not {kind.__name__}. Give COCO's format.")
  if kind is int and not _is_i64(value):
    raise ValueError(f"{where} has {key} = {value}, which 64 bits do not hold. Give a smaller one.")
  return value


def _is_i64(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
  """Whether it is a finite number that a float can be."""
  try:
    return isinstance(value, (int, float)) and math.isfinite(value)
  except OverflowError:
    return False


def _check_ids(entry: dict[str, Any], key: str, where: str) -> None:
  """Raises where a list of categories, which may be missing, is something else."""
  value = entry.get(key)
  if value is not None and not (isinstance(value, list) and all(map(_is_i64, value))):
    raise ValueError(f"{where}: {key} = {value!r} is no list of categories' ids. Mend it.")


def _fractions(box: Any, width: int, height: int, where: str) -> tuple[np.ndarray | None, float]:
  """(x, y, w, h) in pixels -> (cx, cy, w, h) in [0, 1] or None without area; pixels outside."""
  numbers = isinstance(box, list) and len(box) == 4
  if not numbers or not all(map(_is_number, box)):
    raise ValueError(f"{where}: bbox = {box!r} is no [x, y, width, height] in pixels. Mend it.")
  x, y, w, h = box
  left, top = max(x, 0), max(y, 0)
  right, bottom = min(x + w, width), min(y + h, height)
  if right <= left or bottom <= top:
    return None, 0.0
  outside = max(-x, -y, x + w - width, y + h - height)
  corners = np.array([left / width, top / height, right / width, bottom / height])
  return np.concatenate([(corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]]), outside


def _annotated_image(
  image: dict[str, Any], own: list[tuple[np.ndarray, dict]], where: str
) -> AnnotatedImage:
  name = image.get("file_name")
  if not name and isinstance(image.get("coco_url"), str):
    name = "/".join(image["coco_url"].split("/")[-2:])  # .../val2017/1.jpg
  if not isinstance(name, str) or not name:
    raise ValueError(f"{where}: {image['id']} has neither file_name nor coco_url. Give one.")
  boxes = np.array([box for box, _ in own], np.float64).reshape(-1, 4)
  pixels = boxes[:, 2] * image["width"] * boxes[:, 3] * image["height"]
  return AnnotatedImage(
    id=image["id"],
    name=name,
    height=image["height"],
    width=image["width"],
    boxes=boxes,
    category=np.array([a["category_id"] for _, a in own], np.int64),
    area=np.array(
      [p if a.get("area") is None else a["area"] for (_, a), p in zip(own, pixels, strict=True)],
      np.float64,
    ),
    crowd=np.array([bool(a.get("iscrowd")) for _, a in own], bool),
    negatives=tuple(tuple(a.get("neg_category_ids") or ()) for _, a in own),
    absent=frozenset(image.get("neg_category_ids") or ()),
    not_exhaustive=frozenset(image.get("not_exhaustive_category_ids") or ()),
    caption=str(image.get("caption") or ""),
  )
