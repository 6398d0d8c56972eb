"""A host batch that is not what the schema says ends in one line."""

import numpy as np
import pytest

from grain_jax import schema
from grain_jax.training import loop

SIZES = dict(batch=2, image_size=8, row_length=16, regions=3)


@pytest.fixture
def batch():
  shapes = schema.batch_shapes(**SIZES)
  return {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}


def test_a_batch_of_the_schema_passes(batch):
  schema.check_batch(batch, **SIZES)


@pytest.mark.parametrize(
  ("change", "line"),
  [
    ({"boxes": np.zeros((2, 3, 4))}, r"^batch\['boxes'\] is float64\[2, 3, 4\], expected float32"),
    ({"ends": np.zeros((2, 5), np.int32)}, r"is int32\[2, 5\], expected int32\[2, 4\]"),
    ({"label": np.zeros(2)}, r"missing \[\], unexpected \['label'\]"),
    ({"tokens": None}, r"missing \['tokens'\], unexpected \[\]"),
  ],
)  # fmt: skip
def test_what_differs_is_named(batch, change, line):
  batch = {name: value for name, value in (batch | change).items() if value is not None}
  with pytest.raises(ValueError, match=line):
    schema.check_batch(batch, **SIZES)


def test_a_run_checks_its_first_batch_against_its_config(tiny, make_batch):
  batch = make_batch(tiny)
  loop._check_batch(batch, tiny)
  batch["region_mask"] = batch["region_mask"].astype(np.uint8)
  with pytest.raises(ValueError, match=r"^batch\['region_mask'\] is uint8"):
    loop._check_batch(batch, tiny)
