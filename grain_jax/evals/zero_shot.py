"""Zero-shot classification: each class is a mean of text embeddings, the nearest class wins.

With descriptors it is the protocol of the GRAIN paper (arXiv 2412.04429, sec. 4), after Menon and
Vondrick (ICLR 2023): "a photo of a hen, which has two legs".
"""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from grain_jax import places, textfiles
from grain_jax.evals import retrieval
from grain_jax.evals.inputs import names

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
    `zero_shot/mean_per_class`: mean of the classes' own top-1, over classes that have an image;
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
    head: class_embeddings(
      encode_text, prompts, renormalize=not head, texts_per_call=texts_per_call
    )
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
    results[f"zero_shot/{head}mean_per_class"] = mean_per_class(found, labels)
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
  renormalize: bool = True,
  texts_per_call: int = 8192,
) -> np.ndarray:
  """One embedding a class: the mean of its prompts' normalised embeddings.

  A text that several classes share is encoded once; classes of equal prompts are exactly equal.

  Args:
    encode_text: texts -> embeddings, L2-normalised.
    prompts: the prompts of each of C classes, at least one each (`class_prompts`).
    renormalize: whether the mean is normalised again, as CLIP's is. GRAIN's, over descriptors, is
      not (arXiv 2412.04429, sec. 4): a class whose prompts disagree has a shorter one.
    texts_per_call: most texts handed to `encode_text` at once.

  Returns:
    f32 [C, E], of length 1, or at most 1 without `renormalize`.
  """
  owners: dict[str, list[int]] = {}  # text -> classes that have it, once for each time
  for i, own in enumerate(prompts):
    for text in own:
      owners.setdefault(text, []).append(i)
  texts = list(owners)
  sums: np.ndarray | None = None
  for start in range(0, len(texts), texts_per_call):
    chunk = texts[start : start + texts_per_call]
    encoded = retrieval.encode_texts(encode_text, chunk, texts_per_call=texts_per_call)
    if sums is None:
      sums = np.zeros((len(prompts), encoded.shape[-1]))
    times = [len(owners[text]) for text in chunk]
    np.add.at(sums, [i for text in chunk for i in owners[text]], np.repeat(encoded, times, axis=0))
  if sums is None:
    raise ValueError("prompts = []: there is no class to embed. Name the classes.")
  means = sums / np.asarray([len(own) for own in prompts])[:, None]
  if not renormalize:
    return means.astype(np.float32)
  lengths = np.linalg.norm(means, axis=-1, keepdims=True)
  return (means / np.maximum(lengths, 1e-12)).astype(np.float32)


def cached_class_embeddings(
  encode_text: retrieval.EncodeText,
  prompts: Sequence[Sequence[str]],
  *,
  fingerprint: str,
  folder: pathlib.Path | None,
  renormalize: bool = True,
  warn: Callable[[str], None] = print,
  texts_per_call: int = 8192,
) -> np.ndarray:
  """`class_embeddings`, kept in a file named by its content: encoder, prompts and `renormalize`.

  Args:
    encode_text: texts -> embeddings, L2-normalised.
    prompts: the prompts of each of C classes.
    fingerprint: of the encoder (`Encoders.fingerprint`); nothing is kept if it is ''.
    folder: where the file lies; nothing is kept if it is None.
    renormalize: see `class_embeddings`.
    warn: gets one line where a file was there and could not be used.
    texts_per_call: most texts handed to `encode_text` at once.

  Returns:
    f32 [C, E], see `class_embeddings`.
  """

  def compute() -> np.ndarray:
    return class_embeddings(
      encode_text, prompts, renormalize=renormalize, texts_per_call=texts_per_call
    )

  if folder is None or not fingerprint:
    return compute()
  form = "unit mean" if renormalize else "mean"
  content = json.dumps([fingerprint, form, *map(list, prompts)]).encode()
  path = folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.npy"
  if path.exists():
    try:
      kept = np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
      if kept.ndim == 2 and len(kept) == len(prompts):
        return retrieval.check_embeddings(kept, name=str(path), unit=renormalize)
      reason = f"it holds {list(kept.shape)} for {len(prompts)} classes"
    except (ValueError, EOFError) as error:
      reason = str(error).splitlines()[0]
    warn(f"{path} is no use and is made anew: {reason}")
  embeddings = compute()
  folder.mkdir(parents=True, exist_ok=True)
  file = io.BytesIO()
  np.lib.format.write_array(file, embeddings, allow_pickle=False)
  places.write_bytes(path, file.getvalue())
  return embeddings


def label_ranks(scores: np.ndarray, labels: Sequence[int] | np.ndarray) -> np.ndarray:
  """Rank of each image's own class among all, from 0: i64 [N].

  Ties go to the class of lower index: rank = #{greater} + #{equal, of lower index}.

  Args:
    scores: of every class, [N, C], finite.
    labels: index of the own class, [N].
  """
  own = np.asarray(labels)[:, None]
  score = np.take_along_axis(scores, own, axis=1)
  lower = np.arange(scores.shape[1]) < own
  return np.sum((scores > score) | ((scores == score) & lower), axis=1)


def mean_per_class(ranks: np.ndarray, labels: Sequence[int] | np.ndarray) -> float:
  """Top-1 of each class, averaged over the classes that have an image: in [0, 1].

  It is scikit-learn's balanced accuracy.

  Args:
    ranks: rank of each image's own class, from 0, [N], N >= 1.
    labels: index of the own class, [N].
  """
  _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
  hits = np.bincount(index, weights=np.asarray(ranks) == 0)
  return float(np.mean(hits / counts))


