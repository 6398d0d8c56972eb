"""Vision transformer: image -> tokens (Dosovitskiy et al., ICLR 2021), with QK-norm by config."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grain_jax.models import elementwise, fused_attention, layers

Array = jax.Array


def sincos_positions(side: int, width: int) -> Array:
  """2-D sine-cosine embedding of a grid (Vaswani et al., 2017, of x and of y): [side^2, width].

  A quarter of the channels each: sine and cosine of x, sine and cosine of y. Wavelengths run from
  4 patches to 4 grids, so that every channel tells places of this grid apart.
  """
  if width % 4:
    raise ValueError(f"a width of {width} must divide by 4 for sine-cosine positions.")
  frequency = jnp.pi / 2 * jnp.logspace(0.0, -jnp.log10(side), width // 4)
  angle = jnp.arange(side)[:, None] * frequency  # [side, width / 4]
  wave = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
  across = jnp.tile(wave, (side, 1))
  down = jnp.repeat(wave, side, axis=0)
  return jnp.concatenate([across, down], axis=-1)


def merge(x: Array, side: int) -> Array:
  """Squares of side x side pixels become one: [B, H, W, C] -> [B, H/side, W/side, side^2 C]."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // side, side, width // side, side, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, height // side, width // side, side * side * channels)


class HierarchicalStem(nn.Module):
  """Patch embedding by a small network: 4 x 4 pixels, then 2 x 2 merged until a patch is whole.

  The hMLP stem (Touvron et al., "Three things everyone should know about Vision Transformers",
  ECCV 2022, sec. 5) with LayerNorm. Patches do not see each other, as with the linear embedding.
  """

  patch: int  # pixels: 8, 16, 32, ...
  width: int
  activation: str
  norm_eps: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image: Array) -> Array:
    """[B, size, size, 3] -> [B, (size / patch)^2, width]."""

    def dense(x: Array, width: int, name: str) -> Array:
      init = nn.initializers.lecun_normal()
      return nn.Dense(width, kernel_init=init, dtype=self.dtype, name=name)(x)

    x = dense(merge(image.astype(self.dtype), 4), self.width // 2, "fc0")
    for i in range(1, (self.patch // 4).bit_length()):
      x = merge(elementwise.activate(self.activation, x), 2)
      x = layers.layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name=f"norm{i}")
      x = dense(x, self.width, f"fc{i}")
    return x.reshape(image.shape[0], -1, self.width)


def kept_patches(patches: int, dropout: float) -> int:
  """How many of an image's patches training sees."""
  return max(1, round(patches * (1 - dropout)))


class VisionTransformer(nn.Module):
  """Class token and patch tokens after the final LayerNorm.

  With `pre_norm` and without `patch_bias` it is CLIP's image tower (Radford et al., 2021), whose
  final LayerNorm sees the class token alone; for that token it is the same. Without `class_token`
  it is SigLIP's (Zhai et al., ICCV 2023): the patches alone.

  Initialised as timm does: normal (`init_std`, 0.02; timm's truncation is at +-2, a hundred of
  these) for weights and positions, 1e-6 for the class token, zero biases; the patch embedding as
  torch's convolution. The hMLP stem's layers have unit gain (LeCun normal).
  """

  size: int
  patch: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float
  activation: str
  qk_norm: bool
  norm_eps: float
  init_std: float = 0.02
  position_init: str = "normal"
  pre_norm: bool = False
  patch_bias: bool = True
  class_token: bool = True
  stem: str = "linear"
  patch_dropout: float = 0.0  # part of the patches that training does not see
  unroll: int = 1
  remat: str = "none"
  fused: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image: Array, *, train: bool = False) -> Array:
    """Encodes normalised images.

    Args:
      image: [B, size, size, 3], normalised.
      train: with patch dropout (needs an rng named 'dropout').

    Returns:
      [B, 1 + (size / patch)^2, width], the class token (if there is one) first; of the patches
      those that are kept.
    """
    batch, side = image.shape[0], self.size // self.patch
    init = nn.initializers.normal(self.init_std)
    if self.stem == "hmlp":
      x = HierarchicalStem(
        self.patch, self.width, self.activation, self.norm_eps, dtype=self.dtype, name="stem"
      )(image)
    else:
      # A convolution of stride `patch`, written as one matrix product over flattened patches.
      x = merge(image, self.patch).reshape(batch, side * side, -1).astype(self.dtype)
      uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
      x = nn.Dense(
        self.width,
        use_bias=self.patch_bias,
        kernel_init=uniform,
        bias_init=layers.linear_bias(x.shape[-1]),
        dtype=self.dtype,
        name="patch_embedding",
      )(x)
    if self.class_token:
      cls = self.param("class_token", nn.initializers.normal(1e-6), (1, 1, self.width))
      x = jnp.concatenate([jnp.tile(cls, (batch, 1, 1)).astype(self.dtype), x], axis=1)
    positions = self.param("position_embedding", self._positions, (x.shape[1], self.width))
    x = x + positions.astype(self.dtype)
    if train and self.patch_dropout:
      x = self._keep_some(x)
    if self.pre_norm:
      x = layers.layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="pre_norm")
    tokens = x.shape[1]
    padding = fused_attention.padded_length(tokens, self.dtype) - tokens
    if padding:
      x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    blocks = layers.Stack(
      layers.Block,
      {
        "heads": self.heads,
        "hidden": round(self.width * self.mlp_ratio),
        "activation": self.activation,
        "norm_eps": self.norm_eps,
        "inits": (init, init, init, init),
        "qk_norm": self.qk_norm,
        "tokens": tokens if padding else None,
        "fused": self.fused,
        "part": "image tower",
        "dtype": self.dtype,
      },
      unroll=self.unroll,
      remat=self.remat,
    )
    x = layers.shard_batch(x)
    if self.is_initializing():
      x, _ = blocks.create(self.depth, 1, name="blocks")(x, None)
    else:
      x, _ = blocks.apply(self.variables["params"]["blocks"], x, None)
    x = x[:, :tokens] if padding else x
    return layers.layer_norm(x, epsilon=self.norm_eps, dtype=self.dtype, name="norm")

  def _keep_some(self, x: Array) -> Array:
    """The class token and, of each image, so many patches drawn at random, in their order.

    The draw is of the global batch, so that it does not depend on the sharding.
    """
    first = int(self.class_token)
    batch, patches = x.shape[0], x.shape[1] - first
    kept = kept_patches(patches, self.patch_dropout)
    draw = jax.random.uniform(self.make_rng("dropout"), (batch, patches))
    chosen = jnp.sort(jnp.argsort(draw, axis=1)[:, :kept], axis=1)
    return jnp.concatenate(
      [x[:, :first], jnp.take_along_axis(x[:, first:], chosen[..., None], axis=1)], axis=1
    )

  def _positions(self, key: Array, shape: tuple[int, int]) -> Array:
    """Initial position embedding, the class token's first; learned from there on."""
    if self.position_init == "normal":
      return nn.initializers.normal(0.02)(key, shape)
    grid = sincos_positions(self.size // self.patch, self.width)
    return jnp.concatenate([jnp.zeros((int(self.class_token), self.width)), grid])
