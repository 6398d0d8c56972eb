"""Multi-head attention pooling: one vector of an image's tokens, asked for by a learned probe."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grain_jax.models import elementwise, layers

Array = jax.Array

XAVIER = nn.initializers.xavier_uniform()


class AttentionPooling(nn.Module):
  """x = attention(probe, tokens, tokens); x + MLP(LayerNorm(x)).

  The MAP head (Lee et al., Set Transformer, ICML 2019; Zhai et al., "Scaling Vision Transformers",
  CVPR 2022), as SigLIP has it. Initialised as there: Xavier uniform, zero biases.
  """

  width: int
  heads: int
  hidden: int  # units of the MLP
  activation: str
  norm_eps: float
  fused: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    """[B, L, D] -> [B, D]."""
    probe = self.param("probe", XAVIER, (1, 1, self.width))
    probe = jnp.broadcast_to(probe.astype(self.dtype), (len(tokens), 1, self.width))
    x, bias = layers.Attention(
      self.heads, XAVIER, XAVIER,
      fused=self.fused, part="pooling", dtype=self.dtype, name="attention",
    )(probe, tokens, tokens)  # fmt: skip
    x = x + bias.astype(self.dtype)
    y = layers.layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm")
    mlp = layers.Mlp(self.hidden, self.activation, XAVIER, XAVIER, dtype=self.dtype, name="mlp")
    return elementwise.add_residual(x, *mlp(y))[:, 0]


def pool_tokens(
  tokens: Array, pool: str, *, includes_class: bool, class_token: bool = True
) -> Array:
  """One vector of an image's tokens: [..., 1 + patches, D], class token first -> [..., D].

  Args:
    tokens: of the image tower.
    pool: 'class' token, or 'max' or 'mean' over tokens (CLIPpy, arXiv 2210.09996, sec. 3.2).
    includes_class: 'max' and 'mean' see the class token too.
    class_token: there is one; else [..., patches, D].
  """
  if pool == "class":
    return tokens[..., 0, :]
  seen = tokens if includes_class or not class_token else tokens[..., 1:, :]
  if pool == "mean":
    return jnp.mean(seen, axis=-2)
  # The gradient of `jnp.max` asks which entries equal the largest, and is 0/0 where none does: a
  # compiler may have computed them twice, with other rounding. The place of the largest has no such
  # question; the first one of equals takes it all, as of torch.max.
  place = jnp.argmax(jax.lax.stop_gradient(seen), axis=-2)
  here = jnp.arange(seen.shape[-2])[:, None] == place[..., None, :]
  return jnp.sum(jnp.where(here, seen, 0), axis=-2)
