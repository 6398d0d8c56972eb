"""Reasons of losses that the user asked for or that everyone has: no sign that a path is wrong.

They are counted like the others, and do not count towards --allow_dropped.
"""

from __future__ import annotations

from grain_jax.data.sources import (
  coco_json,
  exclusion,
  mdetr,
  objects365,
  open_images,
  region_rules,
)

REASONS = (
  region_rules.REASONS
  | exclusion.REASONS
  | {coco_json.CROWD, mdetr.REPEATED, open_images.GROUP, open_images.DEPICTION}
  | {objects365.KNOWN_MISSING}
)
