"""Towers and decoder against transformers and torch, with random weights carried over by name."""

import flax.linen
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose

from grain_jax.models import decoder, layers, text, vit


def array(x):
  return x.detach().numpy()


def dense(linear):
  return {"kernel": array(linear.weight).T, "bias": array(linear.bias)}


def norm(layer):
  return {"scale": array(layer.weight), "bias": array(layer.bias)}


def stacked(blocks):
  return jax.tree.map(lambda *xs: np.stack(xs), *blocks)


def randomize(module):
  torch.manual_seed(0)
  with torch.no_grad():
    for p in module.parameters():
      p.copy_(torch.randn_like(p) * 0.1 + (1.0 if p.ndim == 1 and p.shape[0] == 32 else 0.0))
  return module.eval()


def clip_block(layer):
  a = layer.self_attn
  return {
    "norm1": norm(layer.layer_norm1),
    "norm2": norm(layer.layer_norm2),
    "attention": {
      "query": dense(a.q_proj), "key": dense(a.k_proj), "value": dense(a.v_proj),
      "out": dense(a.out_proj),
    },
    "mlp": {"fc1": dense(layer.mlp.fc1), "fc2": dense(layer.mlp.fc2)},
  }  # fmt: skip


@pytest.fixture(scope="module")
def clip_text():
  config = transformers.CLIPTextConfig(
    vocab_size=100, hidden_size=32, intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, max_position_embeddings=16, eos_token_id=99, bos_token_id=98,
  )  # fmt: skip
  model = randomize(transformers.CLIPTextModel(config))
  inner = getattr(model, "text_model", model)
  params = {
    "token_embedding": array(inner.embeddings.token_embedding.weight),
    "position_embedding": array(inner.embeddings.position_embedding.weight),
    "blocks": stacked([clip_block(layer) for layer in inner.encoder.layers]),
    "norm": norm(inner.final_layer_norm),
  }
  ours = text.TextTransformer(100, 16, 32, 3, 4, 4.0, "quick_gelu", 1e-5)
  return model, ours, params


def texts_of(lengths, rng):
  return [np.r_[98, rng.integers(1, 98, n - 2), 99].astype(np.int32) for n in lengths]


def packed(texts, length):
  tokens, segments, positions = (np.zeros((1, length), np.int32) for _ in range(3))
  ends, at = [], 0
  for i, ids in enumerate(texts):
    n = len(ids)
    tokens[0, at : at + n], segments[0, at : at + n] = ids, i + 1
    positions[0, at : at + n] = np.arange(n)
    at += n
    ends.append(at - 1)
  return tokens, segments, positions, np.array([ends], np.int32)


def test_text_tower_on_a_packed_row_is_clip_on_each_text_alone(clip_text, rng):
  model, ours, params = clip_text
  texts = texts_of([3, 12, 5, 16], rng)
  got = ours.apply({"params": params}, *packed(texts, 40))[0]
  for i, ids in enumerate(texts):
    want = model(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0, -1]
    assert_allclose(got[i], array(want), rtol=1e-4, atol=1e-5)


def products(jaxpr):
  """Matrix products in a program, those of inner programs too, a loop's body once."""
  for equation in jaxpr.eqns:
    yield from ["dot"] if equation.primitive.name == "dot_general" else []
    for value in equation.params.values():
      for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from products(inner)


def test_rematerialisation_computes_those_products_again_that_it_says(clip_text, rng):
  """A block has 4 projections, 2 products in attention, 2 in the MLP; each has 2 backward.

  Attention computes its logits again in any case.
  """
  _, ours, params = clip_text
  args = packed(texts_of([7, 3, 11], rng), 30)

  def count(remat):
    tower = ours.clone(remat=remat)
    loss = lambda p: jnp.sum(tower.apply({"params": p}, *args))  # noqa: E731
    return len(list(products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)))

  none = count("none")
  assert none == 3 * 8 + 1 + 3 * 8  # the scanned blocks; the last one, whose logits are kept
  assert count("elementwise") == none
  # Of the last block what its few queries ask, read and answer, head by head.
  assert count("attention") == none + 2 + 3
  assert count("block") > count("attention")


