"""LayerNorm and activations whose backward passes keep their input alone, in its own dtype.

Differentiated as they are written, they keep float32 copies of what lies between: of LayerNorm the
deviations and the normalised values, of GELU the argument and the value of its error function.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grain_jax.models import norm_kernels

Array = jax.Array


def quick_gelu(x: Array) -> Array:
  """x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


_written_out = contextvars.ContextVar("written_out", default=False)
_rematerialized = contextvars.ContextVar("rematerialized", default=False)


@contextlib.contextmanager
def layers_written_out(*, rematerialized: bool = False) -> Iterator[None]:
  """Around the trace of layers that are no body of a loop: see `compute_again`.

  `rematerialized`: a layer as a whole is under `jax.checkpoint`, which has a barrier of its own.
  """
  tokens = _written_out.set(True), _rematerialized.set(rematerialized)
  try:
    yield
  finally:
    _written_out.reset(tokens[0])
    _rematerialized.reset(tokens[1])


def are_layers_written_out() -> bool:
  return _written_out.get()


def compute_again(written_out: bool, *arrays: Array) -> tuple[Array, ...]:
  """The arrays, from which what is computed is not found to be the same as in the forward pass.

  Where layers are written out, the compiler otherwise keeps the forward pass's values, all layers'
  at once, instead of computing them a second time. In the body of a loop it cannot, and a barrier
  would only keep it from fusing.
  """
  return jax.lax.optimization_barrier(arrays) if written_out else arrays


_HALF = (jnp.bfloat16, jnp.float16)
_PHI = (0.127414796, -0.142248368, 0.7107068705, -0.7265760135, 0.5307027145)  # half of 7.1.26's


@jax.custom_jvp
def _gelu_by_exponential(x: Array) -> Array:
  """x Phi(x), Phi the normal distribution (Hendrycks and Gimpel, arXiv 1606.08415), float32.

  Phi is Abramowitz and Stegun's formula 7.1.26, whose error of 7.5e-8 is a rounding of float32. Its
  exponential is the density too, so that the function and its derivative need that and a root,
  where the error function costs a GPU more than reading x does.
  """
  return x * _normal(x)[0]


@_gelu_by_exponential.defjvp
def _gelu_by_exponential_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
  (x,), (tangent,) = primals, tangents
  below, density = _normal(x)
  return x * below, tangent * (below + x * density)


def _normal(x: Array) -> tuple[Array, Array]:
  """The normal distribution's Phi(x) and density, float32."""
  inverse = 1.0 + (0.3275911 * 0.5**0.5) * jnp.abs(x)
  t = jax.lax.rsqrt(inverse * inverse)  # one instruction of a GPU, where a division is a dozen
  exponential = jnp.exp2((-0.5 / math.log(2)) * x * x)
  tail = t * exponential * functools.reduce(lambda sum_, c: sum_ * t + c, reversed(_PHI))
  return jnp.where(x < 0, tail, 1.0 - tail), exponential * (2 * jnp.pi) ** -0.5


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": quick_gelu,
  "relu": jax.nn.relu,
}


def activate(name: str, x: Array, bias: Array | None = None) -> Array:
  """An activation of x + bias, whose backward pass keeps x and the bias alone.

  Args:
    name: of config.model.*.activation.
    x: [..., D].
    bias: [D] or None. Given apart, a product that x comes from need not be written a second time.

  Returns:
    [..., D], in the dtype of x.
  """
  bias = jnp.zeros(x.shape[-1:], x.dtype) if bias is None else bias
  # Under a checkpoint the activation is computed again beside its derivative: with a barrier
  # between the two, x would be read once for each.
  written_out = are_layers_written_out() and not _rematerialized.get()
  return _activate(name, written_out, x, bias)


