"""GRAIN's train step in PyTorch: what a user who knows PyTorch would write, equal in mathematics.

It is GRAIN as published and no more: `bench.train_step_sides.PEER` lists the settings it knows.
Fused projections, `scaled_dot_product_attention`, no loop over heads or texts, one matching a step.
Texts come in groups, each one batch [N, L] for the text tower: all of them padded to the context,
as published, or captions and descriptions apart, each padded to its own longest (`bench.
train_step_sides` makes them). Right padding needs no mask: attention is causal, and the feature of
a text is read at its end.

Dimensions: B images, N regions of all images, Q queries, L tokens, D width, E embedding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Batch:
  """A batch whose regions stand flat, sorted by image; every region has a description."""

  image: Tensor  # u8 [B, 3, H, W]
  texts: tuple[tuple[Tensor, Tensor], ...]  # groups of (ids i64 [n, L] padded with 0, ends i64 [n])
  boxes: Tensor  # [N, 4]: (cx, cy, w, h)
  owner: Tensor  # i64 [N], image of each region
  regions: tuple[int, ...]  # regions of each image; their sum is N

  def to(self, device: str) -> Batch:
    """The batch on a device."""
    return Batch(
      image=self.image.to(device),
      texts=tuple((ids.to(device), ends.to(device)) for ids, ends in self.texts),
      boxes=self.boxes.to(device),
      owner=self.owner.to(device),
      regions=self.regions,
    )


@dataclasses.dataclass(frozen=True)
class Output:
  """Embeddings are L2-normalised."""

  image: Tensor  # [B, E]
  regions: Tensor  # [B, Q, E]
  boxes: Tensor  # [B, Q, 4], of the last decoder layer
  captions: Tensor  # [B, E]
  descriptions: Tensor  # [N, E]


class QuickGELU(nn.Module):
  """x * sigmoid(1.702 x)."""

  def forward(self, x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
  """Multi-head attention; inputs that are equal share one product.

  Args:
    shared: which of query, key and value the first input is projected to ('qkv', 'qk', 'kv'); the
      second input gives the one that is left.
  """

  def __init__(
    self, width: int, heads: int, *, shared: str, norm_eps: float = 0.0, dropout: float = 0.0
  ):
    super().__init__()
    self.heads, self.shared, self.dropout = heads, shared, dropout
    self.joint = nn.Linear(width, len(shared) * width)
    if len(shared) == 2:
      self.single = nn.Linear(width, width)
    self.query_norm = nn.LayerNorm(width // heads, norm_eps) if norm_eps else nn.Identity()
    self.key_norm = nn.LayerNorm(width // heads, norm_eps) if norm_eps else nn.Identity()
    self.out = nn.Linear(width, width)

  def forward(self, x: Tensor, other: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """x [B, L, D] and, unless all three are shared, other [B, M, D] -> [B, length of q, D]."""
    batch, _, width = x.shape
    parts = self.joint(x).view(batch, -1, len(self.shared), self.heads, width // self.heads)
    found = dict(zip(self.shared, parts.transpose(1, 3).unbind(2), strict=True))
    if other is not None:
      (name,) = set("qkv") - set(self.shared)
      single = self.single(other).view(batch, -1, self.heads, width // self.heads)
      found[name] = single.transpose(1, 2)
    y = F.scaled_dot_product_attention(
      self.query_norm(found["q"]),
      self.key_norm(found["k"]),
      found["v"],
      dropout_p=self.dropout if self.training else 0.0,
      is_causal=causal,
    )
    return self.out(y.transpose(1, 2).reshape(batch, -1, width))


class Block(nn.Module):
  """Pre-norm transformer block of both towers."""

  def __init__(
    self, width: int, heads: int, hidden: int, *, activation: str, eps: float, qk_norm: bool
  ):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps)
    self.attention = Attention(width, heads, shared="qkv", norm_eps=eps if qk_norm else 0.0)
    self.norm2 = nn.LayerNorm(width, eps)
    act = {"gelu": nn.GELU, "quick_gelu": QuickGELU}[activation]()
    self.mlp = nn.Sequential(nn.Linear(width, hidden), act, nn.Linear(hidden, width))

  def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
    x = x + self.attention(self.norm1(x), causal=causal)
    return x + self.mlp(self.norm2(x))


def blocks(tower: ml_collections.ConfigDict, *, qk_norm: bool) -> nn.ModuleList:
  """The blocks of a tower."""
  hidden, kind = round(tower.width * tower.mlp_ratio), tower.activation
  return nn.ModuleList(
    Block(tower.width, tower.heads, hidden, activation=kind, eps=tower.norm_eps, qk_norm=qk_norm)
    for _ in range(tower.depth)
  )


class ImageTower(nn.Module):
  """Vision transformer with a class token and learned positions."""

  def __init__(self, tower: ml_collections.ConfigDict):
    super().__init__()
    width, patch = tower.width, tower.patch
    self.patch_embedding = nn.Conv2d(3, width, patch, patch)
    self.class_token = nn.Parameter(torch.zeros(1, 1, width))
    self.position_embedding = nn.Parameter(
      0.02 * torch.randn(1 + (tower.size // patch) ** 2, width)
    )
    self.blocks = blocks(tower, qk_norm=tower.qk_norm)
    self.norm = nn.LayerNorm(width, tower.norm_eps)

  def forward(self, image: Tensor) -> Tensor:
    """Normalised [B, 3, H, W] -> [B, 1 + patches, D]."""
    x = self.patch_embedding(image).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.position_embedding
    for block in self.blocks:
      x = block(x)
    return self.norm(x)


class TextTower(nn.Module):
  """CLIP's text transformer: the feature of a text is its last token's."""

  def __init__(self, tower: ml_collections.ConfigDict):
    super().__init__()
    self.token_embedding = nn.Embedding(tower.vocab_size, tower.width)
    nn.init.normal_(self.token_embedding.weight, std=0.02)
    self.position_embedding = nn.Parameter(0.01 * torch.randn(tower.context, tower.width))
    self.blocks = blocks(tower, qk_norm=False)
    self.norm = nn.LayerNorm(tower.width, tower.norm_eps)

  def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
    """ids [n, L] and the index of each text's last token [n] -> [n, D]."""
    x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
    for block in self.blocks:
      x = block(x, causal=True)
    return self.norm(x[torch.arange(len(x), device=x.device), ends])


