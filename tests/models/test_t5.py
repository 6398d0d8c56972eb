"""T5's encoder against transformers, with random weights carried over by name, alone and packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose, assert_array_equal

from grain_jax import export, flops, trees
from grain_jax.models import attention, grain, initial, t5
from grain_jax.plan import useful

WIDTH, HEADS, DEPTH, VOCABULARY = 32, 4, 3, 100


def array(x):
  return x.detach().numpy()


def kernel(linear):
  return {"kernel": array(linear.weight).T}


def block_params(block):
  a, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
  return {
    "norm1": {"scale": array(block.layer[0].layer_norm.weight)},
    "attention": {
      "query": kernel(a.q), "key": kernel(a.k), "value": kernel(a.v), "out": kernel(a.o)
    },
    "norm2": {"scale": array(block.layer[1].layer_norm.weight)},
    "mlp": {"fc1": kernel(mlp.wi), "fc2": kernel(mlp.wo)},
  }  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
  config = transformers.T5Config(
    vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=80, num_layers=DEPTH, num_heads=HEADS,
    dropout_rate=0.1, feed_forward_proj="relu",
  )  # fmt: skip
  model = transformers.T5EncoderModel(config)
  torch.manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.ndim == 1 else 0.0))
  return model.eval()


@pytest.fixture(scope="module")
def params(theirs):
  blocks = [block_params(block) for block in theirs.encoder.block]
  relative = theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
  return {
    "token_embedding": array(theirs.shared.weight),
    "relative_bias": array(relative.weight),
    "blocks": jax.tree.map(lambda *xs: np.stack(xs), *blocks),
    "norm": {"scale": array(theirs.encoder.final_layer_norm.weight)},
  }


def tower(**options):
  return t5.T5Encoder(VOCABULARY, WIDTH, DEPTH, HEADS, 2.5, "relu", 1e-6, **options)


def texts_of(lengths, rng):
  return [np.r_[rng.integers(2, VOCABULARY, n - 1), 1].astype(np.int32) for n in lengths]


def pack(rows, length, slots):
  """Texts a row (None: a slot without a text) as tokens, segments, positions, ends."""
  tokens, segments, positions = (np.zeros((len(rows), length), np.int32) for _ in range(3))
  ends = np.zeros((len(rows), slots), np.int32)
  for i, texts in enumerate(rows):
    at = 0
    for slot, ids in enumerate(texts):
      if ids is not None:
        n = len(ids)
        tokens[i, at : at + n], segments[i, at : at + n] = ids, slot + 1
        positions[i, at : at + n] = np.arange(n)
        at += n
        ends[i, slot] = at - 1
  return tokens, segments, positions, ends


@torch.no_grad()
def mean_of_transformers(model, ids):
  """Of T5EncoderModel's states over the attention mask, as sentence-transformers pools them."""
  length = max(map(len, ids))
  padded = torch.zeros(len(ids), length, dtype=torch.long)
  mask = torch.zeros(len(ids), length)
  for i, row in enumerate(ids):
    padded[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row).long(), 1
  hidden = model(input_ids=padded, attention_mask=mask.long()).last_hidden_state
  return ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()


@pytest.mark.parametrize("unroll", [1, -1])
def test_packed_rows_give_the_means_of_transformers(theirs, params, unroll, rng):
  texts = texts_of([3, 200, 5, 1, 30, 150], rng)  # past the last bucket, and alone
  rows = [texts[:3], [texts[3], None, texts[4]], [texts[5], None, None]]
  got = tower(unroll=unroll).apply({"params": params}, *pack(rows, 220, 3))
  want = mean_of_transformers(theirs, texts)
  assert np.abs(want).max() > 0.3  # weights show
  got = np.asarray(got)
  assert_allclose(got[[0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 2, 0]], want, rtol=1e-5, atol=1e-5)
  assert_array_equal(got[[1, 2, 2], [1, 1, 2]], 0)  # no text: 0, never NaN


def test_gradients_of_a_packed_row_are_those_of_torch(theirs, params, rng):
  """Of all parameters; the relative positions' comes through attention's own backward pass."""
  texts = texts_of([4, 30, 9], rng)
  weight = rng.normal(size=(1, 3, WIDTH)).astype(np.float32)
  rows = pack([texts], 50, 3)

  def total(params):
    return jnp.sum(tower().apply({"params": params}, *rows) * weight)

  got = jax.grad(total)(params)
  theirs.zero_grad()
  loss = 0.0
  for ids, w in zip(texts, weight[0], strict=True):
    hidden = theirs(input_ids=torch.from_numpy(ids[None]).long()).last_hidden_state
    loss = loss + (hidden.mean(1)[0] * torch.from_numpy(w)).sum()
  loss.backward()
  relative = theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
  pairs = {
    "relative positions": (got["relative_bias"], relative.weight.grad),
    "tokens": (got["token_embedding"], theirs.shared.weight.grad),
    "norm": (got["norm"]["scale"], theirs.encoder.final_layer_norm.weight.grad),
  }
  for i, block in enumerate(theirs.encoder.block):
    of_block = jax.tree.map(lambda x, i=i: x[i], got["blocks"])
    a, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
    for name, module in {"query": a.q, "key": a.k, "value": a.v, "out": a.o}.items():
      pairs[f"{name} {i}"] = (of_block["attention"][name]["kernel"].T, module.weight.grad)
    pairs[f"wi {i}"] = (of_block["mlp"]["fc1"]["kernel"].T, mlp.wi.weight.grad)
    pairs[f"wo {i}"] = (of_block["mlp"]["fc2"]["kernel"].T, mlp.wo.weight.grad)
    pairs[f"norm1 {i}"] = (of_block["norm1"]["scale"], block.layer[0].layer_norm.weight.grad)
    pairs[f"norm2 {i}"] = (of_block["norm2"]["scale"], block.layer[1].layer_norm.weight.grad)
  for name, (ours, want) in pairs.items():
    scale = float(want.abs().max())
    assert scale > 0, name
    assert_allclose(ours / scale, want.numpy() / scale, atol=2e-5, err_msg=name)


