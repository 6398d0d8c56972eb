"""Beside pyproject.toml for one thing: the recipes in configs/ become a part of the package."""

import setuptools

setuptools.setup(
  packages=[*setuptools.find_packages(include=["grain_jax*"]), "grain_jax.configs"],
  package_dir={"grain_jax.configs": "configs"},
)