class DecoderLayer(nn.Module):
  """Pre-norm; the query embedding is added to q and k of self-attention, q of cross-attention."""

  def __init__(self, decoder: ml_collections.ConfigDict):
    super().__init__()
    width, heads, rate, eps = decoder.width, decoder.heads, decoder.dropout, decoder.norm_eps
    self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps) for _ in range(3))
    self.self_attention = Attention(width, heads, shared="qk", dropout=rate)
    self.cross_attention = Attention(width, heads, shared="kv", dropout=rate)
    self.mlp = nn.Sequential(
      nn.Linear(width, decoder.mlp_dim),
      nn.ReLU(),
      nn.Dropout(rate),
      nn.Linear(decoder.mlp_dim, width),
    )
    self.dropout = nn.Dropout(rate)

  def forward(self, x: Tensor, queries: Tensor, memory: Tensor) -> Tensor:
    y = self.norm1(x)
    x = x + self.dropout(self.self_attention(y + queries, y))
    x = x + self.dropout(self.cross_attention(memory, self.norm2(x) + queries))
    return x + self.dropout(self.mlp(self.norm3(x)))


class QueryDecoder(nn.Module):
  """Image tokens -> features of the Q region queries and, last, the image query."""

  def __init__(self, decoder: ml_collections.ConfigDict, *, inputs: int, queries: int):
    super().__init__()
    self.input = nn.Linear(inputs, decoder.width, bias=False)
    self.input_norm = nn.LayerNorm(decoder.width, decoder.norm_eps)
    self.query_embedding = nn.Parameter(torch.randn(queries + 1, decoder.width))
    self.layers = nn.ModuleList(DecoderLayer(decoder) for _ in range(decoder.depth))
    self.norm = nn.LayerNorm(decoder.width, decoder.norm_eps)

  def forward(self, tokens: Tensor) -> Tensor:
    """[B, L, any width] -> [B, Q + 1, D] after the last layer and the final norm."""
    memory = self.input_norm(self.input(tokens))
    queries = self.query_embedding.expand(len(tokens), -1, -1)
    x = torch.zeros_like(queries)
    for layer in self.layers:
      x = layer(x, queries, memory)
    return self.norm(x)


class GrainTorch(nn.Module):
  """Towers, decoder, projections; sizes from a resolved configuration of grain_jax."""

  def __init__(self, config: ml_collections.ConfigDict):
    super().__init__()
    m = config.model
    width = m.decoder.width
    self.image_tower, self.text_tower = ImageTower(m.image), TextTower(m.text)
    self.query_decoder = QueryDecoder(m.decoder, inputs=m.image.width, queries=m.num_queries)
    self.box_head = nn.Sequential(
      nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )
    self.text_projection = nn.Linear(m.text.width, m.embed_dim, bias=False)
    self.image_projection = nn.Linear(width, m.embed_dim, bias=False)
    self.region_projection = nn.Linear(width, m.embed_dim, bias=False)
    self.logit_scale = nn.Parameter(torch.tensor(m.logit_scale_init))
    # (u8 / 255 - mean) / std in one multiplication and one addition.
    mean, std = torch.tensor([m.image.mean, m.image.std]).view(2, 3, 1, 1)
    self.register_buffer("image_factor", 1 / (255 * std), persistent=False)
    self.register_buffer("image_offset", -mean / std, persistent=False)

  def forward(self, batch: Batch) -> Output:
    tokens = self.image_tower(torch.addcmul(self.image_offset, batch.image, self.image_factor))
    x = self.query_decoder(tokens)
    texts = F.normalize(self.encode_text(batch), dim=-1)
    regions, image = x[:, :-1], x[:, -1]
    return Output(
      image=F.normalize(self.image_projection(image), dim=-1),
      regions=F.normalize(self.region_projection(regions), dim=-1),
      boxes=self.box_head(regions).sigmoid(),
      captions=texts[: len(batch.image)],
      descriptions=texts[len(batch.image) :],
    )

  def encode_text(self, batch: Batch) -> Tensor:
    """Captions, then descriptions: [B + N, E], not normalised."""
    texts = [self.text_tower(ids, ends) for ids, ends in batch.texts]
    return self.text_projection(torch.cat(texts))


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
  """GIoU of paired boxes (cx, cy, w, h) [..., 4] of positive area (Rezatofighi et al., 2019)."""
  a_low, a_high = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
  b_low, b_high = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
  inner = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
  hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
  union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inner
  return inner / union - (hull - union) / hull


