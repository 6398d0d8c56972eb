"""Candidates in chunks: the same loss and gradients, and no array of all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from numpy.testing import assert_allclose

from grain_jax.objectives import captions, contrastive, regions


def make(rng, rows, candidates, width=8):
  """Rows i whose positives are candidates i; some are invalid, some equal others."""
  a, b = (rng.normal(size=(n, width)).astype(np.float32) for n in (rows, candidates))
  a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
  text_hashes = rng.integers(0, candidates // 2, (candidates, 1)).astype(np.uint32).repeat(2, 1)
  valid = rng.random(candidates) < 0.8
  return a, b, valid, text_hashes, slice(rows)


def loss(a, b, scale, *, valid, text_hashes, positives, chunk):
  rows = contrastive.Candidates(
    a, valid[positives], None if text_hashes is None else text_hashes[positives]
  )
  candidates = contrastive.Candidates(b, valid, text_hashes)
  return contrastive.cross_entropy(rows, candidates, logit_scale=scale, chunk=chunk)


@pytest.mark.parametrize("chunk", [0, 1, 3, 10, 11, 12, 13, 100])
@pytest.mark.parametrize("named", [True, False])
def test_any_chunk_gives_the_loss_worked_out_row_by_row(rng, chunk, named):
  a, b, valid, text_hashes, positives = make(rng, 7, 12)
  if not named:
    text_hashes = np.arange(12, dtype=np.uint32)[:, None].repeat(2, 1)
  sums = loss(
    jnp.asarray(a), jnp.asarray(b), jnp.float32(1.5), valid=jnp.asarray(valid),
    text_hashes=jnp.asarray(text_hashes) if named else None, positives=positives, chunk=chunk,
  )  # fmt: skip
  want, correct = 0.0, 0
  for i in np.flatnonzero(valid[positives]):
    target = i
    others = [
      j for j in range(12)
      if j != target and valid[j] and text_hashes[j, 0] != text_hashes[target, 0]
    ]  # fmt: skip
    logits = np.exp(1.5) * a[i] @ b[[target, *others]].T
    want -= scipy.special.log_softmax(logits)[0]
    correct += logits[0] >= logits.max()
  assert_allclose(sums.loss, want, rtol=1e-5)
  assert (float(sums.correct), float(sums.rows)) == (correct, valid[positives].sum())


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_gradients_do_not_depend_on_the_chunk(rng, chunk):
  a, b, valid, text_hashes, positives = make(rng, 7, 12)

  def value(a, b, scale, chunk):
    keys = {
      "valid": jnp.asarray(valid),
      "text_hashes": jnp.asarray(text_hashes),
      "positives": positives,
    }
    return loss(a, b, scale, chunk=chunk, **keys).loss

  args = jnp.asarray(a), jnp.asarray(b), jnp.float32(1.0)
  whole = jax.grad(value, argnums=(0, 1, 2))(*args, 0)
  parts = jax.grad(value, argnums=(0, 1, 2))(*args, chunk)
  for got, want in zip(parts, whole, strict=True):
    assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def sizes(jaxpr):
  """Elements of every array that the program computes, those of inner programs too."""
  for equation in jaxpr.eqns:
    for var in equation.outvars:
      yield int(np.prod(var.aval.shape))
    for value in equation.params.values():
      for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from sizes(inner)


def test_logits_of_all_columns_never_exist(rng):
  """Caption and region loss with their gradients: 40 rows of 16, 16 columns at a time."""
  x = jnp.asarray(rng.normal(size=(40, 5, 16)).astype(np.float32))
  mask = jnp.ones((40, 5), bool)

  def both(x, chunk):
    options = {"logit_scale": jnp.float32(1.0), "chunk": chunk}
    caption, _ = captions.caption_loss(x[:, 0], x[:, 1], mask=mask[:, 0], **options)
    return caption + regions.region_loss(x, x, mask=mask, **options)[0]

  def largest(chunk):
    program = jax.make_jaxpr(jax.grad(both), static_argnums=1)(x, chunk)
    return max(sizes(program.jaxpr))

  assert largest(0) == 200 * 200  # so the count finds what it is to find
  assert largest(16) == 208 * 16  # the padded columns' own embeddings, [13, 16, 16]


def program_on_devices(x, **options):
  """Text of the gradients of caption and region loss, sharded over eight devices."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def both(x):
    shared = options | {"logit_scale": jnp.float32(1.0), "axes": ("data",)}
    mask = jnp.ones(x.shape[:2], bool)
    caption, _ = captions.caption_loss(x[:, 0], x[:, 1], mask=mask[:, 0], **shared)
    total = caption + regions.region_loss(x, x, mask=mask, **shared)[0]
    return jax.lax.psum(total, "data")

  cut = jax.sharding.PartitionSpec("data")
  over = jax.shard_map(both, mesh=mesh, in_specs=cut, out_specs=jax.sharding.PartitionSpec())
  return jax.make_jaxpr(jax.grad(over))(x)


