"""Attention against PyTorch's own: values, gradients, masks, half precision, what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from grain_jax.models import attention

SHAPE = (2, 9, 3, 8)  # B, L, H, D


def inputs(rng, keys=9):
  batch, length, heads, width = SHAPE
  query = rng.normal(size=SHAPE)
  key, value = rng.normal(size=(2, batch, keys, heads, width)) * 2
  weight = rng.normal(size=SHAPE)
  return [x.astype(np.float32) for x in (query, key, value, weight)]


def stock(query, key, value, weight, mask=None):
  """Result and gradients of sum(result * weight) by torch."""
  tensors = [torch.tensor(x).transpose(1, 2).requires_grad_() for x in (query, key, value)]
  mask = None if mask is None else torch.tensor(mask)
  out = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
  gradients = torch.autograd.grad((out * torch.tensor(weight).transpose(1, 2)).sum(), tensors)
  return [x.transpose(1, 2).detach().numpy() for x in (out, *gradients)]


def ours(query, key, value, weight, mask=None):
  def loss(*arrays):
    out = attention.attend(*arrays, mask=mask)
    return jnp.sum(out * weight), out

  gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
  return [out, *gradients]


@pytest.mark.parametrize("keys", [9, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(rng, keys, masked):
  arrays, mask = inputs(rng, keys), None
  if masked:
    mask = rng.random((2, 1, 9, keys)) < 0.6
    mask[..., 0] = True  # torch gives NaN where nothing may be attended to
  for got, want in zip(ours(*arrays, mask), stock(*arrays, mask), strict=True):
    assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_large_logits_do_not_overflow(rng):
  query, key, value, weight = inputs(rng)
  for got, want in zip(
    ours(query * 1e3, key, value, weight), stock(query * 1e3, key, value, weight), strict=True
  ):
    assert np.isfinite(got).all()
    assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_a_row_without_anything_to_attend_to_is_finite(rng):
  arrays = inputs(rng)
  mask = np.ones((2, 1, 9, 9), bool)
  mask[:, :, 4] = False
  assert all(np.isfinite(x).all() for x in ours(*arrays, mask))


def test_bfloat16_is_near_float32(rng):
  arrays = inputs(rng)
  half = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]]
  got = ours(*half, arrays[3])
  assert all(x.dtype == jnp.bfloat16 for x in got)
  for x, want in zip(got, stock(*arrays), strict=True):
    assert_allclose(np.asarray(x, np.float32), want, rtol=0.05, atol=0.05 * np.abs(want).max())


def test_weights_are_not_kept_for_the_backward_pass(rng):
  query, key, value, _ = inputs(rng)
  kept = jax.eval_shape(lambda *x: jax.vjp(attention.attend, *x)[1], query, key, value)
  sizes = [x.size for x in jax.tree.leaves(kept)]
  batch, length, heads, width = SHAPE
  assert max(sizes) == query.size
  assert min(sizes) == batch * heads * length  # the denominators' logarithms


@pytest.mark.parametrize("how", ["all", "padded", "masked"])
def test_few_queries_read_what_keys_and_values_would_say(rng, how):
  """Against torch's keys and values, with a bias of the keys, which changes nothing."""
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  query, memory, weight = draw(2, 3, 4, 8), draw(2, 11, 16), draw(2, 3, 4, 8)
  key_kernel, value_kernel, value_bias = draw(16, 4, 8) / 4, draw(16, 4, 8) / 4, draw(4, 8)
  tokens = 9 if how == "padded" else None
  mask = rng.random((2, 1, 3, 11)) < 0.6
  mask[..., 0] = True
  names = (query, memory, key_kernel, value_kernel, value_bias)
  theirs = [torch.tensor(x, requires_grad=True) for x in names]
  q, m, wk, wv, bv = theirs
  key = torch.einsum("ble,ehd->bhld", m[:, :tokens], wk) + torch.tensor(draw(4, 1, 8))
  value = torch.einsum("ble,ehd->bhld", m[:, :tokens], wv) + bv[:, None]
  want = torch.nn.functional.scaled_dot_product_attention(
    q.transpose(1, 2), key, value, attn_mask=torch.tensor(mask) if how == "masked" else None
  ).transpose(1, 2)
  (want * torch.tensor(weight)).sum().backward()

  def loss(*arrays):
    options = {"tokens": tokens, "mask": mask if how == "masked" else None}
    out = attention.attend_memory(*arrays, **options)
    return jnp.sum(out * weight), out

  gradients, out = jax.grad(loss, argnums=tuple(range(5)), has_aux=True)(*names)
  assert_allclose(out, want.detach(), rtol=1e-5, atol=1e-5)
  for got, tensor in zip(gradients, theirs, strict=True):
    assert_allclose(got, tensor.grad, rtol=1e-4, atol=2e-5)


def test_dropped_weights_keep_their_share_of_the_values_bias(rng):
  """Torch drops weights of values that have their bias already."""
  query, memory = rng.normal(size=(1, 2, 2, 4)), rng.normal(size=(1, 5, 8))
  kernels, bias = rng.normal(size=(2, 8, 2, 4)), rng.normal(size=(2, 4))
  kept = (rng.random((1, 2, 2, 5)) < 0.5) * 2.0
  query, memory, kernels, bias = (
    jnp.asarray(x, jnp.float32) for x in (query, memory, kernels, bias)
  )
  seen = []
  got = attention.attend_memory(
    query, memory, *kernels, bias, drop=lambda w: seen.append(w) or w * kept
  )
  value = jnp.einsum("ble,ehd->blhd", memory, kernels[1]) + bias
  assert_allclose(got, jnp.einsum("bhql,blhd->bqhd", seen[0] * kept, value), rtol=1e-5, atol=1e-5)


def test_padding_is_seen_by_nothing(rng):
  """Seven tokens of nine are as they are without the other two, whatever stands there."""
  query, key, value, weight = inputs(rng)
  weight[:, 7:] = 0

  def loss(*arrays):
    out = attention.attend(*arrays, tokens=7)
    return jnp.sum(out * weight), out

  gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
  want = stock(*(x[:, :7] for x in (query, key, value, weight)))
  for got, other in zip([out, *gradients], want, strict=True):
    assert_allclose(got[:, :7], other, rtol=1e-5, atol=2e-6)
  assert not any(np.any(g[:, 7:]) for g in gradients)
