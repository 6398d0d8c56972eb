"""DeGLA's terms and their gradients against plain torch, written from the published formulas."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose

from grain_jax.objectives import anchor

B, K, E = 6, 3, 8
FIELDS = ("image", "captions", "negatives")


def unit(rng, *shape):
  x = rng.normal(size=(*shape, E)).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(rng):
  """Embeddings of a model and of its teacher; of one example all negatives are invalid."""
  ours = {"image": unit(rng, B), "captions": unit(rng, B), "negatives": unit(rng, B, K)}
  theirs = {"image": unit(rng, B), "captions": unit(rng, B), "negatives": unit(rng, B, K)}
  captioned = np.array([True, True, True, False, True, True])
  valid = (rng.random((B, K)) < 0.7) & captioned[:, None]
  valid[0], valid[1] = True, False
  return ours, theirs, captioned, valid


def shared(ours, theirs, captioned, valid, scale):
  """What a term sees of `objectives.shared.Shared`."""
  loss = types.SimpleNamespace(anchor=1.0, image_grounded=1.0, text_grounded=1.0)
  return types.SimpleNamespace(
    output=types.SimpleNamespace(**ours, logit_scale=scale),
    teacher=types.SimpleNamespace(**theirs),
    config=types.SimpleNamespace(loss=loss),
    captioned=jnp.asarray(captioned), negatives_valid=jnp.asarray(valid), num_negatives=K,
  )  # fmt: skip


def reference(ours, theirs, captioned, valid, scale):
  """Means over the captioned examples, a loop over examples each."""
  distance, of_image, of_text = 0.0, 0.0, 0.0
  for i in np.flatnonzero(captioned):
    image, text, false = ours["image"][i], ours["captions"][i], ours["negatives"][i][valid[i]]
    distance += F.mse_loss(image, theirs["image"][i], reduction="sum")
    distance += F.mse_loss(text, theirs["captions"][i], reduction="sum")
    distance += F.mse_loss(false, theirs["negatives"][i][valid[i]], reduction="sum")
    for row, right, factor in ((image, text, scale.exp()), (text, theirs["captions"][i], 10.0)):
      logits = factor * torch.cat([(row @ right)[None], false @ row])
      loss = F.cross_entropy(logits[None], torch.zeros(1, dtype=torch.long))
      of_image, of_text = (of_image + loss, of_text) if row is image else (of_image, of_text + loss)
  number = captioned.sum()
  return distance / number, of_image / number, of_text / number


def test_each_term_and_its_gradient_are_those_of_torch(rng):
  ours, theirs, captioned, valid = make(rng)
  scale = np.float32(1.5)

  def losses(ours, scale):
    seen = shared(ours, theirs, captioned, valid, scale)
    parts = anchor.anchor(seen, {})[0] | anchor.grounded(seen, {})[0]
    names = ("loss_anchor", "loss_image_grounded", "loss_text_grounded")
    return jnp.stack([parts[name][0] / parts[name][1] for name in names])

  got = losses(ours, scale)
  leaves = {name: torch.tensor(ours[name], requires_grad=True) for name in FIELDS}
  log_scale = torch.tensor(scale, requires_grad=True)
  fixed = {name: torch.tensor(theirs[name]) for name in FIELDS}
  want = reference(leaves, fixed, captioned, torch.tensor(valid), log_scale)
  assert_allclose(got, [w.item() for w in want], rtol=1e-5)
  gradients = jax.jacrev(losses, argnums=(0, 1))(ours, scale)
  for k, loss in enumerate(want):
    inputs = [*leaves.values(), log_scale]
    expected = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    found = [gradients[0][name][k] for name in FIELDS] + [gradients[1][k]]
    for mine, theirs_ in zip(found, expected, strict=True):
      zero = np.zeros(mine.shape)
      assert_allclose(mine, zero if theirs_ is None else theirs_, rtol=1e-4, atol=1e-6)


def test_without_negatives_or_examples_nothing_is_nan(rng):
  ours, theirs, captioned, _ = make(rng)
  for count, valid in ((captioned, np.zeros((B, K), bool)), (np.zeros(B, bool),) * 2):
    valid = np.broadcast_to(valid if valid.ndim == 2 else valid[:, None], (B, K))

    def total(ours, count=count, valid=valid):
      parts = anchor.grounded(shared(ours, theirs, count, valid, jnp.float32(4.0)), {})[0]
      return sum(pair[0] for pair in parts.values())

    value, gradient = jax.value_and_grad(total)(ours)
    assert value == 0 and not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))


def test_a_copy_of_the_model_is_at_no_distance(rng):
  ours, _, captioned, valid = make(rng)
  seen = shared(ours, ours, captioned, valid, jnp.float32(0.0))
  assert anchor.anchor(seen, {})[0]["loss_anchor"][0] == 0
