"""SigLIP as big_vision saves it: an .npz in the names of flax's own layers.

Attention's kernels are [D, heads, D / heads] and [heads, D / heads, D] there. The blocks of a tower
are `encoderblock_{i}`, or, scanned, one `encoderblock` whose arrays have a leading layer axis. The
file says how many patches there are, not what the image has beyond them (So400m/14 at 384 pixels:
27 patches of 14 are 378): what is read of them is said in a warning.
"""

from __future__ import annotations

import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
import ml_dtypes
import numpy as np

from grain_jax import failures
from grain_jax.convert import foreign, layout, state_dicts

SCALAR = layout.Form(lambda x: x.reshape(()), lambda x: x.reshape(1))  # [1] and []
_SIZES = (224, 256, 384, 512)  # pixels of published models
_TOWERS = {"image": "img/Transformer", "text": "txt/Encoder_0"}


class Found(NamedTuple):
  """Weights, what their shapes show of the model as config keys and values, and their table."""

  state: layout.State
  facts: dict[str, Any]
  rules: Callable[[ml_collections.ConfigDict], list[layout.Rule]]


def read(path: pathlib.Path) -> Found:
  """Reads an .npz.

  Raises:
    ValueError: damaged, or not SigLIP; one line.
  """
  state = state_dicts.arrays(_read_npz(path), where=str(path))
  state = {key.removeprefix("params/"): value for key, value in state.items()}
  shapes = foreign.Shapes(state, str(path), "SigLIP of fixed resolution in big_vision's names")
  patch, _, _, width = shapes.shape_of("img/embedding/kernel", 4)
  _, positions, _ = shapes.shape_of("img/pos_embedding", 3)
  side = round(positions**0.5)
  if side**2 != positions:
    raise ValueError(f"{path}: {positions} positions of patches are no square.")
  _warn_of_size(path, side, patch)
  vocabulary, text_width = shapes.shape_of("txt/Embed_0/embedding", 2)
  facts = {
    "model.embed_dim": shapes.shape_of("txt/head/kernel", 2)[1],
    "model.image.size": side * patch,
    "model.image.patch": patch,
    "model.image.width": width,
    "model.text.vocab_size": vocabulary,
    "model.text.context": shapes.shape_of("txt/pos_embedding", 3)[1],
    "model.text.width": text_width,
  }
  if facts["model.embed_dim"] != width:
    raise ValueError(
      f"{path}: texts are projected to {facts['model.embed_dim']}, but images have a width of "
      f"{width} and no projection."
    )
  scanned = {name: f"{_TOWERS[name]}/encoderblock/LayerNorm_0/scale" in state for name in _TOWERS}
  for name in _TOWERS:
    facts |= _tower_facts(shapes, name, scanned=scanned[name])
  return Found(state, facts, functools.partial(_rules, scanned=scanned))


