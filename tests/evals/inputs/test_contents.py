"""Digests of what evaluations read: equal where it is equal, and nowhere else."""

import pathlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grain_jax.evals.inputs import contents

LEAVES = st.one_of(
  st.text(max_size=3), st.integers(-3, 3), st.binary(max_size=2), st.none(),
  st.builds(pathlib.PurePosixPath, st.text("ab/", max_size=3)),
)  # fmt: skip
VALUES = st.recursive(
  LEAVES,
  lambda inner: st.one_of(
    st.lists(inner, max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=2), inner, max_size=2),
  ),
  max_leaves=6,
)


@given(VALUES, VALUES)
@example("a", b"a")
@example(("a", "sb"), ("as", "b"))
@example((("a",), "b"), (("a", "b"),))
def test_a_digest_tells_values_apart(a, b):
  same = repr(a) == repr(b)
  assert (contents.describe(((), a)) == contents.describe(((), b))) == same


def test_paths_count_from_the_root_and_arrays_by_every_number():
  def of(path, box, root):
    return contents.describe(([pathlib.Path(path)], np.asarray(box)), pathlib.Path(root))

  assert of("/a/x/1.jpg", [0.5], "/a") == of("/b/c/x/1.jpg", [0.5], "/b/c")
  assert of("/a/x/1.jpg", [0.5], "/a") != of("/a/x/1.jpg", [0.25], "/a")
  assert of("/a/x/1.jpg", [0.5], "/a") != of("/a/y/1.jpg", [0.5], "/a")
  assert len({of(name, [], "/a") for name in ("/a/\ud83d", "/a/\udce9", "/a/x")}) == 3
  assert contents.describe((range(0, 1000),)).startswith("1,000 items, digest ")
  with pytest.raises(TypeError, match="contents hold a object"):
    contents.describe(([object()],))
