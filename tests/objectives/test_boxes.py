import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.testing import assert_allclose
from transformers.loss import loss_for_object_detection as detr

from grain_jax.objectives import boxes


def random_boxes(rng, *shape):
  size = rng.uniform(0.02, 0.6, (*shape, 2))
  return np.concatenate([rng.uniform(0, 1, (*shape, 2)), size], -1).astype(np.float32)


def test_generalized_iou_is_that_of_detr(rng):
  a, b = random_boxes(rng, 30), random_boxes(rng, 30)
  corners = [detr.center_to_corners_format(torch.tensor(x)) for x in (a, b)]
  want = detr.generalized_box_iou(*corners).numpy()
  got = boxes.generalized_iou(jnp.asarray(a)[:, None], jnp.asarray(b)[None])
  assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  want_iou = detr.box_iou(*corners)[0].numpy()
  assert_allclose(boxes.iou(jnp.asarray(a)[:, None], jnp.asarray(b)[None]), want_iou, atol=1e-6)


def test_matching_cost_is_the_published_one(rng):
  a, b = random_boxes(rng, 2, 5), random_boxes(rng, 2, 3)
  got = boxes.matching_cost(jnp.asarray(a), jnp.asarray(b))
  for i in range(2):
    x, y = torch.tensor(a[i]), torch.tensor(b[i])
    corners = [detr.center_to_corners_format(t) for t in (x, y)]
    want = 5 * torch.cdist(x, y, p=1) - 2 * detr.generalized_box_iou(*corners)
    assert_allclose(got[i], want, rtol=1e-5, atol=1e-5)


def test_hand_worked_numbers():
  # Two unit-half squares side by side: no overlap, hull twice their area and full.
  a, b = jnp.array([0.25, 0.5, 0.5, 0.5]), jnp.array([0.75, 0.5, 0.5, 0.5])
  assert_allclose(boxes.generalized_iou(a, b), 0.0, atol=1e-6)
  # A quarter apart: hull 1.0 x 0.5, union 0.375, so GIoU = 0 - 0.125 / 0.5.
  a, b = jnp.array([0.25, 0.5, 0.5, 0.5]), jnp.array([0.875, 0.5, 0.25, 0.5])
  assert_allclose(boxes.generalized_iou(a, b), -0.25, atol=1e-6)
  assert_allclose(boxes.generalized_iou(a, a), 1.0, atol=1e-6)


def test_boxes_without_area_give_minus_one_and_finite_gradients():
  flat = jnp.array([0.5, 0.5, 0.0, 0.0])
  assert float(boxes.generalized_iou(flat, flat)) == -1.0
  gradient = jax.grad(lambda x: boxes.generalized_iou(x, flat))(flat)
  assert np.isfinite(gradient).all()


def test_box_loss_counts_matched_pairs_alone(rng):
  a, b = random_boxes(rng, 4, 3), random_boxes(rng, 4, 3)
  mask = rng.random((4, 3)) < 0.5
  b[~mask] = np.nan  # whatever stands there must not matter
  l1, giou, number = boxes.box_loss(jnp.asarray(a), jnp.asarray(b), jnp.asarray(mask))
  x, y = torch.tensor(a[mask]), torch.tensor(b[mask])
  corners = [detr.center_to_corners_format(t) for t in (x, y)]
  assert_allclose(l1, torch.nn.functional.l1_loss(x, y, reduction="sum"), rtol=1e-5)
  want = (1 - torch.diag(detr.generalized_box_iou(*corners))).sum()
  assert_allclose(giou, want, rtol=1e-5)
  assert number == mask.sum()
  gradient = jax.grad(lambda p: sum(boxes.box_loss(p, jnp.asarray(b), jnp.asarray(mask))[:2]))(
    jnp.asarray(a)
  )
  assert np.isfinite(gradient).all() and not np.asarray(gradient)[~mask].any()