def _warn_of_size(path: pathlib.Path, side: int, patch: int) -> None:
  """Warns where the patches are those of a published size that they do not fill."""
  likely = [size for size in _SIZES if size // patch == side and size % patch]
  if likely:
    logging.getLogger(__name__).warning(
      "%s has %d patches of %d a side and is taken as a model of %d pixels. One of %d has as many, "
      "and leaves the last %d out: images are then shown to it a little smaller than it knows.",
      path, side, patch, side * patch, likely[0], likely[0] % patch,
    )  # fmt: skip


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a file, no pickle; those of two opaque bytes are bfloat16, as it saves them."""
  try:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
      raise ValueError("one array alone")
    with loaded as file:
      found = {key: file[key] for key in file.files}
  except failures.DAMAGED_ARRAYS as error:
    if failures.is_storage(error):
      raise
    reason = failures.one_line(error, limit=120)
    raise ValueError(f"{path} is truncated or not an .npz of arrays ({reason}).") from error
  return {
    key: value.view(ml_dtypes.bfloat16) if value.dtype == np.dtype("V2") else value
    for key, value in found.items()
  }


def _tower_facts(shapes: foreign.Shapes, name: str, *, scanned: bool) -> dict[str, Any]:
  """Depth, heads and hidden width of a tower; activation and epsilon are all SigLIP's."""
  theirs = _TOWERS[name]
  block, axes = (f"{theirs}/encoderblock", 1) if scanned else (f"{theirs}/encoderblock_0", 0)
  query = shapes.shape_of(f"{block}/MultiHeadDotProductAttention_0/query/kernel", 3 + axes)
  width, hidden = shapes.shape_of(f"{block}/MlpBlock_0/Dense_0/kernel", 2 + axes)[-2:]
  return {
    f"model.{name}.depth": query[0] if scanned else shapes.depth(rf"{theirs}/encoderblock_(\d+)/"),
    f"model.{name}.heads": query[-2],
    f"model.{name}.mlp_ratio": hidden / width,
    f"model.{name}.activation": "gelu_tanh",
    f"model.{name}.norm_eps": 1e-6,
  }


def _to_convolution(kernel: Any) -> Any:
  side = round((kernel.shape[0] / 3) ** 0.5)
  return kernel.reshape(side, side, 3, -1)


_PATCHES = layout.Form(lambda x: x.reshape(-1, x.shape[-1]), _to_convolution)  # HWIO


def _attention(ours: str, theirs: str, heads: int) -> list[layout.Rule]:
  """Of one layer, or of stacked ones."""
  inner = layout.Form(
    lambda x: x.reshape(*x.shape[:-2], -1), lambda x: x.reshape(*x.shape[:-1], heads, -1)
  )
  outer = layout.Form(
    lambda x: x.reshape(*x.shape[:-3], -1, x.shape[-1]),
    lambda x: x.reshape(*x.shape[:-2], heads, -1, x.shape[-1]),
  )
  table = []
  for name in ("query", "key", "value"):
    table += layout.same(f"{ours}/{name}/kernel", f"{theirs}/{name}/kernel", inner)
    table += layout.same(f"{ours}/{name}/bias", f"{theirs}/{name}/bias", inner)
  table += layout.same(f"{ours}/out/kernel", f"{theirs}/out/kernel", outer)
  return table + layout.same(f"{ours}/out/bias", f"{theirs}/out/bias")


def _flax(ours: str, theirs: str, *leaves: str) -> list[layout.Rule]:
  return [rule for leaf in leaves for rule in layout.same(f"{ours}/{leaf}", f"{theirs}/{leaf}")]


def _mlp(ours: str, theirs: str) -> list[layout.Rule]:
  return [
    *_flax(f"{ours}/fc1", f"{theirs}/Dense_0", "kernel", "bias"),
    *_flax(f"{ours}/fc2", f"{theirs}/Dense_1", "kernel", "bias"),
  ]


def _rules(config: ml_collections.ConfigDict, *, scanned: dict[str, bool]) -> list[layout.Rule]:
  """The table of big_vision's names; of a scanned tower all layers stand in one array."""
  head = "img/MAPHead_0"
  table = [
    *layout.same("image_tower/patch_embedding/kernel", "img/embedding/kernel", _PATCHES),
    *layout.same("image_tower/patch_embedding/bias", "img/embedding/bias"),
    *layout.same("image_tower/position_embedding", "img/pos_embedding", layout.BATCHED),
    *layout.same("pooling/probe", f"{head}/probe"),
    *_attention(
      "pooling/attention", f"{head}/MultiHeadDotProductAttention_0", config.model.image.heads
    ),
    *_flax("pooling/norm", f"{head}/LayerNorm_0", "scale", "bias"),
    *_mlp("pooling/mlp", f"{head}/MlpBlock_0"),
    *layout.same("text_tower/token_embedding", "txt/Embed_0/embedding"),
    *layout.same("text_tower/position_embedding", "txt/pos_embedding", layout.BATCHED),
    *_flax("text_projection", "txt/head", "kernel", "bias"),
    *layout.same("logit_scale", "t", SCALAR),
    *layout.same("logit_bias", "b", SCALAR),
  ]
  for name, theirs in _TOWERS.items():
    ours, heads = f"{name}_tower", config.model[name].heads
    table += _flax(f"{ours}/norm", f"{theirs}/encoder_norm", "scale", "bias")
    block = f"{theirs}/encoderblock" if scanned[name] else f"{theirs}/encoderblock_{{}}"
    ours = f"{ours}/blocks"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    table += _flax(f"{ours}/norm1", f"{block}/LayerNorm_0", "scale", "bias")
    table += _attention(f"{ours}/attention", attention, heads)
    table += _flax(f"{ours}/norm2", f"{block}/LayerNorm_1", "scale", "bias")
    table += _mlp(f"{ours}/mlp", f"{block}/MlpBlock_0")
  return table
