"""grain_jax: pretraining of image-text models that see detail."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import pathlib

  from grain_jax import inference

__version__ = "0.1.0"

# TensorFlow reads data here and nothing else: keep its start-up notices off the terminal.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# transformers has tokenizers here: that it finds no PyTorch is no news.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def load(path: str | pathlib.Path, *, step: int | None = None) -> inference.Model:
  """A trained or imported model, ready to encode; see `grain_jax.inference.Model`.

  Args:
    path: workdir of a run, or what `grain_jax.convert` wrote, or a safetensors export.
    step: which checkpoint; the newest by default.
  """
  from grain_jax import inference  # JAX and its companions load only where a model is wanted

  return inference.load(path, step=step)
