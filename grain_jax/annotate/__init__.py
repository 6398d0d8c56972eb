"""Annotations of one's own pictures by frozen models: descriptions, boxes, false texts; and a page.

`python -m grain_jax.annotate STAGE ...`: describe -> ground -> negatives, each over the output of
the one before, then `grain_jax.data.build --annotated=DIR`.
"""
