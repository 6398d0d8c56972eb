"""Segmentation by prompts on PASCAL VOC, ADE20K and COCO, and the reading of their masks.

Every image is squashed to the model's square, whatever the model's own way of resizing, so that
each patch has its place in the mask; masks keep their size. One set, `voc2012_clippy`, is measured
as CLIPpy's notebook does instead.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from grain_jax import failures, places, textfiles
from grain_jax.evals import retrieval, segmentation
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options, find

_UNKNOWN = 254  # in a table of labels: a value that the dataset does not define


class Item(NamedTuple):
  """An image with its mask of classes and, where the dataset has one, of instances."""

  image: pathlib.Path
  mask: pathlib.Path
  instances: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Set:
  """A dataset with masks."""

  title: str
  vocabulary: str  # its file of class names
  items: Callable[[Options, str], list[Item]]  # (options, name for messages) -> all of the split
  as_clippy: bool = False  # measured by `_run_as_clippy`


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The classes of a dataset, what they are called, and how its masks spell them."""

  classes: tuple[str, ...]  # by label; "background" is the first where the dataset has it
  prompts: tuple[str, ...]  # P names that compete for every pixel
  owners: np.ndarray  # the class of each of them, u8 [P]
  labels: np.ndarray  # value in a mask -> label, `IGNORED` or unknown, u8 [256]
  background: bool  # whether the first class is what is left when the others are gone

  def read(self, path: pathlib.Path, size: tuple[int, int]) -> np.ndarray:
    """The labels of a mask file, u8 [H, W]; a one-line ValueError where it is not one.

    Args:
      path: a PNG, grey or with a palette.
      size: (height, width) of its image.
    """
    values = read_png(path, size)
    labels = self.labels[values]
    unknown = np.unique(values[labels == _UNKNOWN])
    if len(unknown):
      raise ValueError(
        f"mask {path} has the value {unknown[0]}, which is no label of this dataset "
        f"({len(self.classes)} classes). Get the masks in their original form."
      )
    return labels


def check(name: str, options: Options) -> None:
  """Raises a one-line ValueError where the set is not there as it should be."""
  items = items_of(name, options, family="segmentation")
  check_files(items, f"segmentation:{name}", "mask")


def contents(name: str, options: Options) -> tuple[Any, ...]:
  """What is read of a set, the items first: all processes must have the same."""
  return (items_of(name, options, family="segmentation"),)


def run(encoders: Encoders, name: str, options: Options) -> dict[str, float | int]:
  """Top-down segmentation: each pixel takes the class whose prompt is nearest.

  The prompt of a class is "a photo of a(n) {name}". A background may have many prompts, each a
  candidate of its own, as the 40 of VOC in CLIPpy's protocol (arXiv 2210.09996, sec. 4.3).

  Returns:
    `segmentation/NAME/miou`: the mean over classes of intersection over union, both counted over
    all pixels of the set; `.../pixel_accuracy`: fractions in [0, 1]. `.../classes`: how many are in
    the mean, for a class that occurs neither in a mask nor in a prediction is left out;
    `.../examples`: images counted, of `.../rows`. `voc2012_clippy`: see `_run_as_clippy`.
  """
  if SETS[name].as_clippy:
    return _run_as_clippy(encoders, name, options)
  what = f"segmentation:{name}"
  words = load_vocabulary(SETS[name].vocabulary)
  items = items_of(name, options, family="segmentation")
  texts = retrieval.encode_texts(encoders.text, segmentation.photo_prompts(words.prompts))
  counts = np.zeros((len(words.classes),) * 2, np.int64)
  examples = 0
  for index, size, patches in patches_of(encoders, items, what, options.warn):
    mask = words.read(items[index].mask, size)
    predicted = words.owners[segmentation.label_map(patches @ texts.T, size)]
    counts += segmentation.confusion(mask, predicted, len(words.classes))
    examples += 1
  return {
    f"segmentation/{name}/miou": segmentation.mean_iou(counts),
    f"segmentation/{name}/pixel_accuracy": segmentation.pixel_accuracy(counts),
    f"segmentation/{name}/classes": int(np.isfinite(segmentation.iou(counts)).sum()),
    f"segmentation/{name}/examples": examples,
    f"segmentation/{name}/rows": len(items),
  }


# The label of CLIPpy's notebook: its side in pixels, and what it adds to each union.
_CLIPPY_SIDE, _CLIPPY_EPSILON = 224, float(np.finfo(np.float32).eps)