def assign(cost: Tensor, regions: Sequence[int]) -> Tensor:
  """The query of each region at least cost: [N, Q] and regions per image -> i64 [N]."""
  parts = np.split(cost.float().cpu().numpy(), np.cumsum(regions)[:-1])
  found = np.concatenate([scipy.optimize.linear_sum_assignment(part)[1] for part in parts])
  return torch.from_numpy(found).to(cost.device)


def equal_texts(tokens: Tensor) -> Tensor:
  """bool [n, n], true where two different rows of tokens [n, L] are equal."""
  same = (tokens[:, None] == tokens[None]).all(-1)
  return same & ~torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)


def losses(
  model: GrainTorch,
  batch: Batch,
  config: ml_collections.ConfigDict,
  *,
  matcher: Callable[[Tensor, Sequence[int]], Tensor] = assign,
) -> dict[str, Tensor]:
  """'loss' and its parts, named as in `grain_jax.objectives`, each the mean []."""
  w, out, scale = config.loss, model(batch), model.logit_scale.exp()
  images, number = len(batch.image), max(len(batch.boxes), 1)
  predicted = out.boxes
  with torch.no_grad():
    a, b = predicted[batch.owner], batch.boxes[:, None]
    cost = w.box_l1_cost * (a - b).abs().sum(-1) - w.box_giou_cost * generalized_iou(a, b)
    queries = matcher(cost, batch.regions)
  matched = predicted[batch.owner, queries]
  l1 = (matched - batch.boxes).abs().sum() / number
  giou = (1 - generalized_iou(matched, batch.boxes)).sum() / number

  captions = scale * out.image @ out.captions.T
  regions = scale * out.regions[batch.owner, queries] @ out.descriptions.T
  if w.mask_duplicates:
    tokens = [ids for ids, _ in batch.texts]
    first, rest = tokens if len(tokens) == 2 else (tokens[0][:images], tokens[0][images:])
    captions = captions.masked_fill(equal_texts(first), -math.inf)
    regions = regions.masked_fill(equal_texts(rest), -math.inf)
  own = torch.arange(images, device=captions.device)
  caption = (F.cross_entropy(captions, own) + F.cross_entropy(captions.T, own)) / 2
  region = F.cross_entropy(regions, torch.arange(len(regions), device=regions.device))
  box = w.box_loss_scale * (l1 + giou)
  return {
    "loss": w.caption * caption + w.box * box + w.region * region,
    "loss_caption": caption,
    "loss_box_l1": l1,
    "loss_box_giou": giou,
    "loss_box": box,
    "loss_region": region,
  }


class Trainer:
  """The model with its AdamW: `step(batch)` is one update."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    *,
    total_steps: int,
    warmup_steps: int,
    device: str = "cpu",
  ):
    o = config.optimizer
    self.config, self.model, self.updates = config, GrainTorch(config).to(device), 0
    self.total_steps, self.warmup_steps = total_steps, warmup_steps
    parameters = list(self.model.parameters())
    groups = [  # norms, biases and the logit scale do not decay
      {"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay},
      {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, fused=True)

  def learning_rate(self, step: int) -> float:
    """Linear from lr_init to lr, then a cosine to lr_end."""
    o = self.config.optimizer
    if step < self.warmup_steps:
      return o.lr_init + (o.lr - o.lr_init) * step / self.warmup_steps
    done = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
    return o.lr_end + (o.lr - o.lr_end) * (1 + math.cos(math.pi * done)) / 2

  def compile(self, *, backend: str) -> None:
    """Towers and decoder under torch.compile; each shape is a program of its own."""
    for module in (self.model.image_tower, self.model.text_tower, self.model.query_decoder):
      module.compile(backend=backend, dynamic=False)

  def step(self, batch: Batch) -> dict[str, Tensor]:
    """One update; the losses before it, without gradients."""
    parts = self.forward(batch)
    self.update(parts["loss"])
    return {name: value.detach() for name, value in parts.items()}

  def forward(self, batch: Batch) -> dict[str, Tensor]:
    """The losses."""
    self.model.train()
    return losses(self.model, batch, self.config)

  def update(self, loss: Tensor) -> None:
    """Gradients of the loss, and one step of the optimiser."""
    loss.backward()
    for group in self.optimizer.param_groups:
      group["lr"] = self.learning_rate(self.updates)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
      self.model.logit_scale.clamp_(0.0, self.config.model.logit_scale_max)
    self.updates += 1