def class_prompts(
  classes: Sequence[str],
  templates: Sequence[str],
  descriptors: Mapping[str, Sequence[str]] | None = None,
) -> list[list[str]]:
  """The prompts of each class: every template, with every descriptor of the class if there are any.

  "a photo of a {}." becomes "a photo of a hen." or, with a descriptor, "a photo of a hen, which
  has two legs", as does "a photo of a {},", which is how the published templates are written.
  Descriptors are found by `match_descriptors`.

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
  alone = [[template.replace("{}", name) for template in templates] for name in classes]
  if descriptors is None:
    return alone
  found = match_descriptors(descriptors, classes).descriptors
  return [
    [
      f"{template.replace('{}', name).rstrip(' .,')}, {descriptor_clause(descriptor)}"
      for template in templates
      for descriptor in own
    ]
    or plain
    for name, own, plain in zip(classes, found, alone, strict=True)
  ]


def descriptor_clause(descriptor: str) -> str:
  """A descriptor as a relative clause: "two legs" -> "which has two legs".

  "which is" before a, an and used; "which" before has, often, typically, may and can; else "which
  has". The first whole word decides: "antlers" starts with no article. (The published code asks
  whether the text starts with the letter a: "which is antlers".)
  """
  descriptor = descriptor.strip()
  first = descriptor.split(maxsplit=1)[0].lower() if descriptor else ""
  if first in _IS:
    return f"which is {descriptor}"
  return f"which {descriptor}" if first in _AS_IT_IS else f"which has {descriptor}"


class Described(NamedTuple):
  """Descriptors held against classes."""

  descriptors: list[list[str]]  # of each class; []: the class name alone
  note: str  # what of classes and keys went without; empty where nothing did


def match_descriptors(
  held: Mapping[str, Sequence[str]],
  classes: Sequence[str],
  *,
  labels: Sequence[str] | None = None,
) -> Described:
  """The descriptors of each class: those under its name, however spelled (`names.find_keys`).

  Args:
    held: {class: [descriptor, ...]}; an empty list is the class name alone, as in the files that
      Menon and Vondrick published. Keys may be of further classes: they are counted in the note.
    classes: names of the classes.
    labels: other names of the same classes, less good ones.

  Raises:
    ValueError: a class without a key, something else than a list of texts; one line.
  """
  named = list(zip(classes, labels or classes, strict=True))
  keys = names.find_keys(list(held), named)
  missing = [name for name, key in zip(classes, keys, strict=True) if key is None]
  unused = sorted(set(held) - set(keys))
  if missing:
    also = f" (no class for {len(unused)} keys: {_some(unused)})" if unused else ""
    raise ValueError(
      f"descriptors lack {len(missing)} of {len(classes)} classes: {_some(missing)}{also}. "
      "Add them ([] for the class name alone), or use class names as the descriptors spell them."
    )
  for key in dict.fromkeys(keys):
    own = held[key]
    listed = isinstance(own, Sequence) and not isinstance(own, str)
    if not listed or not all(isinstance(d, str) and d.strip() for d in own):
      raise ValueError(f"descriptors[{key!r}] = {own!r}: a list of non-empty strings is needed.")
  found = [list(held[key]) for key in keys]
  alone = [name for name, own in zip(classes, found, strict=True) if not own]
  parts = []
  if alone:
    parts.append(f"{len(alone)} of {len(classes)} classes by name alone (no text): {_some(alone)}")
  if unused:
    parts.append(f"{len(unused)} of {len(held)} keys are no class: {_some(unused)}")
  return Described(found, "; ".join(parts))


def load_descriptors(
  path: str | pathlib.Path,
  classes: Sequence[str],
  *,
  warn: Callable[[str], None] = lambda line: None,
) -> dict[str, list[str]]:
  """Reads a JSON file {class: [descriptor, ...]} and holds it against the class names.

  `warn` gets one line where classes have no text or keys are no class; see `match_descriptors`.
  """
  found = match_descriptors(read_descriptors(path), classes)
  if found.note:
    warn(f"descriptors = {str(path)!r}: {found.note}")
  return dict(zip(classes, found.descriptors, strict=True))


def read_descriptors(path: str | pathlib.Path) -> dict[str, list[str]]:
  """A JSON file {class: [descriptor, ...]}, whatever its classes; a one-line ValueError if none."""
  places.check(path, "descriptors")
  path = pathlib.Path(path)
  descriptors = textfiles.read_json(path, name=f"descriptors = {str(path)!r}")
  if not isinstance(descriptors, dict):
    raise ValueError(
      f"descriptors = {str(path)!r} holds a {type(descriptors).__name__}, not an object. "
      "Give {class: [descriptor]}."
    )
  return descriptors


def _some(shown: Sequence[str]) -> str:
  return ", ".join(map(repr, shown[:10])) + (", ..." if len(shown) > 10 else "")


def _check_group(name: str, members: Sequence[int], classes: Sequence[str]) -> np.ndarray:
  members = np.asarray(members, np.int64)
  if np.any((members < 0) | (members >= len(classes))):
    worst = members[np.flatnonzero((members < 0) | (members >= len(classes)))[0]]
    raise ValueError(
      f"groups[{name!r}] holds class {worst}: there are {len(classes)} classes. Mend the group."
    )
  return members
