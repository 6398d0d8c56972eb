"""What an image's embedding is made of: pooling, no projection, patches left out in training."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from grain_jax import config as configs
from grain_jax.models import grain


@pytest.fixture
def images(rng):
  return jnp.asarray(rng.integers(0, 256, (3, 32, 32, 3)), jnp.uint8)


def apply(config, method, *inputs, **options):
  params = drawn.params(config)
  return grain.build(config).apply({"params": params}, *inputs, method=method, **options), params


@pytest.mark.parametrize("method", ["clip", "grain"])
@pytest.mark.parametrize("includes", [True, False])
@pytest.mark.parametrize("pool", ["class", "max", "mean"])
def test_the_embedding_is_torchs_pooled_token(tiny, images, method, pool, includes):
  tiny.method = method
  tiny.model.update(pool=pool, pool_includes_class=includes)
  configs.check(tiny)
  tokens, params = apply(tiny, "encode_tokens", images)
  got, _ = apply(tiny, "encode_image", images)
  x = torch.tensor(np.asarray(tokens))
  seen = x if includes else x[:, 1:]
  x = {"class": x[:, 0], "max": seen.max(dim=1).values, "mean": seen.mean(dim=1)}[pool]
  x = torch.nn.functional.normalize(x @ torch.tensor(params["image_projection"]["kernel"]), dim=-1)
  assert_allclose(got, x, atol=1e-5)


def test_without_a_projection_patches_are_in_the_space_of_the_pooled_token(tiny_clip, images):
  """CLIPpy: the image's embedding is the largest of each feature over its patches."""
  tiny_clip.model.update(pool="max", pool_includes_class=False, projects_images=False, embed_dim=32)
  configs.check(tiny_clip)
  got, params = apply(tiny_clip, "encode_image", images)
  assert "image_projection" not in params
  tokens, _ = apply(tiny_clip, "encode_tokens", images)
  patches, _ = apply(tiny_clip, "encode_patches", images)
  unit = torch.nn.functional.normalize(torch.tensor(np.asarray(tokens))[:, 1:], dim=-1)
  assert_allclose(patches.reshape(3, -1, 32), unit, atol=1e-6)
  best = torch.tensor(np.asarray(tokens))[:, 1:].max(dim=1).values
  assert_allclose(got, torch.nn.functional.normalize(best, dim=-1), atol=1e-6)


@pytest.mark.parametrize(
  ("method", "pool"), [("grain", "class"), ("grain", "max"), ("clip", "class")]
)
def test_patches_are_read_by_region_queries_or_else_by_the_auxiliary_embedding(
  tiny, images, method, pool
):
  tiny.method = method
  tiny.model.update(pool=pool, auxiliary_pool="max")
  got, params = apply(tiny, "encode_patches", images)
  if method == "grain":
    alone = {k: v for k, v in params.items() if k != "auxiliary_projection"}
    tiny.model.update(pool="query", auxiliary_pool="none")  # as GRAIN is
    want = grain.build(tiny).apply({"params": alone}, images, method="encode_patches")
  else:
    tokens, _ = apply(tiny, "encode_tokens", images)
    want = tokens[:, 1:] @ params["auxiliary_projection"]["kernel"]
    want = (want / jnp.linalg.norm(want, axis=-1, keepdims=True)).reshape(got.shape)
  assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.99])
def test_training_sees_some_patches_and_evaluation_all(tiny_clip, images, rate):
  """With one block that does nothing, tokens say which patches they are."""
  tiny_clip.model.image.update(patch=8, patch_dropout=rate)
  params = drawn.params(tiny_clip)
  model = grain.build(tiny_clip)

  def tokens(seed=None):
    rngs = {} if seed is None else {"dropout": jax.random.key(seed)}
    return np.asarray(
      model.apply({"params": params}, images, method="encode_tokens", train=bool(rngs), rngs=rngs)
    )

  assert tokens().shape == (3, 17, 32)
  kept = max(1, round(16 * (1 - rate)))
  assert tokens(0).shape == (3, 1 + kept, 32)
  assert_array_equal(tokens(0), tokens(0))
  assert rate > 0.9 or np.any(tokens(0) != tokens(1))


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_the_patches_left_are_whole_and_in_their_order(rate):
  from grain_jax.models import vit

  tower = vit.VisionTransformer(32, 8, 16, 1, 2, 2.0, "gelu", False, 1e-6, patch_dropout=rate)
  x = jnp.tile(jnp.arange(17.0)[None, :, None], (64, 1, 16))
  kept = np.asarray(tower.apply({}, x, method="_keep_some", rngs={"dropout": jax.random.key(0)}))
  assert kept.shape == (64, 1 + round(16 * (1 - rate)), 16)
  assert (kept == kept[..., :1]).all() and (kept[:, 0] == 0).all()
  assert (np.diff(kept[..., 0], axis=1) > 0).all()
  counts = np.bincount(kept[:, 1:, 0].astype(int).ravel(), minlength=17)[1:]
  assert counts.min() > 0 and len({tuple(row[:, 0]) for row in kept}) > 32


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model.image.patch_dropout": 1.0}, "patch_dropout = 1.0 must be in"),
    ({"model.image.patch_dropout": 0.5, "model.decoder.memory_positions": True}, "cannot be with"),
    ({"method": "clip", "model.pool": "query"}, "needs a query decoder"),
    ({"model.projects_images": False}, "width 32, and config.model.embed_dim = 16"),
    ({"model.pool": "attention"}, "Choose one of default, query, class, max, mean"),
  ],
)
def test_what_a_tower_cannot_give_is_one_line(tiny, changes, words):
  for key, value in changes.items():
    configs.set_key(tiny, key, value)
  with pytest.raises(ValueError, match=words) as error:
    configs.check(tiny)
  assert "\n" not in str(error.value)
