"""The embedded data: images composed of drawings, with captions, boxes, descriptions and masks.

A scene shows 1 to 5 tinted OpenMoji drawings on a plain or patterned background. Everything about
it follows from (settings, split, index) alone: not from the process, nor from the order.

Splits:
  train:   scenes of seen pairs of colour and concept.
  val:     new layouts of seen pairs, with masks.
  objects: one object an image, every pair of colour and concept equally often, with label and
           mask. `unseen_pairs` of them occur in no other split.

Boxes are exact and amodal: the tight box of an object's own alpha, also where a later object
covers a part of it (never more than `max_overlap` of the smaller box); a region's score is the
visible fraction. The drawings are CC BY-SA 4.0 (`concepts.attribution()`), and so are the images.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image

from grain_jax import schema
from grain_jax.data.scenes import backgrounds, concepts, false_texts, sprites
from grain_jax.data.scenes import texts as scene_texts
from grain_jax.data.scenes import workers as scene_workers

SPLITS = ("train", "val", "objects")


@dataclasses.dataclass(frozen=True)
class SceneSettings:
  """All numbers of the scenes. Sizes are fractions of the image's side.

  The defaults are frozen in tests/data/golden/scenes.json: whoever changes them reruns every arm
  of the comparison of methods.
  """

  seed: int = 0
  train: int = 36000  # records of each split
  val: int = 500
  objects_per_class: int = 4
  image_size: int = 96  # pixels
  concepts: int = 100  # the first so many of concepts.all_concepts()
  names: tuple[str, ...] = ()  # if given: these concepts instead
  colors: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("red", (222, 35, 35)),
    ("orange", (255, 140, 15)),
    ("yellow", (255, 232, 50)),
    ("green", (40, 165, 65)),
    ("blue", (40, 95, 225)),
    ("purple", (135, 55, 190)),
    ("pink", (255, 135, 195)),
    ("gray", (145, 145, 145)),
  )
  negatives: bool = False  # false captions and descriptions too (`false_texts`)
  unseen_fraction: float = 0.2  # of the pairs of colour and concept
  # Chances of 1, 2, ... objects, and the range of the size of each: the square root of the area
  # of the drawing's upright box.
  count_chances: tuple[float, ...] = (0.15, 0.3, 0.3, 0.15, 0.1)
  sizes: tuple[tuple[float, float], ...] = (
    (0.24, 0.58),
    (0.22, 0.5),
    (0.22, 0.44),
    (0.2, 0.38),
    (0.2, 0.34),
  )
  max_side: float = 0.62  # longest side of a drawing
  small_below: float = 0.26  # described as small
  large_above: float = 0.4  # described as large
  max_rotation: int = 20  # degrees, either way
  max_overlap: float = 0.15  # of two boxes: intersection / smaller area
  alpha_threshold: int = 64  # a pixel belongs to an object from here on, of 255
  backgrounds: tuple[str, ...] = backgrounds.KINDS
  jpeg_quality: int = 90
  masks: bool = True  # in val and objects

  def __post_init__(self):
    def check(condition: bool, what: str, why: str):
      if not condition:
        raise ValueError(f"settings.{what} = {getattr(self, what)}: {why}")

    count = len(self.names) or self.concepts
    check(self.concepts >= 2 and len(self.names) != 1, "concepts", "choose at least 2.")
    check(
      count <= 254 or not self.masks,
      "concepts" if not self.names else "names",
      "masks hold at most 254 concepts in a byte. Choose fewer or set masks=False.",
    )
    for split in ("train", "val", "objects_per_class"):
      check(getattr(self, split) >= 0, split, "a number of records cannot be negative.")
    check(self.image_size >= 32, "image_size", "smaller than 32 pixels shows nothing.")
    check(self.seed >= 0, "seed", "a seed cannot be negative.")
    check(len(dict(self.colors)) == len(self.colors) > 1, "colors", "give 2 or more, each once.")
    check(0 <= self.unseen_fraction <= 0.5, "unseen_fraction", "choose one in [0, 0.5].")
    check(
      0 < len(self.count_chances) < len(scene_texts.COUNTS)
      and min(self.count_chances) >= 0
      and abs(sum(self.count_chances) - 1) < 1e-9,
      "count_chances",
      f"give at most {len(scene_texts.COUNTS) - 1} chances that add up to 1.",
    )
    check(
      len(self.sizes) == len(self.count_chances)
      and all(0 < low <= high <= self.max_side for low, high in self.sizes),
      "sizes",
      "give a (least, greatest) for each of count_chances, greatest at most max_side.",
    )
    check(0 < self.max_side <= 0.65, "max_side", "choose one in (0, 0.65], so a turned one fits.")
    check(0 <= self.max_rotation <= 45, "max_rotation", "choose one in [0, 45] degrees.")
    check(0 <= self.max_overlap <= 0.5, "max_overlap", "choose one in [0, 0.5].")
    check(0 < self.alpha_threshold < 255, "alpha_threshold", "choose one in [1, 254].")
    check(1 <= self.jpeg_quality <= 100, "jpeg_quality", "choose one in [1, 100].")
    unknown = set(self.backgrounds) - set(backgrounds.KINDS)
    check(
      bool(self.backgrounds) and not unknown,
      "backgrounds",
      f"unknown {sorted(unknown)}. Choose from {backgrounds.KINDS}.",
    )


@dataclasses.dataclass(frozen=True)
class Scene:
  """A scene before it becomes a record. N objects, in the order in which they are drawn."""

  pixels: np.ndarray  # u8 [H, W, 3]
  owner: np.ndarray  # u8 [H, W]: 0 background, else 1 + the object that shows there
  classes: tuple[int, ...]  # [N], indices into class_names
  sizes: tuple[float, ...]  # [N], as in SceneSettings.sizes
  boxes: np.ndarray  # f32 [N, 4]: (ymin, xmin, ymax, xmax) in [0, 1]
  visible: tuple[float, ...]  # [N], fraction of the object's pixels that nothing covers
  captions: tuple[str, ...]
  descriptions: tuple[str, ...]  # [N]


@functools.lru_cache(maxsize=8)
def _concepts(settings: SceneSettings) -> tuple[concepts.Concept, ...]:
  return concepts.select(settings.concepts, settings.names)


def concept_names(settings: SceneSettings) -> list[str]:
  """Names of the concepts; a mask holds 1 + the index into these, 0 is background."""
  return [concept.name for concept in _concepts(settings)]


def class_names(settings: SceneSettings) -> list[str]:
  """ "{colour} {concept}" of every pair: index = concept * number of colours + colour."""
  names = concept_names(settings)
  return [f"{color} {name}" for name in names for color, _ in settings.colors]


def unseen_pairs(settings: SceneSettings) -> list[int]:
  """Indices into `class_names` that neither `train` nor `val` shows, ascending.

  Spread evenly: each concept loses, to within one, as many colours as any other, and each colour
  as many concepts.
  """
  num_concepts, num_colors = len(_concepts(settings)), len(settings.colors)
  rng = np.random.default_rng([settings.seed, len(SPLITS)])
  order = rng.permutation(num_concepts).tolist()
  first = rng.permutation(num_colors).tolist()
  period = math.lcm(num_concepts, num_colors)  # then the pairs would repeat: shift by one
  chosen = [
    order[i % num_concepts] * num_colors + first[(i + i // period) % num_colors]
    for i in range(round(settings.unseen_fraction * num_concepts * num_colors))
  ]
  return sorted(chosen)


def descriptors(settings: SceneSettings) -> dict[str, list[str]]:
  """{class name: phrases that hold of it} for zero-shot classification with descriptors."""
  return {
    f"{color} {concept.name}": scene_texts.descriptors(concept.name, color, concept.kind)
    for concept in _concepts(settings)
    for color, _ in settings.colors
  }


class Scenes:
  """The records of all splits, each made when asked for.

  Attributes:
    settings: what they are made from.
    split_sizes: {split: number of records}.
  """

  def __init__(self, settings: SceneSettings | None = None):
    self.settings = s = settings or SceneSettings()
    self.concepts = _concepts(s)
    self._unseen = unseen_pairs(s)
    num_classes = len(self.concepts) * len(s.colors)
    self._seen = sorted(set(range(num_classes)) - set(self._unseen))
    self._named = [(color, c.name) for c in self.concepts for color, _ in s.colors]
    self._barred = {self._named[label] for label in self._unseen}
    if len(self._seen) < len(s.count_chances):
      raise ValueError(
        f"settings.concepts = {len(self.concepts)}: {len(self._seen)} seen pairs are fewer than "
        f"the {len(s.count_chances)} objects of a scene. Choose more concepts."
      )
    self.split_sizes = {
      "train": s.train,
      "val": s.val,
      "objects": s.objects_per_class * num_classes,
    }
    self._sprites: dict[int, sprites.Sprite] = {}
    self._chances = np.cumsum(s.count_chances).tolist()

  def record(self, split: str, index: int) -> dict:
    """Record `index` of `split`, with the keys of `schema`; boxes f32 [4], the mask u8 [H, W]."""
    s, scene = self.settings, self.scene(split, index)
    buffer = io.BytesIO()
    image = Image.fromarray(scene.pixels)
    image.save(buffer, "JPEG", quality=s.jpeg_quality, subsampling=0)
    false = false_texts.of_scene(
      [self._named[label] for label in scene.classes],
      caption=scene.captions[0], descriptions=scene.descriptions, boxes=scene.boxes.tolist(),
      barred=self._barred, colors=[color for color, _ in s.colors],
      names=[c.name for c in self.concepts],
      rng=np.random.default_rng([s.seed, SPLITS.index(split), index, 1]) if s.negatives else None,
    )  # fmt: skip
    record = {
      schema.RECORD_KEY: f"{split}-{index:06d}",
      schema.RECORD_IMAGE: buffer.getvalue(),
      schema.RECORD_CAPTIONS: list(scene.captions),
      schema.RECORD_REGIONS: [
        {"description": description, "box": box, "score": score, "negatives": negatives}
        for description, box, score, negatives in zip(
          scene.descriptions, scene.boxes, scene.visible, false[1], strict=True
        )
      ],
      schema.RECORD_NEGATIVES: false[0],
    }
    if split != "train" and s.masks:
      ids = [0] + [1 + c // len(s.colors) for c in scene.classes]
      record[schema.RECORD_MASK] = np.array(ids, np.uint8)[scene.owner]
    if split == "objects":
      record[schema.RECORD_LABEL] = scene.classes[0]
    return record

  def scene(self, split: str, index: int) -> Scene:
    """What `record` shows, before it is encoded."""
    if split not in self.split_sizes:
      raise ValueError(f"split = {split!r}: unknown. Choose from {SPLITS}.")
    if not 0 <= index < self.split_sizes[split]:
      raise IndexError(f"index = {index}: {split} has {self.split_sizes[split]} records.")
    s = self.settings
    rng = np.random.default_rng([s.seed, SPLITS.index(split), index])
    random = rng.random
    if split == "objects":
      classes = [index % (len(self.concepts) * len(s.colors))]
    else:
      u = random()
      count = 1 + next((k for k, c in enumerate(self._chances) if u < c), len(self._chances) - 1)
      picked: dict[int, None] = {}
      while len(picked) < count:
        picked[self._seen[int(random() * len(self._seen))]] = None
      classes = list(picked)
    placed = self._layout(classes, random)
    canvas = backgrounds.draw(
      s.backgrounds[int(random() * len(s.backgrounds))], size=s.image_size, rng=rng
    )
    owner = np.zeros(canvas.shape[:2], np.uint8)
    boxes = np.empty((len(placed), 4), np.float32)
    areas = []
    for k, (label, _, side, rotation, center) in enumerate(placed):
      concept, color = divmod(label, len(s.colors))
      patch = sprites.transform_sprite(
        self._sprite(concept), side=side, rotation=rotation, center=center
      )
      solid = sprites.compose(canvas, patch, rgb=s.colors[color][1])
      solid = solid >= s.alpha_threshold
      top, left, bottom, right = patch.window(s.image_size)
      owner[top:bottom, left:right][solid] = k + 1
      rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
      box = top + rows[0], left + columns[0], top + rows[-1] + 1, left + columns[-1] + 1
      boxes[k] = np.array(box, np.float32) / np.float32(s.image_size)
      areas.append(int(np.count_nonzero(solid)))
    shown = np.bincount(owner.ravel(), minlength=len(placed) + 1)[1:].tolist()
    classes = tuple(label for label, *_ in placed)
    sizes = tuple(size for _, size, *_ in placed)
    described = [
      scene_texts.describe(
        self.concepts[label // len(s.colors)].name,
        s.colors[label % len(s.colors)][0],
        "small" if size < s.small_below else "large" if size > s.large_above else "",
      )
      for label, size in zip(classes, sizes, strict=True)
    ]
    captions = scene_texts.captions(
      described,
      boxes.tolist(),
      [self.concepts[label // len(s.colors)].kind for label in classes],
      choose=lambda n: int(random() * n),
    )
    return Scene(
      pixels=canvas,
      owner=owner,
      classes=classes,
      sizes=sizes,
      boxes=boxes,
      visible=tuple(round(a / b, 4) for a, b in zip(shown, areas, strict=True)),
      captions=tuple(captions),
      descriptions=tuple(described),
    )

  def _sprite(self, concept: int) -> sprites.Sprite:
    if concept not in self._sprites:
      self._sprites[concept] = sprites.load(
        self.concepts[concept],
        max_side=round(self.settings.max_side * self.settings.image_size),
        max_rotation=self.settings.max_rotation,
      )
    return self._sprites[concept]

  def _layout(self, classes, random):
    """[(class, size, side in pixels, degrees, (x, y) of the centre in pixels)], largest first.

    A scene that does not fit is tried again with all its objects a little smaller.
    """
    s, count = self.settings, len(classes)
    low, high = s.sizes[count - 1]
    objects = []
    for label in classes:
      sprite = self._sprite(label // len(s.colors))
      size = low + (high - low) * random()
      rotation = int(random() * (2 * s.max_rotation + 1)) - s.max_rotation
      objects.append((size, label, sprite, rotation))
    objects.sort(key=lambda entry: -entry[0])
    for attempt in range(100):
      shrink = 0.97 ** max(0, attempt - 3)
      placed, taken = [], []
      for size, label, sprite, rotation in objects:
        root = sprite.aspect**0.5
        side = min(max(size * shrink, min(size, low)) / root, s.max_side)
        if attempt > 50:
          side *= 0.97 ** (attempt - 50)
        left, top, right, bottom = (side * e for e in sprite.extents[rotation])
        for _ in range(12):
          x = left + (1 - left - right) * random()
          y = top + (1 - top - bottom) * random()
          box = (y - top, x - left, y + bottom, x + right)
          if all(_overlap(box, other) <= s.max_overlap for other in taken):
            break
        else:
          break
        taken.append(box)
        pixels = side * s.image_size
        center = (x * s.image_size, y * s.image_size)
        placed.append((label, side * root, pixels, rotation, center))
      if len(placed) == count:
        return placed
    raise AssertionError("settings.sizes: objects do not fit. Choose smaller ones.")


def iterate(settings: SceneSettings, split: str, *, workers: int | None = None) -> Iterator[dict]:
  """The records of a split in order, made by several processes.

  Args:
    settings: of the scenes.
    split: one of SPLITS.
    workers: processes; None takes one per CPU core, 0 makes the records here. The records do not
      depend on it.
  """
  scenes = Scenes(settings)
  if split not in SPLITS:
    raise ValueError(f"split = {split!r}: unknown. Choose from {SPLITS}.")
  size = scenes.split_sizes[split]
  if workers is None:
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  workers = min(workers or 0, size // 64)  # a process takes as long to start as some 300 scenes
  if workers < 1:
    return (scenes.record(split, index) for index in range(size))
  return scene_workers.records(dataclasses.asdict(settings), split, size=size, workers=workers)


def from_dict(values: dict) -> SceneSettings:
  """Settings from `dataclasses.asdict(settings)`, also after JSON has made lists of tuples."""

  def freeze(value):
    return tuple(map(freeze, value)) if isinstance(value, list | tuple) else value

  unknown = set(values) - {field.name for field in dataclasses.fields(SceneSettings)}
  if unknown:
    raise ValueError(f"settings.{min(unknown)}: no such setting. See SceneSettings.")
  return SceneSettings(**{key: freeze(value) for key, value in values.items()})


def _overlap(a, b) -> float:
  """Intersection of two boxes over the smaller one's area."""
  height = min(a[2], b[2]) - max(a[0], b[0])
  width = min(a[3], b[3]) - max(a[1], b[1])
  if height <= 0 or width <= 0:
    return 0.0
  return height * width / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
