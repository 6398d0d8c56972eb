"""The query decoder: learned queries read the image tokens (Carion et al., ECCV 2020; GRAIN).

Q region queries and one image query, the image query last, attend to each other and to the
image's tokens. Every layer's output goes through the shared final LayerNorm.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grain_jax.models import attention, elementwise, fused_attention, layers, vit

Array = jax.Array

XAVIER = nn.initializers.xavier_uniform()
# Kernel of query, key and value, by `config.model.decoder.init`: torch draws the three at once,
# [3 D, D], so that Xavier's bound is sqrt(6 / 4 D) where that of one matrix is sqrt(6 / 2 D).
PROJECTION = {
  "torch": nn.initializers.variance_scaling(0.5, "fan_avg", "uniform"),
  "per_matrix": XAVIER,
}
# torch.nn.Linear's own default: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _positions(key: Array, shape: tuple[int, int]) -> Array:
  """Initial positions of the memory: the class token's zero, then the patches' 2-D sine-cosine.

  A square of tokens has no class token.
  """
  del key
  tokens, width = shape
  side = math.isqrt(tokens)
  return jnp.concatenate([jnp.zeros((tokens - side**2, width)), vit.sincos_positions(side, width)])


class DecoderLayer(nn.Module):
  """Pre-norm: self-attention, cross-attention, FFN, each with dropout on its branch.

  The query embedding is added to q and k of self-attention and to q of cross-attention.
  """

  heads: int
  mlp_dim: int
  dropout: float
  norm_eps: float
  deterministic: bool
  init_scheme: str
  tokens: int | None = None  # of memory; what follows is padding
  fused: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, queries: Array, memory: Array) -> tuple[Array, Array]:
    """x, queries [B, Q + 1, D] and memory [B, L, D] -> x twice (carry and the layer's output)."""

    def attend(name: str, tokens: int | None = None) -> nn.Module:
      return layers.Attention(
        self.heads, PROJECTION[self.init_scheme], XAVIER,
        dropout=self.dropout, tokens=tokens,
        fused=self.fused, part=f"query decoder, {name.replace('_', '-')}",
        dtype=self.dtype, name=name,
      )  # fmt: skip

    def add(x: Array, branch: tuple[Array, Array]) -> Array:
      if self.deterministic or not self.dropout:
        return elementwise.add_residual(x, *branch)
      y, bias = branch
      return x + nn.Dropout(self.dropout, deterministic=False)(y + bias.astype(y.dtype))

    y = layers.layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm1")
    q = y + queries
    x = add(x, attend("self_attention")(q, q, y, deterministic=self.deterministic))
    y = layers.layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm2")
    x = add(
      x,
      attend("cross_attention", self.tokens)(
        y + queries, memory, memory, deterministic=self.deterministic
      ),
    )
    y = layers.layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm3")
    mlp = layers.Mlp(
      self.mlp_dim, "relu", XAVIER, XAVIER, self.init_scheme != "torch",
      dropout=self.dropout, dtype=self.dtype, name="mlp",
    )  # fmt: skip
    x = add(x, mlp(y, deterministic=self.deterministic))
    return x, x


class QueryDecoder(nn.Module):
  """Image tokens -> features of the queries, after each layer.

  `init_scheme`: config.model.decoder.init. Both draw Xavier uniform weights; 'torch' as torch's own
  modules under DETR's and GRAIN's code do (joint query, key and value, uniform biases of the MLPs),
  'per_matrix' each matrix for itself, with zero biases.
  """

  num_queries: int
  width: int
  depth: int
  heads: int
  mlp_dim: int
  dropout: float
  norm_eps: float
  memory_positions: bool = False
  init_scheme: str = "torch"
  unroll: int = 1
  remat: str = "none"
  fused: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: Array, *, train: bool = False, alone: bool = False) -> Array:
    """Decodes.

    Args:
      tokens: [B, L, any width], the image tower's output.
      train: with dropout (needs an rng named 'dropout').
      alone: one query sees one token at a time, as if an image had no other. Which query does not
        matter: attention to one token gives its value, whatever is asked, and so layer by layer.

    Returns:
      [depth, B, Q + 1, D]: features after each layer and the final LayerNorm; the image query is
      the last of each row. With `alone` [depth, B * L, 1, D].
    """
    memory = nn.Dense(
      self.width, use_bias=False, kernel_init=LINEAR, dtype=self.dtype, name="input"
    )(tokens)
    memory = layers.layer_norm(memory, epsilon=self.norm_eps, dtype=self.dtype, name="input_norm")
    if self.memory_positions:
      positions = self.param("memory_positions", _positions, (tokens.shape[1], self.width))
      memory = memory + positions.astype(self.dtype)
    if alone:
      memory = memory.reshape(-1, 1, self.width)
    shape = (self.num_queries + 1, self.width)
    queries = self.param("query_embedding", nn.initializers.normal(1.0), shape)
    if alone:
      queries = queries[:1]
    queries = jnp.broadcast_to(queries.astype(self.dtype), (len(memory), *queries.shape))
    length = memory.shape[1]
    padding = 0
    if attention.few_queries(queries.shape[1], self.heads, self.width, length):
      padding = fused_attention.padded_length(length, self.dtype) - length
    if padding:
      memory = jnp.pad(memory, ((0, 0), (0, padding), (0, 0)))
    decoder_layers = layers.Stack(
      DecoderLayer,
      {
        "heads": self.heads,
        "mlp_dim": self.mlp_dim,
        "dropout": self.dropout,
        "norm_eps": self.norm_eps,
        "deterministic": not train,
        "tokens": length if padding else None,
        "init_scheme": self.init_scheme,
        "fused": self.fused,
        "dtype": self.dtype,
      },
      unroll=self.unroll,
      remat=self.remat,
    )
    inputs = (jnp.zeros_like(queries), queries, layers.shard_batch(memory))
    if self.is_initializing():
      _, x = decoder_layers.create(self.depth, 2, name="layers")(*inputs)
    else:
      key = self.make_rng("dropout") if train and self.dropout else None
      _, x = decoder_layers.apply(self.variables["params"]["layers"], *inputs, dropout_key=key)
    return layers.layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm")


class BoxHead(nn.Module):
  """D-D-D-4 MLP with ReLU, then a sigmoid: (cx, cy, w, h) in [0, 1], float32."""

  width: int
  init_scheme: str = "torch"  # as the decoder's
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def dense(width: int, name: str, dtype: Any = jnp.float32) -> nn.Module:
      bias_init = layers.linear_bias(self.width, zero=self.init_scheme != "torch")
      return nn.Dense(width, kernel_init=LINEAR, bias_init=bias_init, dtype=dtype, name=name)

    for i in range(2):
      x = jax.nn.relu(dense(self.width, f"fc{i}", self.dtype)(x))
    return jax.nn.sigmoid(dense(4, "fc2")(x.astype(jnp.float32)))
