"""Texts that are equal within a batch: false negatives of each other.

"A red apple" in two images of a batch is one text with two right answers; a contrastive loss that
takes the other image's copy for a negative teaches the model to tell equal texts apart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def _mix(x: Array) -> Array:
  """Murmur3's 32-bit finaliser: every bit of the input reaches every bit of the output."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def hash_texts(tokens: Array, segments: Array, positions: Array, *, num_texts: int) -> Array:
  """Two 32-bit hashes of each text of packed rows; equal texts have equal hashes.

  Args:
    tokens: i32 [B, L].
    segments: i32 [B, L], 1 + index of the token's text; 0 is padding.
    positions: i32 [B, L], position of the token within its text.
    num_texts: T.

  Returns:
    u32 [B, T, 2]; absent texts give zeros.
  """
  token, position = tokens.astype(jnp.uint32), positions.astype(jnp.uint32)
  member = segments[..., None] == jnp.arange(1, num_texts + 1)  # [B, L, T]
  hashes = []
  for seed in (0x9E3779B9, 0x7F4A7C15):
    mixed = _mix(_mix(token + jnp.uint32(seed)) + position * jnp.uint32(0x27D4EB2F))
    hashes.append(jnp.sum(jnp.where(member, mixed[..., None], jnp.uint32(0)), axis=1))
  return jnp.stack(hashes, axis=-1).astype(jnp.uint32)


def pairwise_equal(a: Array, b: Array) -> Array:
  """u32 [..., N, 2], [..., M, 2] -> bool [..., N, M]: which texts of a equal which of b."""
  return jnp.all(a[..., :, None, :] == b[..., None, :, :], axis=-1)
