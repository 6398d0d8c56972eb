"""Image-text retrieval on outside datasets, short and long captions. DIR is --datasets.

| set | captions | images |
|---|---|---|
| coco | DIR/karpathy/dataset_coco.json, test (5,000) | DIR/coco/val2014 |
| flickr30k | DIR/karpathy/dataset_flickr30k.json, test (1,000) | DIR/flickr30k/images |
| urban1k | DIR/urban1k/caption/N.txt (Long-CLIP, ECCV 2024) | DIR/urban1k/image/N.jpg |
| docci | DIR/docci/docci_descriptions.jsonlines, test (5,000; ECCV 2024) | DIR/docci/images |
| any | DIR/NAME/captions.jsonl: {"image", "caption": text or "captions": [text]} | below DIR/NAME |

All captions of an image count, of COCO the first five (the protocol takes 25,000 of 25,010).
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grain_jax import textfiles, tokenizer
from grain_jax.evals import retrieval
from grain_jax.evals.inputs import annotations
from grain_jax.evals.inputs.annotations import Captioned
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options, find

_GET_URBAN1K = "Get Urban1k.zip from huggingface.co/datasets/BeichenZhang/Urban1k into DIR/urban1k."
_GET_DOCCI = (
  "Get docci_descriptions.jsonlines and images/ from google.github.io/docci into DIR/docci."
)


@dataclasses.dataclass(frozen=True)
class Set:
  """An outside dataset for retrieval."""

  read: Callable[[Options, str], list[Captioned]]  # options, name of the set -> all images
  how: str  # where the images come from
  captions_per_image: int | None = None  # the first so many; None: all


def check(name: str, options: Options) -> None:
  """Raises a one-line ValueError where the set cannot be evaluated."""
  chosen = _set(name)
  captioned = chosen.read(options, name)
  annotations.check_images((c.image for c in captioned), f"retrieval:{name}", chosen.how)


def contents(name: str, options: Options) -> tuple[Any, ...]:
  """What is read of a set, the items first: all processes must have the same."""
  return (_set(name).read(options, name)[: options.limit or None],)


def run(encoders: Encoders, name: str, options: Options) -> dict[str, float | int]:
  """Results of one set; see `evaluate`."""
  chosen = _set(name)
  captioned = chosen.read(options, name)
  return evaluate(
    encoders,
    captioned[: options.limit or None],
    name=name,
    captions_per_image=chosen.captions_per_image,
    warn=options.warn,
  )


def evaluate(
  encoders: Encoders,
  captioned: Sequence[Captioned],
  *,
  name: str,
  captions_per_image: int | None = 5,
  ks: Sequence[int] = (1, 5, 10),
  warn: Callable[[str], None] = print,
  block_elements: int = 1 << 22,
) -> dict[str, float | int]:
  """Recall at K both ways among the images that can be read, as `retrieval.evaluate` defines it.

  Args:
    encoders: of the model.
    captioned: images with one caption or more each.
    name: of the set, in the names of the results.
    captions_per_image: the first so many captions of an image; None for all of them.
    ks: the K of recall at K.
    warn: gets one line where images could not be read.
    block_elements: most similarities held at once.

  Returns:
    `retrieval/{name}/image_to_text/r{k}`, `.../text_to_image/r{k}`: fractions in [0, 1];
    `.../pairs`: captions, `.../distinct_captions` of them differ in wording, `.../truncated` are
    longer than the model's text context and were cut; `.../examples` of `.../rows` images
    counted.

  Raises:
    ValueError: no image that can be read, or embeddings that are not finite unit rows.
  """
  what = f"retrieval:{name}"
  if captions_per_image is not None and captions_per_image < 1:
    raise ValueError(f"{what}: captions_per_image = {captions_per_image}: give 1 or more, or None.")
  images = retrieval.encode_images(encoders, (c.image for c in captioned), what=what, warn=warn)
  own = [captioned[i].captions[:captions_per_image] for i in images.index]
  captions = [caption for group in own for caption in group]
  owners = np.repeat(np.arange(len(own)), [len(group) for group in own])
  recalls = retrieval.recall_both_ways(
    images.values,
    retrieval.encode_texts(encoders.text, captions),
    owners,
    ks=ks,
    block_elements=block_elements,
  )
  results: dict[str, float | int] = {f"retrieval/{name}/{k}": v for k, v in recalls.items()}
  results[f"retrieval/{name}/pairs"] = len(captions)
  results[f"retrieval/{name}/distinct_captions"] = len(set(captions))
  results[f"retrieval/{name}/truncated"] = truncated(captions, encoders.context, encoders.tokenizer)
  results[f"retrieval/{name}/examples"] = len(own)
  results[f"retrieval/{name}/rows"] = len(captioned)
  return results


def truncated(captions: Sequence[str], context: int, tokens: tokenizer.Tokenizer) -> int:
  """How many captions have more than `context` tokens, start and end included."""
  longer = tokens.with_context(context + 1)  # by one, so that what does not fit shows
  return sum(len(ids) > context for ids in longer.encode_batch(captions))


def _set(name: str) -> Set:
  return SETS.get(name) or Set(_json_lines, f"Put them where DIR/{name}/captions.jsonl says.")


def _karpathy(options: Options, name: str) -> list[Captioned]:
  return annotations.karpathy(options, name, f"retrieval:{name}")


def _urban1k(options: Options, name: str) -> list[Captioned]:
  folder = find(options, name, "caption", what=f"retrieval:{name}", how=_GET_URBAN1K)
  files = sorted(folder.glob("*.txt"), key=lambda path: (len(path.stem), path.stem))
  found = []
  for path in files:
    text = " ".join(textfiles.read_text(path).split())
    if not text:
      raise ValueError(f"{path} is empty: each picture needs a caption. Get it once more.")
    found.append(Captioned(folder.parent / "image" / f"{path.stem}.jpg", (text,)))
  if not found:
    raise ValueError(f"retrieval:{name}: {folder} holds no .txt file. {_GET_URBAN1K}")
  return found


def _docci(options: Options, name: str) -> list[Captioned]:
  what = f"retrieval:{name}"
  path = find(options, name, "docci_descriptions.jsonlines", what=what, how=_GET_DOCCI)
  found = [
    Captioned(
      path.parent / "images" / annotations.field(entry, "image_file", str, where),
      (annotations.field(entry, "description", str, where).strip(),),
    )
    for where, entry in annotations.read_json_lines(path)
    if annotations.field(entry, "split", str, where) == "test"
  ]
  if not found:
    raise ValueError(f"{what}: {path} has no line of split 'test'. Get it once more.")
  return found


def _json_lines(options: Options, name: str) -> list[Captioned]:
  """A user's own set; an image on several lines is one image with several captions."""
  if not name or name in (".", "..") or "/" in name or "\\" in name:
    raise ValueError(f"retrieval:{name}: the name of a set is the name of a folder below DIR.")
  known = ", ".join(SETS)
  how = f'Write lines {{"image": path, "caption": text}} into it, or choose from {known}.'
  path = find(options, name, "captions.jsonl", what=f"retrieval:{name}", how=how)
  captions: dict[str, tuple[str, ...]] = {}
  spelled: dict[str, str] = {}  # in NFC: see `places.find_file`
  for where, entry in annotations.read_json_lines(path):
    image = annotations.field(entry, "image", str, where)
    image = spelled.setdefault(unicodedata.normalize("NFC", image), image)
    key = "caption" if entry.get("captions") is None else "captions"
    captions[image] = captions.get(image, ()) + annotations.texts(entry, key, where)
  if not captions:
    raise ValueError(f"retrieval:{name}: {path} is empty. {how}")
  return [Captioned(path.parent / image, own) for image, own in captions.items()]


SETS: dict[str, Set] = {
  "coco": Set(_karpathy, annotations.GET_COCO, captions_per_image=5),
  "flickr30k": Set(_karpathy, annotations.GET_FLICKR30K, captions_per_image=5),
  "urban1k": Set(_urban1k, _GET_URBAN1K),
  "docci": Set(_docci, _GET_DOCCI),
}