def test_what_keeps_matrix_products_keeps_cudnn_attention_too():
  """Its two products are one primitive, which no policy of JAX's own knows."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  kept = {name: policy for name, policy in layers._POLICIES.items() if policy is not None}
  primitive = cudnn._dot_product_attention_fwd_p_wrapper
  assert kept["elementwise"](primitive) and kept["elementwise"](jax.lax.dot_general_p)
  assert not kept["elementwise"](jax.lax.exp_p) and not kept["attention"](primitive)


@pytest.mark.parametrize("remat", [r for r in layers.REMAT if r != "auto"])
@pytest.mark.parametrize("unroll", [1, -1])
def test_last_block_at_the_ends_alone_is_the_whole_block(clip_text, rng, remat, unroll):
  """Value and gradient against all blocks on all tokens, taken at the ends afterwards."""
  _, ours, params = clip_text
  ours = ours.clone(remat=remat, unroll=unroll)
  tokens, segments, positions, ends = packed(texts_of([7, 3, 11], rng), 30)
  weight = rng.normal(size=(1, 3, 32)).astype(np.float32)

  def whole(params):
    x = params["token_embedding"][tokens] + params["position_embedding"][positions]
    mask, init = text.packed_causal_mask(segments), jax.nn.initializers.zeros
    for i in range(3):
      block = layers.Block(4, 128, "quick_gelu", 1e-5, (init,) * 4)
      of_layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
      x, _ = block.apply({"params": of_layer}, x, mask)
    norm_ = flax.linen.LayerNorm(epsilon=1e-5)
    return norm_.apply({"params": params["norm"]}, x)[:, ends[0]]

  params = jax.tree.map(jnp.asarray, params)
  functions = (whole, lambda p: ours.apply({"params": p}, tokens, segments, positions, ends))
  values = [f(params) for f in functions]
  assert_allclose(*values, rtol=1e-5, atol=1e-5)
  gradients = [jax.grad(lambda p, f=f: jnp.sum(f(p) * weight))(params) for f in functions]
  for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
    assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_packed_and_unpacked_texts_have_equal_features_and_gradients(clip_text, rng):
  _, ours, params = clip_text
  texts = texts_of([7, 3, 11], rng)
  weight = rng.normal(size=(3, 32)).astype(np.float32)

  def together(params):
    return ours.apply({"params": params}, *packed(texts, 30))[0]

  def apart(params):
    return jnp.concatenate([ours.apply({"params": params}, *packed([t], 16))[0] for t in texts])

  assert_allclose(together(params), apart(params), rtol=1e-5, atol=1e-5)
  gradients = [jax.grad(lambda p, f=f: jnp.sum(f(p) * weight))(params) for f in (together, apart)]
  for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
    assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_vision_tower_is_vit(rng):
  config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
    image_size=32, patch_size=8, layer_norm_eps=1e-6,
  )  # fmt: skip
  model = randomize(transformers.ViTModel(config, add_pooling_layer=False))
  state = {k: array(v) for k, v in model.state_dict().items()}

  def block(i):
    names = [k for k in state if f"layer.{i}." in k or f"layers.{i}." in k]

    def find(*words):
      (name,) = [n for n in names if n.endswith(".weight") and any(f".{w}." in n for w in words)]
      return state[name], state[name.removesuffix("weight") + "bias"]

    def linear(*words):
      weight, bias = find(*words)
      return {"kernel": weight.T, "bias": bias}

    def layer_norm(*words):
      weight, bias = find(*words)
      return {"scale": weight, "bias": bias}

    return {
      "norm1": layer_norm("layernorm_before"),
      "norm2": layer_norm("layernorm_after"),
      "attention": {
        "query": linear("query", "q_proj"), "key": linear("key", "k_proj"),
        "value": linear("value", "v_proj"), "out": linear("attention.output.dense", "o_proj"),
      },
      "mlp": {
        "fc1": linear("intermediate.dense", "fc1"),
        "fc2": linear(f"{i}.output.dense", "fc2"),
      },
    }  # fmt: skip

  kernel = state["embeddings.patch_embeddings.projection.weight"]  # [D, 3, p, p]
  params = {
    "class_token": state["embeddings.cls_token"],
    "position_embedding": state["embeddings.position_embeddings"][0],
    "patch_embedding": {
      "kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, 32),
      "bias": state["embeddings.patch_embeddings.projection.bias"],
    },
    "blocks": stacked([block(i) for i in range(3)]),
    "norm": {"scale": state["layernorm.weight"], "bias": state["layernorm.bias"]},
  }
  ours = vit.VisionTransformer(32, 8, 32, 3, 4, 4.0, "gelu", False, 1e-6)
  image = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
  got = ours.apply({"params": params}, image)
  want = model(torch.tensor(image).permute(0, 3, 1, 2)).last_hidden_state
  assert_allclose(got, array(want), rtol=1e-4, atol=1e-5)


def test_qk_norm_normalises_each_head(rng):
  ours = vit.VisionTransformer(16, 8, 32, 1, 4, 4.0, "gelu", True, 1e-6)
  params = ours.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  attention = params["blocks"]["attention"]
  assert attention["query_norm"]["scale"].shape == (1, 8)
  image = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
  before = ours.apply({"params": params}, image)
  # Queries are normalised, so their scale cannot matter.
  attention["query"] = jax.tree.map(lambda x: x * 7.0, attention["query"])
  assert_allclose(ours.apply({"params": params}, image), before, rtol=1e-3, atol=1e-4)


def test_sincos_positions_tell_all_places_apart_and_near_ones_least():
  grid = np.asarray(vit.sincos_positions(6, 32))
  assert grid.shape == (36, 32)
  # Hand-worked: the first channel is sin(x pi / 2), the first of the second half sin(y pi / 2).
  assert_allclose(grid[:4, 0], [0, 1, 0, -1], atol=1e-6)
  assert_allclose(grid[::6, 16][:4], [0, 1, 0, -1], atol=1e-6)
  distance = np.linalg.norm(grid[:, None] - grid[None], axis=-1)
  assert distance[~np.eye(36, dtype=bool)].min() > 0.5
  x = np.arange(36) % 6
  row = np.arange(36) < 6
  assert (np.argsort(distance[0, row])[1] == 1) and (x[np.argmax(distance[0, row])] > 2)
  with pytest.raises(ValueError, match="must divide by 4"):
    vit.sincos_positions(6, 30)


class TorchDecoder(torch.nn.Module):
  """The published arrangement from torch's own layer parts: zero target, queries added."""

  def __init__(self):
    super().__init__()
    self.input = torch.nn.Linear(24, 32, bias=False)
    self.input_norm = torch.nn.LayerNorm(32)
    self.layers = torch.nn.ModuleList(
      torch.nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
      for _ in range(2)
    )
    self.norm = torch.nn.LayerNorm(32)
    self.query_embed = torch.nn.Embedding(4, 32)

  def forward(self, tokens):
    memory = self.input_norm(self.input(tokens))
    pos = self.query_embed.weight[None].expand(len(tokens), -1, -1)
    x, out = torch.zeros_like(pos), []
    for layer in self.layers:
      y = layer.norm1(x)
      x = x + layer.self_attn(y + pos, y + pos, y)[0]
      y = layer.norm2(x)
      x = x + layer.multihead_attn(y + pos, memory, memory)[0]
      x = x + layer.linear2(torch.relu(layer.linear1(layer.norm3(x))))
      out.append(self.norm(x))
    return torch.stack(out)


