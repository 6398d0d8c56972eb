"""A trained model in Python: `grain_jax.load(PATH)`, then texts and images to embeddings."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from PIL import Image

from grain_jax import encoders, failures, places, schema
from grain_jax import tokenizer as tokenizers
from grain_jax.convert import weights
from grain_jax.data import decoding, transforms
from grain_jax.evals import zero_shot
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.models import grain
from grain_jax.runtime import mesh as meshes

# An image: PIL, u8 [H, W, 3], or the path of a file.
ImageInput = Image.Image | np.ndarray | str | os.PathLike
_LARGEST_BATCH = 64  # images or rows of text in one call of the compiled encoder


class Regions(NamedTuple):
  """Where in an image each of N descriptions is."""

  boxes: np.ndarray  # f32 [N, 4], (ymin, xmin, ymax, xmax) as fractions of the image
  scores: np.ndarray  # f32 [N], cosine similarity of description and region


class Model:
  """A model and its tokenizer on one device. Takes any number of inputs, batches by itself.

  `config` is the configuration that it was trained with.
  """

  def __init__(self, config: ml_collections.ConfigDict, params: Any):
    self.config = config
    self.tokenizer = tokenizers.Tokenizer(context=config.model.text.context)
    self._mesh = meshes.create(self._with_batch_size(1), devices=jax.local_devices()[:1])
    self._model = grain.build(config)
    self._params = meshes.replicate(params, self._mesh)
    self._encoders: dict[int, Encoders] = {}

  def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
    """Token ids with start and end, zero-padded: i32 [N, context] (77 as published).

    Longer texts are cut to the context, the end token kept.
    """
    return self.tokenizer.tokenize(_texts(texts, "texts"))

  def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
    """N texts -> f32 [N, E], L2-normalised."""
    texts = _texts(texts, "texts")
    if not texts:
      return np.zeros((0, self.config.model.embed_dim), np.float32)
    with jax.set_mesh(self._mesh):
      return self._encoder(len(texts)).text(texts)

  def encode_image(self, images: ImageInput | Sequence[ImageInput]) -> np.ndarray:
    """N images (PIL, u8 [H, W, 3], paths; or u8 [N, H, W, 3]) -> f32 [N, E], L2-normalised."""
    pixels = self.preprocess(images)
    if not len(pixels):
      return np.zeros((0, self.config.model.embed_dim), np.float32)
    with jax.set_mesh(self._mesh):
      return self._encoder(len(pixels)).image(pixels)

  def encode_patches(self, images: ImageInput | Sequence[ImageInput]) -> np.ndarray:
    """N images, squashed -> their patches in the space of the texts, f32 [N, rows, columns, E]."""
    pixels = self._pixels(images, "squash")  # patches are of the whole image
    if not len(pixels):
      side = self.config.model.image.size // self.config.model.image.patch
      return np.zeros((0, side, side, self.config.model.embed_dim), np.float32)
    with jax.set_mesh(self._mesh):
      return self._encoder(len(pixels)).patches(pixels)

  def describe_regions(self, image: ImageInput, descriptions: str | Sequence[str]) -> Regions:
    """For each description the region query that means it most: (boxes [N, 4], scores [N]).

    Several descriptions may have the same region; a low score says that it is not to be seen.

    Raises:
      ValueError: the model has no region queries (method 'clip'), or there are several images.
    """
    if self.config.method == "clip":
      raise ValueError(
        "describe_regions: a model of method 'clip' has no region queries. Load a GRAIN model."
      )
    pixels = self._pixels(image, "squash")  # boxes are of the whole image
    if len(pixels) != 1:
      raise ValueError(f"describe_regions takes one image, not {len(pixels)}. Call it for each.")
    descriptions = _texts(descriptions, "descriptions")
    if not descriptions:
      return Regions(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    with jax.set_mesh(self._mesh):
      regions, boxes = self._encoder(1).regions(pixels)
    similarity = self.encode_text(descriptions) @ regions[0].T  # [N, Q]
    best = similarity.argmax(axis=1)
    return Regions(
      np.clip(schema.center_to_corners(boxes[0, best]), 0, 1).astype(np.float32),
      similarity.max(axis=1),
    )

  def classify(
    self,
    images: ImageInput | Sequence[ImageInput],
    classes: Sequence[str],
    descriptors: Mapping[str, Sequence[str]] | None = None,
  ) -> np.ndarray:
    """Probabilities of C classes, f32 [N, C]: softmax of the scaled cosine similarities.

    A class is the mean embedding of its prompts: `config.zero_shot.templates` and, if given, its
    descriptors (class -> list), as `grain_jax.evals.zero_shot` words them.
    """
    classes = _texts(classes, "classes")
    prompts = zero_shot.class_prompts(classes, self.config.zero_shot.templates, descriptors)
    heads = zero_shot.class_embeddings(self.encode_text, prompts)
    scale = float(np.exp(np.asarray(self._params["logit_scale"])))
    logits = scale * (self.encode_image(images) @ heads.T)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)

  def preprocess(self, images: ImageInput | Sequence[ImageInput]) -> np.ndarray:
    """Images as the model sees them: u8 [N, size, size, 3].

    By `config.data.eval_resize` and `config.model.image.interpolation`.

    Raises:
      ValueError: what is no image, or an array that is not u8 [..., H, W, 3].
    """
    return self._pixels(images, self.config.data.eval_resize)

  def _pixels(self, images: ImageInput | Sequence[ImageInput], how: str) -> np.ndarray:
    single = isinstance(images, (Image.Image, str, os.PathLike)) or (
      isinstance(images, np.ndarray) and images.ndim == 3
    )
    items = [images] if single else list(images)
    size = self.config.model.image.size
    most = self.config.data.max_pixels
    by = self.config.model.image.interpolation
    pixels = [
      transforms.resize(_to_pil(p, i, most), size, how, interpolation=by)
      for i, p in enumerate(items)
    ]
    return np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)

  def _with_batch_size(self, size: int) -> ml_collections.ConfigDict:
    """The configuration with `size` rows a call, on the one device."""
    config = ml_collections.ConfigDict(self.config.to_dict())
    config.eval_batch_size = config.batch_size = size
    config.mesh.update(data=1, fsdp=1, tensor=1, rules=())
    return config

  def _encoder(self, rows: int) -> Encoders:
    """Encoders for about so many rows: one compiled program for each power of two up to 64."""
    size = min(1 << (rows - 1).bit_length(), _LARGEST_BATCH)
    if size not in self._encoders:
      self._encoders[size] = encoders.make(
        self._with_batch_size(size),
        self._model,
        self._params,
        mesh=self._mesh,
        tokenizer=self.tokenizer,
      )
    return self._encoders[size]


def load(path: str | pathlib.Path, *, step: int | None = None) -> Model:
  """A model from a folder: workdir, imported checkpoint or export; see `weights.load`."""
  return Model(*weights.load(path, step=step))


def _texts(texts: str | Sequence[str], name: str) -> list[str]:
  found = [texts] if isinstance(texts, str) else list(texts)
  for i, text in enumerate(found):
    if not isinstance(text, str):
      raise ValueError(f"{name}[{i}] is a {type(text).__name__}, not a text.")
  return found


def _to_pil(image: Any, index: int, max_pixels: int = decoding.MAX_PIXELS) -> Image.Image:
  """As it is shown, RGB; one line about what cannot be read."""
  if isinstance(image, (str, os.PathLike)):
    places.check(image, f"images[{index}]")
    file = places.find_file(image)
    if not failures.retry_read(file.is_file, file):
      raise ValueError(f"images[{index}]: there is no file {file}.")
    try:
      data = failures.retry_read(file.read_bytes, file)
      return decoding.decode(data, max_pixels=max_pixels)
    except ValueError as error:
      raise ValueError(f"images[{index}], {file}: {error}") from error
  if isinstance(image, Image.Image):
    try:
      return decoding.decode(image, max_pixels=max_pixels)
    except ValueError as error:
      raise ValueError(f"images[{index}]: {error}") from error
  array = np.asarray(image)
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
    raise ValueError(
      f"images[{index}] is {array.dtype} {list(array.shape)}: give u8 [H, W, 3] with values of 0 "
      "to 255, a PIL image or a path."
    )
  return decoding.decode(array)
