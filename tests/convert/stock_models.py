"""The published architectures from torch's own layers, and what the tests compare them by."""

import functools
from collections import OrderedDict

import jax
import numpy as np
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.nn import functional

from grain_jax import config as configs
from grain_jax import tokenizer as tokenizers
from grain_jax import trees
from grain_jax.convert import run_folder, weights
from grain_jax.models import grain, initial

CONTEXT = 16


def randomize(module):
  """Weights of which every one shows in the output."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in module.named_parameters():
      p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
      if p.ndim == 1 and name.endswith("weight"):
        p.add_(1.0)
  return module.eval()


class QuickGelu(nn.Module):
  def forward(self, x):
    return x * torch.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
  def __init__(self, width, heads, hidden, activation):
    super().__init__()
    self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
    layers = {
      "c_fc": nn.Linear(width, hidden), "gelu": activation(), "c_proj": nn.Linear(hidden, width)
    }  # fmt: skip
    self.mlp = nn.Sequential(OrderedDict(layers))

  def forward(self, x, mask=None):
    y = self.ln_1(x)
    x = x + self.attn(y, y, y, attn_mask=mask)[0]
    return x + self.mlp(self.ln_2(x))


class ClipTransformer(nn.Module):
  def __init__(self, width, depth, heads, hidden, activation):
    super().__init__()
    self.resblocks = nn.ModuleList(
      ClipBlock(width, heads, hidden, activation) for _ in range(depth)
    )

  def forward(self, x, mask=None):
    for block in self.resblocks:
      x = block(x, mask)
    return x


class ClipVision(nn.Module):
  """Patch 8, image 24, width 128 (two heads of 64), two layers."""

  def __init__(self, activation):
    super().__init__()
    self.class_embedding = nn.Parameter(torch.zeros(128))
    self.positional_embedding = nn.Parameter(torch.zeros(10, 128))
    self.conv1 = nn.Conv2d(3, 128, 8, 8, bias=False)
    self.ln_pre, self.ln_post = nn.LayerNorm(128), nn.LayerNorm(128)
    self.transformer = ClipTransformer(128, 2, 2, 96, activation)
    self.proj = nn.Parameter(torch.zeros(128, 24))

  def forward(self, image):
    x = self.conv1(image).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
    return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class TextTower(nn.Module):
  """What OpenAI's CLIP has at its top level: width 64 (one head), three layers, context 16."""

  def __init__(self, activation):
    super().__init__()
    self.token_embedding = nn.Embedding(tokenizers.VOCAB_SIZE, 64)
    self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT, 64))
    self.transformer = ClipTransformer(64, 3, 1, 96, activation)
    self.ln_final = nn.LayerNorm(64)
    self.text_projection = nn.Parameter(torch.zeros(64, 24))
    self.logit_scale = nn.Parameter(torch.zeros(()))

  def encode_text(self, ids):
    mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
    x = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
    return self.ln_final(x)[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


class Clip(TextTower):
  def __init__(self, activation=nn.GELU):
    super().__init__(activation)
    self.visual = ClipVision(activation)
    self.register_buffer("attn_mask", torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1))

  def encode_image(self, image):
    return self.visual(image)


class TimmAttention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.q_norm = nn.LayerNorm(width // heads, eps=1e-6)
    self.k_norm = nn.LayerNorm(width // heads, eps=1e-6)

  def forward(self, x):
    q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    x = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
    return self.proj(x.transpose(1, 2).flatten(2))


class TimmBlock(nn.Module):
  def __init__(self, width, heads, hidden):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
    self.attn = TimmAttention(width, heads)
    layers = {"fc1": nn.Linear(width, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, width)}
    self.mlp = nn.Sequential(OrderedDict(layers))

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class TimmVision(nn.Module):
  """ViT with QK-norm: patch 8, image 24, width 128, two heads, two layers; all tokens."""

  def __init__(self):
    super().__init__()
    self.cls_token = nn.Parameter(torch.zeros(1, 1, 128))
    self.pos_embed = nn.Parameter(torch.zeros(1, 10, 128))
    self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 128, 8, 8)})
    self.blocks = nn.Sequential(*(TimmBlock(128, 2, 96) for _ in range(2)))
    self.norm = nn.LayerNorm(128, eps=1e-6)

  def forward(self, image):
    x = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
    return self.norm(self.blocks(x))


class GrainTowers(TextTower):
  """`backbone_state_dict`; `image_projection` is used by the CLIP baseline alone."""

  def __init__(self):
    super().__init__(QuickGelu)
    self.visual = TimmVision()
    self.image_projection = nn.Parameter(torch.zeros(128, 24))

  def encode_image(self, image):
    return self.visual(image)[:, 0] @ self.image_projection


