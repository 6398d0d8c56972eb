"""Segmentation from patch features: by prompts (top-down), by grouping alone (bottom-up).

Both are CLIPpy's protocols (Ranasinghe et al., ICCV 2023, arXiv 2210.09996, sec. 3.5), for the
patch features of any model. Pure NumPy; a mask here is u8 [H, W] with `IGNORED` where nothing is
known about a pixel.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from grain_jax.evals import retrieval, zero_shot

IGNORED = 255  # pixels of this label count nowhere
GROUPS = 8  # of an image, as in CLIPpy
# What the scenes of `data.scenes` have behind their objects.
BACKGROUNDS = (
  "a plain background",
  "a gradient background",
  "a striped background",
  "a blurred background",
  "a noisy background",
)

EncodePatches = Callable[[np.ndarray], Any]  # u8 [b, S, S, 3] -> [b, h, w, E], L2-normalised


@dataclasses.dataclass(frozen=True)
class Example:
  """One image with its true mask and the predicted one."""

  key: str
  image: np.ndarray  # u8 [S, S, 3], as the model sees it
  true: np.ndarray  # u8 [H, W]: 0 background, else 1 + index of the class; or `IGNORED`
  predicted: np.ndarray  # likewise
  groups: np.ndarray  # bottom-up, u16 [H, W]: ids without a meaning
  labels: dict[int, str]  # what the labels of either mask mean, background included


@dataclasses.dataclass(frozen=True)
class Result:
  """Metrics by flat name, and the first `keep` images."""

  metrics: dict[str, float | int]
  examples: list[Example]


def evaluate_built(
  encode_patches: EncodePatches,
  encode_text: retrieval.EncodeText,
  batches: retrieval.Batches,
  *,
  classes: Sequence[str],
  templates: Sequence[str] = (),
  background: Sequence[str] = BACKGROUNDS,
  keep: int = 0,
) -> Result:
  """Segments the images of a dataset whose records have masks, top-down and bottom-up.

  Args:
    encode_patches: images -> embeddings of their patches, in the space of the texts.
    encode_text: texts -> embeddings.
    batches: (batch, extras) with extras "mask" (a PNG a row, b"" where there is none; 0 background,
      else 1 + index into `classes`) and "key"; see `retrieval`.
    classes: C <= 254 names.
    templates: prompts with one {} for the name; none for "a photo of a(n) {}".
    background: prompts, each a candidate of its own, that stand for the background.
    keep: how many images, the first that have a mask, come back as `Result.examples`.

  Returns:
    Metrics, fractions in [0, 1]:
    `segmentation/miou`, `segmentation/pixel_accuracy`: all pixels, background one of the classes;
    `segmentation/miou_foreground`, `segmentation/pixel_accuracy_foreground`: only pixels of true
    objects, each given to one of `classes`, so that no prompt for the background is needed;
    `grouping/jaccard`: see `best_overlaps`; the segments are the classes of an image (two objects
    of a class are one).
    Counts: `segmentation/classes` in the mean of `miou`; `grouping/segments`;
    `segmentation/images` that have a mask; `segmentation/examples` of `segmentation/rows` rows.

  Raises:
    ValueError: no mask at all, a mask that does not fit the classes, embeddings not finite or not
      of unit length.
  """
  if not 0 < len(classes) < IGNORED:
    raise ValueError(f"segmentation: {len(classes)} classes; a mask has room for 1 to 254.")
  prompts = (
    zero_shot.class_prompts(classes, templates)
    if templates
    else [[p] for p in photo_prompts(classes)]
  )
  embeddings = zero_shot.class_embeddings(encode_text, [*([b] for b in background), *prompts])
  owners = np.maximum(np.arange(len(embeddings)) - len(background) + 1, 0).astype(np.uint8)
  total = np.zeros((2, len(classes) + 1, len(classes) + 1), np.int64)
  overlaps: list[np.ndarray] = []
  kept: list[Example] = []
  images = examples = rows = 0
  for batch, extras in batches:
    counted = retrieval.counted_rows(batch, extras, ("key", "mask"))
    rows += len(batch["example_mask"])
    examples += len(counted)
    masked = [i for i in counted if extras["mask"][i]]
    if not masked:
      continue
    patches = checked_patches(encode_patches(batch["image"]), batch["image"])
    for i in masked:
      images += 1
      key = extras["key"][i]
      mask = _check_labels(decode_mask(extras["mask"][i], f"of {key!r}"), len(classes), key)
      scores = patches[i] @ embeddings.T
      predicted = owners[label_map(scores, mask.shape)]
      total[0] += confusion(mask, predicted, len(classes) + 1)
      objects = np.where(mask == 0, IGNORED, mask)
      named = 1 + label_map(scores[..., len(background) :], mask.shape)
      total[1] += confusion(objects, named, len(classes) + 1)
      groups = label_map(group_scores(patches[i]), mask.shape)
      overlaps.append(best_overlaps(mask, groups))
      if len(kept) < keep:
        found = sorted({*np.unique(mask), *np.unique(predicted)} - {IGNORED})
        labels = {int(v): "background" if v == 0 else classes[v - 1] for v in found}
        image = np.array(batch["image"][i])
        kept.append(Example(key, image, mask, predicted, groups, labels))
  if not images:
    raise ValueError(
      f"segmentation: none of the {examples} images ({rows} rows) has a mask. Give a split whose "
      "records have some (val or objects of the scenes)."
    )
  segments = np.concatenate(overlaps)
  metrics: dict[str, float | int] = {
    "segmentation/miou": mean_iou(total[0]),
    "segmentation/pixel_accuracy": pixel_accuracy(total[0]),
  }
  if len(segments):  # else the masks show nothing but background
    metrics |= {
      "segmentation/miou_foreground": mean_iou(total[1]),
      "segmentation/pixel_accuracy_foreground": pixel_accuracy(total[1]),
      "grouping/jaccard": float(segments.mean()),
    }
  metrics |= {
    "grouping/segments": len(segments),
    "segmentation/classes": int(np.isfinite(iou(total[0])).sum()),
    "segmentation/images": images,
    "segmentation/examples": examples,
    "segmentation/rows": rows,
  }
  return Result(metrics, kept)


def photo_prompts(names: Sequence[str]) -> list[str]:
  """The prompt of each name: "a photo of a cat", "a photo of an apple"."""
  return [
    f"a photo of {'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}" for name in names
  ]


def label_map(
  scores: np.ndarray, size: tuple[int, int], *, block_elements: int = 1 << 21
) -> np.ndarray:
  """The class of the highest score at every pixel, scores upsampled bilinearly.

  To upsample features and then take the cosine with each class gives the same: the product is
  linear, and the length of a pixel's feature divides the scores of all classes alike.

  Args:
    scores: of C classes, [h, w, C].
    size: (H, W) of the mask in pixels.
    block_elements: about how many upsampled scores are held at once (4 bytes each).

  Returns:
    u16 [H, W]; of equal scores, the class of lower index.
  """
  classes = scores.shape[-1]
  labels = np.empty(size, np.uint16)
  step = max(1, block_elements // max(1, classes * size[1]))
  for start, block in _upsampled(scores, size, step):
    labels[start : start + step] = block.argmax(axis=0)
  return labels


def upsample(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Bilinear interpolation between the centres of cells, [h, w, C] -> f32 [H, W, C].

  As torch.nn.functional.interpolate(mode="bilinear", align_corners=False): beyond the outermost
  centres the outermost values go on.
  """
  return np.concatenate([b.transpose(1, 2, 0) for _, b in _upsampled(values, size, size[0])])