def _run_as_clippy(encoders: Encoders, name: str, options: Options) -> dict[str, float | int]:
  """VOC as the notebook of CLIPpy's released checkpoint measures it, and rightly beside it.

  Published (github.com/kahnchana/clippy, src/evaluation, notebooks/evaluate.ipynb): split train;
  the picture's middle, its shorter side at the model's, against the label squashed to 224 x 224
  by nearest pixels, so that the two show different places where a picture is no square; scores
  upsampled to 224 x 224; 21 classes and 39 more that stand for the background; the mean over all
  21 of hits / (union + eps), in which a class that never occurs counts as 0.

  Returns:
    `segmentation/NAME/miou` and `.../pixel_accuracy`: as published; `.../miou_aligned` and
    `.../pixel_accuracy_aligned`: of the same images as `run` measures other sets, pictures squashed
    and masks in their size, absent classes left out; `.../classes`: how many occur;
    `.../examples`: images counted, of `.../rows`.
  """
  what = f"segmentation:{name}"
  words = load_vocabulary(SETS[name].vocabulary)
  items = items_of(name, options, family="segmentation")
  texts = retrieval.encode_texts(encoders.text, segmentation.photo_prompts(words.prompts))
  counts = np.zeros((2,) + (len(words.classes),) * 2, np.int64)  # as published, aligned
  examples = 0
  views = (("center_crop", options.warn), ("squash", lambda line: None))  # said once
  for row, (resize, warn) in enumerate(views):
    for index, size, patches in patches_of(encoders, items, what, warn, resize=resize):
      mask = words.read(items[index].mask, size)
      if resize == "center_crop":
        mask = np.asarray(
          Image.fromarray(mask).resize((_CLIPPY_SIDE, _CLIPPY_SIDE), Image.Resampling.NEAREST)
        )
        examples += 1
      predicted = words.owners[segmentation.label_map(patches @ texts.T, mask.shape)]
      counts[row] += segmentation.confusion(mask, predicted, len(words.classes))
  published, aligned = counts
  hits = np.diagonal(published)
  union = published.sum(axis=0) + published.sum(axis=1) - hits
  return {
    f"segmentation/{name}/miou": float(np.mean(hits / (union + _CLIPPY_EPSILON))),
    f"segmentation/{name}/pixel_accuracy": segmentation.pixel_accuracy(published),
    f"segmentation/{name}/miou_aligned": segmentation.mean_iou(aligned),
    f"segmentation/{name}/pixel_accuracy_aligned": segmentation.pixel_accuracy(aligned),
    f"segmentation/{name}/classes": int(np.isfinite(segmentation.iou(published)).sum()),
    f"segmentation/{name}/examples": examples,
    f"segmentation/{name}/rows": len(items),
  }


def items_of(name: str, options: Options, *, family: str) -> list[Item]:
  """The images and masks of a set, the first `options.limit` of them; ValueError if none."""
  items = SETS[name].items(options, f"{family}:{name}")
  return items[: options.limit or None]


def patches_of(
  encoders: Encoders,
  items: Sequence[Item],
  what: str,
  warn: Callable[[str], None],
  *,
  resize: str = "squash",
) -> Iterator[tuple[int, tuple[int, int], np.ndarray]]:
  """(index of the item, (height, width) of its image, patches [h, w, E]) of what can be read.

  `resize` is one of `transforms.RESIZES`.

  Raises:
    ValueError: none of them can be read.
  """
  unreadable = images_lib.Unreadable()
  for batch in images_lib.batches(
    (item.image for item in items),
    size=encoders.size,
    resize=resize,
    interpolation=encoders.interpolation,
    batch_size=encoders.batch_size,
    unreadable=unreadable,
    shard=encoders.shard,
    max_pixels=encoders.max_pixels,
  ):
    patches = segmentation.checked_patches(encoders.patches(batch.image), batch.image)
    for row, index in enumerate(batch.index.tolist()):
      height, width = batch.original_size[row].tolist()
      yield index, (height, width), patches[row]
  if len(unreadable) == len(items):
    raise ValueError(f"{what}: {unreadable.line(len(items))}.")
  if unreadable:
    warn(f"{what}: {unreadable.line(len(items))}")


def check_files(items: Sequence[Item], what: str, kind: str) -> None:
  """Raises a one-line ValueError where an image or its file of `kind` is missing.

  The sizes of the first pair are compared too: a folder of resized images shows there.
  """
  for field in ("image", kind):
    paths = [getattr(item, field) for item in items]
    missing = [path for path in paths if not places.find_file(path).exists()]
    if missing:
      raise ValueError(
        f"{what}: {len(missing)} of {len(items)} files are missing, the first {missing[0]}. "
        "Unpack the archive again."
      )
  first = items[0].image
  try:
    image = images_lib.open_image(first)
  except ValueError:
    return  # `run` counts it
  read_png(getattr(items[0], kind), (image.height, image.width))


