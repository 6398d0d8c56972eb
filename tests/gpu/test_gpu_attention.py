"""Attention on a GPU, whatever is taken for it, against float32 on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax.models import attention, text

# queries, keys, heads, width of a head
SHAPES = {
  "ViT-B/16": (197, 197, 12, 64),
  "ViT-L/14": (257, 257, 16, 64),
  "ViT-S/16": (197, 197, 12, 32),
  "384 pixels": (577, 577, 12, 64),
  "text": (128, 128, 8, 64),
  "cross": (6, 197, 8, 64),
  "self": (6, 6, 8, 64),
  "one token": (1, 1, 8, 64),
  "one query": (1, 197, 8, 64),
  "odd width": (50, 50, 3, 20),
}


def packed_mask(rng, length, batch):
  segments = np.sort(rng.integers(1, 5, (batch, length)), axis=1)
  return np.asarray(text.packed_causal_mask(jnp.asarray(segments)))


def both(inputs, weight, mask, *, dtype, fused):
  """Result and gradients of sum(result * weight)."""

  def loss(*arrays):
    out = attention.attend(*arrays, mask=mask, fused=fused, part="test")
    return jnp.sum(out.astype(jnp.float32) * weight), out

  arrays = [jnp.asarray(x, dtype) for x in inputs]
  gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
  return [np.asarray(x, np.float32) for x in (out, *gradients)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_auto_is_near_float32(rng, shape, masked, rehearsal):
  queries, keys, heads, width = SHAPES[shape]
  if masked and queries != keys:
    pytest.skip("packed rows attend to themselves")
  query, weight = rng.normal(size=(2, 3, queries, heads, width)).astype(np.float32)
  key, value = rng.normal(size=(2, 3, keys, heads, width)).astype(np.float32)
  mask = packed_mask(rng, queries, 3) if masked else None
  got = both((query, key, value), weight, mask, dtype=jnp.bfloat16, fused="auto")
  if not (rehearsal or width % 8 or keys == 1):
    assert attention.implementations()["test"].startswith("cuDNN"), attention.implementations()
  with jax.default_device(jax.devices("cpu")[0]):
    halves = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (query, key, value)]
    want = both(halves, weight, mask, dtype=jnp.float32, fused="xla")
  for x, y in zip(got, want, strict=True):
    scale = max(np.linalg.norm(y), 0.02 * np.linalg.norm(weight))
    assert np.isfinite(x).all() and np.linalg.norm(x - y) / scale < 2e-2


def test_by_name_cudnn_masks_too_or_says_why(rng, rehearsal):
  query, key, value = rng.normal(size=(3, 2, 128, 8, 64)).astype(np.float32)
  weight, mask = np.ones_like(query), packed_mask(rng, 128, 2)
  if rehearsal:
    with pytest.raises(ValueError, match="'cudnn' is impossible for the test .*CPU devices"):
      both((query, key, value), weight, mask, dtype=jnp.bfloat16, fused="cudnn")
    return
  got = both((query, key, value), weight, mask, dtype=jnp.bfloat16, fused="cudnn")
  want = both((query, key, value), weight, mask, dtype=jnp.bfloat16, fused="xla")
  for x, y in zip(got, want, strict=True):
    assert np.linalg.norm(x - y) / np.linalg.norm(y) < 2e-2
  with pytest.raises(ValueError, match="is impossible for the test .float32"):
    both((query, key, value), weight, None, dtype=jnp.float32, fused="cudnn")
