"""Zero-shot classification on outside datasets by four protocols: `zero_shot:SET`.

`name`: the class name alone is the prompt. `templates`: the set's own prompts. `descriptors`: each
template with each descriptor of the class, "a photo of a hen, which has two legs". `regions`: what
the region queries see of the raw descriptors is mixed in (GRAIN, arXiv 2412.04429, sec. 4):

  score = alpha * image . class + (1 - alpha) * mean over queries of max over its descriptors of
  region . descriptor

with the class embedding of `descriptors`, which is the plain mean of its prompts' embeddings, as
published; those of `name` and `templates` are normalised again, as CLIP's are. Every image is
encoded once, for all protocols.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from grain_jax.evals import retrieval, zero_shot
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import labelled


@dataclasses.dataclass(frozen=True)
class Set:
  """A dataset known by name; `vocabularies/NAME.json` says where TFDS has it."""

  title: str
  get: str = ""  # how to get it where TFDS does not have it
  published: str = ""  # its name in published files of descriptors, where it is another one


SETS: dict[str, Set] = {
  "cifar10": Set("CIFAR-10"),
  "cifar100": Set("CIFAR-100"),
  "sun397": Set("SUN397", published="sun"),
  "stanford_cars": Set("Stanford Cars", published="cars"),
  "dtd": Set("DTD"),
  "oxford_pets": Set("Oxford Pets", published="pets"),
  "caltech101": Set("Caltech101", published="caltech"),
  "flowers102": Set("Flowers102", published="flowers"),
  "cub200": Set("CUB-200", published="cub"),
  "places365": Set("Places365"),
  "food101": Set("Food101"),
  "imagenet": Set("ImageNet"),
  "imagenet_v2": Set("ImageNet-V2", published="imagenet"),
  "eurosat": Set("EuroSAT"),
  "resisc45": Set("RESISC45"),
  "patch_camelyon": Set("PatchCamelyon"),
  "products2023": Set(
    "Products-2023",
    get="Make it a folder with one sub-folder of pictures a product, and a classes.json "
    "{sub-folder: name}.",
  ),
}
# The eleven sets of the GRAIN paper's average.
PAPER = tuple(SETS)[:11]
# Other results go by these names.
_TAKEN = ("average11", "descriptors", "paper", "seen", "unseen")
AVERAGE = "zero_shot/average11/"
PLAIN = "templates"  # the protocol of a set's names without one, whatever else is asked for
_SCORES_AT_ONCE = 1 << 24  # similarities of regions and descriptors: 64 MiB


def check(name: str, options: Options) -> None:
  """Raises a one-line ValueError where the set cannot be evaluated as asked.

  With `options.download` it downloads the set.
  """
  if not name or "/" in name:
    raise ValueError(f"zero_shot:{name} names no set. Known ones: {', '.join(SETS)}.")
  if name in _TAKEN:
    raise ValueError(f"zero_shot:{name}: results use this name already. Rename the folder.")
  if not options.protocols:
    raise ValueError(f"zero_shot:{name}: no protocol is asked for. Give one, such as 'templates'.")
  if "regions" in options.protocols:
    alphas = options.alphas
    distinct = {f"{alpha:g}" for alpha in alphas}
    if not alphas or not all(0 <= a <= 1 for a in alphas) or len(distinct) < len(alphas):
      raise ValueError(f"alphas = {alphas}: give different weights in [0, 1], such as 0.5.")
  if options.cache is not None and options.cache.exists() and not options.cache.is_dir():
    raise ValueError(f"cache = {str(options.cache)!r} is a file. Give a folder.")
  _prompts(name, _load(name, options), options, default=("{}",))


def contents(name: str, options: Options) -> tuple[Any, ...]:
  """What is read of a set, the items first: all processes must have the same."""
  data = _load(name, options)
  prompts = _prompts(name, data, options, default=("{}",))
  return data.items, data.labels, prompts.heads, prompts.phrases


def run(encoders: Encoders, name: str, options: Options) -> dict[str, float | int]:
  """Top-1, top-5 and the mean over classes of one set, by every protocol asked for.

  Args:
    encoders: of the model.
    name: of `SETS`, or of a folder below `options.root`.
    options: protocols, alphas and where things lie.

  Returns:
    `zero_shot/NAME/PROTOCOL/top1`, `.../top5` (left out where there are at most 5 classes) and
    `.../mean_per_class` (`zero_shot.mean_per_class`), fractions in [0, 1]; for regions
    `zero_shot/NAME/regions/alpha=A/...` for every A of `options.alphas`: choosing one by these
    images would be choosing by the answers. `zero_shot/NAME/top1` and so on are those of
    `templates`, and are left out where that is not asked for. `zero_shot/NAME/classes`,
    `zero_shot/NAME/examples` of `zero_shot/NAME/rows` images counted.

  Raises:
    ValueError: what `check` finds; no image can be read; a model without region queries.
  """
  if "regions" in options.protocols:
    encoders.require_regions(f"zero_shot:{name} by protocol 'regions'")
  check(name, options)
  data = _load(name, options)
  prompts = _prompts(name, data, options, default=encoders.templates)
  if prompts.note:
    options.warn(prompts.note)
  scorer = _Scorer.build(encoders, prompts, options)

  labels: list[int] = []

  def sources() -> Iterator[images_lib.Source]:
    for image, label in itertools.islice(data.read(), options.limit or None):
      labels.append(label)
      yield image

  unreadable = images_lib.Unreadable()
  counted: list[int] = []
  ranks: dict[str, list[np.ndarray]] = {}
  for batch in images_lib.batches(
    sources(),
    size=encoders.size,
    resize=encoders.resize,
    interpolation=encoders.interpolation,
    batch_size=encoders.batch_size,
    unreadable=unreadable,
    shard=encoders.shard,
    max_pixels=encoders.max_pixels,
  ):
    own = [labels[i] for i in batch.index]
    counted += own
    for head, scores in scorer.scores(batch.image):
      ranks.setdefault(head, []).append(zero_shot.label_ranks(scores, own))
  if not counted:
    raise ValueError(f"zero_shot:{name}: {unreadable.line(len(labels)) or 'there is no picture.'}")
  if unreadable:
    options.warn(f"zero_shot:{name}: {unreadable.line(len(labels))}")

  results: dict[str, float | int] = {}
  for head, parts in ranks.items():
    figures = _figures(np.concatenate(parts), counted, len(data.classes))
    results |= {f"zero_shot/{name}/{head}/{key}": value for key, value in figures.items()}
    if head == PLAIN:
      results |= {f"zero_shot/{name}/{key}": value for key, value in figures.items()}
  results[f"zero_shot/{name}/classes"] = len(data.classes)
  results[f"zero_shot/{name}/examples"] = len(counted)
  results[f"zero_shot/{name}/rows"] = len(labels)
  return results


def average(results: Mapping[str, float | int]) -> dict[str, float | int]:
  """`zero_shot/average11/...`: the mean over the sets of `PAPER` of each fraction that all have.

  With `zero_shot/average11/limit`, the smallest, where one of them is of a trial.
  """
  first = f"zero_shot/{PAPER[0]}/"
  tails = [key.removeprefix(first) for key in results if key.startswith(first)]
  averages: dict[str, float | int] = {}
  for tail in tails:
    values = [results.get(f"zero_shot/{name}/{tail}") for name in PAPER]
    if all(isinstance(value, float) for value in values):
      averages[f"{AVERAGE}{tail}"] = float(np.mean(values))
  limits = [results[key] for name in PAPER if (key := f"zero_shot/{name}/limit") in results]
  if averages and limits:
    averages[f"{AVERAGE}limit"] = min(limits)
  return averages


def region_scores(
  regions: np.ndarray, phrases: np.ndarray, counts: Sequence[int], *, block: int = _SCORES_AT_ONCE
) -> np.ndarray:
  """Mean over queries of the best similarity with a descriptor of each class.

  Args:
    regions: of b images, [b, Q, E], L2-normalised.
    phrases: descriptors, those of a class together, classes in order: [D, E], L2-normalised.
    counts: descriptors of each of C classes, at least one each; their sum is D.
    block: most similarities held at once, or Q * D if that is more.

  Returns:
    f32 [b, C].
  """
  b, queries, width = regions.shape
  starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
  step = max(1, block // (queries * len(phrases)))
  parts = []
  for start in range(0, b, step):
    part = regions[start : start + step]
    similarity = part.reshape(-1, width) @ phrases.T  # [images * Q, D]
    best = np.maximum.reduceat(similarity, starts, axis=1)  # [images * Q, C]
    parts.append(best.reshape(len(part), queries, -1).mean(axis=1))
  return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class _Prompts:
  """Texts of each class, by protocol."""

  heads: Mapping[str, list[list[str]]]  # protocol -> prompts of each class
  phrases: list[list[str]]  # raw descriptors of each class; [] if they are not asked for
  note: str  # of descriptors, where classes or keys went without


@dataclasses.dataclass(frozen=True)
class _Scorer:
  """Scores of all classes for a batch of images, by protocol."""

  encoders: Encoders
  protocols: Sequence[str]
  alphas: Sequence[float]
  heads: Mapping[str, np.ndarray]  # protocol -> class embeddings [C, E]
  twins: Mapping[str, np.ndarray]  # protocol -> the first class of the same texts, i64 [C]
  phrases: np.ndarray | None  # raw descriptors, [D, E]
  counts: Sequence[int]  # of them a class, [C]

  @classmethod
  def build(cls, encoders: Encoders, prompts: _Prompts, options: Options) -> _Scorer:
    """Encodes all texts."""
    fingerprint = "" if options.cache is None else encoders.fingerprint()

    def embed(texts: list[list[str]], *, renormalize: bool = True) -> np.ndarray:
      return zero_shot.cached_class_embeddings(
        encoders.text, texts, fingerprint=fingerprint, folder=options.cache,
        renormalize=renormalize, warn=options.warn,
      )  # fmt: skip

    each = [[phrase] for own in prompts.phrases for phrase in own]
    return cls(
      encoders=encoders,
      protocols=tuple(dict.fromkeys(options.protocols)),
      alphas=options.alphas,
      heads={
        head: embed(texts, renormalize=head != "descriptors")
        for head, texts in prompts.heads.items()
      },
      twins={head: _twins(texts) for head, texts in prompts.heads.items()},
      phrases=embed(each) if each else None,
      counts=[len(own) for own in prompts.phrases],
    )

  def scores(self, batch: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(head of the result's name, f32 [b, C]) for images u8 [b, size, size, 3]."""
    images = np.asarray(self.encoders.image(batch))
    retrieval.check_length(images, len(batch), name="encoders.image")
    images = retrieval.check_embeddings(images, name="encoders.image")
    whole = {head: images @ classes.T for head, classes in self.heads.items()}
    for protocol in self.protocols:
      if protocol != "regions":
        # Classes of equal texts tie exactly, whatever the product's rounding.
        yield protocol, whole[protocol][:, self.twins[protocol]]
    if self.phrases is None:
      return
    regions = np.asarray(self.encoders.regions(batch)[0])
    retrieval.check_length(regions, len(batch), name="encoders.regions")
    regions = retrieval.check_embeddings(regions, name="encoders.regions")
    local = region_scores(regions, self.phrases, self.counts)
    for alpha in self.alphas:
      mixed = alpha * whole["descriptors"] + (1 - alpha) * local
      yield f"regions/alpha={alpha:g}", mixed[:, self.twins["descriptors"]]


