"""Softmax attention whose backward pass rematerialises the weights, in plain XLA or by cuDNN.

Dimensions: B batch, L tokens, H heads, D width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name

from grain_jax.models import elementwise, fused_attention

Array = jax.Array

RECOMPUTED_SCOPE = "computed_again"  # named scope of the product that the backward pass recomputes
SCOPE = "attend"  # named scope of what cuDNN does in one call
RESIDUAL_NAME = "attention_result"  # checkpoint_name of the residuals beside query, key, value


# The attention implementation of each part of the model: `implementations`.
_implementations: dict[str, str] = {}


def implementations() -> dict[str, str]:
  """{part of the model: which attention the programs traced so far use for it, and why}."""
  return dict(_implementations)


def summary() -> str:
  """'attention: ' and `implementations` in one line; '' where there is no GPU and so no choice."""
  if jax.default_backend() != "gpu":
    return ""
  return "attention: " + "; ".join(
    f"{part}: {what}" for part, what in sorted(_implementations.items())
  )


def record_implementation(part: str, what: str, *, refused: bool = False) -> None:
  """Records the implementation of a part of the model; warns where cuDNN refused."""
  if refused and what != _implementations.get(part):
    logging.warning("attention of the %s: %s", part, what)
  _implementations[part] = what


def attend(
  query: Array,
  key: Array,
  value: Array,
  *,
  mask: Array | None = None,
  bias: Array | None = None,
  scale: float | None = None,
  tokens: int | None = None,
  fused: str = "xla",
  part: str = "model",
) -> Array:
  """softmax(scale q k^T + bias) v, softmax in float32.

  Args:
    query: [B, Lq, H, D].
    key: [B, Lk, H, D].
    value: [B, Lk, H, D].
    mask: bool, broadcastable to [B, H, Lq, Lk]; false where attention is forbidden.
    bias: of the logits, of rank 4 and broadcastable to [B, H, Lq, Lk] (T5's relative positions);
      XLA alone.
    scale: of the logits, 1 / sqrt(D) by default; another one: XLA alone.
    tokens: of queries and keys, without a mask; what follows them is padding, which nothing sees.
    fused: config.model.attention: 'xla'; 'cudnn', or an error; 'auto' takes cuDNN where it can, for
      half precision on NVIDIA's GPUs.
    part: of the model, for messages.

  Returns:
    [B, Lq, H, D]; of padding meaningless.

  Raises:
    ValueError: 'cudnn' was asked for by name and is impossible; one line.
  """
  if mask is None and key.shape[1] == 1:  # the softmax over one key is 1
    return jnp.broadcast_to(value, query.shape)
  multiple = 0
  if bias is not None or scale is not None:
    _refuse_cudnn(fused, part)
  elif fused != "xla":
    multiple = _cudnn_multiple(query, key, mask, tokens, fused=fused, part=part)
  if multiple:
    return fused_attention.attend_sharded(query, key, value, mask, multiple=multiple, tokens=tokens)
  if tokens and tokens < key.shape[1]:
    mask = (jnp.arange(key.shape[1]) < tokens)[None, None, None]
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  written_out = elementwise.are_layers_written_out()
  with jax.named_scope(SCOPE):
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(_attend(scale, written_out, *heads_first, mask, bias), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_einsum(formula: str, a: Array, b: Array) -> Array:
  """einsum in float32, whose gradients are products of the inputs' own dtype."""
  return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _wide_einsum_backward(
  formula: str, inputs: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  a, b = inputs
  gradient = gradient.astype(a.dtype)
  (of_a,) = jax.linear_transpose(lambda a: jnp.einsum(formula, a, b), a)(gradient)
  (of_b,) = jax.linear_transpose(lambda b: jnp.einsum(formula, a, b), b)(gradient)
  return of_a, of_b


_wide_einsum.defvjp(
  lambda formula, a, b: (_wide_einsum(formula, a, b), (a, b)), _wide_einsum_backward
)


def few_queries(queries: int, heads: int, width: int, keys: int) -> bool:
  """Whether `attend_memory` has less to do than projecting every key and value."""
  return keys > 1 and 2 * queries * heads <= width


def attend_memory(
  query: Array,
  memory: Array,
  key_kernel: Array,
  value_kernel: Array,
  value_bias: Array,
  *,
  mask: Array | None = None,
  tokens: int | None = None,
  drop: Callable[[Array], Array] | None = None,
) -> Array:
  """Attention of few queries to many tokens, of which no key and no value is computed.

  By associativity q (m K)^T = (q K^T) m^T and w (m V) = (w m) V, so that the projections act on
  Lq H vectors instead of L. The key's bias adds the same to all logits of a query and changes
  nothing.

  Args:
    query: [B, Lq, H, D], projected.
    memory: [B, L, E].
    key_kernel: [E, H, D].
    value_kernel: [E, H, D].
    value_bias: [H, D].
    mask: bool, broadcastable to [B, H, Lq, L]; false where attention is forbidden.
    tokens: of memory; what follows them is padding. None: all.
    drop: dropout of the attention weights.

  Returns:
    [B, Lq, H, D], the softmax in float32.
  """
  asked = jnp.einsum("bqhd,ehd->bhqe", query, key_kernel)
  logits = _wide_einsum("bhqe,ble->bhql", asked, memory)
  logits = checkpoint_name(logits, elementwise.PRODUCT_NAME) * query.shape[-1] ** -0.5
  if tokens and tokens < memory.shape[1]:
    mask = jnp.arange(memory.shape[1]) < tokens
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits)
  weights = weights if drop is None else drop(weights)
  read = jnp.einsum("bhql,ble->bhqe", weights.astype(memory.dtype), memory)
  out = jnp.einsum("bhqe,ehd->bqhd", read, value_kernel)
  total = 1.0 if drop is None else jnp.swapaxes(jnp.sum(weights, -1, keepdims=True), 1, 2)
  return (out.astype(jnp.float32) + total * value_bias).astype(out.dtype)


def _refuse_cudnn(fused: str, part: str) -> None:
  """Raises where cuDNN was asked for by name; what has a bias or its own scale goes by XLA."""
  if fused == "cudnn":
    raise ValueError(
      f"config.model.attention = 'cudnn' is impossible for the {part}, whose logits have relative "
      "positions and no scale (T5). Set it to 'auto'."
    )
  if fused == "auto":
    record_implementation(part, "XLA (relative positions)")


def _cudnn_multiple(
  query: Array, key: Array, mask: Array | None, tokens: int | None, *, fused: str, part: str
) -> int:
  """To which multiple lengths are padded for cuDNN; 0: XLA's form is to be taken."""
  why = fused_attention.unavailable()
  if not why and query.dtype not in (jnp.bfloat16, jnp.float16):
    why = f"{query.dtype}"
  result = fused_attention.ProbeResult(0, why)
  if not why:
    result = fused_attention.probe(query, key, mask, tokens)
  if result.multiple:
    lengths = sorted({query.shape[1], key.shape[1]}, reverse=True)
    padded = [fused_attention.pad_to(length, result.multiple) for length in lengths]
    lengths = [tokens] if tokens else lengths
    text = " and ".join(map(str, lengths))
    text += "" if padded == lengths else f" padded to {' and '.join(map(str, padded))}"
    record_implementation(part, f"cuDNN, {text} tokens")
    return result.multiple
  if fused == "cudnn":
    raise ValueError(
      f"config.model.attention = 'cudnn' is impossible for the {part} ({query.dtype}, "
      f"{query.shape[1]} queries and {key.shape[1]} keys of {query.shape[-1]}): {result.refusal}. "
      "Set it to 'auto'."
    )
  record_implementation(
    part, f"XLA ({'' if why else 'cuDNN refuses: '}{result.refusal})", refused=not why
  )
  return 0


def _logits(
  scale: float, query: Array, key: Array, mask: Array | None, bias: Array | None
) -> Array:
  """Scaled, biased and masked logits, [B, H, Lq, Lk] float32."""
  logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
  logits = logits * scale
  logits = logits if bias is None else logits + bias.astype(jnp.float32)
  return logits if mask is None else jnp.where(mask, logits, jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
  scale: float,
  written_out: bool,
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  bias: Array | None,
) -> Array:
  """Attention of heads-first arrays [B, H, L, D]; `written_out`: `elementwise.compute_again`."""
  return _forward(scale, written_out, query, key, value, mask, bias)[0]


def _forward(
  scale: float,
  written_out: bool,
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  bias: Array | None,
) -> tuple[Array, tuple]:
  """Result and residuals: never the weights, which are the largest arrays of a block.

  Instead of them the logarithm of the softmax's denominator, [B, H, Lq, 1], is kept, as in
  FlashAttention (Dao et al., NeurIPS 2022, appendix B).
  """
  logits = _logits(scale, query, key, mask, bias)
  top = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = jnp.einsum(
    "bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  out = checkpoint_name((out / total).astype(value.dtype), RESIDUAL_NAME)
  log_total = checkpoint_name(top + jnp.log(total), RESIDUAL_NAME)
  return out, (query, key, value, mask, bias, out, log_total)


def _backward(
  scale: float, written_out: bool, residuals: tuple, gradient: Array
) -> tuple[Array, Array, Array, None, Array | None]:
  query, key, value, mask, bias, out, log_total = residuals
  query, key, gradient = elementwise.compute_again(written_out, query, key, gradient)
  with jax.named_scope(RECOMPUTED_SCOPE):
    weights = jnp.exp(_logits(scale, query, key, mask, bias) - log_total)
  # Summed in float32 and rounded once to their inputs' dtype, as a float32 product would be.
  product = functools.partial(jnp.einsum, preferred_element_type=query.dtype)
  value_gradient = product("bhqk,bhqd->bhkd", weights.astype(value.dtype), gradient)
  # Of the softmax: dL/ds = w (dL/dw - sum over keys of w dL/dw), and that sum is <dL/do, o>.
  mean = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
  weights_gradient = jnp.einsum(
    "bhqd,bhkd->bhqk", gradient, value, preferred_element_type=jnp.float32
  )
  logits_gradient = weights * (weights_gradient - mean)
  bias_gradient = None
  if bias is not None:
    repeated = tuple(i for i, size in enumerate(bias.shape) if size < logits_gradient.shape[i])
    bias_gradient = jnp.sum(logits_gradient, repeated, keepdims=True).astype(bias.dtype)
  logits_gradient = (logits_gradient * scale).astype(query.dtype)
  query_gradient = product("bhqk,bhkd->bhqd", logits_gradient, key)
  key_gradient = product("bhqk,bhqd->bhkd", logits_gradient, query)
  return query_gradient, key_gradient, value_gradient, None, bias_gradient


_attend.defvjp(_forward, _backward)
