"""ground: a box for each description, by an open-vocabulary detector of `transformers`.

--model is a folder on this machine (`hf download MODEL --local-dir FOLDER`) of OWLv2 (the paper's:
google/owlv2-base-patch16-ensemble), Grounding DINO, MM-Grounding-DINO or LLMDet; config.json says
which. --annotated is what `describe` wrote. Each description gets the box with its best score,
above --threshold, whatever other descriptions want the same box. Boxes are of the image as it is
shown. The source's own regions stay, and come first; a description that is one of theirs is not
looked for.

A description longer than the detector reads (16 tokens in OWLv2) is asked for by its first words,
as many whole ones as fit, and counted as cut_to_text_limit; its region has all of it. A description
without a box stays among the descriptions and is counted as description_without_box. Of Grounding
DINO's scores by token, a description's is the mean over its tokens, as evaluations take it, or the
largest (--aggregate). raw/ holds the best score and box of every description, above the threshold
or not.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from grain_jax import schema
from grain_jax.annotate import detectors, stages
from grain_jax.data import decoding
from grain_jax.data.building import inputs
from grain_jax.data.sources import base

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
NEUTRAL = ("batch_size", "device")
FLAGS = (
  base.Flag("model", "folder of the detector", required=True),
  base.Flag("threshold", "score that a box must exceed", 0.3, float),
  base.Flag("top_k", "most boxes of a description", 1, int),
  base.Flag("box_nms", "IoU beyond which the lesser box of a description goes", 0.7, float),
  base.Flag(
    "aggregate", "how scores of a description's tokens become one (Grounding DINO)", "mean",
    choices=detectors.AGGREGATES,
  ),
  base.Flag("texts_per_prompt", "descriptions asked for together; 0: all that fit", 0, int),
  base.Flag("batch_size", "images at a time", 8, int),
  base.Flag("device", "where the detector runs; auto: a GPU where there is one", "auto",
            choices=DEVICES),
  base.Flag("dtype", "of the detector's computations", "float32", choices=DTYPES),
)  # fmt: skip
_LEAST_SIDE = 1e-6  # of a box, as a fraction of the image
_DIGITS = 7  # of numbers that are written: a detector computes with no more


class Box(NamedTuple):
  box: tuple[float, ...]  # (ymin, xmin, ymax, xmax), fractions, within the image
  score: float


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
  """The settings of flags, checked.

  Raises:
    ValueError: one of them cannot be; one line.
  """
  for name, least, most in (("threshold", 0, 1), ("box_nms", 0, 1)):
    if not least <= values[name] <= most:
      raise ValueError(f"--{name} = {values[name]}: not in [{least}, {most}]. Choose from it.")
  for name, least in (("top_k", 1), ("batch_size", 1), ("texts_per_prompt", 0)):
    if values[name] < least:
      raise ValueError(f"--{name} = {values[name]}: give {least} or more.")
  folder = base.existing(values["model"], "--model")
  kind = detectors.kind_of(folder)
  detectors.require()
  files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
  return {
    **{flag.name: values[flag.name] for flag in FLAGS},
    "model": str(folder),
    "kind": kind,
    "files": [inputs.stamp(file) for file in files],
  }


def check(settings: Mapping[str, Any], source: base.Source, *, say: Callable[[str], None]) -> None:
  """Raises ValueError where there is no description to look for; one line."""
  if source.annotated is None:
    raise ValueError(
      "annotate ground has no descriptions to look for. Give the folder that `annotate describe` "
      "wrote as --annotated=DIR."
    )
  say(f"ground: {settings['kind']} in {settings['model']}")


def make(settings: Mapping[str, Any]) -> Ground:
  return Ground(settings)


class Ground:
  """The stage; its detector is loaded when it is first asked."""

  def __init__(self, settings: Mapping[str, Any], detector: detectors.Detector | None = None):
    """`detector`: in place of the one that the settings name."""
    self._settings, self._detector = settings, detector
    self.batch_size = settings["batch_size"]
    self.num_gpus = 0.0 if settings["device"] == "cpu" else 1.0
    self._totals: collections.Counter[str] = collections.Counter()

  @property
  def detector(self) -> detectors.Detector:
    if self._detector is None:
      names = ("device", "dtype", "aggregate", "texts_per_prompt")
      folder = base.existing(self._settings["model"], "--model")
      self._detector = detectors.load(folder, **{name: self._settings[name] for name in names})
    return self._detector

  def totals(self) -> Mapping[str, float]:
    """descriptions asked for, those with a box, prompts (an image and what was asked of it)."""
    totals, self._totals = self._totals, collections.Counter()
    return totals

  def annotate(self, items: Sequence[stages.Item]) -> list[stages.Result]:
    """See `stages.Stage`."""
    asked = [_Asked(item, self.detector) for item in items]
    prompts = [
      (one, chunk) for one in asked for chunk in self.detector.chunks([q for _, q in one.queries])
    ]
    for start in range(0, len(prompts), self.batch_size):
      self._detect(prompts[start : start + self.batch_size])
    return [self._result(one) for one in asked]

  def _detect(self, prompts: Sequence[tuple[_Asked, list[int]]]) -> None:
    """Asks the detector, with fewer images at a time where its memory does not do."""
    try:
      found = self.detector.detect(
        [one.image for one, _ in prompts],
        [[one.queries[i][1] for i in chunk] for one, chunk in prompts],
      )
    except RuntimeError as error:
      if not self.detector.is_out_of_memory(error):
        raise
      if len(prompts) == 1:
        prompts[0][0].failed = "out_of_memory"
        return
      half = len(prompts) // 2
      self._detect(prompts[:half])
      self._detect(prompts[half:])
      return
    self._totals["prompts"] += len(prompts)
    for (one, chunk), (boxes, scores) in zip(prompts, found, strict=True):
      if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        one.failed = "not_finite"
        continue
      boxes, scores = usable(boxes, scores)
      for i, row in zip(chunk, scores, strict=True):
        one.found[i] = best_boxes(
          boxes, row, threshold=self._settings["threshold"], top_k=self._settings["top_k"],
          nms=self._settings["box_nms"],
        )  # fmt: skip
        one.best[i] = next(iter(best_boxes(boxes, row, threshold=-1, top_k=1, nms=1)), None)

  def _result(self, one: _Asked) -> stages.Result:
    if one.failed:
      return stages.Result(None, [*one.losses, ("pictures", one.failed)])
    regions = [_region(**region) for region in one.item.regions]
    losses, raw = list(one.losses), []
    for i, (description, query) in enumerate(one.queries):
      boxes = one.found.get(i, [])
      regions += [_region(description, box.box, box.score) for box in boxes]
      losses += [] if boxes else [("regions", "description_without_box")]
      self._totals["descriptions"] += 1
      self._totals["descriptions_with_box"] += bool(boxes)
      said: dict[str, Any] = {"description": description}
      if query != description:
        said["asked"] = query
      best = one.best.get(i)
      raw.append({**said, **({} if best is None else {"box": best.box, "score": best.score})})
    self._totals["descriptions_with_box_before"] += one.known
    return stages.Result({"regions": regions}, losses, [raw] if raw else [])


class _Asked:
  """What is asked of an image, and what was found."""

  def __init__(self, item: stages.Item, detector: detectors.Detector):
    self.item, self.failed = item, ""
    self.queries: list[tuple[str, str]] = []  # (description, what the detector reads of it)
    self.losses: list[tuple[str, str]] = []
    self.found: dict[int, list[Box]] = {}  # by index of `queries`
    self.best: dict[int, Box | None] = {}  # whatever its score
    self.known = 0  # descriptions that have a box already
    has_box = {r.get("of", r["description"]).casefold() for r in item.regions}
    met: set[str] = set()
    for description in item.descriptions:
      name = description.casefold()
      if name in has_box:
        self.known += 1
        continue
      query, cut = detector.fit(description)
      if name in met:
        self.losses.append(("descriptions", "duplicate"))
      elif not query:
        self.losses.append(("descriptions", "nothing_to_read"))
      else:
        self.queries.append((description, query))
        self.losses += [("descriptions", "cut_to_text_limit")] if cut else []
      met.add(name)
    if not item.descriptions:
      self.losses.append(("pictures", "without_descriptions"))
    self.image = Image.new("RGB", (1, 1))
    if self.queries:
      try:
        self.image = decoding.decode(item.image, max_pixels=schema.MOST_PIXELS)
      except ValueError:
        self.failed, self.queries = "corrupt_image", []


def usable(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Boxes [N, 4] clipped to the image and scores [K, N], without those beside the image."""
  boxes = np.clip(boxes, 0, 1)
  keep = ((boxes[:, 2:] - boxes[:, :2]) > _LEAST_SIDE).all(axis=1)
  return boxes[keep], scores[:, keep]


