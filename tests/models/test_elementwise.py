"""LayerNorm and activations with backward passes of their own, beside torch's and JAX's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from grain_jax.models import elementwise

SHAPES = ((2, 7, 48), (3, 16), (1, 2, 3, 64))
TORCH = {
  "gelu": torch.nn.functional.gelu,
  "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
  "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
  "relu": torch.nn.functional.relu,
}


def draw(shape, seed=0, *, mean=0.0):
  return np.random.default_rng(seed).normal(mean, 2.0, shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", (0.0, 300.0))
def test_layer_norm_and_its_gradients_are_torchs(shape, mean):
  x, gradient = draw(shape, mean=mean), draw(shape, 1)
  scale, bias = draw(shape[-1:], 2), draw(shape[-1:], 3)
  theirs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, scale, bias)]
  expected = torch.nn.functional.layer_norm(theirs[0], shape[-1:], *theirs[1:], eps=1e-5)
  expected.backward(torch.tensor(gradient, dtype=torch.float64))
  norm = elementwise.LayerNorm(1e-5)
  y, pull = jax.vjp(
    lambda x, scale, bias: norm.apply({"params": {"scale": scale, "bias": bias}}, x),
    *map(jnp.asarray, (x, scale, bias)),
  )
  rounding = 1e-5 if not mean else 2e-3  # of the deviations from a mean of 300
  np.testing.assert_allclose(y, expected.detach(), atol=rounding, rtol=1e-5)
  for ours, other in zip(pull(jnp.asarray(gradient)), theirs, strict=True):
    np.testing.assert_allclose(ours, other.grad, atol=3 * rounding, rtol=1e-4)


def test_layer_norm_has_flaxs_parameters():
  x = jnp.asarray(draw((2, 5)))
  ours = elementwise.LayerNorm(1e-6).init(jax.random.key(0), x)
  stock = nn.LayerNorm(1e-6).init(jax.random.key(0), x)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, ours, stock))


@pytest.mark.parametrize("name", elementwise._FUNCTIONS)
def test_activations_and_their_gradients_are_torchs(name):
  x = np.concatenate([draw((500,)), np.float32([-40, -6, 0.5, 6, 40])])
  theirs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
  expected = TORCH[name](theirs)
  expected.backward(torch.ones_like(theirs))
  y, pull = jax.vjp(elementwise._FUNCTIONS[name], jnp.asarray(x))
  np.testing.assert_allclose(y, expected.detach(), atol=2e-6, rtol=2e-6)
  np.testing.assert_allclose(pull(jnp.ones_like(y))[0], theirs.grad, atol=1e-5, rtol=2e-6)


def residuals(function, *arguments):
  """Bytes that a backward pass keeps."""
  _, pull = jax.vjp(function, *arguments)
  return sum(leaf.nbytes for leaf in jax.tree.leaves(pull))


def test_backward_passes_keep_their_input_alone():
  """In bfloat16; of LayerNorm also two numbers a row."""
  x = jnp.asarray(draw((64, 256)), jnp.bfloat16)
  for name in ("gelu", "gelu_tanh", "quick_gelu"):
    assert residuals(elementwise._FUNCTIONS[name], x) == x.nbytes
  norm = elementwise.LayerNorm(1e-6, jnp.bfloat16)
  params = norm.init(jax.random.key(0), x)
  assert norm.apply(params, x).dtype == jnp.bfloat16
  kept = residuals(norm.apply, params, x)
  assert kept <= x.nbytes + 64 * 2 * 4 + 256 * 4
  stock = residuals(nn.LayerNorm(1e-6, dtype=jnp.float32).apply, params, x)
  assert stock > 2 * kept  # what flax's keeps


def test_bfloat16_is_rounded_once():
  """The result and the gradients of float32, rounded; the input's gradient in its own dtype."""
  x, gradient = (jnp.asarray(draw((32, 128), seed), jnp.bfloat16) for seed in (0, 1))
  scale, bias = (jnp.asarray(draw((128,), seed)) for seed in (2, 3))

  def run(dtype):
    y, pull = jax.vjp(
      lambda *a: elementwise.normalize(1e-6, jnp.dtype(dtype), *a), x.astype(dtype), scale, bias
    )
    return y, *pull(gradient.astype(dtype))

  half, whole = run(jnp.bfloat16), run(jnp.float32)
  assert [a.dtype.name for a in half] == ["bfloat16", "bfloat16", "float32", "float32"]
  for ours, exact in zip(half[:2], whole[:2], strict=True):
    np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))
  for ours, exact in zip(half[2:], whole[2:], strict=True):
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-4)