def test_buckets_are_those_of_transformers():
  from transformers.models.t5 import modeling_t5

  offset = torch.arange(300)[None, :] - torch.arange(300)[:, None]
  want = modeling_t5.T5Attention._relative_position_bucket(
    offset, bidirectional=True, num_buckets=t5.BUCKETS, max_distance=t5.MAX_DISTANCE
  )
  assert_array_equal(t5.relative_buckets(300), want.numpy())


@pytest.mark.parametrize("remat", ["elementwise", "attention", "block"])
def test_what_is_rematerialised_changes_no_gradient(params, remat, rng):
  rows = pack([texts_of([4, 9], rng)], 16, 2)

  def gradient(remat):
    model = tower(remat=remat)
    return jax.grad(lambda p: jnp.sum(model.apply({"params": p}, *rows) ** 2))(params)

  for a, b in zip(*map(jax.tree.leaves, (gradient(remat), gradient("none"))), strict=True):
    assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_fresh_parameters_have_the_imported_ones_shapes(params):
  rows = (jnp.zeros((1, 8), jnp.int32),) * 3
  fresh = tower().init(jax.random.key(0), *rows, jnp.zeros((1, 2), jnp.int32))["params"]
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)


def test_fused_attention_asked_for_by_name_ends_in_one_line(params):
  rows = (jnp.zeros((1, 8), jnp.int32),) * 3
  with pytest.raises(ValueError, match="model.attention = 'cudnn' is impossible for the text"):
    tower(fused="cudnn").apply({"params": params}, *rows, jnp.zeros((1, 2), jnp.int32))


def t5_config(tiny, **text):
  tiny.model.text.update(kind="t5", activation="relu", vocab_size=300, norm_eps=1e-6, **text)
  return tiny


def test_a_model_with_this_tower_has_finite_gradients_whatever_texts_are_missing(tiny, make_batch):
  config = t5_config(tiny)
  model = grain.build(config)
  params = initial.init_params(model, config)
  batch = make_batch(config)
  batch["text_mask"][3:] = batch["segments"][3:] = batch["ends"][3:] = 0  # no text at all
  batch = {name: jnp.asarray(value) for name, value in batch.items()}

  def total(params):
    out = model.apply({"params": params}, batch, num_regions=config.data.max_regions)
    return jnp.sum(out.captions * out.image) + jnp.sum(out.descriptions**2), out

  gradient, out = jax.jit(jax.grad(total, has_aux=True))(params)
  assert_allclose(jnp.linalg.norm(out.captions[:3], axis=-1), 1, rtol=1e-5)
  assert_array_equal(out.captions[3:], 0)
  norms = {name: float(jnp.abs(g).max()) for name, g in trees.named_leaves(gradient)}
  assert np.isfinite(list(norms.values())).all()
  assert norms["text_tower/relative_bias"] > 0


@pytest.mark.parametrize("format", ["hf_clip", "grain_torch"])
def test_formats_of_clips_text_tower_refuse_this_one(tiny, tmp_path, format):
  config = t5_config(tiny)
  with pytest.raises(ValueError, match=r"cannot have .*config.model.text.kind = 't5'"):
    export.writers()[format](tmp_path / "out", config=config, params={}, step=0)


def test_useful_flops_are_those_of_a_program_without_padding(tiny):
  """The products of one caption in a row of its length and their gradients, and of its mean."""
  config = t5_config(tiny)
  config.method, config.data.max_regions = "clip", 0
  n, model = 40, grain.build(config)
  params = jax.eval_shape(lambda: initial.init_params(model, config))

  def total(params, *rows):
    return jnp.sum(model.apply({"params": params}, *rows, method="encode_text"))

  rows = (jax.ShapeDtypeStruct((1, n), jnp.int32),) * 3
  ends = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  counts = flops.count(jax.make_jaxpr(jax.grad(total))(params, *rows, ends).jaxpr)
  counted = sum(k for path, k in counts.items() if attention.RECOMPUTED_SCOPE not in path)
  want = useful.text_tower_flops(config, caption=n, description=0)
  assert counted == want + 2 * 2 * n * config.model.text.width


def test_bfloat16_differs_by_its_rounding_alone(theirs, params, rng):
  texts = texts_of([3, 40, 12], rng)
  rows = pack([texts], 64, 3)
  got = tower(dtype=jnp.bfloat16).apply({"params": params}, *rows)
  gradient = jax.grad(
    lambda p: jnp.sum(tower(dtype=jnp.bfloat16).apply({"params": p}, *rows).astype(jnp.float32))
  )(params)
  want = mean_of_transformers(theirs, texts)
  assert got.dtype == jnp.bfloat16
  assert np.abs(np.asarray(got[0], np.float32) - want).max() < 0.05 * np.abs(want).max()
  for name, value in trees.named_leaves(gradient):
    assert value.dtype == jnp.float32 and np.isfinite(value).all(), name
