"""Image-text retrieval: recall at K both ways; and the ranking that every evaluation here shares.

An evaluation reads `batches`, an iterable of (batch, extras): `batch` as in `schema.BATCH`,
`extras` a dict of lists with one entry a row ("key", "captions", "label", "descriptions"). Rows
whose `example_mask` is false (padding, bad records) never count; every result says how many rows
counted (`.../examples`) out of how many (`.../rows`). Shares are fractions in [0, 1], as floats;
counts are ints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders

EncodeImage = Callable[[np.ndarray], Any]  # u8 [b, H, W, 3] -> f32 [b, E], L2-normalised
EncodeText = Callable[[list[str]], Any]  # N texts -> f32 [N, E], L2-normalised
Batches = Iterable[tuple[Mapping[str, Any], Mapping[str, Sequence[Any]]]]

_UNIT_TOLERANCE = 0.02  # of a row's length; bfloat16 towers stay well within


def evaluate(
  encode_image: EncodeImage,
  encode_text: EncodeText,
  batches: Batches,
  *,
  captions_per_image: int | None = 1,
  ks: Sequence[int] = (1, 5, 10),
  texts_per_call: int = 8192,
  block_elements: int = 1 << 22,
) -> dict[str, float | int]:
  """Recall at K of images from captions and of captions from images.

  Image to text: the share of images for which one of their own captions is among the K nearest of
  all captions. Text to image: the share of captions whose own image is among the K nearest of all
  images. With 5 captions an image this is the protocol of COCO 5k and Flickr30k 1k (Karpathy).

  Args:
    encode_image: images -> embeddings.
    encode_text: texts -> embeddings.
    batches: (batch, extras) with extras "captions" ([str] a row) and "key"; see the module.
    captions_per_image: the first so many captions of an image; None for all of them.
    ks: the K of recall at K.
    texts_per_call: most texts handed to `encode_text` at once.
    block_elements: most similarities held at once (see `first_hit_ranks`).

  Returns:
    `retrieval/image_to_text/r{k}`, `retrieval/text_to_image/r{k}`: fractions in [0, 1].
    `retrieval/pairs`: (image, caption) pairs; `retrieval/distinct_captions` of them differ in
    wording (equal captions tie, so only the first of them can be found at rank 0);
    `retrieval/images`: images ranked; `retrieval/examples` of `retrieval/rows` rows counted; the
    difference between images and examples had no caption.

  Raises:
    ValueError: no image with a caption, or embeddings that are not finite unit rows.
  """
  if captions_per_image is not None and captions_per_image < 1:
    raise ValueError(
      f"captions_per_image = {captions_per_image}: at least one is needed. Give 1, or None for all."
    )
  images: list[np.ndarray] = []
  captions: list[str] = []
  owners: list[int] = []  # image of each caption
  examples = rows = count = 0
  for batch, extras in batches:
    keep = counted_rows(batch, extras, ("captions",))
    rows += len(batch["example_mask"])
    examples += len(keep)
    own = [[c for c in extras["captions"][i] if c.strip()][:captions_per_image] for i in keep]
    captioned = [j for j, texts in enumerate(own) if texts]
    if not captioned:
      continue
    encoded = np.asarray(encode_image(batch["image"]))
    check_length(encoded, len(batch["image"]), name="encode_image")
    images.append(check_embeddings(encoded[keep[captioned]], name="encode_image"))
    for j in captioned:
      captions += own[j]
      owners += [count] * len(own[j])
      count += 1
  if not count:
    raise ValueError(
      f"retrieval: 0 of {rows} rows have a picture and a caption. Check the split and its records."
    )
  texts = encode_texts(encode_text, captions, texts_per_call=texts_per_call)
  recalls = recall_both_ways(
    np.concatenate(images), texts, np.asarray(owners), ks=ks, block_elements=block_elements
  )
  results: dict[str, float | int] = {f"retrieval/{name}": r for name, r in recalls.items()}
  results["retrieval/pairs"] = len(captions)
  results["retrieval/distinct_captions"] = len(set(captions))
  results["retrieval/images"] = count
  results["retrieval/examples"] = examples
  results["retrieval/rows"] = rows
  return results


def recall_both_ways(
  images: np.ndarray,
  texts: np.ndarray,
  owners: np.ndarray,
  *,
  ks: Sequence[int] = (1, 5, 10),
  block_elements: int = 1 << 22,
) -> dict[str, float]:
  """`image_to_text/r{k}` and `text_to_image/r{k}`; see `evaluate`.

  Args:
    images: embeddings, [N, E].
    texts: embeddings of the captions, [M, E].
    owners: image of each caption, i64 [M]; each image has one or more.
    ks: the K of recall at K.
    block_elements: most similarities held at once (see `first_hit_ranks`).
  """
  index = np.arange(len(images))
  ranks = {
    "image_to_text": first_hit_ranks(images, texts, index, owners, block_elements=block_elements),
    "text_to_image": first_hit_ranks(texts, images, owners, index, block_elements=block_elements),
  }
  return {f"{way}/r{k}": recall_at_k(found, k) for way, found in ranks.items() for k in ks}


def recall_at_k(ranks: np.ndarray, k: int) -> float:
  """Share of queries whose first hit stands among the K nearest: mean(rank < k), in [0, 1].

  Args:
    ranks: 0-based ranks of first hits, [N], N >= 1.
    k: how many of the nearest are looked at.
  """
  if k < 1 or not len(ranks):
    raise ValueError(f"recall_at_k over {len(ranks)} queries with k = {k}: both must be positive.")
  return float(np.mean(np.asarray(ranks) < k))


def first_hit_ranks(
  queries: np.ndarray,
  candidates: np.ndarray,
  query_groups: np.ndarray,
  candidate_groups: np.ndarray,
  *,
  block_elements: int = 1 << 22,
) -> np.ndarray:
  """Rank of the nearest candidate that belongs to each query's own group, from 0.

  Candidates are ordered by falling inner product; equal ones by rising index, as a stable sort
  orders them: rank = #{greater} + #{equal, earlier in the list}. So a tie is never a gift of the
  order of comparison: a model that gives the same embedding to everything finds one in M. Equal
  candidates are scored once: a matrix product rounds a column by where it stands.

  Similarities are computed for a block of queries at a time and never stored as a whole: at most
  max(block_elements, M) of them.

  Args:
    queries: [N, E].
    candidates: [M, E].
    query_groups: group id of each query, i64 [N] (an image's own index, a label, ...).
    candidate_groups: group id of each candidate, i64 [M].
    block_elements: most similarities held at once (4 bytes each).

  Returns:
    i64 [N] in [0, M).

  Raises:
    ValueError: a query without any candidate of its group.
  """
  queries, candidates = np.asarray(queries), np.asarray(candidates)
  query_groups, candidate_groups = np.asarray(query_groups), np.asarray(candidate_groups)
  orphans = np.flatnonzero(~np.isin(query_groups, candidate_groups))
  if len(orphans):
    raise ValueError(
      f"query {orphans[0]} is of group {query_groups[orphans[0]]}, which no candidate has "
      f"({len(orphans)} of {len(queries)} queries are like that). Give each query a candidate."
    )
  ranks = np.zeros(len(queries), np.int64)
  order = np.arange(len(candidates))
  distinct, of = distinct_rows(candidates)
  rows = candidates[distinct]
  block = max(1, block_elements // max(1, len(candidates)))
  for start in range(0, len(queries), block):
    part = slice(start, start + block)
    scores = queries[part] @ rows.T
    scores = scores if len(rows) == len(candidates) else scores[:, of]
    own = query_groups[part, None] == candidate_groups[None]
    best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    equal = scores == best
    first = np.argmax(equal & own, axis=1)[:, None]
    ranks[part] = np.sum((scores > best) | (equal & (order < first)), axis=1)
  return ranks


def distinct_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(index of the first of each distinct row, rising, i64 [D]; which of them each is, i64 [N]).

  Args:
    values: [N, E], floats.
  """
  found: dict[bytes, int] = {}
  # + 0: the two zeros are one number.
  of = np.asarray([found.setdefault(row.tobytes(), len(found)) for row in values + 0.0], np.int64)
  return np.unique(of, return_index=True)[1], of


def encode_texts(
  encode_text: EncodeText, texts: Sequence[str], *, texts_per_call: int = 8192
) -> np.ndarray:
  """Embeddings of `texts`, each distinct text encoded once, so equal texts are exactly equal.

  Args:
    encode_text: texts -> embeddings.
    texts: N texts, N >= 1.
    texts_per_call: most texts handed to `encode_text` at once.

  Returns:
    f32 [N, E], L2-normalised.
  """
  distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
  names = list(distinct)
  parts = []
  for start in range(0, len(names), texts_per_call):
    chunk = names[start : start + texts_per_call]
    encoded = np.asarray(encode_text(chunk))
    check_length(encoded, len(chunk), name="encode_text")
    parts.append(check_embeddings(encoded, name="encode_text"))
  return np.concatenate(parts)[[distinct[text] for text in texts]]


def encode_images(
  encoders: Encoders,
  sources: Iterable[images_lib.Source],
  *,
  what: str,
  warn: Callable[[str], None] = print,
) -> images_lib.Encoded:
  """`images.encode` by `encoders.image`, with its embeddings checked: values f32 [n, E]."""

  def encode_image(images: np.ndarray) -> np.ndarray:
    encoded = np.asarray(encoders.image(images))
    check_length(encoded, len(images), name="encode_image")
    return check_embeddings(encoded, name="encode_image")

  return images_lib.encode(encode_image, sources, encoders, what=what, warn=warn)


def counted_rows(
  batch: Mapping[str, Any], extras: Mapping[str, Sequence[Any]], needed: Sequence[str]
) -> np.ndarray:
  """Indices of the rows that count, i64 [n <= b]; raises where `extras` does not fit the batch."""
  rows = len(batch["example_mask"])
  for name in needed:
    if name not in extras:
      raise ValueError(f"extras has {sorted(extras)}, not {name!r}: this evaluation needs it.")
    if len(extras[name]) != rows:
      raise ValueError(
        f"extras[{name!r}] has {len(extras[name])} entries for {rows} rows. Give one a row."
      )
  return np.flatnonzero(np.asarray(batch["example_mask"]))


def check_length(values: np.ndarray, rows: int, *, name: str) -> None:
  """Raises a one-line ValueError unless an encoder gave back one entry a row."""
  if values.ndim < 2 or len(values) != rows:
    raise ValueError(
      f"{name} returned shape {list(values.shape)} for {rows} rows. Return one each."
    )


def check_embeddings(values: np.ndarray, *, name: str, unit: bool = True) -> np.ndarray:
  """`values` as f32 [..., E]; raises a one-line ValueError unless all rows are finite unit rows.

  A NaN compares false with everything, so it would count as the best of all ranks. Without `unit`
  rows may be shorter, as means of unit rows are.
  """
  values = np.asarray(values, np.float32)
  lengths = np.linalg.norm(values, axis=-1)
  broken = int(np.sum(~np.isfinite(lengths)))
  if broken:
    raise ValueError(
      f"{name}: {broken} of {lengths.size} embeddings are not finite: the parameters have diverged "
      "or the encoder divides by zero. Evaluate an earlier checkpoint."
    )
  off = np.abs(lengths - 1) if unit else lengths - 1
  if lengths.size and np.max(off) > _UNIT_TOLERANCE:
    worst = lengths.flat[np.argmax(off)]
    raise ValueError(
      f"{name} returned an embedding of length {worst:.3g}. L2-normalise its output."
    )
  return values
