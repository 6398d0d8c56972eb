"""grain_jax: pretraining of image-text models that see detail."""

import os

# TensorFlow reads data here and nothing else: keep its start-up notices off the terminal.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
