"""LayerNorm's kernels on a GPU, and tokens padded once, against float32 on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax.models import attention, elementwise, norm_kernels

SHAPES = {"ViT-B/16": (8, 200, 768), "heads": (8, 200, 12, 64), "text": (8, 128, 512)}


def result_and_gradients(arrays, *, dtype, norm):
  """Of x + branch and its LayerNorm, both used again, in float32."""
  x, branch, through, gradient, branch_bias, scale, bias = arrays
  module = elementwise.LayerNorm(1e-6, jnp.dtype(dtype))

  def function(x, branch, branch_bias, scale, bias):
    params = {"params": {"scale": scale, "bias": bias}}
    with norm_kernels.chosen(norm):
      return module.apply(params, x, (branch, branch_bias), method="keep")

  def run(x, branch, *vectors):
    out, pull = jax.vjp(function, x, branch, *vectors)
    return out, pull((through.astype(dtype), gradient.astype(dtype)))

  found = jax.jit(run)(x.astype(dtype), branch.astype(dtype), branch_bias, scale, bias)
  return [np.asarray(z, np.float64) for z in jax.tree.leaves(found)]


@pytest.mark.parametrize("name", SHAPES)
def test_the_kernels_are_near_float32(rng, name, rehearsal):
  shape = SHAPES[name]
  arrays = [rng.normal(size=shape) for _ in range(4)]
  arrays += [rng.normal(size=shape[-1]) for _ in range(3)]
  halves = [jnp.asarray(a, jnp.bfloat16).astype(jnp.float32) for a in arrays]
  norm_kernels._refusals.clear()
  got = result_and_gradients(halves, dtype="bfloat16", norm="auto")
  if not rehearsal:
    assert norm_kernels._refusals == {(shape[-1], "bfloat16"): ""}
  with jax.default_device(jax.devices("cpu")[0]):
    want = result_and_gradients([jnp.asarray(np.asarray(a)) for a in halves],
                                dtype="float32", norm="xla")  # fmt: skip
  for x, y in zip(got, want, strict=True):
    assert np.linalg.norm(x - y) < 1e-2 * np.linalg.norm(y)


def test_padding_is_seen_by_nothing(rng, rehearsal):
  """197 tokens of 200: as they are, whatever stands in the other three."""
  query, key, value, weight = rng.normal(size=(4, 4, 200, 12, 64))

  def run(arrays, tokens, *, dtype, fused):
    def loss(*arrays):
      out = attention.attend(*arrays, tokens=tokens, fused=fused, part="padded")
      return jnp.sum(out[:, :197].astype(jnp.float32) * weight[:, :197]), out[:, :197]

    halves = [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in arrays]
    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*halves)
    return [np.asarray(x[:, :197], np.float32) for x in (out, *gradients)]

  got = run((query, key, value), 197, dtype="bfloat16", fused="auto")
  if not rehearsal:
    assert attention.implementations()["padded"] == "cuDNN, 197 padded to 200 tokens"
  with jax.default_device(jax.devices("cpu")[0]):
    alone = [x[:, :197] for x in (query, key, value)]
    want = run(alone, None, dtype="float32", fused="xla")
  for x, y in zip(got, want, strict=True):
    assert np.linalg.norm(x - y) < 2e-2 * np.linalg.norm(y)
