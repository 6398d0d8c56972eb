"""GRAIN assembled from its towers and the decoder (arXiv 2412.04429); CLIP is a setting of it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections

from grain_jax import config as configs
from grain_jax.models import decoder, norm_kernels, pooling, t5, text, vit

Array = jax.Array

METHODS = configs.CHOICES["method"]


@flax.struct.dataclass
class Output:
  """What a forward pass of a batch gives; embeddings are float32 and L2-normalised.

  With method 'clip' there are no queries: Q = 0 and `boxes` has no layers.
  """

  image: Array  # [B, E]: the image query's (GRAIN) or the class token's (CLIP) embedding
  regions: Array  # [B, Q, E]: embeddings of the region queries
  boxes: Array  # [layers, B, Q, 4]: (cx, cy, w, h) in [0, 1] after each decoder layer
  captions: Array  # [B, E]
  descriptions: Array  # [B, R, E]: meaningless where text_mask is false
  negatives: Array  # [B, K, E]: hard-negative captions, likewise
  region_negatives: Array  # [B, R, N, E]: false descriptions of the regions, likewise
  auxiliary: Array  # [B, E]: the second embedding of an image, or [B, 0] where there is none
  logit_scale: Array  # []: the logarithm of the scale s of the logits
  logit_bias: Array  # []: added to them by SigLIP's loss; 0 where the model has none


def normalize(x: Array) -> Array:
  """x / |x| over the last axis in float32; a zero vector stays zero."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