def read_png(path: pathlib.Path, size: tuple[int, int]) -> np.ndarray:
  """A mask file as it stands, u8 [H, W]; a one-line ValueError where it is not of this size."""
  file = places.find_file(path)
  mask = segmentation.decode_mask(failures.retry_read(file.read_bytes, file), str(path))
  if mask.shape != tuple(size):
    raise ValueError(
      f"mask {path} is {mask.shape[1]} x {mask.shape[0]} pixels, its picture "
      f"{size[1]} x {size[0]}. "
      "Give both as they are published."
    )
  return mask


@functools.cache
def load_vocabulary(name: str) -> Vocabulary:
  """The class names that come with this package; see the sources and licences in the files."""
  path = pathlib.Path(__file__).parent / "segmentation_vocabularies" / f"{name}.json"
  content = json.loads(path.read_text(encoding="utf-8"))
  behind = content["background"]
  first = int(bool(behind))
  labels = np.full(256, _UNKNOWN, np.uint8)
  labels[content["ignored_values"]] = segmentation.IGNORED
  labels[content["background_values"]] = 0
  for label, entry in enumerate(content["classes"], first):
    labels[entry["value"]] = label
  names = [entry["name"] for entry in content["classes"]]
  prompts = [entry.get("prompt", entry["name"]) for entry in content["classes"]]
  return Vocabulary(
    classes=("background",) * first + tuple(names),
    prompts=(*behind, *prompts),
    owners=np.array([0] * len(behind) + list(range(first, first + len(names))), np.uint8),
    labels=labels,
    background=bool(first),
  )


def _voc(options: Options, what: str, *, split: str = "val") -> list[Item]:
  how = (
    "Get VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012 "
    "and unpack it in DIR/voc2012."
  )
  root = _inside(options, ("voc2012", "VOCdevkit/VOC2012"), "ImageSets", what=what, how=how)
  listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
  if not listing.exists():
    raise ValueError(f"{what}: there is no {listing}. {how}")
  keys = textfiles.read_text(listing).split()
  if not keys:
    raise ValueError(f"{what}: {listing} is empty. {how}")
  return [
    Item(
      root / "JPEGImages" / f"{key}.jpg",
      root / "SegmentationClass" / f"{key}.png",
      root / "SegmentationObject" / f"{key}.png",
    )
    for key in keys
  ]


def _ade(options: Options, what: str) -> list[Item]:
  how = (
    "Get ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu "
    "and unpack it in DIR/ade20k."
  )
  root = _inside(options, ("ade20k", "ADEChallengeData2016"), "images", what=what, how=how)
  return _pairs(
    root / "images" / "validation", root / "annotations" / "validation", what=what, how=how
  )


def _coco(options: Options, what: str) -> list[Item]:
  how = (
    "Get val2017.zip from https://cocodataset.org, unpacked as DIR/coco/val2017, and "
    "stuffthingmaps_trainval2017.zip from https://github.com/nightrome/cocostuff, unpacked as "
    "DIR/coco_stuff/val2017."
  )
  images = find(options, "coco", "val2017", what=what, how=how)
  masks = find(options, "coco_stuff", "val2017", what=what, how=how)
  return _pairs(images, masks, what=what, how=how)


def _inside(
  options: Options, names: tuple[str, str], has: str, *, what: str, how: str
) -> pathlib.Path:
  """ROOT/names[0]/names[1] if the archive's own folder was kept, else ROOT/names[0]."""
  if options.root is not None and (options.root / names[0] / names[1] / has).exists():
    return options.root / names[0] / names[1]
  return find(options, names[0], has, what=what, how=how).parent


def _pairs(images: pathlib.Path, masks: pathlib.Path, *, what: str, how: str) -> list[Item]:
  """Every JPEG of a folder, by name, with the PNG of the same name in the other."""
  found = sorted(images.glob("*.jpg"))
  if not found:
    raise ValueError(f"{what}: there is no picture NAME.jpg in {images}. {how}")
  return [Item(path, masks / f"{path.stem}.png") for path in found]


SETS: Mapping[str, Set] = {
  "voc2012": Set("PASCAL VOC 2012, val: 20 objects and background", "voc2012", _voc),
  "voc2012_clippy": Set(
    "PASCAL VOC 2012, train, as the notebook of CLIPpy's released checkpoint measures it",
    "voc2012",
    functools.partial(_voc, split="train"),
    as_clippy=True,
  ),
  "ade20k": Set("ADE20K (SceneParse150), validation: 150 classes", "ade20k", _ade),
  "coco_stuff": Set("COCO-Stuff, val2017: 80 things and 91 stuff classes", "coco_stuff", _coco),
  "coco_object": Set("COCO-Object, val2017: 80 things and background", "coco_object", _coco),
}