def best_boxes(
  boxes: np.ndarray, scores: np.ndarray, *, threshold: float, top_k: int, nms: float
) -> list[Box]:
  """The boxes of a description, best first.

  Args:
    boxes: [N, 4], (ymin, xmin, ymax, xmax).
    scores: [N], of the description for each box.
    threshold: a score must exceed it.
    top_k: most boxes.
    nms: IoU with a better box that is kept, beyond which a box is left out.
  """
  found: list[int] = []
  candidates = np.flatnonzero(scores > threshold)
  if top_k == 1:
    candidates = candidates[np.argmax(scores[candidates])][None] if len(candidates) else candidates
  else:
    candidates = candidates[np.argsort(-scores[candidates], kind="stable")]
  for i in candidates:
    if all(_iou(boxes[i], boxes[j]) <= nms for j in found):
      found.append(i)
    if len(found) == top_k:
      break
  return [Box(tuple(map(_rounded, boxes[i])), _rounded(scores[i])) for i in found]


def _rounded(number: float) -> float:
  return round(float(number), _DIGITS)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
  sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
  common = math.prod(sides)
  return float(common / (math.prod(a[2:] - a[:2]) + math.prod(b[2:] - b[:2]) - common))


def _region(description: str, box: Sequence[float], score: float, **more: Any) -> dict[str, Any]:
  """A region as JSON."""
  box = [float(x) for x in box]
  return {**more, "description": description, "box": box, "score": float(score)}
