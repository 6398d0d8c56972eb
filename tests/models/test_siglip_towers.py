"""A tower without a class token, attention pooling, and texts padded to the context."""

import functools

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from grain_jax import config as configs
from grain_jax import flops, objectives, tokenizer, tokenizing
from grain_jax.convert import resize
from grain_jax.models import attention, decoder, grain, initial, text, vit
from grain_jax.plan import useful

CONTEXT, ROW, REGIONS, WIDTH = 12, 64, 5, 16
WORDS = st.lists(st.sampled_from(["dog", "red", "on", "!", "42"]), min_size=1, max_size=15)
TOKENS = tokenizer.Tokenizer(CONTEXT, pads=True)
TOWER = text.TextTransformer(49408, CONTEXT, WIDTH, 2, 2, 2.0, "gelu_tanh", 1e-6, causal=False)


@functools.cache
def tower_params():
  rows = (jnp.zeros((1, ROW), jnp.int32),) * 3
  shapes = jax.eval_shape(TOWER.init, jax.random.key(0), *rows, jnp.zeros((1, 6), jnp.int32))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes["params"]
  )


encode = jax.jit(lambda params, *rows: TOWER.apply({"params": params}, *rows))


@given(WORDS, st.lists(st.one_of(st.none(), WORDS), min_size=REGIONS, max_size=REGIONS))
def test_packed_texts_have_the_features_of_each_alone(caption, others):
  texts = [" ".join(caption), *(None if words is None else " ".join(words) for words in others)]
  packed = TOKENS.pack(texts, row_length=ROW, regions=REGIONS)
  kept = np.flatnonzero(packed.text_mask)
  assert len(kept) == min(sum(t is not None for t in texts), ROW // CONTEXT)
  row = [x[None] for x in (packed.tokens, packed.segments, packed.positions, packed.ends)]
  ids = np.stack([TOKENS.encode(texts[i]) for i in kept])
  assert ids.shape == (len(kept), CONTEXT)
  places = np.broadcast_to(np.arange(CONTEXT, dtype=np.int32), ids.shape)
  ends = np.full((len(ids), 1), CONTEXT - 1, np.int32)
  room = [(0, 6 - len(ids)), (0, 0)]  # one shape to compile
  alone = [np.pad(x, room) for x in (ids, np.ones_like(ids), places, ends)]
  got, want = encode(tower_params(), *row), encode(tower_params(), *alone)
  assert_allclose(got[0, kept], want[: len(ids), 0], rtol=1e-5, atol=1e-5)


def test_a_token_sees_those_behind_it_and_the_pads():
  ids = TOKENS.encode("dog red on")[None]
  rows = [np.ones_like(ids), np.arange(CONTEXT, dtype=np.int32)[None]]
  first = np.zeros((1, 1), np.int32)
  before = encode(tower_params(), ids, *rows, first)
  for at in (2, CONTEXT - 1):
    changed = ids.copy()
    changed[0, at] += 7
    assert np.abs(encode(tower_params(), changed, *rows, first) - before).max() > 1e-3


def torch_pooling(params, tokens, heads):
  """x = MultiheadAttention(probe, tokens, tokens); x + MLP(LayerNorm(x)) by torch's modules."""

  def tensor(x):
    return torch.tensor(np.asarray(x))

  width, a = tokens.shape[-1], params["attention"]
  layer = torch.nn.MultiheadAttention(width, heads, batch_first=True)
  layer.in_proj_weight.data = torch.cat(
    [tensor(a[n]["kernel"]).T for n in ("query", "key", "value")]
  )
  layer.in_proj_bias.data = torch.cat([tensor(a[n]["bias"]) for n in ("query", "key", "value")])
  layer.out_proj.weight.data = tensor(a["out"]["kernel"]).T
  layer.out_proj.bias.data = tensor(a["out"]["bias"])
  x = layer(tensor(params["probe"]).repeat(len(tokens), 1, 1), tensor(tokens), tensor(tokens))[0]
  y = torch.nn.functional.layer_norm(
    x, (width,), tensor(params["norm"]["scale"]), tensor(params["norm"]["bias"]), 1e-6
  )
  fc1, fc2 = params["mlp"]["fc1"], params["mlp"]["fc2"]
  y = torch.nn.functional.gelu(y @ tensor(fc1["kernel"]) + tensor(fc1["bias"]))
  return (x + y @ tensor(fc2["kernel"]) + tensor(fc2["bias"]))[:, 0].detach()


@pytest.mark.parametrize("method", ["clip", "grain"])
@pytest.mark.parametrize("class_token", [True, False])
def test_attention_pooling_of_any_tower_is_torchs(tiny, rng, method, class_token):
  tiny.method, tiny.model.pool, tiny.model.image.class_token = method, "map", class_token
  configs.check(tiny)
  images = jnp.asarray(rng.integers(0, 256, (3, 32, 32, 3)), jnp.uint8)
  params, model = drawn.params(tiny), grain.build(tiny)
  tokens = model.apply({"params": params}, images, method="encode_tokens")
  assert tokens.shape == (3, 4 + class_token, 32)

  def project(x):
    x = x @ torch.tensor(params["image_projection"]["kernel"])
    return torch.nn.functional.normalize(x, dim=-1)

  want = project(torch_pooling(params["pooling"], tokens, 2))
  assert_allclose(model.apply({"params": params}, images, method="encode_image"), want, atol=1e-5)
  if method == "grain":  # whose region queries read the patches
    return
  alone = np.asarray(tokens)[:, int(class_token) :].reshape(12, 1, 32)
  want = project(torch_pooling(params["pooling"], alone, 2)).reshape(3, 2, 2, 16)
  assert_allclose(model.apply({"params": params}, images, method="encode_patches"), want, atol=1e-5)


@pytest.mark.parametrize("pool", ["max", "mean", "query"])
def test_without_a_class_token_all_tokens_are_patches(tiny, rng, pool):
  tiny.model.pool = pool
  tiny.model.pool_includes_class = False  # there is none to leave out
  tiny.model.image.class_token = False
  configs.check(tiny)
  images = jnp.asarray(rng.integers(0, 256, (3, 32, 32, 3)), jnp.uint8)
  params, model = drawn.params(tiny), grain.build(tiny)
  tokens = np.asarray(model.apply({"params": params}, images, method="encode_tokens"))
  patches = model.apply({"params": params}, images, method="encode_patches")
  assert tokens.shape == (3, 4, 32) and patches.shape == (3, 2, 2, 16)
  if pool != "query":
    x = {"max": tokens.max(axis=1), "mean": tokens.mean(axis=1)}[pool]
    x = x @ params["image_projection"]["kernel"]
    got = model.apply({"params": params}, images, method="encode_image")
    assert_allclose(got, x / np.linalg.norm(x, axis=-1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_patches_are_left_out_of_a_tower_without_a_class_token(rate):
  tower = vit.VisionTransformer(
    32, 8, 16, 1, 2, 2.0, "gelu", False, 1e-6, patch_dropout=rate, class_token=False
  )
  x = jnp.tile(jnp.arange(16.0)[None, :, None], (64, 1, 16))
  kept = np.asarray(tower.apply({}, x, method="_keep_some", rngs={"dropout": jax.random.key(0)}))
  assert kept.shape == (64, round(16 * (1 - rate)), 16)
  assert (np.diff(kept[..., 0], axis=1) > 0).all()
  assert set(kept[:, 0, 0]) > {0.0, 1.0}  # the first patch is drawn like others


def test_positions_of_patches_alone(rng):
  """Sine-cosine ones in tower and memory, and resized ones, are those beside a class token's."""
  make = functools.partial(
    vit.VisionTransformer, 32, 8, 16, 1, 2, 2.0, "gelu", False, 1e-6, position_init="sincos"
  )
  key = jax.random.key(0)
  alone = make(class_token=False)._positions(key, (16, 16))
  assert_array_equal(make()._positions(key, (17, 16))[1:], alone)
  assert_array_equal(decoder._positions(key, (16, 16)), decoder._positions(key, (17, 16))[1:])
  grid = rng.normal(size=(17, 8)).astype(np.float32)
  got = resize.position_embedding(grid[1:], 6)
  assert got.shape == (36, 8)
  assert_array_equal(got, resize.position_embedding(grid, 6)[1:])


@pytest.mark.parametrize("changes", [{"pool": "class"}, {"pool": "default"}])
def test_a_class_token_that_there_is_not_cannot_be_taken(tiny_clip, changes):
  config = configs.resolve(tiny_clip)
  config.model.update(changes)
  config.model.image.class_token = False
  with pytest.raises(ValueError, match="there is none. Choose map, max or mean") as error:
    configs.check(config)
  assert "\n" not in str(error.value)
  config.method = "grain"
  if changes["pool"] == "default":
    configs.check(config)  # the image query


@pytest.mark.parametrize("end_and_pad", ["one id", "two ids"])
def test_padded_texts_are_not_counted_as_truncated(tiny, end_and_pad):
  """Two of five are: the cut one, and the one of exactly the context."""
  tiny.model.text.update(kind="siglip", context=12)
  tiny.data.update(row_length=60, max_regions=4)
  tokens = tokenizing.make(tiny)
  tokens.pad = tokenizer.END if end_and_pad == "one id" else 0
  texts = ["dog " * 30, "dog " * 10, "dog", "dog red", "dog " * 6]
  assert tokens.encode(texts[1])[-2:].tolist() == [tokens.encode("dog")[1], tokenizer.END]
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in initial.dummy_batch(tiny, 1).items()}
  packed = tokens.pack(texts, row_length=60, regions=4)
  for name in ("tokens", "segments", "positions", "ends", "text_mask"):
    batch[name] = jnp.asarray(getattr(packed, name)[None])
  batch["example_mask"][:] = True
  params = {"params": drawn.params(tiny)}
  output = jax.jit(functools.partial(grain.build(tiny).apply, num_regions=4))(params, batch)
  parts = objectives.total_loss(output, batch, tiny).parts
  assert float(parts["truncated_texts"][0]) == 2 and packed.dropped == 0


def test_useful_flops_are_those_of_a_program_whose_rows_are_full(tiny):
  tiny.method, tiny.data.max_regions = "clip", 0
  tiny.model.image.class_token, tiny.model.pool = False, "map"
  tiny.model.text.update(kind="siglip", context=24)
  model = grain.build(tiny)
  params = jax.eval_shape(lambda: initial.init_params(model, tiny))

  def total(params, *rows):
    return jnp.sum(model.apply({"params": params}, *rows, method="encode_text"))

  rows = (jax.ShapeDtypeStruct((1, 24), jnp.int32),) * 3
  ends = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  counts = flops.count(jax.make_jaxpr(jax.grad(total))(params, *rows, ends).jaxpr)
  counted = sum(k for path, k in counts.items() if attention.RECOMPUTED_SCOPE not in path)
  assert counted == useful.text_tower_flops(tiny, caption=9.0, description=3.0)
