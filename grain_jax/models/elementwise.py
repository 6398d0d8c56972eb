"""LayerNorm and activations whose backward passes keep their input alone, in its own dtype.

Differentiated as they are written, they keep float32 copies of what lies between: of LayerNorm the
deviations and the normalised values, of GELU the argument and the value of its error function.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def quick_gelu(x: Array) -> Array:
  """x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


_written_out = contextvars.ContextVar("written_out", default=False)


@contextlib.contextmanager
def layers_written_out() -> Iterator[None]:
  """Around the trace of layers that are no body of a loop: see `compute_again`."""
  token = _written_out.set(True)
  try:
    yield
  finally:
    _written_out.reset(token)


def are_layers_written_out() -> bool:
  return _written_out.get()


def compute_again(written_out: bool, *arrays: Array) -> tuple[Array, ...]:
  """The arrays, from which what is computed is not found to be the same as in the forward pass.

  Where layers are written out, the compiler otherwise keeps the forward pass's values, all layers'
  at once, instead of computing them a second time. In the body of a loop it cannot, and a barrier
  would only keep it from fusing.
  """
  return jax.lax.optimization_barrier(arrays) if written_out else arrays


def keeping_input(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
  """The function of one array, whose backward pass computes again all that it needs of it."""

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def keeping(written_out: bool, x: Array) -> Array:
    return function(x)

  def backward(written_out: bool, x: Array, gradient: Array) -> tuple[Array]:
    x, gradient = compute_again(written_out, x, gradient)
    return jax.vjp(function, x)[1](gradient)

  keeping.defvjp(lambda written_out, x: (function(x), x), backward)
  return lambda x: keeping(are_layers_written_out(), x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": keeping_input(functools.partial(jax.nn.gelu, approximate=False)),
  "gelu_tanh": keeping_input(functools.partial(jax.nn.gelu, approximate=True)),
  "quick_gelu": keeping_input(quick_gelu),
  "relu": jax.nn.relu,
}


class LayerNorm(nn.Module):
  """LayerNorm over the last axis (Ba et al., arXiv 1607.06450), computed in float32.

  `scale` and `bias` are float32 [D], as those of flax.linen.LayerNorm.
  """

  epsilon: float
  dtype: Any = jnp.float32  # of the result

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., D] -> [..., D]."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
    return normalize(self.epsilon, jnp.dtype(self.dtype), x, scale, bias)


def normalize(epsilon: float, dtype: jnp.dtype, x: Array, scale: Array, bias: Array) -> Array:
  """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in `dtype`."""
  return _normalize(epsilon, dtype, are_layers_written_out(), x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normalize(
  epsilon: float, dtype: jnp.dtype, written_out: bool, x: Array, scale: Array, bias: Array
) -> Array:
  return _forward(epsilon, dtype, written_out, x, scale, bias)[0]


def _forward(
  epsilon: float, dtype: jnp.dtype, written_out: bool, x: Array, scale: Array, bias: Array
) -> tuple[Array, tuple[Array, ...]]:
  wide = x.astype(jnp.float32)
  mean = jnp.mean(wide, -1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide - mean), -1, keepdims=True) + epsilon)
  y = (wide - mean) * inverse * scale + bias
  return y.astype(dtype), (x, mean, inverse, scale)


def _backward(
  epsilon: float,
  dtype: jnp.dtype,
  written_out: bool,
  residuals: tuple[Array, ...],
  gradient: Array,
) -> tuple[Array, Array, Array]:
  x, mean, inverse, scale = residuals
  x, gradient = compute_again(written_out, x, gradient)
  normal = (x.astype(jnp.float32) - mean) * inverse
  gradient = gradient.astype(jnp.float32)
  rows = tuple(range(x.ndim - 1))
  scale_gradient, bias_gradient = jnp.sum(gradient * normal, rows), jnp.sum(gradient, rows)
  inner = gradient * scale
  offset = jnp.mean(inner, -1, keepdims=True)
  slope = jnp.mean(inner * normal, -1, keepdims=True)
  x_gradient = inverse * (inner - offset - normal * slope)
  return x_gradient.astype(x.dtype), scale_gradient.astype(scale.dtype), bias_gradient


_normalize.defvjp(_forward, _backward)
