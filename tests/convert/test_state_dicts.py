"""Files of weights: what is refused, and that nothing in them is run."""

import json
import os
import sys

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from numpy.testing import assert_array_equal

from grain_jax.convert import state_dicts


class Payload:
  """Makes a folder when it is unpickled by a loader that runs what it reads."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


class Plain:
  """Of a class that only its project knows, as argument namespaces in checkpoints are."""


def load(path, *words):
  """The one-line error of a file that cannot be read."""
  with pytest.raises(ValueError) as caught:
    state_dicts.load(path)
  text = str(caught.value)
  assert "\n" not in text and len(text) < 500 and path.name in text
  assert "eights only" not in text  # torch advises to load it without the guard
  for word in words:
    assert word in text, text


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_nothing_is_run(tmp_path, legacy):
  trap = tmp_path / "trap"
  path = tmp_path / "weights.pt"
  torch.save(
    {"state_dict": {"a": torch.zeros(2)}, "args": Payload(trap)}, path,
    _use_new_zipfile_serialization=not legacy,
  )  # fmt: skip
  load(path, "nothing of it was run", "posix.mkdir")
  assert not trap.exists()
  torch.load(path, weights_only=False)  # the trap does work
  assert trap.exists()
  torch.save({"args": Plain()}, path, _use_new_zipfile_serialization=not legacy)
  load(path, "nothing of it was run", "Plain")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.2, 0.6, 0.97])
def test_a_truncated_file(tmp_path, part, legacy):
  path = tmp_path / "weights.pt"
  state = {f"layer{i}.weight": torch.full((40, 40), 0.5) for i in range(4)}
  torch.save(state, path, _use_new_zipfile_serialization=not legacy)
  data = path.read_bytes()
  path.write_bytes(data[: int(part * len(data))])
  load(path, "truncated")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5])
def test_a_truncated_safetensors_file(tmp_path, part):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file({"a": np.ones((40, 40), np.float32)}, path)
  data = path.read_bytes()
  path.write_bytes(data[: int(part * len(data))])
  load(path, "truncated or not a safetensors file")


def test_files_of_another_kind(tmp_path):
  (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  load(tmp_path / "pointer.pt", "not a file of PyTorch")
  load(tmp_path / "none.pt", "does not exist")
  load(tmp_path, "is a folder")
  torch.save([torch.zeros(2)], tmp_path / "list.pt")
  load(tmp_path / "list.pt", "holds a list")
  torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
  load(tmp_path / "ViT-B-32.pt", "is a TorchScript program")
  weights = {"a": torch.ones(3).to(torch.float8_e4m3fn)}
  safetensors.torch.save_file(weights, tmp_path / "quantized.safetensors")
  load(tmp_path / "quantized.safetensors", "unknown type", "float8")


def test_an_index_stays_in_its_folder(tmp_path):
  safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "part.safetensors")
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
  assert list(state_dicts.load(index)) == ["a"]
  for bad in ({"a": "../part.safetensors"}, {}, [1]):
    index.write_text(json.dumps({"weight_map": bad}))
    load(index, "weight_map")
  index.write_text("{")
  load(index, "not JSON")


def test_without_torch_a_pt_file_says_how_to_go_on(tmp_path, monkeypatch):
  torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
  monkeypatch.setitem(sys.modules, "torch", None)
  load(tmp_path / "weights.pt", "pip install torch", "safetensors")
  safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
  assert list(state_dicts.load(tmp_path / "m.safetensors")) == ["a"]


def test_arrays_are_float32_and_lose_the_prefix_of_distributed_training(tmp_path):
  values = torch.tensor([1.0, -2.5, 3e-5])
  saved = {f"module.{name}": values.to(dtype) for name, dtype in (
    ("a", torch.float16), ("b", torch.bfloat16), ("c", torch.float64))}  # fmt: skip
  saved["module.position_ids"] = torch.arange(3)
  safetensors.torch.save_file(saved, tmp_path / "m.safetensors")
  torch.save(saved, tmp_path / "m.pt")
  for name in ("m.safetensors", "m.pt"):
    state = state_dicts.arrays(state_dicts.load(tmp_path / name), where=name)
    assert list(sorted(state)) == ["a", "b", "c", "position_ids"]
    for key in "abc":
      assert state[key].dtype == np.float32
      assert_array_equal(state[key], saved[f"module.{key}"].float())
    assert state["position_ids"].dtype == np.int64
  state = state_dicts.arrays({"module.a": values, "b": values}, where="mixed")
  assert list(state) == ["module.a", "b"]  # a module of that name, not a prefix
