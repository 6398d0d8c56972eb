"""Layers that the towers and the decoder share: normalisation, attention, MLP, a stack of blocks.

Dimensions: B batch, L tokens, D width, H heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from grain_jax import config as configs
from grain_jax.models import attention, elementwise, fused_attention

Array = jax.Array
Initializer = Callable[..., Array]

# What the backward pass rematerialises: nothing; all but matrix products; all but the matrix
# products with parameters; every block.
REMAT = configs.CHOICES["model.remat"]


def _matrix_products_saveable(primitive: Any, *args: Any, **params: Any) -> bool:
  """Checkpoint policy: saves matrix products, and cuDNN's attention, which has two."""
  fused = primitive.name.startswith("dot_product_attention_fwd")
  return fused or jax.checkpoint_policies.dots_saveable(primitive, *args, **params)


_POLICIES = {
  "elementwise": jax.checkpoint_policies.save_from_both_policies(
    _matrix_products_saveable,
    jax.checkpoint_policies.save_only_these_names(
      attention.RESIDUAL_NAME, elementwise.PRODUCT_NAME
    ),
  ),
  "attention": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(elementwise.PRODUCT_NAME),
  ),
  "block": None,
}


def norm(epsilon: float, dtype: Any, name: str) -> elementwise.LayerNorm:
  """LayerNorm over the last axis, computed in float32, returned in `dtype`; for compact modules."""
  return elementwise.LayerNorm(epsilon, dtype, name=name)


def layer_norm(x: Array, *, epsilon: float, dtype: Any, name: str) -> Array:
  """LayerNorm over the last axis, computed in float32, returned in `dtype`; for compact modules."""
  return elementwise.LayerNorm(epsilon, dtype, name=name)(x)


def shard_batch(x: Array) -> Array:
  """Fixes the layout of activations [B, ...] under `jax.set_mesh`: sharded over the batch alone.

  Without it the compiler may follow the parameters' layout and shard the width instead.
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
  tokens: int | None = None  # of keys, and of as many queries; what follows is padding
  fused: str = "xla"
  part: str = "model"  # part of the model, for messages
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
  ) -> tuple[Array, Array]:
    """Attends from each query token to the key tokens.

    Args:
      query: [B, Lq, D].
      key: [B, Lk, D].
      value: [B, Lk, D].
      mask: bool, broadcastable to [B, H, Lq, Lk]; false where attention is forbidden.
      deterministic: no dropout of attention weights.

    Returns:
      The last product, [B, Lq, D], and its bias, [D], apart: see `Linear`.
    """
    width = query.shape[-1]

    inputs = {"query": query, "key": key, "value": value}
    linear = {
      name: Linear(width, self.kernel_init, dtype=self.dtype, name=name).parameters(x.shape[-1])
      for name, x in inputs.items()
    }
    if (
      key is value
      and query is not key
      and self.qk_norm_eps is None
      and attention.few_queries(query.shape[1], self.heads, width, key.shape[1])
    ):
      out = self._read(query, key, linear, mask=mask, deterministic=deterministic)
      return Linear(width, self.out_init, dtype=self.dtype, name="out")(out)
    projected = {}
    for x in {id(x): x for x in inputs.values()}.values():  # projections of one array go together
      names = [name for name in inputs if inputs[name] is x]
      kernels, biases = zip(*(linear[name] for name in names), strict=True)
      kernels = tuple(kernel.astype(self.dtype) for kernel in kernels)
      products = elementwise.project(x.astype(self.dtype), kernels, biases)
      projected |= dict(zip(names, products, strict=True))

    def split(x: Array) -> Array:
      return fused_attention.pin_layout(x.reshape(*x.shape[:-1], self.heads, width // self.heads))

    q, k, v = (split(projected[name]) for name in ("query", "key", "value"))
    if self.qk_norm_eps is not None:
      q = layer_norm(q, epsilon=self.qk_norm_eps, dtype=self.dtype, name="query_norm")
      k = layer_norm(k, epsilon=self.qk_norm_eps, dtype=self.dtype, name="key_norm")
    if self.dropout and not deterministic:
      attention.record_implementation(self.part, "XLA (dropout)")
      logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
      logits = logits * (width // self.heads) ** -0.5
      if self.tokens:
        mask = jnp.arange(k.shape[1]) < self.tokens
      if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
      weights = nn.Dropout(self.dropout, deterministic=False)(jax.nn.softmax(logits))
      out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(self.dtype), v)
    else:
      # Parameters do not depend on how attention is computed.
      fused = "xla" if self.is_initializing() else self.fused
      out = attention.attend(q, k, v, mask=mask, tokens=self.tokens, fused=fused, part=self.part)
    out = out.reshape(*query.shape[:-1], width)
    return Linear(width, self.out_init, dtype=self.dtype, name="out")(out)

  def _read(
    self,
    query: Array,
    memory: Array,
    linear: Mapping[str, tuple[Array, Array]],
    *,
    mask: Array | None,
    deterministic: bool,
  ) -> Array:
    """`attention.attend_memory` on query [B, Lq, D] and memory [B, L, D] -> [B, Lq, D]."""
    attention.record_implementation(self.part, "XLA (few queries: no keys, no values)")
    width = query.shape[-1]
    shape = self.heads, width // self.heads
    kernel, bias = linear["query"]
    query, kernel = query.astype(self.dtype), kernel.astype(self.dtype)
    (projected,) = elementwise.project(query, (kernel,), (bias,))
    key_kernel, value_kernel = (
      linear[name][0].astype(self.dtype).reshape(-1, *shape) for name in ("key", "value")
    )
    drop = None
    if self.dropout and not deterministic:
      drop = nn.Dropout(self.dropout, deterministic=False)
    out = attention.attend_memory(
      projected.reshape(*query.shape[:-1], *shape),
      memory.astype(self.dtype),
      key_kernel,
      value_kernel,
      linear["value"][1].reshape(shape),
      mask=mask,
      tokens=self.tokens,
      drop=drop,
    )
    return out.reshape(query.shape)


def linear_bias(fan_in: int, *, zero: bool = False) -> Initializer:
  """Biases of a linear layer: torch.nn.Linear's U(-1/sqrt(fan_in), 1/sqrt(fan_in)), or zeros."""
  if zero:
    return nn.initializers.zeros

  def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

  return init


