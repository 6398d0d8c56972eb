"""Open-vocabulary detectors of `transformers`, from a folder: the score of each box for each text.

What a detector says is read from its logits: the post-processing of `transformers` keeps only the
best text of a box, so that a description whose box suits another one better would have none.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors
from PIL import Image

# `model_type` of config.json -> name of the class here, of the model, of the image processor.
KINDS = {
  "owlv2": ("Owlv2", "Owlv2ForObjectDetection", "Owlv2ImageProcessorPil"),
  "grounding-dino": (
    "GroundingDino",
    "GroundingDinoForObjectDetection",
    "GroundingDinoImageProcessorPil",
  ),
  "mm-grounding-dino": (  # LLMDet too
    "GroundingDino",
    "MMGroundingDinoForObjectDetection",
    "GroundingDinoImageProcessorPil",
  ),
}
AGGREGATES = ("mean", "max")
_INSTALL = "pip install -r requirements-annotate.txt"
_FILES = ("config.json", "preprocessor_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_NARROWEST = 16  # the longer side of an image over its shorter, beyond which it is padded
_LEAST = 4  # pixels of a side: of fewer, `transformers` may take it for the color channels
_ENOUGH = 2  # times the processor's own longer side: an image beyond it is made smaller first
_FILL = (124, 116, 104)  # of what is padded: the mean of ImageNet
_MOST_TEXTS = 64  # of an image at a time, where the detector has no limit of its own
_THREADS = 4  # that prepare images


class Found(NamedTuple):
  """What a detector says of an image."""

  boxes: np.ndarray  # f64 [N, 4], (ymin, xmin, ymax, xmax), fractions of the image, not clipped
  scores: np.ndarray  # f32 [K, N], of each of the K texts for each box, in [0, 1]


class Framed(NamedTuple):
  """An image as a processor can take it."""

  image: Image.Image
  width: int  # of what is of the image itself, at the left and the top; the rest is padding
  height: int


def kind_of(folder: pathlib.Path) -> str:
  """The kind of the detector in a folder, one of `KINDS`.

  Raises:
    ValueError: there is none, or a file of it is missing; one line.
  """
  missing = [name for name in _FILES if not (folder / name).is_file()]
  if not any((folder / name).is_file() for name in _WEIGHTS):
    missing.append(_WEIGHTS[0])
  if missing:
    raise ValueError(
      f"--model={folder} lacks {' and '.join(missing)}. Give the folder of a detector as "
      "`hf download MODEL --local-dir FOLDER` writes it, with weights in safetensors."
    )
  try:
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
  except (ValueError, KeyError, TypeError):
    kind = None
  if kind not in KINDS:
    raise ValueError(
      f"--model={folder}: config.json says model_type {kind!r}, which is no detector that is known "
      f"here. Give one of {', '.join(KINDS)}."
    )
  return kind


def require() -> Any:
  """The libraries (torch, transformers); one line where they are missing."""
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ValueError(f"annotate ground needs {error.name}: {_INSTALL}.") from error
  return torch, transformers


def load(
  folder: pathlib.Path,
  *,
  device: str = "auto",
  dtype: str = "float32",
  aggregate: str = "mean",
  texts_per_prompt: int = 0,
) -> Detector:
  """The detector in a folder, ready.

  Args:
    folder: as `save_pretrained` writes it, with its tokenizer and processor.
    device: auto, cpu or cuda.
    dtype: of its computations: float32, bfloat16 or float16; its weights are float32.
    aggregate: how scores of the tokens of a text become one, of `AGGREGATES`.
    texts_per_prompt: most texts that are asked for together; 0: as many as fit.

  Raises:
    ValueError: a library, a file or the device is missing; one line.
  """
  torch, transformers = require()
  own, model_class, processor_class = KINDS[kind_of(folder)]
  if device == "auto":
    device = "cuda" if torch.cuda.is_available() else "cpu"
  if device == "cuda" and not torch.cuda.is_available():
    raise ValueError(
      "--device=cuda: PyTorch sees no GPU here. Use --device=cpu, or install CUDA's."
    )
  transformers.utils.logging.disable_progress_bar()
  local = {"local_files_only": True, "trust_remote_code": False}
  try:
    model, loaded = getattr(transformers, model_class).from_pretrained(
      folder, local_files_only=True, use_safetensors=True, dtype=torch.float32,
      output_loading_info=True,
    )  # fmt: skip
    processor = getattr(transformers, processor_class).from_pretrained(folder, **local)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
  except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"--model={folder} cannot be loaded: {reason}. Fetch it again.") from error
  if lacking := sorted(loaded["missing_keys"] & {name for name, _ in model.named_parameters()}):
    raise ValueError(
      f"--model={folder}: its weights lack {len(lacking)} arrays of {model_class}, {lacking[0]} "
      "first. Fetch it again."
    )
  if getattr(processor, "do_center_crop", None):
    raise ValueError(
      f"--model={folder}: preprocessor_config.json has do_center_crop, which hides a part of each "
      "image. Set it to false."
    )
  model = model.to(device).eval()
  made = Owlv2 if own == "Owlv2" else GroundingDino
  return made(
    model, processor, tokenizer, device=device, dtype=dtype, aggregate=aggregate,
    texts_per_prompt=texts_per_prompt,
  )  # fmt: skip


def frame(image: Image.Image, longest: int, narrowest: float) -> Framed:
  """An image no larger than is of use, and no narrower than a processor can take.

  It is scaled, then padded at the right or the bottom.
  """
  if max(image.size) > longest:
    factor = longest / max(image.size)
    size = [max(1, round(side * factor)) for side in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
  width, height = image.size
  least = max(_LEAST, math.ceil(max(width, height) / narrowest))
  if min(width, height) < least:
    padded = Image.new("RGB", (max(width, least), max(height, least)), _FILL)
    padded.paste(image, (0, 0))
    image = padded
  return Framed(image, width, height)


class Detector:
  """Scores of boxes for texts, of several images at a time."""

  def __init__(self, model, processor, tokenizer, *, device, dtype, aggregate, texts_per_prompt):
    """See `load`."""
    self.model, self.processor, self.tokenizer = model, processor, tokenizer
    self._device, self._dtype = device, dtype
    self._aggregate, self._together = aggregate, texts_per_prompt

  def fit(self, text: str) -> tuple[str, bool]:
    """(what of a text the detector can read, '' if nothing; whether words were cut off)."""
    words = self._clean(text).split()
    low, high = 0, len(words)
    if words and self._length(" ".join(words)) <= self._longest_text():
      low = high
    while low < high:  # as many words as fit
      middle = (low + high + 1) // 2
      if self._length(" ".join(words[:middle])) <= self._longest_text():
        low = middle
      else:
        high = middle - 1
    fitted = " ".join(words[:low])
    return (fitted if self._length(fitted) else ""), low < len(words)

  def chunks(self, texts: Sequence[str]) -> list[list[int]]:
    """Indices of texts that are asked for together."""
    found: list[list[int]] = []
    room = 0
    for i, text in enumerate(texts):
      cost = self._cost(text)
      full = self._together and found and len(found[-1]) == self._together
      if not found or full or cost > room:
        found.append([])
        room = self._room()
      found[-1].append(i)
      room -= cost
    return found

  def detect(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[Found]:
    """Boxes of each image, and their scores for its own texts, as `fit` and `chunks` give them."""
    raise NotImplementedError

  def is_out_of_memory(self, error: BaseException) -> bool:
    torch, _ = require()
    return isinstance(error, torch.cuda.OutOfMemoryError)

  def _clean(self, text: str) -> str:
    raise NotImplementedError

  def _length(self, text: str) -> int:
    """Tokens of a text that `_longest_text` counts."""
    raise NotImplementedError

  def _longest_text(self) -> int:
    raise NotImplementedError

  def _cost(self, text: str) -> int:
    raise NotImplementedError

  def _room(self) -> int:
    """Costs of texts that can be asked for together."""
    raise NotImplementedError

  def _run(self, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(logits [B, N, texts or tokens] f32, boxes cxcywh [B, N, 4] f64) of a batch."""
    torch, _ = require()
    inputs = {name: value.to(self._device) for name, value in inputs.items()}
    cast: Any = contextlib.nullcontext()
    if self._dtype != "float32":
      cast = torch.autocast(self._device, dtype=getattr(torch, self._dtype))
    with torch.inference_mode(), cast:
      outputs = self.model(**inputs)
    return outputs.logits.float().cpu().numpy(), outputs.pred_boxes.double().cpu().numpy()


