"""grain_jax's parameters in the names and shapes of the PyTorch peer."""

from __future__ import annotations

from collections.abc import Mapping

import ml_collections
import numpy as np
import torch

Tensor = torch.Tensor

# Where a stack of layers stands in the names of both.
_STACKS = {
  "image_tower/blocks": "image_tower.blocks",
  "text_tower/blocks": "text_tower.blocks",
  "query_decoder/layers": "query_decoder.layers",
}
_MLP = {"fc0": "0", "fc1": "2", "fc2": "4"}  # of the box head


def from_grain_jax(
  params: Mapping[str, np.ndarray], config: ml_collections.ConfigDict
) -> dict[str, Tensor]:
  """grain_jax's parameters by name (or their gradients) -> a state dict of `GrainTorch`."""
  state: dict[str, Tensor] = {}
  rest = dict(params)
  for ours, theirs in _STACKS.items():
    stack = {k.removeprefix(f"{ours}/"): rest.pop(k) for k in list(rest) if k.startswith(ours)}
    depth = len(next(iter(stack.values())))
    for i in range(depth):
      layer = {name: value[i] for name, value in stack.items()}
      state |= {f"{theirs}.{i}.{k}": v for k, v in _layer(layer).items()}
  patch = config.model.image.patch
  kernel = rest.pop("image_tower/patch_embedding/kernel")  # rows: (row, column, channel)
  kernel = kernel.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
  state["image_tower.patch_embedding.weight"] = _tensor(kernel)
  state["text_tower.token_embedding.weight"] = _tensor(rest.pop("text_tower/token_embedding"))
  for i, name in _MLP.items():
    for leaf in ("kernel", "bias"):
      rest[f"box_head/{name}/{leaf}"] = rest.pop(f"box_head/{i}/{leaf}")
  return state | _plain(rest)


def _tensor(value: np.ndarray) -> Tensor:
  return torch.from_numpy(np.array(value, np.float32))  # a contiguous copy


def _plain(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
  """Names with dots; kernels transposed."""
  leaves: dict[str, Tensor] = {}
  for name, value in params.items():
    path, _, leaf = name.rpartition("/")
    leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    value = np.asarray(value)
    leaves[".".join(filter(None, [path.replace("/", "."), leaf]))] = _tensor(
      value.T if name.endswith("/kernel") else value
    )
  return leaves


def _layer(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
  """One layer: query, key and value of an attention joined as its `shared` says."""
  rest, state = dict(params), {}
  for name in ("attention", "self_attention", "cross_attention"):
    if f"{name}/query/kernel" not in params:
      continue
    shared = {"attention": "qkv", "self_attention": "qk", "cross_attention": "kv"}[name]
    for leaf in ("kernel", "bias"):
      parts = {part[0]: rest.pop(f"{name}/{part}/{leaf}") for part in ("query", "key", "value")}
      joint = np.concatenate([parts.pop(part) for part in shared], axis=-1)
      state |= _plain({f"{name}/joint/{leaf}": joint})
      state |= _plain({f"{name}/single/{leaf}": value for value in parts.values()})
  for fc, index in (("fc1", "0"), ("fc2", "3" if "norm3/scale" in params else "2")):
    for leaf in ("kernel", "bias"):
      state |= _plain({f"mlp/{index}/{leaf}": rest.pop(f"mlp/{fc}/{leaf}")})
  return state | _plain(rest)
