"""Names and shapes of other projects' weights beside ours, as a table that is read both ways.

A format is a list of rules. `read` follows it from their state dict to our parameters, `write` from
ours to theirs, and the shapes that `read` demands are those that `write` would give. Ours are the
names of `trees.named_leaves`, with equal layers stacked along a leading axis; theirs have a key for
each layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import trees

State = dict[str, np.ndarray]  # their weights by name
_SHOWN = 3  # keys named in an error


class Form(NamedTuple):
  """How one array (of one layer) changes its shape between theirs and ours."""

  to_ours: Callable[[Any], Any]
  to_theirs: Callable[[Any], Any]


SAME = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(lambda x: x.T, lambda x: x.T)  # torch's Linear [out, in] and our kernel [in, out]
VECTOR = Form(lambda x: x.reshape(1, 1, -1), lambda x: x.reshape(-1))  # [D] and [1, 1, D]
BATCHED = Form(lambda x: x[0], lambda x: x[None])  # [1, L, D] and [L, D]


def _to_patches(kernel: Any) -> Any:
  return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _to_convolution(kernel: Any) -> Any:
  side = round((kernel.shape[0] / 3) ** 0.5)
  return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


# A convolution of stride P, [D, 3, P, P], and the same over flattened patches, [P * P * 3, D].
PATCHES = Form(_to_patches, _to_convolution)


@dataclasses.dataclass(frozen=True)
class Rule:
  """One key of theirs and what it is here."""

  ours: tuple[str, ...]  # several: theirs is all of them joined along its first axis
  theirs: str  # '{}' stands for the number of the layer
  form: Form = SAME


def same(ours: str, theirs: str, form: Form = SAME) -> list[Rule]:
  """One array."""
  return [Rule((ours,), theirs, form)]


def linear(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
  """torch's Linear and flax's Dense."""
  rules = same(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED)
  return rules + same(f"{ours}/bias", f"{theirs}.bias") if bias else rules


def norm(ours: str, theirs: str) -> list[Rule]:
  """LayerNorm."""
  return same(f"{ours}/scale", f"{theirs}.weight") + same(f"{ours}/bias", f"{theirs}.bias")


def joined(ours: str, weight: str, bias: str) -> list[Rule]:
  """Queries, keys and values of an attention, in one matrix [3 D, D] and one vector [3 D]."""
  parts = [f"{ours}/{name}" for name in ("query", "key", "value")]
  return [
    Rule(tuple(f"{part}/kernel" for part in parts), weight, TRANSPOSED),
    Rule(tuple(f"{part}/bias" for part in parts), bias),
  ]


def _join(parts: Sequence[Any]) -> Any:
  """Parts of one key along its first axis; NumPy stays NumPy, in C order."""
  if not isinstance(parts[0], np.ndarray):
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]
  return np.asarray(np.concatenate(parts) if len(parts) > 1 else parts[0], order="C")


def write(rules: Sequence[Rule], params: Any) -> dict[str, Any]:
  """Their state dict of our parameters.

  Args:
    rules: the format's table for this model.
    params: our tree, of arrays; under `jax.eval_shape` also of shapes.

  Raises:
    KeyError: the table lacks a parameter, or names one that is none: a defect of the table.
  """
  leaves = dict(trees.named_leaves(params))
  forgotten = set(leaves) - {name for rule in rules for name in rule.ours}
  if forgotten:
    raise KeyError(f"no rule for {sorted(forgotten)}")
  state = {}
  for rule in rules:
    parts = [leaves[name] for name in rule.ours]
    if "{}" not in rule.theirs:
      state[rule.theirs] = _join([rule.form.to_theirs(part) for part in parts])
      continue
    for layer in range(parts[0].shape[0]):
      state[rule.theirs.format(layer)] = _join([rule.form.to_theirs(p[layer]) for p in parts])
  return state


def read(rules: Sequence[Rule], state: State, abstract: Any, *, where: str) -> Any:
  """Our parameters of their state dict, float32.

  Args:
    rules: the format's table for this model.
    state: their weights, float32, with nothing beside them.
    abstract: our tree of ShapeDtypeStructs.
    where: the file, for errors.

  Returns:
    A tree like `abstract` of NumPy arrays.

  Raises:
    ValueError: the model is none of this format; keys are missing or unknown, a shape or dtype does
      not fit, a number is not finite.
  """
  names = {name for name, _ in trees.named_leaves(abstract)}
  known = {name for rule in rules for name in rule.ours}
  if names != known:
    parts = [f"asks for {few(sorted(names - known))}"] if names - known else []
    parts += [f"has no place for {few(sorted(known - names))}"] if known - names else []
    raise ValueError(
      f"{where}: the model in --config {' and '.join(parts)}, unlike the format. Change the recipe."
    )
  wanted = jax.eval_shape(functools.partial(write, rules), abstract)
  _check(state, {key: leaf.shape for key, leaf in wanted.items()}, where)
  flat: dict[tuple[str, ...], np.ndarray] = {}
  for rule in rules:
    keys = [rule.theirs]
    if "{}" in rule.theirs:
      depth = dict(trees.named_leaves(abstract))[rule.ours[0]].shape[0]
      keys = [rule.theirs.format(layer) for layer in range(depth)]
    # [layers][parts] -> [parts][layers]
    split = [np.split(state[k], len(rule.ours)) if len(rule.ours) > 1 else [state[k]] for k in keys]
    for name, layers in zip(rule.ours, zip(*split, strict=True), strict=True):
      values = [rule.form.to_ours(x) for x in layers]
      value = np.stack(values) if "{}" in rule.theirs else values[0]
      flat[tuple(name.split("/"))] = np.asarray(value, order="C")
  return flax.traverse_util.unflatten_dict(flat)


def few(names: Sequence[str]) -> str:
  """'a, b, c and 9 more'."""
  text = ", ".join(names[:_SHOWN])
  return text + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _check(state: State, wanted: dict[str, tuple[int, ...]], where: str) -> None:
  """Raises a one-line ValueError for the first keys that are not as they should be."""
  missing = [key for key in wanted if key not in state]
  unknown = [key for key in state if key not in wanted]
  if missing or unknown:
    parts = [f"lacks {few(missing)}"] if missing else []
    parts += [f"has the unknown {few(unknown)}"] if unknown else []
    raise ValueError(
      f"{where} {' and '.join(parts)}. Check the format and the file; --config gives sizes that "
      "cannot be seen in it."
    )
  wrong = [key for key, shape in wanted.items() if state[key].shape != shape]
  if wrong:
    first = [f"{key} is {state[key].shape} and should be {wanted[key]}" for key in wrong[:_SHOWN]]
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise ValueError(f"{where}: {'; '.join(first)}{more}. Check --config and the file.")
  for key in wanted:
    if state[key].dtype != np.float32:
      raise ValueError(
        f"{where}: {key} is of type {state[key].dtype}, not a floating-point weight."
      )
    if not np.isfinite(state[key]).all():
      raise ValueError(f"{where}: {key} holds numbers that are not finite. Use another checkpoint.")
