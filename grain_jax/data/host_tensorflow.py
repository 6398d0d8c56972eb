"""TensorFlow, for reading on the host alone: the one place that imports it.

GPUs are hidden from it before anything can use it: it would take all of their memory from JAX.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from absl import logging

__all__ = ["tf", "datasets"]


def hide_gpus() -> None:
  """Hides the GPUs from TensorFlow; a warning where somebody has used it with them before."""
  try:
    tf.config.set_visible_devices([], "GPU")
  except RuntimeError as error:
    logging.warning(
      "TensorFlow was used before grain_jax and holds memory of the GPUs (%s). Import grain_jax "
      "first, or call tf.config.set_visible_devices([], 'GPU') at the start.",
      " ".join(str(error).split()),
    )


def datasets() -> Any:
  """The module tensorflow_datasets."""
  import tensorflow_datasets

  return tensorflow_datasets


hide_gpus()
