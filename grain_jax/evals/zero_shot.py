"""Zero-shot classification: each class is a mean of text embeddings, the nearest class wins.

With descriptors it is the protocol of the GRAIN paper (arXiv 2412.04429, sec. 4), after Menon and
Vondrick (ICLR 2023): "a photo of a hen, which has two legs".
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from grain_jax.evals import retrieval

_IS = ("a", "an", "used")  # first words that "which is" goes before
_AS_IT_IS = ("has", "often", "typically", "may", "can")  # ... and plain "which"


def evaluate(
  encode_image: retrieval.EncodeImage,
  encode_text: retrieval.EncodeText,
  batches: retrieval.Batches,
  *,
  classes: Sequence[str],
  templates: Sequence[str],
  descriptors: Mapping[str, Sequence[str]] | None = None,
  groups: Mapping[str, Sequence[int]] | None = None,
  ks: Sequence[int] = (1, 5),
  texts_per_call: int = 8192,
) -> dict[str, float | int]:
  """Share of images whose own class is among the K nearest of all classes.

  Every class is a candidate for every image, whatever the group: "unseen" is the accuracy on
  images of unseen classes among seen and unseen ones. Ties go to the class of lower index.

  Args:
    encode_image: images -> embeddings.
    encode_text: texts -> embeddings.
    batches: (batch, extras) with extras "label" (index into `classes`) and "key"; see `retrieval`.
    classes: C class names.
    templates: prompts with one {} for the class name.
    descriptors: class name -> descriptors; if given, every figure comes a second time, under
      `zero_shot/descriptors/`, with the descriptors in the prompts.
    groups: name -> indices of classes whose images are also reported apart. They may overlap.
    ks: the K of top-K.
    texts_per_call: about how many texts are handed to `encode_text` at once.

  Returns:
    `zero_shot/top{k}` and `zero_shot/{group}/top{k}`: fractions in [0, 1];
    `zero_shot/classes`, `zero_shot/{group}/examples`, and `zero_shot/examples` of
    `zero_shot/rows` rows counted. A group without an image has the count 0 and no top-K.

  Raises:
    ValueError: no classes, a label outside them, a wrong template, classes without descriptors,
      no image that counts. Everything that can be seen without the batches comes first.
  """
  groups = {name: _check_group(name, members, classes) for name, members in (groups or {}).items()}
  clash = sorted({"descriptors", "examples", "rows", "classes"} & groups.keys())
  if clash:
    raise ValueError(f"groups has the name {clash[0]!r}: results use it already. Rename the group.")
  heads = {"": class_prompts(classes, templates)}
  if descriptors is not None:
    heads["descriptors/"] = class_prompts(classes, templates, descriptors)
  weights = {
    head: class_embeddings(encode_text, prompts, texts_per_call=texts_per_call)
    for head, prompts in heads.items()
  }

  labels: list[int] = []
  ranks: dict[str, list[np.ndarray]] = {head: [] for head in heads}
  rows = 0
  for batch, extras in batches:
    keep = retrieval.counted_rows(batch, extras, ("label",))
    rows += len(batch["example_mask"])
    if not len(keep):
      continue
    own = np.asarray([int(extras["label"][i]) for i in keep])
    outside = np.flatnonzero((own < 0) | (own >= len(classes)))
    if len(outside):
      row = keep[outside[0]]
      key = extras["key"][row] if "key" in extras else f"row {row}"
      raise ValueError(
        f"label = {own[outside[0]]} of {key!r}: the split has {len(classes)} classes, so labels "
        f"go from 0 to {len(classes) - 1}. Give the class names this split was built with."
      )
    encoded = np.asarray(encode_image(batch["image"]))
    retrieval.check_length(encoded, len(batch["image"]), name="encode_image")
    images = retrieval.check_embeddings(encoded[keep], name="encode_image")
    labels += own.tolist()
    for head, classifier in weights.items():
      found = retrieval.first_hit_ranks(images, classifier, own, np.arange(len(classes)))
      ranks[head].append(found)
  if not labels:
    raise ValueError(f"zero_shot: 0 of {rows} rows count. Check the split and its records.")

  results: dict[str, float | int] = {}
  for head, parts in ranks.items():
    found = np.concatenate(parts)
    for group, members in {"": np.arange(len(classes)), **groups}.items():
      of_group = found[np.isin(labels, members)]
      prefix = f"zero_shot/{head}{group}/" if group else f"zero_shot/{head}"
      if len(of_group):
        results |= {f"{prefix}top{k}": retrieval.recall_at_k(of_group, k) for k in ks}
  for group, members in groups.items():
    results[f"zero_shot/{group}/examples"] = int(np.isin(labels, members).sum())
  results["zero_shot/classes"] = len(classes)
  results["zero_shot/examples"] = len(labels)
  results["zero_shot/rows"] = rows
  return results


def class_embeddings(
  encode_text: retrieval.EncodeText,
  prompts: Sequence[Sequence[str]],
  *,
  texts_per_call: int = 8192,
) -> np.ndarray:
  """One embedding a class: the mean of its prompts' normalised embeddings, normalised again.

  Args:
    encode_text: texts -> embeddings, L2-normalised.
    prompts: the prompts of each of C classes, at least one each (`class_prompts`).
    texts_per_call: classes are encoded together until they have so many prompts.

  Returns:
    f32 [C, E], L2-normalised.
  """
  means: list[np.ndarray] = []
  waiting: list[Sequence[str]] = []
  for i, own in enumerate(prompts):
    waiting.append(own)
    if i + 1 < len(prompts) and sum(map(len, waiting)) < texts_per_call:
      continue
    texts = [text for group in waiting for text in group]
    encoded = retrieval.encode_texts(encode_text, texts, texts_per_call=texts_per_call)
    ends = np.cumsum([len(group) for group in waiting])
    means += [part.mean(axis=0) for part in np.split(encoded, ends[:-1])]
    waiting = []
  stacked = np.stack(means)
  return stacked / np.maximum(np.linalg.norm(stacked, axis=-1, keepdims=True), 1e-12)


def class_prompts(
  classes: Sequence[str],
  templates: Sequence[str],
  descriptors: Mapping[str, Sequence[str]] | None = None,
) -> list[list[str]]:
  """The prompts of each class: every template, with every descriptor of the class if there are any.

  "a photo of a {}." becomes "a photo of a hen." or, with a descriptor, "a photo of a hen, which
  has two legs".

  Raises:
    ValueError: no classes, no templates, a template without exactly one {}, or classes without
      descriptors, which are listed.
  """
  if not classes:
    raise ValueError("classes = []: zero-shot classification needs class names. Name them.")
  if isinstance(templates, str) or not templates:
    raise ValueError(f"templates = {templates!r}: a list of prompts is needed. Give at least one.")
  for template in templates:
    if template.count("{}") != 1:
      raise ValueError(
        f"templates holds {template!r}: the class name goes where {{}} stands. Write it once."
      )
  if descriptors is None:
    return [[template.replace("{}", name) for template in templates] for name in classes]
  check_descriptors(descriptors, classes)
  return [
    [
      f"{template.replace('{}', name).rstrip(' .')}, {descriptor_clause(descriptor)}"
      for template in templates
      for descriptor in descriptors[name]
    ]
    for name in classes
  ]


def descriptor_clause(descriptor: str) -> str:
  """A descriptor as a relative clause: "two legs" -> "which has two legs".

  "which is" before a, an and used; "which" before has, often, typically, may and can; else "which
  has". The first whole word decides: "antlers" starts with no article.
  """
  descriptor = descriptor.strip()
  first = descriptor.split(maxsplit=1)[0].lower() if descriptor else ""
  if first in _IS:
    return f"which is {descriptor}"
  return f"which {descriptor}" if first in _AS_IT_IS else f"which has {descriptor}"


def load_descriptors(path: str | pathlib.Path, classes: Sequence[str]) -> dict[str, list[str]]:
  """Reads a JSON file {class: [descriptor, ...]} and holds it against the class names."""
  path = pathlib.Path(path)
  try:
    descriptors = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise ValueError(
      f"descriptors = {str(path)!r}: {error.strerror}. Give a JSON file {{class: [descriptor]}}."
    ) from error
  except ValueError as error:
    raise ValueError(
      f"descriptors = {str(path)!r} is not JSON: {error}. Give {{class: [descriptor]}}."
    ) from error
  if not isinstance(descriptors, dict):
    raise ValueError(
      f"descriptors = {str(path)!r} holds a {type(descriptors).__name__}, not an object. "
      "Give {class: [descriptor]}."
    )
  check_descriptors(descriptors, classes)
  return {name: list(descriptors[name]) for name in classes}


def check_descriptors(descriptors: Mapping[str, Sequence[str]], classes: Sequence[str]) -> None:
  """Raises a one-line ValueError unless every class has a list of non-empty descriptors."""
  missing = [name for name in classes if not descriptors.get(name)]
  if missing:
    shown = ", ".join(map(repr, missing[:10])) + (", ..." if len(missing) > 10 else "")
    raise ValueError(
      f"descriptors lack {len(missing)} of {len(classes)} classes: {shown}. "
      "Add them, or use class names as the descriptors spell them."
    )
  for name in classes:
    own = descriptors[name]
    if isinstance(own, str) or not all(isinstance(d, str) and d.strip() for d in own):
      raise ValueError(f"descriptors[{name!r}] = {own!r}: a list of non-empty strings is needed.")


def _check_group(name: str, members: Sequence[int], classes: Sequence[str]) -> np.ndarray:
  members = np.asarray(members, np.int64)
  if np.any((members < 0) | (members >= len(classes))):
    worst = members[np.flatnonzero((members < 0) | (members >= len(classes)))[0]]
    raise ValueError(
      f"groups[{name!r}] holds class {worst}: there are {len(classes)} classes. Mend the group."
    )
  return members
