"""Files of weights: PyTorch's (without running what is pickled in them) and safetensors."""

from __future__ import annotations

import argparse
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 from here on
import numpy as np
import safetensors

from grain_jax import textfiles
from grain_jax.convert import layout

_INDEX = ".index.json"
# Names of torch's wrappers within keys: of torch.compile, FSDP and activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def load(path: pathlib.Path) -> dict[str, Any]:
  """What a file of weights holds, as it was saved: a dictionary of tensors, or of dictionaries.

  Args:
    path: a .safetensors file, the .index.json of a file in parts, or any file of `torch.save`.

  Raises:
    ValueError: no such file, truncated, of another kind, or holding code; one line. Nothing that
      the file asks for is run (`torch.load(weights_only=True)`).
  """
  if not path.is_file():
    kind = "is a folder, not a file of weights" if path.is_dir() else "does not exist"
    raise ValueError(f"--input: {path} {kind}.")
  if path.name.endswith(_INDEX):
    return _load_parts(path)
  loaded = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
  if not isinstance(loaded, Mapping):
    raise ValueError(f"{path} holds a {type(loaded).__name__}, not a dictionary of weights.")
  return dict(loaded)


def _load_parts(path: pathlib.Path) -> dict[str, Any]:
  """All parts of a checkpoint that its index names; they stand beside it."""
  index = read_json(path)
  files = index.get("weight_map", {}) if isinstance(index, dict) else {}
  names = sorted({str(name) for name in files.values()}) if isinstance(files, dict) else []
  if not names or any(pathlib.PurePath(name).name != name for name in names):
    raise ValueError(f"{path} does not name the files of its parts (weight_map).")
  state: dict[str, Any] = {}
  for name in names:
    state |= load(path.with_name(name))
  return state


def _load_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is truncated or not a safetensors file ({error}).") from error
  except (AttributeError, TypeError) as error:  # how it says that NumPy lacks a type
    raise ValueError(
      f"{path} holds weights of an unknown type ({error}). Save them as float32 or bfloat16."
    ) from error


def _load_torch(path: pathlib.Path) -> Any:
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f"{path} is read by PyTorch, which is not installed: pip install torch, or have the weights "
      "saved as .safetensors."
    ) from error
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # what matters comes as an error
      # Training checkpoints often note their flags: a Namespace holds values and runs nothing.
      with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises many kinds for a damaged file
    reason = " ".join(str(error).split())
    if "TorchScript" in reason:
      raise ValueError(
        f"{path} is a TorchScript program, not weights. Save its state_dict() as .safetensors, or "
        "take the same weights from a project that publishes them without code."
      ) from error
    reason = reason.rpartition("WeightsUnpickler error: ")[2]  # without advice to run it anyway
    code = re.search(r"(?:GLOBAL|unrecognized function|instantiate) (\S+)", reason)
    if code:
      raise ValueError(
        f"{path} holds more than weights: its pickle asks for {code[1]}, and nothing of it was "
        "run. Save the state dict alone, as .safetensors if you can."
      ) from error
    raise ValueError(
      f"{path} is truncated or not a file of PyTorch ({reason[:100] or type(error).__name__})."
    ) from error


def arrays(weights: Any, *, where: str) -> layout.State:
  """The weights as NumPy arrays, floating-point ones as float32, under the names of the bare model.

  Args:
    weights: a state dict of torch tensors or NumPy arrays, of a model that may have been compiled
      or distributed, as a whole or in parts; see `unwrap`.
    where: the file, for errors.

  Raises:
    ValueError: it is no dictionary of tensors, an empty one, or holds a weight under two names.
  """
  if not isinstance(weights, Mapping) or not weights:
    raise ValueError(f"{where} is not a dictionary of weights.")
  others = [str(k) for k, v in weights.items() if not hasattr(v, "shape") or not isinstance(k, str)]
  if others:
    raise ValueError(f"{where} is not a state dict: {layout.few(others)} are no arrays.")
  state: layout.State = {}
  for (key, value), name in zip(weights.items(), unwrap(weights), strict=True):
    if name in state:
      raise ValueError(
        f"{where} holds {name} twice, once as {key}. Save the state dict of one model, compiled or "
        "not."
      )
    state[name] = _array(value)
  return state


def unwrap(keys: Iterable[str]) -> list[str]:
  """Keys of a state dict without the names that torch's wrappers put into them, in their order.

  'module._orig_mod.visual.proj' -> 'visual.proj'. The names of torch.compile, FSDP and activation
  checkpointing go wherever they stand, since no module is called so. DistributedDataParallel's
  'module' goes at a place where every key has it: 'visual.module' if 'visual' has nothing else.
  """
  paths = [tuple(p for p in key.split(".") if p not in _WRAPPERS) for key in keys]
  children: dict[tuple[str, ...], set[str]] = {}
  for path in paths:
    for depth, part in enumerate(path):
      children.setdefault(path[:depth], set()).add(part)
  return [
    ".".join(
      part
      for depth, part in enumerate(path)
      if part != "module" or depth == len(path) - 1 or children[path[:depth]] != {"module"}
    )
    for path in paths
  ]


def _array(value: Any) -> np.ndarray:
  if not isinstance(value, np.ndarray):
    value = value.detach()
    value = (value.float() if value.is_floating_point() else value).numpy()
  floating = value.dtype.kind == "f" or value.dtype == ml_dtypes.bfloat16
  return value.astype(np.float32, copy=False) if floating else value


def without(state: layout.State, ignored: str) -> layout.State:
  """The state dict without the keys that the regex `ignored` matches as a whole."""
  return {key: value for key, value in state.items() if not re.fullmatch(ignored, key)}


def read_json(path: pathlib.Path) -> Any:
  """The content of a JSON file; a one-line ValueError where there is none."""
  if not path.exists():
    raise ValueError(f"--input: {path} does not exist.")
  return textfiles.read_json(path)
