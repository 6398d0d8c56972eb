"""LayerNorm and activations with backward passes of their own, beside torch's and JAX's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from grain_jax.models import elementwise, layers

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


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", elementwise._FUNCTIONS)
def test_activations_and_their_gradients_are_torchs(name, dtype):
  """Of a product and its bias apart; in bfloat16 as exact as float32 rounded once."""
  x, bias = draw((250, 2)), np.float32([0.5, -0.25])
  x[:5] = [[-40, -12], [-6, -3], [0.5, 0], [6, 1e-3], [40, 12]]
  x, gradient = (jnp.asarray(a, dtype) for a in (x, draw((250, 2), 1)))
  theirs, their_bias = (
    torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (x, bias)
  )
  total = theirs + their_bias
  expected = TORCH[name](total)
  expected.backward(torch.tensor(np.asarray(gradient, np.float64)))
  y, pull = jax.vjp(lambda x, b: elementwise.activate(name, x, b), x, jnp.asarray(bias))
  ours, our_bias = pull(gradient)
  assert y.dtype == ours.dtype == dtype and our_bias.dtype == jnp.float32
  rounding = 2e-6 if dtype == "float32" else 2.0**-8
  close = functools.partial(np.testing.assert_allclose, rtol=rounding)
  close(np.asarray(y, np.float64), expected.detach(), atol=rounding)
  close(np.asarray(ours, np.float64), theirs.grad, atol=10 * rounding)
  close(our_bias, their_bias.grad, atol=250 * rounding)


def residuals(function, *arguments):
  """Bytes that a backward pass keeps."""
  _, pull = jax.vjp(function, *arguments)
  return sum(leaf.nbytes for leaf in jax.tree.leaves(pull))


def test_backward_passes_keep_their_input_alone():
  """In bfloat16; of LayerNorm also two numbers a row."""
  x = jnp.asarray(draw((64, 256)), jnp.bfloat16)
  bias = jnp.zeros(x.shape[-1:], jnp.float32)
  for name in elementwise._FUNCTIONS:
    assert (
      residuals(functools.partial(elementwise.activate, name), x, bias) <= x.nbytes + bias.nbytes
    )
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
    # The deviation comes from sums of one pass there: a rounding may fall to the other side.
    different = ours != exact.astype(jnp.bfloat16)
    assert jnp.mean(different) < 2e-3
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-7, atol=1e-6)
  for ours, exact in zip(half[2:], whole[2:], strict=True):
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rematerialized", "barriers"), [(False, 1), (True, 0)])
def test_an_activation_is_hidden_from_the_forward_pass_once(rematerialized, barriers):
  """In its own backward pass, or by the checkpoint around the whole layer."""

  def loss(x):
    with elementwise.layers_written_out(rematerialized=rematerialized):
      return elementwise.activate("gelu", x).sum()

  text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 3))))
  assert text.count("optimization_barrier") == barriers


def test_stacks_say_whether_their_layers_are_rematerialized(monkeypatch):
  told = []
  within = elementwise.layers_written_out

  def note(**given):
    told.append(given)
    return within(**given)

  monkeypatch.setattr(elementwise, "layers_written_out", note)
  params = {"mlp": {"kernel": jnp.ones((2, 3, 3))}}

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3, use_bias=False, name="mlp")(x), None

  for remat in ("none", "elementwise"):
    layers.Stack(Block, {}, unroll=-1, remat=remat).apply(params, jnp.ones((2, 3)))
  assert told == [{"rematerialized": False}, {"rematerialized": True}]