def similarity_map(patches: np.ndarray, text: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """How much of a text each pixel shows: the cosines of the patches with it, upsampled.

  Args:
    patches: unit rows, [h, w, E].
    text: a unit vector, [E].
    size: (H, W) of the image in pixels.

  Returns:
    f32 [H, W] in [-1, 1].
  """
  return upsample((patches @ text)[..., None], size)[..., 0]


def project_to_plane(features: np.ndarray) -> np.ndarray:
  """Coordinates along the two first principal components: [n, E] -> f32 [n, 2], n >= 1.

  A component without variance (n = 1, equal features) gives zeros.
  """
  centred = _centred(features)
  components = principal_components(features, 2)
  found = centred @ components.T
  return np.pad(found, [(0, 0), (0, 2 - found.shape[1])]).astype(np.float32)


def principal_components(features: np.ndarray, count: int) -> np.ndarray:
  """The directions of largest variance of n features, as unit rows, by falling variance.

  The sign of a component is such that the feature furthest along it lies on its positive side.

  Args:
    features: [n, E].
    count: of components asked for; features of lower rank give fewer, down to none.

  Returns:
    f64 [k, E], k <= count.
  """
  centred = _centred(features)
  left, lengths, right = np.linalg.svd(centred, full_matrices=False)
  # Beyond the rank, directions are arbitrary: nothing lies along them.
  scale = max(float(np.linalg.norm(features)), np.finfo(np.float64).tiny)
  real = int(np.sum(lengths > 1e-6 * scale))
  k = min(count, real)
  furthest = left[np.abs(left[:, :k]).argmax(axis=0), np.arange(k)]
  return right[:k] * np.sign(furthest)[:, None]


def group_scores(patches: np.ndarray, count: int = GROUPS) -> np.ndarray:
  """Bottom-up grouping: the cosine of each patch with each of the image's principal components.

  The components are the centres of the groups and each patch belongs to the nearest (CLIPpy, sec.
  3.5). No code of it is published, and the paper leaves open, for which is chosen here:
  normalisation before the SVD: patches as `encode_patches` gives them, of unit length, and not
  rescaled after centring;
  centring: by the mean of the image's patches, in the SVD and in the cosine alike, so that no
  common part of all patches favours one centre everywhere;
  signs: each component points to the patch furthest along it, and stands for one group: a patch on
  its far side goes to another;
  the number: 8 components of an image, or as many as its patches have dimensions.

  Args:
    patches: [h, w, E].
    count: of groups.

  Returns:
    f32 [h, w, k], 1 <= k <= count: fewer than `count` where the features' rank is lower.
  """
  h, w, width = patches.shape
  flat = patches.reshape(-1, width)
  centred = _centred(flat)
  components = principal_components(flat, count)
  if not len(components):  # all patches are equal: one group
    return np.zeros((h, w, 1), np.float32)
  lengths = np.linalg.norm(centred, axis=1, keepdims=True)
  cosines = centred @ components.T / np.maximum(lengths, 1e-12)
  return cosines.reshape(h, w, -1).astype(np.float32)


def best_overlaps(segments: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """Of each true segment, the IoU with the group that overlaps it best, whatever the classes.

  The mean over all segments of all images is the Jaccard similarity of CLIPpy, tables 3 and 4: "an
  instance average of IoU between predicted and annotated segmentations, independent of object
  labels". Ignored pixels count neither for a segment nor for a group; background is no segment, but
  a group that spreads over it has a larger union.

  Args:
    segments: u8 [H, W]: 0 background, `IGNORED`, else the id of a segment.
    groups: id of the group, below 256, [H, W].

  Returns:
    f64 [S] in [0, 1], the S segments by rising id.
  """
  known = segments != IGNORED
  table = np.bincount(
    segments[known].astype(np.int64) * 256 + groups[known], minlength=256 * 256
  ).reshape(256, 256)
  areas, covered = table.sum(axis=1), table.sum(axis=0)
  present = np.flatnonzero(areas[1:]) + 1
  shared = table[present]
  union = areas[present, None] + covered[None] - shared
  return (shared / union).max(axis=1) if len(present) else np.zeros(0)


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
  """How many pixels of each true class were given to each class: i64 [classes, classes].

  Args:
    true: u8 [H, W], labels below `classes`, or `IGNORED`.
    predicted: labels below `classes`, [H, W].
    classes: how many there are.
  """
  known = true != IGNORED
  rows, columns = true[known].astype(np.int64), predicted[known].astype(np.int64)
  for what, labels in (("true", rows), ("predicted", columns)):
    if labels.size and labels.max() >= classes:
      raise ValueError(f"confusion: {what} label {labels.max()}, but there are {classes} classes.")
  return np.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)


def iou(counts: np.ndarray) -> np.ndarray:
  """Intersection over union of each class: f64 [C], NaN for a class that never occurs.

  IoU_c = n_cc / (sum_j n_cj + sum_i n_ic - n_cc) with n the confusion over the whole set.
  """
  hits = np.diagonal(counts)
  union = counts.sum(axis=0) + counts.sum(axis=1) - hits
  return np.divide(hits, union, out=np.full(len(counts), np.nan), where=union > 0)


def mean_iou(counts: np.ndarray) -> float:
  """Mean of `iou` over the classes that occur in the truth or in a prediction; NaN if none does."""
  values = iou(counts)
  return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")


def pixel_accuracy(counts: np.ndarray) -> float:
  """Share of the pixels, not ignored, that have their true class; NaN if there are none."""
  pixels = int(counts.sum())
  return float(np.trace(counts) / pixels) if pixels else float("nan")


def checked_patches(patches: Any, images: np.ndarray) -> np.ndarray:
  """An encoder's patches as f32 [b, h, w, E]; a one-line ValueError where they are no use."""
  patches = np.asarray(patches)
  if patches.ndim != 4 or len(patches) != len(images) or not patches[:1].size:
    raise ValueError(
      f"encode_patches returned {list(patches.shape)} for {len(images)} images: [b, h, w, E] is "
      "needed."
    )
  return retrieval.check_embeddings(patches, name="encode_patches")


def decode_mask(data: bytes, name: str) -> np.ndarray:
  """A PNG, grey or with a palette, as u8 [H, W]; a one-line ValueError where it is none."""
  try:
    with Image.open(io.BytesIO(data)) as image:
      mode, mask = image.mode, np.asarray(image)
  except Exception as error:  # PIL raises a dozen kinds, SyntaxError and struct.error among them
    raise ValueError(f"mask {name} cannot be read: {error}. Get the file again.") from None
  if mode not in ("L", "P"):
    raise ValueError(
      f"mask {name} is a picture of mode {mode}: a PNG with a byte a pixel is needed."
    )
  return mask


def _check_labels(mask: np.ndarray, classes: int, key: str) -> np.ndarray:
  """The mask; a one-line ValueError where its labels go beyond the classes."""
  worst = int(np.where(mask == IGNORED, 0, mask).max())
  if worst > classes:
    raise ValueError(
      f"mask of {key!r} has the label {worst}, but there are {classes} classes. "
      "Give the names this split was built with."
    )
  return mask


def _centred(features: np.ndarray) -> np.ndarray:
  features = np.asarray(features, np.float64)
  return features - features.mean(axis=0)


def _upsampled(
  values: np.ndarray, size: tuple[int, int], step: int
) -> Iterator[tuple[int, np.ndarray]]:
  """(first row, [C, rows, W]) of the upsampled values, `step` rows at a time."""
  planes = np.ascontiguousarray(np.asarray(values, np.float32).transpose(2, 0, 1))
  wide = planes @ _weights(planes.shape[2], size[1]).T  # [C, h, W]
  down = _weights(planes.shape[1], size[0])
  for start in range(0, size[0], step):
    yield start, down[start : start + step] @ wide


def _weights(cells: int, pixels: int) -> np.ndarray:
  """How much each cell counts at each pixel of a line, f32 [pixels, cells]."""
  place = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
  distance = np.abs(place[:, None] - np.arange(cells)[None])
  return np.maximum(1 - distance, 0).astype(np.float32)