def test_decoder_is_torchs_decoder_layer_as_published(rng):
  model = randomize(TorchDecoder())

  def attention(a):
    weights, biases = np.split(array(a.in_proj_weight), 3), np.split(array(a.in_proj_bias), 3)
    names = ("query", "key", "value")
    parts = {n: {"kernel": w.T, "bias": b} for n, w, b in zip(names, weights, biases, strict=True)}
    return parts | {"out": dense(a.out_proj)}

  params = {
    "input": {"kernel": array(model.input.weight).T},
    "input_norm": norm(model.input_norm),
    "query_embedding": array(model.query_embed.weight),
    "norm": norm(model.norm),
    "layers": stacked(
      [
        {
          "norm1": norm(layer.norm1), "norm2": norm(layer.norm2), "norm3": norm(layer.norm3),
          "self_attention": attention(layer.self_attn),
          "cross_attention": attention(layer.multihead_attn),
          "mlp": {"fc1": dense(layer.linear1), "fc2": dense(layer.linear2)},
        }
        for layer in model.layers
      ]
    ),
  }  # fmt: skip
  ours = decoder.QueryDecoder(3, 32, 2, 4, 64, 0.1, 1e-5)
  tokens = rng.normal(size=(2, 7, 24)).astype(np.float32)
  got = ours.apply({"params": params}, tokens)
  assert_allclose(got, array(model(torch.tensor(tokens))), rtol=1e-4, atol=1e-5)
  names = {
    k for k in flax.traverse_util.flatten_dict(ours.init(jax.random.key(0), tokens)["params"])
  }
  assert names == set(flax.traverse_util.flatten_dict(params))