def _load(name: str, options: Options) -> labelled.Labelled:
  if name in SETS:
    how = SETS[name].get
  else:
    how = (
      f"Sets known by name: {', '.join(SETS)}; any other is a folder with one sub-folder of "
      "pictures a class."
    )
  return labelled.load(name, options, what=f"zero_shot:{name}", how=how)


def _prompts(
  name: str, data: labelled.Labelled, options: Options, *, default: Sequence[str]
) -> _Prompts:
  """The texts of all protocols, checked; `default` are templates where the set has none."""
  templates = data.templates or default
  heads: dict[str, list[list[str]]] = {}
  phrases: list[list[str]] = []
  note = ""
  for protocol in options.protocols:
    if protocol == "name":
      heads[protocol] = [[label] for label in data.classes]
    elif protocol == "templates":
      heads[protocol] = zero_shot.class_prompts(data.classes, templates)
  if {"descriptors", "regions"} & set(options.protocols):
    described = _descriptors(name, data, options)
    own = list(zip(data.classes, described.descriptors, strict=True))
    heads["descriptors"] = [
      zero_shot.class_prompts([label], templates, {label: found})[0] for label, found in own
    ]
    if "regions" in options.protocols:
      phrases = [found or [label] for label, found in own]
    note = described.note
  return _Prompts(heads, phrases, note)


