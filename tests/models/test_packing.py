"""Packed rows of any mixture of texts against each text in a row of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from grain_jax import tokenizer
from grain_jax.models import text

CONTEXT, ROW, REGIONS, WIDTH = 20, 64, 5, 16
WORDS = st.lists(
  st.sampled_from(["dog", "red", "zebra", "caipirinha", "on", "!", "42"]), min_size=1, max_size=24
)
TOKENS = tokenizer.Tokenizer(CONTEXT)
TOWER = text.TextTransformer(
  vocab_size=49408, context=CONTEXT, width=WIDTH, depth=2, heads=2, mlp_ratio=2.0,
  activation="quick_gelu", norm_eps=1e-5,
)  # fmt: skip


@functools.cache
def tower_params():
  rows = (jnp.zeros((1, ROW), jnp.int32),) * 3
  shapes = jax.eval_shape(TOWER.init, jax.random.key(0), *rows, jnp.zeros((1, 6), jnp.int32))
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32)  # noqa: E731
  return jax.tree.map(draw, shapes["params"])


@jax.jit
def encode(params, rows, weight):
  """(features [B, T, D], gradient of their sum by `weight` [B, T, D])."""

  def total(params):
    features = TOWER.apply({"params": params}, *rows)
    return jnp.sum(features * weight), features

  return jax.grad(total, has_aux=True)(params)


@settings(max_examples=25, deadline=None)
@given(WORDS, st.lists(st.one_of(st.none(), WORDS), min_size=REGIONS, max_size=REGIONS))
def test_any_mixture_of_texts_packs_to_the_features_and_gradients_of_each_alone(caption, others):
  texts = [" ".join(caption), *(None if words is None else " ".join(words) for words in others)]
  packed = TOKENS.pack(texts, row_length=ROW, regions=REGIONS, negatives=0)
  kept = np.flatnonzero(packed.text_mask)
  assert 0 in kept  # the caption is never dropped

  alone = np.zeros((3, 1 + REGIONS, CONTEXT), np.int32)  # tokens, segments, positions
  ends = np.zeros((1 + REGIONS, 1), np.int32)
  for i in kept:
    ids = TOKENS.encode(texts[i])
    alone[:, i, : len(ids)] = ids, np.ones(len(ids)), np.arange(len(ids))
    ends[i] = len(ids) - 1
  weight = np.zeros((1, 1 + REGIONS, WIDTH), np.float32)
  weight[0, kept] = np.random.default_rng(len(kept)).normal(size=(len(kept), WIDTH))

  row = [x[None] for x in (packed.tokens, packed.segments, packed.positions, packed.ends)]
  gradients, features = encode(tower_params(), row, weight)
  want_gradients, want = encode(tower_params(), [*alone, ends], weight.swapaxes(0, 1))
  assert_allclose(features[0, kept], want[kept, 0], rtol=1e-5, atol=1e-5)
  norm = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want_gradients))
  for a, b in zip(*map(jax.tree.leaves, (gradients, want_gradients)), strict=True):
    assert_allclose(a / norm, b / norm, atol=1e-4)
