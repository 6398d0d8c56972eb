"""Shared by the tests of evaluations on outside datasets."""

import pytest

from grain_jax.evals.inputs.options import Options


@pytest.fixture
def warnings():
  return []


@pytest.fixture
def options(tmp_path, warnings):
  return Options(root=tmp_path, warn=warnings.append)