def test_hierarchical_stem_is_its_strided_convolutions(rng):
  """Merging squares and a matrix product are a convolution whose stride is its size."""
  stem = vit.HierarchicalStem(patch=16, width=12, activation="gelu", norm_eps=1e-6)
  image = rng.normal(size=(2, 32, 48, 3)).astype(np.float32)
  params = stem.init(jax.random.key(0), image)["params"]
  params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
  got = stem.apply({"params": params}, image)

  x = torch.tensor(image).permute(0, 3, 1, 2)
  for name, side in (("fc0", 4), ("fc1", 2), ("fc2", 2)):
    if name != "fc0":
      x = torch.nn.functional.gelu(x)
      # One LayerNorm over the merged square: all of its channels at once.
      squares = torch.nn.functional.unfold(x, side, stride=side)  # [B, C * side^2, L]
      order = np.arange(x.shape[1] * side * side).reshape(x.shape[1], side * side).T.ravel()
      scale, bias = (torch.tensor(params[f"norm{name[-1]}"][k]) for k in ("scale", "bias"))
      squares = torch.nn.functional.layer_norm(
        squares[:, order].transpose(1, 2), (len(order),), scale, bias, 1e-6
      )
      rows, columns = x.shape[2] // side, x.shape[3] // side
      x = squares @ torch.tensor(params[name]["kernel"]) + torch.tensor(params[name]["bias"])
      x = x.transpose(1, 2).reshape(x.shape[0], -1, rows, columns)
    else:
      kernel = torch.tensor(params[name]["kernel"]).reshape(side, side, 3, -1).permute(3, 2, 0, 1)
      x = torch.nn.functional.conv2d(x, kernel, torch.tensor(params[name]["bias"]), stride=side)
  assert_allclose(got, x.flatten(2).transpose(1, 2).numpy(), rtol=1e-5, atol=1e-5)


def test_hierarchical_stem_keeps_patches_apart(rng):
  """A change in one patch changes that patch's embedding alone."""
  stem = vit.HierarchicalStem(patch=8, width=12, activation="gelu", norm_eps=1e-6)
  image = rng.normal(size=(1, 16, 16, 3)).astype(np.float32)
  variables = stem.init(jax.random.key(0), image)
  other = image.copy()
  other[0, 9, 12] += 1  # second row of patches, second column
  changed = np.any(stem.apply(variables, image) != stem.apply(variables, other), axis=-1)
  assert changed.tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("remat", ["none", "block"])
def test_scanned_or_written_out_a_stack_is_the_same_with_its_dropout(rng, remat):
  """Values, gradients and draws of two layers, in one scan and without."""
  tokens = rng.normal(size=(2, 5, 16)).astype(np.float32)
  scanned = decoder.QueryDecoder(3, 16, 2, 2, 32, 0.5, 1e-5, remat=remat)
  written_out = scanned.clone(unroll=-1)
  shapes = jax.eval_shape(scanned.init, jax.random.key(0), tokens)["params"]
  params = jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape).astype(np.float32), shapes)

  def run(model):
    def loss(params):
      out = model.apply({"params": params}, tokens, train=True, rngs={"dropout": jax.random.key(1)})
      return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    return [out, *jax.tree.leaves(gradients)]

  for a, b in zip(run(scanned), run(written_out), strict=True):
    assert_allclose(a, b, rtol=1e-4, atol=1e-4)