class Linear(nn.Module):
  """A linear layer whose product and bias come apart; parameters are those of flax's Dense."""

  features: int
  kernel_init: Initializer
  bias_init: Initializer = nn.initializers.zeros
  dtype: Any = jnp.float32

  def __call__(self, x: Array) -> tuple[Array, Array]:
    """[..., D] -> x times the kernel, [..., features], and the bias, [features]."""
    kernel, bias = self.parameters(x.shape[-1])
    return elementwise.product(x.astype(self.dtype), kernel.astype(self.dtype)), bias

  @nn.compact
  def parameters(self, width: int) -> tuple[Array, Array]:
    """The kernel, [width, features], and the bias, [features], in float32."""
    kernel = self.param("kernel", self.kernel_init, (width, self.features))
    return kernel, self.param("bias", self.bias_init, (self.features,))


class Mlp(nn.Module):
  """Linear(hidden) -> activation -> dropout -> Linear(D); biases start as `linear_bias`."""

  hidden: int
  activation: str
  fc1_init: Initializer
  fc2_init: Initializer
  zero_biases: bool = True
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, deterministic: bool = True) -> tuple[Array, Array]:
    """[..., D] -> the last product, [..., D], and its bias, [D], apart: see `Linear`."""

    def linear(features: int, init: Initializer, name: str, fan_in: int) -> Linear:
      bias_init = linear_bias(fan_in, zero=self.zero_biases)
      return Linear(features, init, bias_init, dtype=self.dtype, name=name)

    width = x.shape[-1]
    y, bias = linear(self.hidden, self.fc1_init, "fc1", width)(x)
    y = elementwise.activate(self.activation, y, bias)
    if self.dropout:
      y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
    return linear(width, self.fc2_init, "fc2", self.hidden)(y)


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
  zero_biases: bool = True  # of the MLP, at first
  qk_norm: bool = False
  tokens: int | None = None  # of each row; what follows is padding
  fused: str = "xla"
  part: str = "model"  # part of the model, for messages
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mask: Array | None, at: Array | None = None) -> tuple[Array, None]:
    attention_in, attention_out, fc1, fc2 = self.inits
    x = fused_attention.pin_layout(x)
    x, y = norm(self.norm_eps, self.dtype, "norm1").keep(x)
    query = y
    if at is not None:
      x, query = (jnp.take_along_axis(z, at[..., None], axis=1) for z in (x, y))
      mask = None if mask is None else jnp.take_along_axis(mask, at[:, None, :, None], axis=2)
    branch = Attention(
      self.heads,
      attention_in,
      attention_out,
      qk_norm_eps=self.norm_eps if self.qk_norm else None,
      tokens=self.tokens,
      fused=self.fused,
      part=self.part if at is None else f"{self.part}, last layer",
      dtype=self.dtype,
      name="attention",
    )(query, y, y, mask=mask)
    x, y = norm(self.norm_eps, self.dtype, "norm2").keep(x, branch)
    mlp = Mlp(
      self.hidden, self.activation, fc1, fc2, self.zero_biases, dtype=self.dtype, name="mlp"
    )
    x = fused_attention.pin_layout(elementwise.add_residual(x, *mlp(y)))
    return x, None


