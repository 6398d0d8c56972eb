"""Softmax attention whose backward pass computes the weights again, in plain XLA or by cuDNN.

Dimensions: B batch, L tokens, H heads, D width of a head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name

from grain_jax.models import fused_attention

Array = jax.Array

AGAIN = "computed_again"  # scope of the one product that the backward pass repeats
SAVED = "attention_result"  # name of what it needs beside queries, keys and values


# What was taken for which part of the model, by its name: `taken`.
_taken: dict[str, str] = {}


def taken() -> dict[str, str]:
  """{part of the model: which attention the programs traced so far use for it, and why}."""
  return dict(_taken)


def summary() -> str:
  """`taken` in one line."""
  return "; ".join(f"{part}: {what}" for part, what in sorted(_taken.items()))


def note(part: str, what: str, *, refused: bool = False) -> None:
  """Keeps what was taken for a part of the model; says it where something was refused."""
  if refused and what != _taken.get(part):
    logging.warning("attention of the %s: %s", part, what)
  _taken[part] = what


def attend(
  query: Array,
  key: Array,
  value: Array,
  *,
  mask: Array | None = None,
  fused: str = "xla",
  part: str = "model",
) -> Array:
  """softmax(q k^T / sqrt(D)) v, softmax in float32.

  Args:
    query: [B, Lq, H, D].
    key: [B, Lk, H, D].
    value: [B, Lk, H, D].
    mask: bool, broadcastable to [B, H, Lq, Lk]; false where attention is forbidden.
    fused: config.model.attention: 'xla'; 'cudnn', or an error; 'auto' takes cuDNN where it can, for
      unmasked half precision on NVIDIA's GPUs.
    part: of the model, for messages.

  Returns:
    [B, Lq, H, D].

  Raises:
    ValueError: 'cudnn' was asked for by name and is impossible; one line.
  """
  if mask is None and key.shape[1] == 1:  # the softmax over one key is 1
    return jnp.broadcast_to(value, query.shape)
  multiple = 0 if fused == "xla" else _cudnn_multiple(query, key, mask, fused=fused, part=part)
  if multiple:
    return fused_attention.sharded(query, key, value, mask, multiple=multiple)
  heads_first = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  return jnp.swapaxes(_attend(*heads_first, mask), 1, 2)


def _cudnn_multiple(query: Array, key: Array, mask: Array | None, *, fused: str, part: str) -> int:
  """To which multiple lengths are padded for cuDNN; 0: XLA's form is to be taken."""
  why = fused_attention.unavailable()
  if not why and query.dtype not in (jnp.bfloat16, jnp.float16):
    why = f"{query.dtype}"
  if not why and mask is not None and fused == "auto":
    why = "masked"
  answer = fused_attention.Answer(0, why) if why else fused_attention.ask(query, key, mask)
  if answer.multiple:
    lengths = sorted({query.shape[1], key.shape[1]}, reverse=True)
    padded = [fused_attention.pad_to(length, answer.multiple) for length in lengths]
    text = " and ".join(map(str, lengths))
    text += "" if padded == lengths else f" padded to {' and '.join(map(str, padded))}"
    note(part, f"cuDNN, {text} tokens")
    return answer.multiple
  if fused == "cudnn":
    raise ValueError(
      f"config.model.attention = 'cudnn' is impossible for the {part} ({query.dtype}, "
      f"{query.shape[1]} queries and {key.shape[1]} keys of {query.shape[-1]}): {answer.refusal}. "
      "Set it to 'auto'."
    )
  note(part, f"XLA ({'' if why else 'cuDNN refuses: '}{answer.refusal})", refused=not why)
  return 0


def _logits(query: Array, key: Array, mask: Array | None) -> Array:
  """Scaled and masked, [B, H, Lq, Lk] float32."""
  logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
  logits = logits * query.shape[-1] ** -0.5
  return logits if mask is None else jnp.where(mask, logits, jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp)
def _attend(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
  """Of [B, H, L, D]."""
  return _forward(query, key, value, mask)[0]


def _forward(query: Array, key: Array, value: Array, mask: Array | None) -> tuple[Array, tuple]:
  """Result and residuals: never the weights, which are the largest arrays of a block.

  Instead of them the logarithm of the softmax's denominator, [B, H, Lq, 1], is kept, as in
  FlashAttention (Dao et al., NeurIPS 2022, appendix B).
  """
  logits = _logits(query, key, mask)
  top = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = jnp.einsum(
    "bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  out = checkpoint_name((out / total).astype(value.dtype), SAVED)
  log_total = checkpoint_name(top + jnp.log(total), SAVED)
  return out, (query, key, value, mask, out, log_total)


def _backward(residuals: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
  query, key, value, mask, out, log_total = residuals
  with jax.named_scope(AGAIN):
    weights = jnp.exp(_logits(query, key, mask) - log_total)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  of_value = product("bhqk,bhqd->bhkd", weights.astype(value.dtype), gradient)
  # Of the softmax: dL/ds = w (dL/dw - sum over keys of w dL/dw), and that sum is <dL/do, o>.
  mean = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
  of_logits = weights * (product("bhqd,bhkd->bhqk", gradient, value) - mean)
  of_logits = (of_logits * query.shape[-1] ** -0.5).astype(query.dtype)
  of_query = product("bhqk,bhkd->bhqd", of_logits, key)
  of_key = product("bhqk,bhqd->bhkd", of_logits, query)
  return of_query.astype(query.dtype), of_key.astype(key.dtype), of_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)