class Owlv2(Detector):
  """OWLv2: an image is padded to a square at the right and the bottom; each text stands alone."""

  def detect(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[Found]:
    torch, _ = require()
    size = self.processor.size
    # Padded to a square by the processor: none is too narrow, but it must not be too long.
    longest = _ENOUGH * max(size["height"], size["width"])
    framed = [frame(image, longest, float("inf")) for image in images]
    most = max(map(len, texts))

    def prepare(image: Image.Image) -> Any:
      return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      pixels = list(pool.map(prepare, [one.image for one in framed]))
    flat = [text for own in texts for text in [*own, *[""] * (most - len(own))]]
    tokens = self.tokenizer(
      flat, padding="max_length", max_length=self._longest_text(), truncation=True,
      return_tensors="pt",
    )  # fmt: skip
    logits, boxes = self._run(
      {
        "pixel_values": torch.stack(pixels),
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
      }
    )
    found = []
    for i, (one, own) in enumerate(zip(framed, texts, strict=True)):
      sides = one.image.size
      if getattr(self.processor, "do_pad", True):
        sides = (max(sides), max(sides))
      scores = _sigmoid(logits[i, :, : len(own)].T)
      found.append(Found(_corners(boxes[i], sides, one), scores))
    return found

  def _clean(self, text: str) -> str:
    return re.sub(r"<\|(start|end)oftext\|>", " ", text, flags=re.IGNORECASE)  # else its end

  def _length(self, text: str) -> int:
    return len(self.tokenizer(text)["input_ids"]) if text else 0

  def _longest_text(self) -> int:
    return self.model.config.text_config.max_position_embeddings

  def _cost(self, text: str) -> int:
    return 1

  def _room(self) -> int:
    return _MOST_TEXTS


class GroundingDino(Detector):
  """Grounding DINO and its kin: all texts in one prompt, 'a dog. a brown sofa.', scores by token.

  Images of a batch are padded to one size; boxes are fractions of what is not padding.
  """

  def detect(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[Found]:
    torch, _ = require()
    longest = _ENOUGH * max(side for side in dict(self.processor.size).values() if side)
    framed = [frame(image, longest, _NARROWEST) for image in images]
    prompts = [self.prompt(own) for own in texts]
    width = max(len(ids) for ids, _ in prompts)
    ids = torch.full((len(prompts), width), self.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, (own, _) in enumerate(prompts):
      ids[row, : len(own)] = torch.tensor(own)
      mask[row, : len(own)] = 1
    inputs = self.processor(images=[one.image for one in framed], return_tensors="pt")
    logits, boxes = self._run(
      {
        **{name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs},
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
      }
    )
    aggregate: Callable[..., np.ndarray] = np.mean if self._aggregate == "mean" else np.max
    found = []
    for i, (one, (_, spans)) in enumerate(zip(framed, prompts, strict=True)):
      tokens = _sigmoid(logits[i])  # [N, tokens]
      scores = np.stack([aggregate(tokens[:, start:stop], axis=1) for start, stop in spans])
      found.append(Found(_corners(boxes[i], one.image.size, one), scores))
    return found

  def prompt(self, texts: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
    """(token ids of the prompt, where the tokens of each text begin and end in it)."""
    ids, spans = [self.tokenizer.cls_token_id], []
    for text in texts:
      own = self._tokens(text)
      spans.append((len(ids), len(ids) + len(own)))
      ids += [*own, self._dot]
    return [*ids, self.tokenizer.sep_token_id], spans

  @property
  def _dot(self) -> int:
    return self.tokenizer.convert_tokens_to_ids(".")

  def _tokens(self, text: str) -> list[int]:
    return self.tokenizer(text, add_special_tokens=False)["input_ids"]

  def _clean(self, text: str) -> str:
    # A full stop or a question mark ends a text in a prompt, and so does what looks like a token.
    return re.sub(r"[.?]|\[(CLS|SEP|PAD|UNK|MASK)\]", " ", text, flags=re.IGNORECASE).lower()

  def _length(self, text: str) -> int:
    return len(self._tokens(text)) if text else 0

  def _longest_text(self) -> int:
    return self._room() - 1

  def _cost(self, text: str) -> int:
    return self._length(text) + 1

  def _room(self) -> int:
    config = self.model.config
    return min(config.max_text_len, config.text_config.max_position_embeddings) - 2


def _sigmoid(logits: np.ndarray) -> np.ndarray:
  """Of f32, -inf where a token is masked; NaN stays."""
  with np.errstate(over="ignore"):
    return 1 / (1 + np.exp(-logits.astype(np.float64))).astype(np.float32)


def _corners(boxes: np.ndarray, sides: tuple[int, int], one: Framed) -> np.ndarray:
  """Boxes cxcywh, fractions of (width, height) -> yxyx, fractions of the image itself."""
  center, half = boxes[:, :2], boxes[:, 2:] / 2
  scale = np.array(sides, np.float64) / (one.width, one.height)
  low, high = (center - half) * scale, (center + half) * scale
  return np.concatenate([low[:, ::-1], high[:, ::-1]], axis=1)
