"""Scenes made by several processes, read back in order.

The processes are started afresh, with `worker` alone: a fork of a process that runs TensorFlow
or JAX may hang, and `multiprocessing` would import the caller's main module in each of them.
A record travels as three lengths, a JSON object, the image and the mask.
"""

from __future__ import annotations

import json
import os
import pathlib
import struct
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from grain_jax import schema

_PROGRAM = "grain_jax.data.scenes.worker"
_HEADER = struct.Struct("<III")
_BYTES = (schema.RECORD_IMAGE, schema.RECORD_MASK)


def records(settings: dict, split: str, *, size: int, workers: int) -> Iterator[dict]:
  """Records 0 .. size-1 of a split; worker w makes records w, w + workers, ...

  Args:
    settings: `dataclasses.asdict` of SceneSettings.
    split: one of scenes.SPLITS.
    size: number of records.
    workers: number of processes, at least 1.
  """
  root = str(pathlib.Path(__file__).resolve().parents[3])
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  task = json.dumps({"settings": settings, "split": split, "size": size, "workers": workers})
  processes = []
  try:
    for worker in range(workers):
      processes.append(
        subprocess.Popen(
          [sys.executable, "-m", _PROGRAM, str(worker), task],
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE,
          env=os.environ | {"PYTHONPATH": path},
          bufsize=1 << 20,
        )
      )
    for index in range(size):
      yield _read(processes[index % workers], split, index)
  finally:
    for process in processes:
      process.kill()
      process.stdout.close()
      process.wait()


def encode(record: dict) -> bytes:
  """A record as bytes."""
  text = {key: value for key, value in record.items() if key not in _BYTES}
  text[schema.RECORD_REGIONS] = [
    region | {"box": region["box"].tolist()} for region in record[schema.RECORD_REGIONS]
  ]
  mask = record.get(schema.RECORD_MASK)
  parts = [
    json.dumps(text).encode(),
    record[schema.RECORD_IMAGE],
    b"" if mask is None else mask.tobytes(),
  ]
  return _HEADER.pack(*map(len, parts)) + b"".join(parts)


def decode(text: bytes, image: bytes, mask: bytes) -> dict:
  """The record whose three parts these are."""
  record = json.loads(text)
  for region in record[schema.RECORD_REGIONS]:
    region["box"] = np.array(region["box"], np.float32)
  record[schema.RECORD_IMAGE] = image
  if mask:
    side = round(len(mask) ** 0.5)
    record[schema.RECORD_MASK] = np.frombuffer(mask, np.uint8).reshape(side, side)
  return record


def _read(process: subprocess.Popen, split: str, index: int) -> dict:
  header = process.stdout.read(_HEADER.size)
  lengths = _HEADER.unpack(header) if len(header) == _HEADER.size else ()
  parts = [process.stdout.read(length) for length in lengths]
  if not parts or any(len(part) != n for part, n in zip(parts, lengths, strict=True)):
    raise RuntimeError(
      f"scenes: the process that makes record {index} of {split} ended with code "
      f"{process.wait()}. Its message stands above; workers=0 makes the records in this process."
    )
  return decode(*parts)
