"""A trained model in Python: `grain_jax.load(PATH)`, then texts and images to embeddings."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from grain_jax import encoders, places, schema, tokenizing
from grain_jax.convert import towers, weights
from grain_jax.data import transforms
from grain_jax.evals import zero_shot
from grain_jax.evals.inputs import given_images
from grain_jax.evals.inputs.given_images import ImageInput
from grain_jax.models import grain
from grain_jax.runtime import compile_cache
from grain_jax.runtime import mesh as meshes

# Images, or rows of text, in one call of a compiled encoder; fewer are padded. On a processor an
# image of a B/16 alone takes no longer than each of 32, and waits for no padding.
_BATCH = {"cpu": 1}
_BATCH_OF_ACCELERATORS = 32


class Regions(NamedTuple):
  """Where in an image each of N descriptions is."""

  boxes: np.ndarray  # f32 [N, 4], (ymin, xmin, ymax, xmax) as fractions of the image
  scores: np.ndarray  # f32 [N], cosine similarity of description and region


class Model:
  """A model and its tokenizer on one device. Takes any number of inputs, batches by itself.

  An image is a PIL image, the path of a file, `bytes` of a file, an array u8 [H, W, 3], or a tensor
  of torch, u8 or floats of 0 to 1, [3, H, W] or [H, W, 3]. Several are a list of them, or an array
  or tensor with a leading N.

  Each encoder (images, texts, regions, patches) is one program, compiled when it is first used,
  whatever the number of inputs.

  For users of Flax: `module` is the linen module and `params` its parameters, so that
  `model.apply({"params": model.params}, model.preprocess(images), method="encode_image")` can be
  differentiated, jitted and trained like any other; `grain_jax.models.grain.Grain` has the methods.

  Attributes:
    config: the configuration that it was trained with.
    tokenizer: of its texts.
    module: the Flax module.
    params: its parameters, a tree of arrays on the device.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    params: Any,
    *,
    source: str = "",
    part: str | None = None,
  ):
    """`source` says where the parameters come from, for `repr`; `part`: the tower they are of."""
    self.config = config
    self._part = part
    if part is not None:  # which Flax asks for and no tower reads
      params = {**params, "logit_scale": np.float32(0)}
    self.tokenizer = tokenizing.make_or_ids(config)
    self.module = grain.build(config)
    device = jax.local_devices()[0]
    alone = ml_collections.ConfigDict(config.to_dict())
    batch = _BATCH.get(device.platform, _BATCH_OF_ACCELERATORS)
    alone.eval_batch_size = alone.batch_size = batch
    alone.mesh.update(data=1, fsdp=1, tensor=1, rules=())
    self._mesh = meshes.create(alone, devices=[device])
    self.params = meshes.replicate(params, self._mesh)
    self._source = source
    self._encoders = encoders.make(
      alone, self.module, self.params, mesh=self._mesh, tokenizer=self.tokenizer, announce=True
    )

  def __repr__(self) -> str:
    m = self.config.model
    parts = [
      f"ViT {m.image.depth} x {m.image.width}, patches of {m.image.patch} in {m.image.size} px",
      f"text {m.text.depth} x {m.text.width}, {m.text.context} tokens",
    ]
    if self.config.method != "clip":
      parts.append(f"decoder {m.decoder.depth} x {m.decoder.width}, {m.num_queries} region queries")
    parts.append(f"embeddings of {m.embed_dim}")
    parts.append(f"{sum(x.size for x in jax.tree.leaves(self.params)):,} parameters")
    if self._source:
      parts.append(self._source)
    return f"<grain_jax model, {self.config.method}: {'; '.join(parts)}>"

  def _needs(self, part: str, what: str) -> None:
    """Raises where a tower alone is asked for what the other one does."""
    if self._part not in (None, part):
      raise ValueError(
        f"{what}: {self._source} holds the {self._part} tower of a model alone. Train with "
        f"--config.init.{self._part}=FOLDER --config.init.adopt, and load the run."
      )

  def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """`module.apply`, Flax's: `apply({"params": params}, images, method="encode_image")`."""
    return self.module.apply(variables, *args, **kwargs)

  def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
    """Token ids with start and end, padded (CLIP: with 0): i32 [N, context] (77 as published).

    Longer texts are cut to the context, the end token kept.
    """
    return self.tokenizer.tokenize(_texts(texts, "texts"))

  def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
    """N texts -> f32 [N, E], L2-normalised."""
    self._needs("text", "encode_text")
    texts = _texts(texts, "texts")
    if not texts:
      return np.zeros((0, self.config.model.embed_dim), np.float32)
    with jax.set_mesh(self._mesh):
      return self._encoders.text(texts)

  def encode_token_ids(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """N texts given as token ids -> f32 [N, E], L2-normalised.

    Args:
      ids: integers [N, L], start and end included, L at most the context.
      mask: bool [N, L], true for the tokens of a text, which come first.

    Raises:
      ValueError: shapes, ids or mask are of no texts of this model; one line.
    """
    self._needs("text", "encode_token_ids")
    ids, mask = np.asarray(ids), np.asarray(mask)
    m = self.config.model.text
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or mask.shape != ids.shape:
      raise ValueError(
        f"encode_token_ids: ids {ids.dtype}{list(ids.shape)} and mask {list(mask.shape)}: give "
        "integers [N, L] and a mask of the same shape."
      )
    mask = mask.astype(bool)
    if ids.shape[1] > m.context:
      raise ValueError(
        f"encode_token_ids: ids have {ids.shape[1]} columns, more than the model's context of "
        f"{m.context}. Cut them."
      )
    if not mask[:, :1].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
      raise ValueError(
        "encode_token_ids: the mask of each text must be true for its first tokens and false after "
        "them: pad on the right."
      )
    if (mask & ((ids < 0) | (ids >= m.vocab_size))).any():
      raise ValueError(
        f"encode_token_ids: an id is not in [0, {m.vocab_size}): another model's tokenizer?"
      )
    if not len(ids):
      return np.zeros((0, self.config.model.embed_dim), np.float32)
    with jax.set_mesh(self._mesh):
      return self._encoders.token_ids(ids, mask)

  def encode_image(self, images: ImageInput | Sequence[ImageInput]) -> np.ndarray:
    """N images -> f32 [N, E], L2-normalised; what is an image stands in the class."""
    self._needs("image", "encode_image")
    pixels = self.preprocess(images)
    if not len(pixels):
      return np.zeros((0, self.config.model.embed_dim), np.float32)
    with jax.set_mesh(self._mesh):
      return self._encoders.image(pixels)

  def encode_patches(self, images: ImageInput | Sequence[ImageInput]) -> np.ndarray:
    """N images, squashed -> their patches in the space of the texts, f32 [N, rows, columns, E]."""
    self._needs("image", "encode_patches")
    pixels = self._pixels(images, "squash")  # patches are of the whole image
    if not len(pixels):
      side = self.config.model.image.size // self.config.model.image.patch
      return np.zeros((0, side, side, self.config.model.embed_dim), np.float32)
    with jax.set_mesh(self._mesh):
      return self._encoders.patches(pixels)

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
      regions, boxes = self._encoders.regions(pixels)
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
    descriptors (class -> list), as `grain_jax.evals.zero_shot` words them. Without descriptors the
    mean is normalised again: see `class_embeddings` there.
    """
    classes = _texts(classes, "classes")
    prompts = zero_shot.class_prompts(classes, self.config.zero_shot.templates, descriptors)
    heads = zero_shot.class_embeddings(self.encode_text, prompts, renormalize=descriptors is None)
    scale = float(np.exp(np.asarray(self.params["logit_scale"])))
    logits = scale * (self.encode_image(images) @ heads.T)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)

  def preprocess(self, images: ImageInput | Sequence[ImageInput]) -> np.ndarray:
    """Images as the model sees them: u8 [N, size, size, 3].

    By `config.data.eval_resize` and `config.model.image.interpolation`.

    Raises:
      ValueError: what is no image; one line that says which.
    """
    return self._pixels(images, self.config.data.eval_resize)

  def _pixels(self, images: ImageInput | Sequence[ImageInput], how: str) -> np.ndarray:
    size = self.config.model.image.size
    most = self.config.data.max_pixels
    by = self.config.model.image.interpolation
    pixels = [
      transforms.resize(given_images.to_pil(p, i, most), size, how, interpolation=by)
      for i, p in enumerate(given_images.split(images))
    ]
    return np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)


def load(path: str | pathlib.Path, *, step: int | None = None) -> Model:
  """A model from a folder: workdir, imported checkpoint or export; see `weights.load`.

  Of the folder of a tower alone (an imported DINO, Sentence-T5) it does what that tower can.

  What it compiles is kept in the user's cache folder; see `grain_jax.runtime.compile_cache`.
  """
  if not isinstance(path, str | os.PathLike):
    raise ValueError(f"load: path is {_kind(path)}. Give the folder of a run or of weights.")
  path = places.open_place(path, "path")
  compile_cache.use()
  if part := towers.find(path):
    _, config, params = towers.load(path)
    return Model(config, params, source=str(path), part=part)
  config, params, found = weights.open_checkpoint(path, step=step)
  source = str(path) if found is None else f"step {found:,} of {path}"
  return Model(config, params, source=source)


def _kind(value: Any) -> str:
  return "None" if value is None else f"a {type(value).__name__}"


def _texts(texts: str | Sequence[str], name: str) -> list[str]:
  if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping):
    raise ValueError(f"{name} is {_kind(texts)}. Give a text or a list of texts.")
  found = [texts] if isinstance(texts, str) else list(texts)
  for i, text in enumerate(found):
    if not isinstance(text, str):
      raise ValueError(f"{name}[{i}] is {_kind(text)}, not a text.")
  return found
