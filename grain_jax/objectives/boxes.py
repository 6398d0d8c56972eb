"""Boxes (cx, cy, w, h): overlap, matching cost, and the box loss of matched pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def corners(boxes: Array) -> tuple[Array, Array]:
  """(cx, cy, w, h) [..., 4] -> lower and upper corners (x, y), each [..., 2]."""
  center, size = boxes[..., :2], boxes[..., 2:]
  return center - size / 2, center + size / 2


def _ratio(a: Array, b: Array) -> Array:
  """a / b, and 0 where b is not positive, with a finite gradient in both."""
  positive = b > 0
  return jnp.where(positive, a / jnp.where(positive, b, 1.0), 0.0)


def _areas(a: Array, b: Array) -> tuple[Array, Array, Array]:
  """Areas of intersection, union and smallest enclosing box of paired boxes, each [...]."""
  (a_low, a_high), (b_low, b_high) = corners(a), corners(b)
  inner = jnp.maximum(jnp.minimum(a_high, b_high) - jnp.maximum(a_low, b_low), 0.0)
  outer = jnp.maximum(a_high, b_high) - jnp.minimum(a_low, b_low)
  intersection = inner[..., 0] * inner[..., 1]
  union = a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - intersection
  return intersection, union, outer[..., 0] * outer[..., 1]


def iou(a: Array, b: Array) -> Array:
  """|A∩B| / |A∪B| of paired boxes [..., 4], in [0, 1]; two boxes without area give 0."""
  intersection, union, _ = _areas(a, b)
  return _ratio(intersection, union)


def generalized_iou(a: Array, b: Array) -> Array:
  """Generalized IoU of paired boxes, in [-1, 1].

  GIoU = |A∩B| / |A∪B| - |C \\ (A∪B)| / |C|, with C the smallest box around both
  (Rezatofighi et al., CVPR 2019, eq. 5).

  Args:
    a: boxes (cx, cy, w, h) as fractions of the image, [..., 4].
    b: boxes like `a`, [..., 4].

  Returns:
    [...]; 0-area pairs give -1, never NaN.
  """
  intersection, union, hull = _areas(a, b)
  value = _ratio(intersection, union) - _ratio(hull - union, hull)
  return jnp.where(union > 0, value, -1.0)


def matching_cost(
  predicted: Array, true: Array, *, l1_cost: float = 5.0, giou_cost: float = 2.0
) -> Array:
  """l1_cost |b - b'|_1 - giou_cost GIoU(b, b') of all pairs (GRAIN, sec. 3; no class term).

  Args:
    predicted: [..., Q, 4].
    true: [..., R, 4].
    l1_cost: weight of the L1 distance.
    giou_cost: weight of the generalized IoU.

  Returns:
    [..., Q, R].
  """
  a, b = predicted[..., :, None, :], true[..., None, :, :]
  return l1_cost * jnp.sum(jnp.abs(a - b), axis=-1) - giou_cost * generalized_iou(a, b)


def box_loss(predicted: Array, true: Array, mask: Array) -> tuple[Array, Array, Array]:
  """Sums of L1 and 1 - GIoU over matched pairs, and their number.

  Args:
    predicted: matched boxes [..., R, 4].
    true: [..., R, 4].
    mask: bool [..., R].

  Returns:
    (sum of |b - b'|_1, sum of 1 - GIoU, number of pairs), all []. Masked pairs have no gradient.
  """
  # Replaced before the arithmetic, so that no NaN of a masked pair reaches the gradient.
  full_image = jnp.array([0.5, 0.5, 1.0, 1.0], jnp.float32)
  predicted = jnp.where(mask[..., None], predicted, full_image)
  true = jnp.where(mask[..., None], true, full_image)
  l1 = jnp.where(mask, jnp.sum(jnp.abs(predicted - true), axis=-1), 0.0)
  giou = jnp.where(mask, 1.0 - generalized_iou(predicted, true), 0.0)
  return jnp.sum(l1), jnp.sum(giou), jnp.sum(mask, dtype=jnp.float32)