class GrainDecoder(nn.Module):
  """`state_dict`: 3 region queries and the image query, width 64, 8 heads, two layers."""

  def __init__(self):
    super().__init__()
    self.proj = nn.Linear(128, 64, bias=False)
    layers = (
      nn.TransformerDecoderLayer(64, 8, 96, 0.1, batch_first=True, norm_first=True)
      for _ in range(2)
    )
    decoder = nn.ModuleDict({"layers": nn.ModuleList(layers), "norm": nn.LayerNorm(64)})
    self.transformer = nn.ModuleDict({"pre_norm": nn.LayerNorm(64), "decoder": decoder})
    self.query_embed = nn.Embedding(4, 64)
    heads = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)])
    self.bbox_embed = nn.ModuleDict({"layers": heads})
    self.obj_proj = nn.Parameter(torch.zeros(64, 24))
    self.img_proj = nn.Parameter(torch.zeros(64, 24))
    # Dead in the published code.
    self.class_embed = nn.Linear(64, 11)
    self.pos_embed = nn.Parameter(torch.zeros(1, 7, 64))
    self.temporal_embed = nn.Parameter(torch.zeros(1, 4, 64))

  def forward(self, tokens):
    """(image [B, E], regions [B, Q, E], boxes of each layer [layers, B, Q, 4])."""
    memory = self.transformer["pre_norm"](self.proj(tokens))
    queries = self.query_embed.weight.expand(len(tokens), -1, -1)
    x, boxes = torch.zeros_like(queries), []
    for layer in self.transformer["decoder"]["layers"]:
      y = layer.norm1(x)
      x = x + layer.self_attn(y + queries, y + queries, y)[0]
      x = x + layer.multihead_attn(layer.norm2(x) + queries, memory, memory)[0]
      x = x + layer.linear2(torch.relu(layer.linear1(layer.norm3(x))))
      out = self.transformer["decoder"]["norm"](x)
      first, second, last = self.bbox_embed["layers"]
      box = last(torch.relu(second(torch.relu(first(out[:, :-1])))))
      boxes.append(box.sigmoid())
    return out[:, -1] @ self.img_proj, out[:, :-1] @ self.obj_proj, torch.stack(boxes)


def images(rng, size):
  return rng.integers(0, 256, (3, size, size, 3), dtype=np.uint8)


def texts(rng):
  """Ids [3, context] of texts of three lengths, padded with 0."""
  ids = np.zeros((3, CONTEXT), np.int32)
  for row, length in zip(ids, (4, 9, CONTEXT), strict=True):
    row[0], row[length - 1] = tokenizers.START, tokenizers.END
    row[1 : length - 1] = rng.integers(1, tokenizers.START, length - 2)
  return ids


def pixels(config, image):
  """What the model sees of u8 images, as torch wants it."""
  x = (image / 255 - np.array(config.model.image.mean)) / np.array(config.model.image.std)
  return torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2)


def run_of(folder):
  """(config, parameters, step) as evaluations find them; parameters as NumPy arrays."""
  config, params, step = weights.load_run(str(folder))
  return config, trees.map_with_name(lambda name, x: np.asarray(x), params), step


@functools.cache
def _jitted(config, method):
  model = grain.build(configs.from_json(config))
  return jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method))


def ours(config, params, method, *args):
  """A method of our model, compiled once for each configuration."""
  out = _jitted(configs.to_json(config), method)(params, *args)
  return jax.tree.map(np.asarray, out)


def random_run(folder, config, rng):
  """Writes a run of random weights; its parameters."""
  abstract = jax.eval_shape(lambda: initial.init_params(grain.build(config), config))
  params = trees.map_with_name(
    lambda name, x: np.asarray(
      0.15 * rng.normal(size=x.shape) + name.endswith("scale"), np.float32
    ),
    abstract,
  )
  run_folder.write(folder, config=config, params=params, source={})
  return params


def our_texts(config, params, ids):
  """Embeddings [3, E] of `texts`, a row each."""
  ends = ids.argmax(-1)[:, None].astype(np.int32)
  positions = np.broadcast_to(np.arange(CONTEXT, dtype=np.int32), ids.shape)
  segments = (positions <= ends).astype(np.int32)
  return ours(config, params, "encode_text", ids, segments, positions, ends)[:, 0]


def unit(x):
  return functional.normalize(x, dim=-1).detach().numpy()


def assert_close(got, want, *, tolerance=1e-5):
  """Within `tolerance` of the largest value."""
  assert got.shape == want.shape
  assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def assert_same_clip(folder, model, rng):
  """A run's embeddings are those of a torch model with `encode_image` and `encode_text`."""
  config, params, _ = run_of(folder)
  image, ids = images(rng, config.model.image.size), texts(rng)
  got = ours(config, params, "encode_image", image)
  assert_close(got, unit(model.encode_image(pixels(config, image))))
  got = our_texts(config, params, ids)
  assert_close(got, unit(model.encode_text(torch.tensor(ids.astype(np.int64)))))
  assert params["logit_scale"] == model.logit_scale.detach().numpy()


def assert_equal_trees(a, b):
  """The same names, and bit-equal leaves."""
  a, b = dict(trees.named_leaves(a)), dict(trees.named_leaves(b))
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype == np.float32
    assert_array_equal(a[name], b[name], err_msg=name)


def fails_in_one_line(call, out, *words):
  """`call()` raises a one-line ValueError with all of `words`, and leaves nothing at `out`."""
  before = sorted(out.parent.iterdir())
  try:
    call()
  except ValueError as error:
    text = str(error)
  else:
    raise AssertionError("nothing was raised")
  assert "\n" not in text.strip() and len(text) < 700, text
  for word in words:
    assert word in text, text
  assert sorted(out.parent.iterdir()) == before