def rematerialize(block: type[nn.Module], remat: str, *, scanned: bool = True) -> type[nn.Module]:
  """The module class, with its values rematerialised in the backward pass as `remat` says.

  Args:
    block: module class.
    remat: one of REMAT.
    scanned: it is the body of a scan, where nothing need stop the compiler from merging the two
      computations.
  """
  configs.check_choice("model.remat", remat)
  if remat == "none":
    return block
  return nn.remat(block, prevent_cse=not scanned, policy=_POLICIES[remat])


def split_stack(params: Any, sizes: Sequence[int]) -> list[Any]:
  """Splits stacked parameters [layers, ...] into stacks of so many layers.

  One split, whose gradient is one concatenation; slices would each pad to the whole stack.
  """
  leaves, structure = jax.tree.flatten(params)
  stacks = zip(*(jax.lax.split(leaf, sizes) for leaf in leaves), strict=True)
  return [structure.unflatten(stack) for stack in stacks]


@dataclasses.dataclass(frozen=True)
class Stack:
  """Equal blocks one after another; their parameters carry a leading layer axis.

  The block's call is (carry, *broadcast) -> (carry, output of the layer). The stack's is the same,
  with the outputs of all layers stacked. Layers run as a scan or, with `unroll` = -1, written out:
  longer to compile, but nothing that the backward pass needs is then stacked over layers.
  """

  block: type[nn.Module]
  arguments: Mapping[str, Any]  # of the block
  unroll: int = 1  # layers per iteration of the scan; -1: no scan
  remat: str = "none"  # what the backward pass rematerialises: one of REMAT

  def create(self, depth: int, broadcast: int, *, name: str) -> nn.Module:
    """The submodule that initialises the parameters of all blocks, within a compact method."""
    return nn.scan(
      self.block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(nn.broadcast,) * broadcast,
      length=depth,
    )(**self.arguments, name=name)

  def apply(
    self, params: Any, carry: Array, *broadcast: Any, dropout_key: Array | None = None
  ) -> tuple[Array, Any]:
    """Runs the blocks on parameters [layers, ...], as many as there are."""
    depth = len(jax.tree.leaves(params)[0])
    keys = None if dropout_key is None else jax.random.split(dropout_key, depth)
    scanned = 0 < self.unroll < depth
    if scanned:

      def scan_body(carry: Array, layer: tuple[Any, Array | None]) -> tuple[Array, Any]:
        params, key = layer
        return self.apply_block(params, carry, *broadcast, dropout_key=key, scanned=True)

      return jax.lax.scan(scan_body, carry, (params, keys), unroll=self.unroll)

    @jax.jit  # traced and lowered once and not once a layer; the compiler writes the calls out
    def run_layer(params: Any, key: Array | None, carry: Array, *inputs: Any) -> tuple[Array, Any]:
      with elementwise.layers_written_out(rematerialized=self.remat != "none"):
        return self.apply_block(params, carry, *inputs, dropout_key=key)

    outputs = []
    for i, layer in enumerate(split_stack(params, [1] * depth)):
      layer = jax.tree.map(lambda p: jnp.squeeze(p, 0), layer)
      carry, output = run_layer(layer, None if keys is None else keys[i], carry, *broadcast)
      outputs.append(output)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)

  def apply_block(
    self,
    params: Any,
    carry: Array,
    *inputs: Any,
    dropout_key: Array | None = None,
    scanned: bool = False,
  ) -> tuple[Array, Any]:
    """Runs one block on its own parameters; `scanned`: as the body of a scan."""
    block = rematerialize(self.block, self.remat, scanned=scanned)(**self.arguments, parent=None)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return block.apply({"params": params}, carry, *inputs, rngs=rngs)