def _descriptors(name: str, data: labelled.Labelled, options: Options) -> zero_shot.Described:
  """Descriptors of each class, found by its name in prompts or by its label, however spelled."""
  what = f"zero_shot:{name} by descriptors"
  if options.descriptors is None:
    raise ValueError(f"{what} needs DIR/{name}.json {{class: [...]}}: give --descriptors=DIR.")
  stems = dict.fromkeys([name, SETS[name].published or name] if name in SETS else [name])
  files = [f"{prefix}{stem}.json" for stem in stems for prefix in ("", "descriptors_")]
  found = [file for file in files if (options.descriptors / file).exists()]
  path = options.descriptors / (found or files)[0]
  held = zero_shot.read_descriptors(path)
  try:
    own = zero_shot.match_descriptors(held, data.classes, labels=data.labels)
  except ValueError as error:
    raise ValueError(f"{what}: {path}: {error}") from error
  return own._replace(note=f"{what}: {path}: {own.note}" if own.note else "")


def _twins(texts: Sequence[Sequence[str]]) -> np.ndarray:
  """For each class the first class of the same texts: i64 [C]."""
  first: dict[tuple[str, ...], int] = {}
  return np.asarray([first.setdefault(tuple(own), i) for i, own in enumerate(texts)])


def _figures(ranks: np.ndarray, labels: Sequence[int], classes: int) -> dict[str, float]:
  figures = {"top1": retrieval.recall_at_k(ranks, 1)}
  if classes > 5:
    figures["top5"] = retrieval.recall_at_k(ranks, 5)
  return figures | {"mean_per_class": zero_shot.mean_per_class(ranks, labels)}
