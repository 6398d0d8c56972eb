"""Named leaves of a parameter tree, and the one matcher of names against regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

Tree = Any


def name_of(path: Sequence[Any]) -> str:
  """'image/blocks/attention/query/kernel' for a key path of `jax.tree_util`."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
  """[(name, leaf)] in the order of `jax.tree.leaves`."""
  return [(name_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_name(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
  """Applies `function(name, leaf)` to each leaf."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: function(name_of(path), leaf), tree)


def match(tree: Tree, rules: Iterable[tuple[str, Any]], default: Any, *, what: str) -> Tree:
  """For each leaf the value of the first rule whose regex is found in the leaf's name.

  Args:
    tree: parameters, or anything of their structure.
    rules: (regex, value) pairs; `re.search` on names such as 'text/blocks/mlp/fc1/kernel'.
    default: value of the leaves that no rule matches.
    what: name of the config key that holds the rules, for the error.

  Returns:
    A tree like `tree` with the values as leaves.

  Raises:
    ValueError: a regex is malformed, or matches no leaf at all.
  """
  rules = list(rules)
  names = [name for name, _ in named_leaves(tree)]
  for pattern, _ in rules:
    try:
      found = any(re.search(pattern, name) for name in names)
    except re.error as error:
      raise ValueError(f"{what}: {pattern!r} is not a regular expression ({error}).") from error
    if not found:
      raise ValueError(
        f"{what}: {pattern!r} matches no parameter. The names look like {names[0]!r}, "
        f"{names[-1]!r}."
      )

  def choose(name: str, leaf: Any) -> Any:
    del leaf
    return next((value for pattern, value in rules if re.search(pattern, name)), default)

  return map_with_name(choose, tree)


def count(tree: Tree) -> int:
  """Number of scalars in all leaves."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def first_difference(saved: Any, abstract: Any) -> str:
  """The first array that a checkpoint and a model do not share, in words; '' if they match.

  Compared are the parts (parameters, moments, ...) that `abstract` has.
  """
  parts = {name.split("/")[0] for name, _ in named_leaves(abstract)}
  theirs = {name: leaf for name, leaf in named_leaves(saved) if name.split("/")[0] in parts}
  ours = dict(named_leaves(abstract))
  for name, leaf in ours.items():
    if name not in theirs:
      return f"it has no {name!r} {list(leaf.shape)}"
    if tuple(theirs[name].shape) != tuple(leaf.shape):
      return (
        f"its {name!r} has the shape {list(theirs[name].shape)}, the model's {list(leaf.shape)}"
      )
  for name, leaf in theirs.items():
    if name not in ours:
      return f"its {name!r} {list(leaf.shape)} is not in the model"
  return ""