class Grain(nn.Module):
  """Image tower, text tower and query decoder with their projections into the joint space."""

  image_tower: vit.VisionTransformer
  text_tower: text.TextTransformer | t5.T5Encoder
  query_decoder: decoder.QueryDecoder | None
  embed_dim: int
  image_mean: tuple[float, ...]
  image_std: tuple[float, ...]
  logit_scale_init: float
  logit_bias_init: float | None = None  # None: the model has no bias of the logits
  pool: str = "class"  # of the image's embedding; 'query': the decoder's image query
  pool_includes_class: bool = True
  projects_images: bool = True
  auxiliary_pool: str = "none"  # of a second embedding of an image, projected: 'max' or 'mean'
  pooling: pooling.AttentionPooling | None = None  # where `pool` is 'map'
  text_bias: bool = False  # of the projection of texts
  norm: str = "auto"  # config.model.norm
  dtype: Any = jnp.float32

  def setup(self):
    normal, dim = nn.initializers.normal, self.embed_dim

    def project(width: int, *, bias: bool = False) -> nn.Dense:
      return nn.Dense(dim, use_bias=bias, kernel_init=normal(width**-0.5), dtype=self.dtype)

    self.text_projection = project(self.text_tower.width, bias=self.text_bias)
    pooled = self.pool != "query"
    if self.projects_images:
      of = self.image_tower if pooled else self.query_decoder
      self.image_projection = project(of.width)
    if self.auxiliary_pool != "none":
      self.auxiliary_projection = project(self.image_tower.width)
    if self.query_decoder is not None:
      width = self.query_decoder.width
      self.region_projection = project(width)
      self.box_head = decoder.BoxHead(
        width, init_scheme=self.query_decoder.init_scheme, dtype=self.dtype
      )
    self.logit_scale = self.param(
      "logit_scale", nn.initializers.constant(self.logit_scale_init), ()
    )
    self.logit_bias = jnp.zeros(())
    if self.logit_bias_init is not None:
      bias = nn.initializers.constant(self.logit_bias_init)
      self.logit_bias = self.param("logit_bias", bias, ())

  def __call__(
    self,
    batch: dict[str, Array],
    *,
    num_regions: int,
    train: bool = False,
  ) -> Output:
    """Encodes a device batch (`schema.BATCH`) of which the first 1 + num_regions texts are
    caption and descriptions. In training it needs an rng named 'dropout'."""
    seen = self.encode_tokens(batch["image"], train=train)
    image, regions, boxes = self._encode_regions(seen, train=train)
    texts = self.encode_text(batch["tokens"], batch["segments"], batch["positions"], batch["ends"])
    first = 1 + num_regions + batch["negative_kind"].shape[1]
    per_region = batch["region_negative_mask"].shape[2]
    return Output(
      image=image,
      regions=regions,
      boxes=boxes,
      captions=texts[:, 0],
      descriptions=texts[:, 1 : 1 + num_regions],
      negatives=texts[:, 1 + num_regions : first],
      region_negatives=texts[:, first:].reshape(
        len(texts), num_regions, per_region, self.embed_dim
      ),
      auxiliary=self._auxiliary(seen),
      logit_scale=self.logit_scale,
      logit_bias=self.logit_bias,
    )

  def encode_tokens(self, image: Array, *, train: bool = False) -> Array:
    """u8 [B, H, W, 3] -> tokens of the image tower [B, 1 + patches, D], class token (if any) first.

    In training fewer of them, by `config.model.image.patch_dropout`.
    """
    x = image.astype(jnp.float32) / 255.0
    x = (x - jnp.asarray(self.image_mean)) / jnp.asarray(self.image_std)
    with norm_kernels.chosen(self.norm):
      return self.image_tower(x, train=train)

  def _pool(self, tokens: Array) -> Array:
    """[B, L, D] -> [B, D]."""
    if self.pooling is not None:
      return self.pooling(tokens)
    return pooling.pool_tokens(
      tokens,
      self.pool,
      includes_class=self.pool_includes_class,
      class_token=self.image_tower.class_token,
    )

  def _project(self, pooled: Array) -> Array:
    """[..., D] -> [..., E], L2-normalised."""
    return normalize(self.image_projection(pooled) if self.projects_images else pooled)

  def _auxiliary(self, tokens: Array) -> Array:
    """Tokens [B, 1 + patches, D] -> the second embedding [B, E], or [B, 0]."""
    if self.auxiliary_pool == "none":
      return jnp.zeros((len(tokens), 0))
    pooled = pooling.pool_tokens(
      tokens,
      self.auxiliary_pool,
      includes_class=self.pool_includes_class,
      class_token=self.image_tower.class_token,
    )
    return normalize(self.auxiliary_projection(pooled))

  def encode_regions(self, image: Array) -> tuple[Array, Array, Array]:
    """u8 [B, H, W, 3] -> image [B, E], regions [B, Q, E], boxes [layers, B, Q, 4]."""
    return self._encode_regions(self.encode_tokens(image))

  def _encode_regions(self, tokens: Array, *, train: bool = False) -> tuple[Array, Array, Array]:
    pooled = None
    if self.pool != "query":
      pooled = self._pool(tokens)
    if self.query_decoder is None:
      batch = len(tokens)
      nothing = jnp.zeros((batch, 0, self.embed_dim)), jnp.zeros((0, batch, 0, 4))
      return self._project(pooled), *nothing
    with norm_kernels.chosen(self.norm):
      x = self.query_decoder(tokens, train=train)
    boxes = self.box_head(x[:, :, :-1])
    regions = normalize(self.region_projection(x[-1, :, :-1]))
    return self._project(x[-1, :, -1] if pooled is None else pooled), regions, boxes

  def encode_image(self, image: Array) -> Array:
    """u8 [B, H, W, 3] -> [B, E], L2-normalised float32."""
    return self.encode_regions(image)[0]

  def encode_patches(self, image: Array) -> Array:
    """u8 [B, H, W, 3] -> patches in the space of the texts [B, H / patch, W / patch, E].

    With a query decoder a patch is what a region query makes of an image of which it sees that
    token alone; so it is with attention pooling. Where else the image's embedding, or its auxiliary
    one, is pooled from tokens, a patch's token takes the projection that the pooled one takes (as
    CLIPpy, arXiv 2210.09996, reads patches).
    """
    side = self.image_tower.size // self.image_tower.patch
    tokens = self.encode_tokens(image)
    first = int(self.image_tower.class_token)
    if self.query_decoder is not None:
      x = self.query_decoder(tokens, alone=True)[-1, :, 0]
      patches = self.region_projection(x).reshape(*tokens.shape[:2], -1)[:, first:]
    elif self.auxiliary_pool != "none":
      patches = self.auxiliary_projection(tokens[:, first:])
    else:
      seen = tokens[:, first:]
      if self.pooling is not None:
        seen = self.pooling(seen.reshape(-1, 1, seen.shape[-1])).reshape(seen.shape)
      patches = self._project(seen)
    return normalize(patches).reshape(len(image), side, side, -1)

  def encode_text(self, tokens: Array, segments: Array, positions: Array, ends: Array) -> Array:
    """Packed rows i32 [B, L] and ends [B, T] -> [B, T, E], L2-normalised float32."""
    with norm_kernels.chosen(self.norm):
      x = self.text_tower(tokens, segments, positions, ends)
    return normalize(self.text_projection(x))


