"""Layers that the towers and the decoder share: normalisation, attention, MLP, a stack of blocks.

Dimensions: B batch, L tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Array = jax.Array
Initializer = Callable[..., Array]

# What the backward pass computes again: nothing; all but matrix products; all but the matrix
# products with parameters; every block.
REMAT = ("none", "elementwise", "attention", "block")
_POLICIES = {
  "elementwise": jax.checkpoint_policies.dots_saveable,
  "attention": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "block": None,
}


def quick_gelu(x: Array) -> Array:
  """x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "quick_gelu": quick_gelu,
  "relu": jax.nn.relu,
}


def layer_norm(x: Array, *, epsilon: float, dtype: Any, name: str) -> Array:
  """LayerNorm over the last axis, computed in float32, returned in `dtype`; for compact modules."""
  norm = nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)
  return norm(x).astype(dtype)


def _has_cudnn(x: Array) -> bool:
  """Whether cuDNN's fused attention takes such arrays: half precision on a GPU."""
  return jax.default_backend() == "gpu" and x.dtype in (jnp.bfloat16, jnp.float16)


def shard_batch(x: Array) -> Array:
  """Fixes the layout of activations [B, ...] under `jax.set_mesh`: the batch is cut, nothing else.

  Without it the compiler may follow the parameters' layout and cut the width instead.
  """
  axes = tuple(a for a in ("data", "fsdp") if a in jax.sharding.get_abstract_mesh().axis_names)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


class Attention(nn.Module):
  """Multi-head attention with optional QK-norm (LayerNorm on each head's queries and keys).

  softmax(q k^T / sqrt(D / H)) v, with the softmax in float32. `fused` is config.model.attention.
  """

  heads: int
  kernel_init: Initializer
  out_init: Initializer
  qk_norm_eps: float | None = None
  dropout: float = 0.0
  fused: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    deterministic: bool = True,
  ) -> Array:
    """Attends from each query token to the key tokens.

    Args:
      query: [B, Lq, D].
      key: [B, Lk, D].
      value: [B, Lk, D].
      mask: bool, broadcastable to [B, H, Lq, Lk]; false where attention is forbidden.
      deterministic: no dropout of attention weights.

    Returns:
      [B, Lq, D].
    """
    width = query.shape[-1]

    def project(name: str, x: Array) -> Array:
      y = nn.Dense(width, kernel_init=self.kernel_init, dtype=self.dtype, name=name)(x)
      return y.reshape(*x.shape[:-1], self.heads, width // self.heads)

    q, k, v = project("query", query), project("key", key), project("value", value)
    if self.qk_norm_eps is not None:
      q = layer_norm(q, epsilon=self.qk_norm_eps, dtype=self.dtype, name="query_norm")
      k = layer_norm(k, epsilon=self.qk_norm_eps, dtype=self.dtype, name="key_norm")
    if self.dropout and not deterministic:
      logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
      logits = logits * (width // self.heads) ** -0.5
      if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
      weights = nn.Dropout(self.dropout, deterministic=False)(jax.nn.softmax(logits))
      out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(self.dtype), v)
    else:
      fused = self.fused == "cudnn" or (self.fused == "auto" and mask is None and _has_cudnn(q))
      out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, implementation="cudnn" if fused else "xla"
      )
    out = out.reshape(*query.shape[:-1], width)
    return nn.Dense(width, kernel_init=self.out_init, dtype=self.dtype, name="out")(out)


class Mlp(nn.Module):
  """Linear(hidden) -> activation -> dropout -> Linear(D)."""

  hidden: int
  activation: str
  fc1_init: Initializer
  fc2_init: Initializer
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, deterministic: bool = True) -> Array:
    y = nn.Dense(self.hidden, kernel_init=self.fc1_init, dtype=self.dtype, name="fc1")(x)
    y = ACTIVATIONS[self.activation](y)
    if self.dropout:
      y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
    return nn.Dense(x.shape[-1], kernel_init=self.fc2_init, dtype=self.dtype, name="fc2")(y)


class Block(nn.Module):
  """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

  The block of both towers. Its call has the form that `nn.scan` asks for: (carry, mask) ->
  (carry, None). With `at`, i32 [B, T], only the tokens in these columns come out, [B, T, D]: they
  attend to all of x, and the others cost keys and values alone.
  """

  heads: int
  hidden: int
  activation: str
  norm_eps: float
  inits: tuple[Initializer, Initializer, Initializer, Initializer]  # attention in, out, fc1, fc2
  qk_norm: bool = False
  fused: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mask: Array | None, at: Array | None = None) -> tuple[Array, None]:
    attention_in, attention_out, fc1, fc2 = self.inits
    y = query = layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm1")
    if at is not None:
      x, query = (jnp.take_along_axis(z, at[..., None], axis=1) for z in (x, y))
      mask = None if mask is None else jnp.take_along_axis(mask, at[:, None, :, None], axis=2)
    x = x + Attention(
      self.heads,
      attention_in,
      attention_out,
      qk_norm_eps=self.norm_eps if self.qk_norm else None,
      fused=self.fused,
      dtype=self.dtype,
      name="attention",
    )(query, y, y, mask=mask)
    y = layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm2")
    x = x + Mlp(self.hidden, self.activation, fc1, fc2, dtype=self.dtype, name="mlp")(y)
    return x, None


def rematerialize(block: type[nn.Module], remat: str, *, scanned: bool = True) -> type[nn.Module]:
  """The module class with a part of its values computed again in the backward pass.

  Args:
    block: module class.
    remat: one of REMAT.
    scanned: it is the body of a scan, where nothing need stop the compiler from merging the two
      computations.
  """
  if remat not in REMAT:
    raise ValueError(f"config.model.remat = {remat!r} is unknown. Choose one of {REMAT}.")
  if remat == "none":
    return block
  return nn.remat(block, prevent_cse=not scanned, policy=_POLICIES[remat])


def stack(
  block: type[nn.Module], depth: int, *, unroll: int, remat: str, broadcast: int
) -> Callable[..., nn.Module]:
  """`depth` equal blocks as one scan; parameters carry a leading layer axis.

  Args:
    block: module class whose call is (carry, *broadcast) -> (carry, output of the layer).
    depth: number of layers.
    unroll: layers per iteration; -1 unrolls all.
    remat: what the backward pass computes again: one of REMAT.
    broadcast: number of arguments after the carry, equal for all layers.

  Returns:
    A constructor with the block's own arguments.
  """
  return nn.scan(
    rematerialize(block, remat, scanned=0 < unroll < depth),
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(nn.broadcast,) * broadcast,
    length=depth,
    unroll=depth if unroll < 0 else unroll,
  )