def test_gradients_of_gathered_features_are_scattered_as_they_are_added_up(rng):
  """Each device receives the sum for its own examples alone: half the bytes of an all-reduce.

  Half precision halves what is gathered; sums over devices stay float32.
  """
  x = jnp.asarray(rng.normal(size=(16, 3, 4)).astype(np.float32))
  for dtype in ("float32", "bfloat16"):
    program = str(program_on_devices(x, dtype=jnp.dtype(dtype))).splitlines()
    gathered = [line for line in program if " all_gather[" in line and "bool" not in line]
    assert [line.split(":")[1].split("[")[0] for line in gathered] == 3 * [
      "f32" if dtype == "float32" else "bf16"
    ]
    sums = [line for line in program if "psum" in line or "reduce_scatter" in line]
    scattered = [line for line in sums if "reduce_scatter" in line]
    assert len(scattered) == 3  # images, captions, descriptions
    assert all("f32[2,4]" in line or "f32[6,4]" in line for line in scattered)
    assert all(":f32[] " in line for line in sums if line not in scattered), sums


def float64_loss(images, texts, scale):
  """CLIP's symmetric loss summed over a batch, and its gradients; NumPy, double precision."""
  images, texts = images.astype(np.float64), texts.astype(np.float64)
  logits = scale * images @ texts.T
  rows, columns = (scipy.special.log_softmax(logits, axis=axis) for axis in (1, 0))
  loss = -(np.trace(rows) + np.trace(columns)) / 2
  gradient = (np.exp(rows) + np.exp(columns)) / 2 - np.eye(len(logits))
  scale_gradient = np.sum(gradient * logits)
  return loss, (scale * gradient @ texts, scale * gradient.T @ images, scale_gradient)


@pytest.mark.parametrize("chunk", [0, 256])
@pytest.mark.parametrize(
  ("precision", "loss_error", "gradient_error"),
  [("float32", 1e-6, 2e-5), ("bfloat16", 3e-4, 4e-3)],
)
def test_loss_and_gradients_keep_what_their_precision_promises(
  rng, precision, loss_error, gradient_error, chunk
):
  """A batch of 1,024 over eight devices, at the end of training: s = 100, positives at 0.3."""
  size, width, scale = 1024, 512, 100.0
  texts = rng.normal(size=(size, width))
  texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
  noise = rng.normal(size=(size, width))
  images = 0.3 * texts + 0.95 * noise / np.linalg.norm(noise, axis=-1, keepdims=True)
  images /= np.linalg.norm(images, axis=-1, keepdims=True)
  near = rng.permutation(size)  # half of the negatives that are hard, as duplicates nearly are
  images[: size // 2] += 0.25 * texts[near[: size // 2]]
  images, texts = (x.astype(np.float32) for x in (images, texts))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  options = {"chunk": chunk, "dtype": contrastive.product_dtype(precision, "cpu")}

  def value(images, texts, logit_scale):
    mask = jnp.ones(len(images), bool)
    total, _ = captions.caption_loss(
      images, texts, logit_scale=logit_scale, mask=mask, axes=("data",), **options
    )
    return jax.lax.psum(total, "data")

  sharded, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
  over = jax.shard_map(
    value, mesh=mesh, in_specs=(sharded, sharded, replicated), out_specs=replicated
  )
  with jax.set_mesh(mesh):
    got = jax.jit(jax.value_and_grad(over, argnums=(0, 1, 2)))(
      images, texts, jnp.float32(np.log(scale))
    )
  want = float64_loss(images, texts, scale)
  assert abs(got[0] / want[0] - 1) < loss_error
  for gradient, reference in zip(got[1], want[1], strict=True):
    error = np.linalg.norm(gradient - reference) / np.linalg.norm(reference)
    assert error < gradient_error
