"""CLIP's and SigLIP's text tower on packed rows: the texts of one row do not see each other."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grain_jax.models import layers

Array = jax.Array


def packed_mask(segments: Array) -> Array:
  """Block-diagonal mask of packed rows: bool [B, 1, L, L] from segments [B, L]."""
  return segments[:, None, :, None] == segments[:, None, None, :]


def packed_causal_mask(segments: Array) -> Array:
  """`packed_mask` of which a token sees itself and what stands before it."""
  length = segments.shape[-1]
  return packed_mask(segments) & jnp.tril(jnp.ones((length, length), bool))


class TextTransformer(nn.Module):
  """Causal transformer; the feature of a text is its last token's (Radford et al., 2021).

  Not `causal` it is SigLIP's (Zhai et al., ICCV 2023): tokens see those behind them too, and each
  text comes padded to the context, pads that are tokens like others (`tokenizing.make` pads).

  Initialised as CLIP does: tokens 0.02, positions 0.01, attention width^-0.5, residual outputs
  width^-0.5 (2 depth)^-0.5, first MLP layer (2 width)^-0.5.
  """

  vocab_size: int
  context: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float
  activation: str
  norm_eps: float
  causal: bool = True
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
      positions: i32 [B, L], position of the token within its text.
      ends: i32 [B, T], index in the row of each text's last token.

    Returns:
      [B, T, width], after the final LayerNorm; rows of absent texts are meaningless.
    """
    normal = nn.initializers.normal
    embedding = self.param("token_embedding", normal(0.02), (self.vocab_size, self.width))
    position = self.param("position_embedding", normal(0.01), (self.context, self.width))
    x = (jnp.take(embedding, tokens, axis=0) + jnp.take(position, positions, axis=0)).astype(
      self.dtype
    )
    mask = packed_causal_mask(segments) if self.causal else packed_mask(segments)
    x = self._blocks(layers.shard_batch(x), mask, ends)
    return layers.layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm")

  def _blocks(self, x: Array, mask: Array, ends: Array) -> Array:
    """All blocks, [B, L, D] -> [B, T, D]: the last of them for the tokens at `ends` alone."""
    normal, out = nn.initializers.normal, self.width**-0.5 * (2 * self.depth) ** -0.5
    blocks = layers.Stack(
      layers.Block,
      {
        "heads": self.heads,
        "hidden": round(self.width * self.mlp_ratio),
        "activation": self.activation,
        "norm_eps": self.norm_eps,
        "inits": (
          normal(self.width**-0.5),
          normal(out),
          normal((2 * self.width) ** -0.5),
          normal(out),
        ),
        "zero_biases": False,  # CLIP draws weights alone; the rest is as torch makes it
        "fused": self.fused,
        "part": "text tower",
        "dtype": self.dtype,
      },
      unroll=self.unroll,
      remat=self.remat,
    )
    if self.is_initializing():  # parameters of all blocks are one stack
      x, _ = blocks.create(self.depth, 1, name="blocks")(x, mask)
      return jnp.take_along_axis(x, ends[..., None], axis=1)
    params = self.variables["params"]["blocks"]
    if self.depth > 1:
      before, params = layers.split_stack(params, [self.depth - 1, 1])
      x, _ = blocks.apply(before, x, mask)
    x, _ = blocks.apply_block(jax.tree.map(lambda p: jnp.squeeze(p, 0), params), x, mask, ends)
    return x