def pool_of(config: ml_collections.ConfigDict) -> str:
  """`config.model.pool`, of which 'default' is GRAIN's image query or CLIP's class token."""
  if config.model.pool != "default":
    return config.model.pool
  return "query" if config.method == "grain" else "class"


def build(config: ml_collections.ConfigDict, *, unroll: int | None = None) -> Grain:
  """The model of a configuration.

  Args:
    config: a whole configuration (`configs/common.py`), sizes resolved by `config.resolve`.
    unroll: overrides `config.model.unroll` (cost analysis wants the unrolled program).
  """
  m = config.model
  common = {
    # A run has settled both (`training.sizing`). Left open, layers are a loop and all is stored.
    "unroll": (m.unroll or 1) if unroll is None else unroll,
    "remat": "none" if m.remat == "auto" else m.remat,
    "fused": m.attention,
    "dtype": jnp.dtype(m.dtype),
  }
  image_tower = vit.VisionTransformer(
    size=m.image.size,
    patch=m.image.patch,
    width=m.image.width,
    depth=m.image.depth,
    heads=m.image.heads,
    mlp_ratio=m.image.mlp_ratio,
    activation=m.image.activation,
    qk_norm=m.image.qk_norm,
    norm_eps=m.image.norm_eps,
    init_std=m.image.init_std,
    position_init=m.image.position_init,
    pre_norm=m.image.pre_norm,
    patch_bias=m.image.patch_bias,
    class_token=m.image.class_token,
    stem=m.image.stem,
    patch_dropout=m.image.patch_dropout,
    **common,
  )
  of_text = {
    "vocab_size": m.text.vocab_size,
    "width": m.text.width,
    "depth": m.text.depth,
    "heads": m.text.heads,
    "mlp_ratio": m.text.mlp_ratio,
    "activation": m.text.activation,
    "norm_eps": m.text.norm_eps,
    **common,
  }
  text_tower: text.TextTransformer | t5.T5Encoder
  if m.text.kind == "t5":  # positions are relative: the context is the tokenizer's alone
    text_tower = t5.T5Encoder(**of_text)
  else:
    causal = m.text.kind != "siglip"
    text_tower = text.TextTransformer(context=m.text.context, causal=causal, **of_text)
  attention_pooling = None
  if m.pool == "map":
    attention_pooling = pooling.AttentionPooling(
      width=m.image.width,
      heads=m.image.heads,
      hidden=round(m.image.width * m.image.mlp_ratio),
      activation=m.image.activation,
      norm_eps=m.image.norm_eps,
      fused=m.attention,
      dtype=jnp.dtype(m.dtype),
    )
  query_decoder = None
  if config.method == "grain":
    query_decoder = decoder.QueryDecoder(
      num_queries=m.num_queries,
      width=m.decoder.width,
      depth=m.decoder.depth,
      heads=m.decoder.heads,
      mlp_dim=m.decoder.mlp_dim,
      dropout=m.decoder.dropout,
      norm_eps=m.decoder.norm_eps,
      memory_positions=m.decoder.memory_positions,
      init_scheme=m.decoder.init,
      **common,
    )
  return Grain(
    image_tower=image_tower,
    text_tower=text_tower,
    query_decoder=query_decoder,
    embed_dim=m.embed_dim,
    image_mean=tuple(m.image.mean),
    image_std=tuple(m.image.std),
    logit_scale_init=m.logit_scale_init,
    logit_bias_init=m.logit_bias_init if m.logit_bias else None,
    pool=pool_of(config),
    pool_includes_class=m.pool_includes_class,
    projects_images=m.projects_images,
    auxiliary_pool=m.auxiliary_pool,
    pooling=attention_pooling,
    text_bias=m.text.kind == "siglip",
    norm=m.norm,
    dtype=jnp.dtype(m.dtype),
  )
