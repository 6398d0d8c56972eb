"""T5's encoder as a text tower on packed rows, as Sentence-T5 (arXiv 2108.08877) pools it."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.models import attention, elementwise, layers

Array = jax.Array

BUCKETS = 32  # of relative positions, half of them for keys after the query
MAX_DISTANCE = 128  # from which on all distances share a bucket


def relative_buckets(length: int) -> np.ndarray:
  """Bucket of each key as seen from each query: i32 [L, L], in [0, BUCKETS).

  Distances below BUCKETS / 4 have their own bucket, larger ones share them logarithmically up to
  MAX_DISTANCE; keys after the query take the upper half (Raffel et al., JMLR 2020, sec. 2.1).
  """
  offset = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
  half, exact = BUCKETS // 2, BUCKETS // 4
  distance = np.abs(offset)
  # In float32, as the published code has it: 8 * 2^(k/2) are the bounds.
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(
    MAX_DISTANCE / exact
  )
  logarithmic = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
  return (half * (offset > 0) + np.where(distance < exact, distance, logarithmic)).astype(np.int32)


def rms_norm(x: Array, *, epsilon: float, dtype: Any, name: str) -> Array:
  """x / rms(x) * scale over the last axis in float32, returned in `dtype`; in compact modules."""
  norm = nn.RMSNorm(epsilon=epsilon, dtype=jnp.float32, name=name)
  return norm(x.astype(jnp.float32)).astype(dtype)


class Attention(nn.Module):
  """Self-attention of T5: softmax(q k^T + bias) v, unscaled, without biases of projections.

  Initialised as T5: queries (D * D / H)^-0.5, the others D^-0.5.
  """

  heads: int
  fused: str = "xla"
  part: str = "model"  # part of the model, for messages
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mask: Array, bias: Array) -> Array:
    """x [B, L, D], mask bool [B, 1, L, L], bias [1, H, L, L] -> [B, L, D]."""
    width = x.shape[-1]
    head = width // self.heads

    def project(name: str, std: float) -> Array:
      init = nn.initializers.normal(std)
      y = nn.Dense(width, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)(x)
      return y.reshape(*x.shape[:-1], self.heads, head)

    query = project("query", (width * head) ** -0.5)
    key, value = project("key", width**-0.5), project("value", width**-0.5)
    # Parameters do not depend on how attention is computed.
    fused = "xla" if self.is_initializing() else self.fused
    out = attention.attend(
      query, key, value, mask=mask, bias=bias, scale=1.0, fused=fused, part=self.part
    ).reshape(x.shape)
    init = nn.initializers.normal(width**-0.5)
    return nn.Dense(width, use_bias=False, kernel_init=init, dtype=self.dtype, name="out")(out)


class Mlp(nn.Module):
  """Linear(hidden) -> activation -> Linear(D) without biases (T5 v1.0: ReLU, not gated)."""

  hidden: int
  activation: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def dense(x: Array, width: int, name: str) -> Array:
      init = nn.initializers.normal(x.shape[-1] ** -0.5)
      return nn.Dense(width, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)(x)

    y = elementwise.activate(self.activation, dense(x, self.hidden, "fc1"))
    return dense(y, x.shape[-1], "fc2")


class Block(nn.Module):
  """Pre-norm block with RMSNorm: x + attention(norm(x)), then x + mlp(norm(x))."""

  heads: int
  hidden: int
  activation: str
  norm_eps: float
  fused: str = "xla"
  part: str = "model"  # part of the model, for messages
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mask: Array, bias: Array) -> tuple[Array, None]:
    """In the form that `layers.Stack` asks for: (carry, mask, bias) -> (carry, None)."""
    y = rms_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm1")
    attend = Attention(self.heads, self.fused, self.part, dtype=self.dtype, name="attention")
    x = x + attend(y, mask, bias)
    y = rms_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm2")
    return x + Mlp(self.hidden, self.activation, dtype=self.dtype, name="mlp")(y), None


class T5Encoder(nn.Module):
  """Bidirectional encoder; the feature of a text is the mean over its tokens, end included.

  The table of relative positions is one for all blocks. There is no dropout.
  """

  vocab_size: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float
  activation: str
  norm_eps: float
  unroll: int = 1
  remat: str = "none"
  fused: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: Array, segments: Array, positions: Array, ends: Array) -> Array:
    """Encodes T texts a row.

    Args:
      tokens: i32 [B, L], ids.
      segments: i32 [B, L], 1 + index of the token's text; 0 is padding.
      positions: unused: a text's tokens stand side by side, so their distance is that of columns,
        and one bias [1, H, L, L] serves all rows.
      ends: i32 [B, T]: its shape says how many texts there are.

    Returns:
      [B, T, width], means after the final RMSNorm; 0 for absent texts.
    """
    del positions
    normal = nn.initializers.normal
    embedding = self.param("token_embedding", normal(1.0), (self.vocab_size, self.width))
    table = self.param("relative_bias", normal(self.width**-0.5), (BUCKETS, self.heads))
    x = layers.shard_batch(jnp.take(embedding, tokens, axis=0).astype(self.dtype))
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    bias = jnp.take(table.T, relative_buckets(tokens.shape[1]), axis=1)[None]
    blocks = layers.Stack(
      Block,
      {
        "heads": self.heads,
        "hidden": round(self.width * self.mlp_ratio),
        "activation": self.activation,
        "norm_eps": self.norm_eps,
        "fused": self.fused,
        "part": "text tower",
        "dtype": self.dtype,
      },
      unroll=self.unroll,
      remat=self.remat,
    )
    if self.is_initializing():  # parameters of all blocks are one stack
      x, _ = blocks.create(self.depth, 2, name="blocks")(x, mask, bias)
    else:
      x, _ = blocks.apply(self.variables["params"]["blocks"], x, mask, bias)
    x = rms_norm(x, epsilon=self.norm_eps, dtype=jnp.float32, name="norm")
    return mean_of_texts(x, segments, ends.shape[1]).astype(self.dtype)


def mean_of_texts(x: Array, segments: Array, texts: int) -> Array:
  """Mean over a text's tokens: x [B, L, D], segments [B, L] -> [B, T, D]; 0 for absent texts."""
  member = (segments[:, None] == 1 + jnp.arange(texts)[:, None]).astype(x.dtype)  # [B, T, L]
  count = jnp.maximum(jnp.sum(member, axis=-1, keepdims=True), 1)
  exact = jax.lax.Precision.HIGHEST
  return jnp.einsum("btl,bld->btd", member, x, precision=exact) / count
