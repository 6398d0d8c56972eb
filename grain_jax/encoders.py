"""A model's encoders for evaluations: jitted over the mesh, NumPy in and out, any row count."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from grain_jax import tokenizer as tokenizers
from grain_jax import tokenizing, trees
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.process_shard import SINGLE_PROCESS, ProcessShard
from grain_jax.models import grain
from grain_jax.runtime import compile_cache
from grain_jax.runtime import mesh as meshes

Array = jax.Array

# Parameters that a text's embedding depends on, by the start of their names.
_OF_TEXT = ("text_tower/", "text_projection/")
_SPOKEN = {"image": "image", "text": "text", "regions": "region", "patches": "patch"}


def make(
  config: ml_collections.ConfigDict,
  model: grain.Grain,
  params: Any,
  *,
  mesh: Mesh,
  tokenizer: tokenizers.Tokenizer,
  on_batch: Callable[[], None] = lambda: None,
  announce: bool = False,
) -> Encoders:
  """Encoders that split their input into batches of `config.eval_batch_size`, padded at the end.

  Each encoder is one program, compiled when it is first used.

  Args:
    config: of the model.
    model: the module.
    params: its parameters.
    mesh: of the devices.
    tokenizer: of the texts.
    on_batch: called after each batch.
    announce: say on stderr when a program is compiled.
  """
  jitted = make_jitted(model, mesh)
  programs: dict[str, Callable[..., Any]] = {}
  compiling = threading.Lock()
  size = config.eval_batch_size
  sharding = meshes.batch_sharding(mesh)

  def program(name: str, *arrays: Array) -> Callable[..., Any]:
    with compiling:  # threads that ask at once wait for one program
      if name not in programs:
        lowered = jitted[name].lower(params, *arrays)
        what = f"the {_SPOKEN[name]} encoder for batches of {size}"
        with compile_cache.announced(what) if announce else contextlib.nullcontext():
          programs[name] = lowered.compile()
      return programs[name]

  def call(name: str, *arrays: np.ndarray) -> Any:
    """Applies an encoder to rows of any number, in batches of one shape."""
    rows = len(arrays[0])
    outs = []
    for start in range(0, rows, size):
      chunk = [a[start : start + size] for a in arrays]
      pad = size - len(chunk[0])
      chunk = [np.pad(c, [(0, pad)] + [(0, 0)] * (c.ndim - 1)) for c in chunk]
      # Every process has all rows and puts its own shards on its devices.
      sharded = [
        jax.make_array_from_callback(c.shape, sharding, lambda index, c=c: c[index]) for c in chunk
      ]
      out = program(name, *sharded)(params, *sharded)
      outs.append(jax.tree.map(lambda x: np.asarray(x)[: size - pad], out))  # noqa: B023
      on_batch()
    return jax.tree.map(lambda *xs: np.concatenate(xs), *outs)

  def text(texts: Sequence[str]) -> np.ndarray:
    length = config.data.row_length
    rows = tokenizer.pack_texts(texts, row_length=length, texts_per_row=max(length // 8, 1))
    out = call("text", rows.tokens, rows.segments, rows.positions, rows.ends)
    return out[rows.row, rows.slot]

  def token_ids(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Embeddings f32 [N, E] of texts given as ids i32 [N, L] and mask, a row each."""
    if tokenizer.pads:  # these pads are part of the text
      room = [(0, 0), (0, tokenizer.context - ids.shape[1])]
      known = tokenizer.hash != tokenizing.NONE  # else the pads are what was given
      ids = np.pad(
        np.where(mask, ids, tokenizer.pad) if known else ids, room, constant_values=tokenizer.pad
      )
      mask = np.ones_like(ids, bool)
    length, lengths = config.data.row_length, mask.sum(axis=1)
    room = [(0, 0), (0, length - ids.shape[1])]
    tokens, segments = (np.pad(x.astype(np.int32), room) for x in (np.where(mask, ids, 0), mask))
    ends = np.zeros((len(ids), max(length // 8, 1)), np.int32)
    ends[:, 0] = lengths - 1
    positions = np.arange(length, dtype=np.int32) * segments
    return call("text", tokens, segments, positions, ends)[:, 0]

  return Encoders(
    token_ids=token_ids,
    image=lambda images: call("image", images),
    text=text,
    regions=lambda images: call("regions", images),
    patches=lambda images: call("patches", images),
    size=config.model.image.size,
    resize=config.data.eval_resize,
    interpolation=config.model.image.interpolation,
    max_pixels=config.data.max_pixels,
    batch_size=size,
    context=min(config.model.text.context, config.data.row_length),
    tokenizer=tokenizer,
    has_regions=config.method != "clip",
    templates=tuple(config.zero_shot.templates),
    fingerprint=functools.cache(lambda: _fingerprint(config, params, tokenizer)),
    shard=_process_shard(mesh),
  )


@functools.lru_cache(maxsize=8)
def make_jitted(model: grain.Grain, mesh: Mesh) -> dict[str, Callable[..., Any]]:
  """Jitted encoders of global arrays, with replicated results.

  Equal models on one mesh share them, and what is compiled: the evaluations of a run as it goes on,
  two checkpoints side by side.

  Returns:
    {'image': (params, u8 [B, H, W, 3]) -> [B, E],
     'regions': (params, u8 [B, H, W, 3]) -> (regions [B, Q, E], boxes of the last layer [B, Q, 4]),
     'patches': (params, u8 [B, H, W, 3]) -> [B, rows, columns, E],
     'text': (params, tokens, segments, positions [B, L], ends [B, T]) -> [B, T, E]}
  """
  replicated = meshes.replicated(mesh)

  def apply(method: str, params: Any, *args: Array) -> Any:
    return model.apply({"params": params}, *args, method=method)

  def regions(params: Any, image: Array) -> tuple[Array, Array]:
    _, embeddings, boxes = apply("encode_regions", params, image)
    return embeddings, boxes[-1]

  return {
    "image": jax.jit(functools.partial(apply, "encode_image"), out_shardings=replicated),
    "regions": jax.jit(regions, out_shardings=replicated),
    "patches": jax.jit(functools.partial(apply, "encode_patches"), out_shardings=replicated),
    "text": jax.jit(functools.partial(apply, "encode_text"), out_shardings=replicated),
  }


def model_fingerprint(config: ml_collections.ConfigDict, params: Any) -> str:
  """Hex digest of a model: of its configuration and all of its parameters.

  All processes that hold shards of them must call it.
  """
  digest = hashlib.blake2b(digest_size=16)
  model = config.model.to_dict()
  model |= {"attention": "auto", "norm": "auto"}  # what its run asked of its own machine
  model["text"]["tokenizer"] = tokenizing.make_or_ids(config).hash  # whatever folder it is in
  digest.update(json.dumps(model, sort_keys=True, default=str).encode())
  digest.update(config.method.encode())
  for name, leaf in trees.named_leaves(params):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(meshes.to_host(leaf)).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _process_shard(mesh: Mesh) -> ProcessShard:
  """What this process reads; all of it where the mesh is within one process."""
  if not mesh.is_multi_process:
    return SINGLE_PROCESS
  return ProcessShard(jax.process_index(), jax.process_count(), multihost_utils.process_allgather)


def _fingerprint(
  config: ml_collections.ConfigDict, params: Any, tokenizer: tokenizers.Tokenizer
) -> str:
  """Of all that a text's embedding depends on.

  '' in a run of several processes: all of them encode together, so none may find on its own disk
  what another does not.
  """
  if jax.process_count() > 1:
    return ""
  digest = hashlib.blake2b(digest_size=16)
  digest.update(tokenizer.hash.encode())
  text = {key: value for key, value in config.model.text.items() if key != "tokenizer"}  # a path
  digest.update(repr((text, config.model.dtype)).encode())
  for name, leaf in trees.named_leaves(params):
    if name.startswith(_OF_TEXT):
      digest.update(name.encode())
      digest.update(np.ascontiguousarray(meshes.to_host(leaf)).view(np.uint8).data)
  return digest.hexdigest()
