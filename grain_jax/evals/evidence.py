"""What a result rests on: how many decisions it counts, and what guessing would give.

Read from the counts that stand beside it, so that it can be said of any results.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

FEW = 100  # a result over fewer images, or fewer decisions, is said to be over few
_Z = 1.959964  # of the normal distribution: 95 % lie within
_PAIR = 0.5  # chance where there are two to choose from

Results = Mapping[str, float | int]


class Evidence(NamedTuple):
  """What stands behind one result."""

  count: int | None  # decisions that it counts; None: not known
  unit: str  # what they are: "images", "boxes", ...
  images: int | None  # that they were made on
  chance: float | None  # what guessing would give, where that is known
  share: bool  # whether it is a plain share of those decisions


_NOTHING = Evidence(None, "", None, None, False)


def find(name: str, results: Results) -> Evidence:
  """What the result of this flat name rests on, by the counts in `results`."""
  parts = name.split("/")
  family, metric = parts[0], parts[-1]
  if len(parts) < 2 or metric == "chance" or family not in _FAMILIES:
    return _NOTHING
  outside = len(parts) > 2 and f"{family}/{parts[1]}/rows" in results
  base, row = ("/".join(parts[:2]), parts[2:-1]) if outside else (family, parts[1:-1])

  def count(*keys: str) -> int | None:
    """The first of these counts that the results have."""
    found = (results.get(f"{base}/{key}") for key in keys)
    return next((int(value) for value in found if value is not None), None)

  return _FAMILIES[family](row, metric, count, results.get(f"{base}/chance"))


def interval(share: float, count: int) -> tuple[float, float]:
  """Wilson's 95 % interval of a share of `count` independent decisions (Wilson, JASA 1927).

  (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)
  """
  if count < 1:
    raise ValueError(f"an interval over {count} decisions: at least one is needed.")
  z2 = _Z**2 / count
  half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
  middle = share + z2 / 2
  return max((middle - half) / (1 + z2), 0.0), min((middle + half) / (1 + z2), 1.0)


def interval_of(name: str, results: Results) -> tuple[float, float] | None:
  """The interval of a result that is a share of a known number of decisions; else None."""
  evidence, value = find(name, results), results[name]
  if not evidence.share or not evidence.count or not isinstance(value, float):
    return None
  return interval(value, evidence.count) if 0 <= value <= 1 else None


def few(name: str, results: Results) -> str:
  """ "only 12 images" where a result rests on fewer than `FEW`; else ''."""
  evidence = find(name, results)
  if not isinstance(results[name], float):
    return ""
  for number, unit in ((evidence.images, "images"), (evidence.count, evidence.unit)):
    if number is not None and number < FEW:
      return f"only {number} {unit.removesuffix('s') if number == 1 else unit}"
  return ""


def chance(name: str, results: Results) -> float | None:
  """What guessing would give, where the interval of the result reaches down to it; else None."""
  evidence, found = find(name, results), interval_of(name, results)
  if evidence.chance is None or found is None or found[0] > evidence.chance:
    return None
  return evidence.chance


def note(name: str, results: Results) -> str:
  """What must be said beside a result that rests on few decisions or on chance; else ''."""
  words = [few(name, results)] if few(name, results) else []
  guessed = chance(name, results)
  if guessed is not None:
    words.append(f"not above chance, {percent(guessed)} %")
  found = interval_of(name, results)
  if words and found is not None:
    words.append(f"95 % interval {100 * found[0]:.1f} to {100 * found[1]:.1f} %")
  return "; ".join(words)


def is_loss(name: str) -> bool:
  """Whether a result is a loss, which is no share, however small it is: 'validation/loss_box'."""
  return name.rpartition("/")[2].startswith("loss")


def percent(share: float) -> str:
  """Of a share, with as many digits as a small one needs: 0.5 -> "50", 0.00125 -> "0.125"."""
  return f"{100 * share:.3g}"


def _number(metric: str, head: str) -> int | None:
  """ "top5", "top" -> 5."""
  tail = metric.removeprefix(head)
  return int(tail) if metric.startswith(head) and tail.isdigit() else None


def _top(metric: str, classes: int | None) -> float | None:
  k = _number(metric, "top")
  return min(k / classes, 1.0) if k and classes else None


def _zero_shot(row, metric, count, _) -> Evidence:
  group = "/".join(part for part in row if part != "descriptors")
  # Outside sets have one count for all protocols; groups of built data each their own.
  images = count(f"{group}/examples") if group else count("examples")
  if images is None and group and row[0] in ("name", "templates", "regions"):
    images = count("examples")
  if images is None:  # an average over sets
    return _NOTHING
  share = _number(metric, "top") is not None
  return Evidence(images, "images", images, _top(metric, count("classes")), share)


def _retrieval(row, metric, count, _) -> Evidence:
  images, pairs, k = count("images", "examples"), count("pairs"), _number(metric, "r")
  if not images or not pairs or k is None or not row:
    return _NOTHING
  if row[-1] == "text_to_image":
    return Evidence(pairs, "captions", images, min(k / images, 1.0), True)
  missed, own = 1.0, pairs / images  # drawing k of all captions without one of the image's own
  for i in range(k):
    missed *= max(pairs - own - i, 0) / max(pairs - i, 1)
  return Evidence(images, "images", images, 1 - missed, True)


def _composition(row, metric, count, _) -> Evidence:
  images = count("images")
  own = count(f"{metric}/pairs", f"{metric}/examples")
  if own is not None:
    return Evidence(own, "pairs", images, _PAIR, True)
  everything = count("examples")
  if metric == "micro":
    return Evidence(everything, "pairs", images, _PAIR, True)
  false = count("perturbations")
  if metric.startswith("accuracy") and false:
    return Evidence(everything, "captions", images, 1 / (1 + false), True)
  return Evidence(everything, "pairs", images, None, False)


def _grounding(row, metric, count, _) -> Evidence:
  images = count("examples")
  if metric == "description_top1":
    names = count("descriptions")
    guess = 1 / names if names else None
    return Evidence(count("described_regions"), "regions", images, guess, True)
  if metric.startswith("box_recall@"):
    return Evidence(count("boxes"), "boxes", images, None, True)
  if "recall@" in metric:
    unit = "regions" if count("regions") is not None else "descriptions"
    return Evidence(count(unit), unit, images, None, True)
  return Evidence(None, "", images, None, False)


def _images(row, metric, count, _) -> Evidence:
  """A mean over images, pixels or objects: no share of decisions, but over so many images."""
  return Evidence(count("segments"), "segments", count("images", "examples"), None, False)


def _region_classification(row, metric, count, _) -> Evidence:
  boxes = count(*("/".join([*row[:1], "boxes"]), "boxes"))
  share = _number(metric, "top") is not None
  return Evidence(boxes, "boxes", count("examples"), _top(metric, count("classes")), share)


def _fine_grained(row, metric, count, guess) -> Evidence:
  boxes = count(*("/".join([*row[:1], "boxes"]), "boxes"))
  return Evidence(boxes, "boxes", count("examples"), guess, metric == "accuracy")


def _waterbirds(row, metric, count, _) -> Evidence:
  if metric == "accuracy":
    return Evidence(count("examples"), "images", count("examples"), _PAIR, True)
  own = count(f"{metric}/examples")
  if own is not None:
    return Evidence(own, "images", own, _PAIR, True)
  groups = [count(f"{bird}bird_on_{place}/examples") for bird, place in _GROUPS]
  least = min((n for n in groups if n), default=None)
  return Evidence(least, "images in the smallest group", None, None, False)


_GROUPS = (("land", "land"), ("land", "water"), ("water", "land"), ("water", "water"))


def _linear_probe(row, metric, count, _) -> Evidence:
  if metric not in ("top1", "mean_per_class"):
    return _NOTHING
  images = count("examples")
  return Evidence(images, "images", images, _top(metric, count("classes")), metric == "top1")


_FAMILIES = {
  "zero_shot": _zero_shot,
  "retrieval": _retrieval,
  "composition": _composition,
  "grounding": _grounding,
  "detection": _images,
  "region_classification": _region_classification,
  "fine_grained": _fine_grained,
  "segmentation": _images,
  "grouping": _images,
  "waterbirds": _waterbirds,
  "linear_probe": _linear_probe,
}