def _apply(name: str, x: Array, bias: Array) -> Array:
  """The activation of x + bias, in float32 and rounded once where x is of half precision."""
  if x.dtype not in _HALF:
    return _FUNCTIONS[name](x + bias.astype(x.dtype))
  function = _gelu_by_exponential if name == "gelu" else _FUNCTIONS[name]
  return function(x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _activate(name: str, written_out: bool, x: Array, bias: Array) -> Array:
  return _apply(name, x, bias)


def _activate_backward(
  name: str, written_out: bool, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  x, bias = residuals
  x, gradient = compute_again(written_out, x, gradient)
  gradient = jax.vjp(lambda x: _apply(name, x, bias), x)[1](gradient)[0]
  return gradient, sum_rows(gradient, bias.dtype)


_activate.defvjp(
  lambda name, written_out, x, bias: (_activate(name, written_out, x, bias), (x, bias)),
  _activate_backward,
)


def sum_rows(gradient: Array, dtype: Any) -> Array:
  """Gradient of a bias: [..., D] summed in float32 over all but the last axis, in `dtype`."""
  return jnp.sum(gradient.astype(jnp.float32), tuple(range(gradient.ndim - 1))).astype(dtype)


@jax.custom_vjp
def add_residual(x: Array, branch: Array, bias: Array) -> Array:
  """x + (branch + bias), summed in float32 and rounded once: x, branch [..., D], bias [D]."""
  total = x.astype(jnp.float32) + (branch.astype(jnp.float32) + bias.astype(jnp.float32))
  return total.astype(x.dtype)


add_residual.defvjp(
  lambda x, branch, bias: (add_residual(x, branch, bias), bias),
  lambda bias, gradient: (gradient, gradient, sum_rows(gradient, bias.dtype)),
)


def project(x: Array, kernels: tuple[Array, ...], biases: tuple[Array, ...]) -> tuple[Array, ...]:
  """`_project`, of which a checkpoint policy sees the results by name: it cannot look inside."""
  return tuple(checkpoint_name(y, PRODUCT_NAME) for y in _project(x, kernels, biases))


@jax.custom_vjp
def _project(x: Array, kernels: tuple[Array, ...], biases: tuple[Array, ...]) -> tuple[Array, ...]:
  """x kernel + bias for each: x [..., D], kernels [D, E], biases [E] -> [..., E] in x's dtype.

  The gradient of x is added up product by product, each onto the sum of those before it, which a
  matrix product of cuBLAS does in its own pass.
  """
  return tuple(
    product(x, kernel) + bias.astype(x.dtype) for kernel, bias in zip(kernels, biases, strict=True)
  )


PRODUCT_NAME = "product"  # checkpoint_name of products that a function of our own hides


def product(x: Array, kernel: Array) -> Array:
  """[..., D] times [D, E]."""
  return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _project_backward(residuals: tuple, gradients: tuple[Array, ...]) -> tuple:
  x, kernels, biases = residuals
  total, kernel_gradients = None, []
  for kernel, gradient in zip(kernels, gradients, strict=True):
    part = product(gradient, kernel.T)
    total = part if total is None else part + total
    rows = tuple(range(x.ndim - 1))
    kernel_gradients.append(jax.lax.dot_general(x, gradient, ((rows, rows), ((), ()))))
  bias_gradients = [sum_rows(g, b.dtype) for g, b in zip(gradients, biases, strict=True)]
  return total, tuple(kernel_gradients), tuple(bias_gradients)


_project.defvjp(
  lambda x, kernels, biases: (_project(x, kernels, biases), (x, kernels, biases)),
  _project_backward,
)


class LayerNorm(nn.Module):
  """LayerNorm over the last axis (Ba et al., arXiv 1607.06450), computed in float32.

  By `norm_kernels` where they can be used. `scale` and `bias` are float32 [D], as those of
  flax.linen.LayerNorm.
  """

  epsilon: float
  dtype: Any = jnp.float32  # of the result

  def __call__(self, x: Array) -> Array:
    """[B, ..., D] -> [B, ..., D]."""
    return self._normalize(False, x, None)[1]

  def keep(self, x: Array, branch: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
    """x + branch and its LayerNorm.

    Args:
      x: [B, ..., D].
      branch: (product [B, ..., D], bias [D]), for `add_residual`; None: x alone.

    Returns:
      What is normalised, to be used from here on instead of x, and the result, both [B, ..., D].
    """
    return self._normalize(True, x, branch)

  @nn.compact
  def _normalize(
    self, keep: bool, x: Array, branch: tuple[Array, Array] | None
  ) -> tuple[Array | None, Array]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
    dtype = jnp.dtype(self.dtype)
    if not self.is_initializing() and norm_kernels.usable(x, dtype):
      return norm_kernels.layer_norm(self.epsilon, keep, x, branch, scale, bias)
    if branch is not None:
      x = add_residual(x, *branch)
    return x, normalize(self.epsilon, dtype, x, scale, bias)


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
  if x.dtype == jnp.bfloat16:
    # Both sums in one pass. The difference loses what the square of mean / deviation has of digits:
    # 16 bits of float32's 24 at most, as bfloat16 knows no deviation below a 256th of a mean.
    variance = jnp.mean(jnp.square(wide), -1, keepdims=True) - jnp.square(mean)
    variance = jnp.maximum(variance, 0.0)
  else:
    variance = jnp.mean(jnp.square(wide - mean), -1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + epsilon)
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
