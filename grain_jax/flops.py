"""FLOPs of the matrix products of a program, counted before any compiler sees it.

A product of [.., M, K] and [.., K, N] is 2 M N K a batch entry, and nothing else counts. The count
is exact for the program as written: bodies of scans count as often as they run, and what
is rematerialised counts again. Masked attention counts whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.extend import core


def _inner(parameters: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
  """Jaxprs among the parameters of an equation."""
  for value in parameters.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _product(eqn: Any) -> int:
  """FLOPs of a dot_general or conv_general_dilated; 0 of anything else."""
  if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
    return 0
  left, right = (v.aval for v in eqn.invars)
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    terms = math.prod(left.shape[d] for d in contracted)
  else:  # each output sums over the window and its input channels, less the zeros of a dilation
    terms = math.prod(right.shape) // right.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    terms /= math.prod(eqn.params["lhs_dilation"])
  return round(2 * terms * math.prod(eqn.outvars[0].aval.shape))


def product_precision(eqn: Any) -> tuple[str, str]:
  """(widest type of the operands, 'DEFAULT' | 'HIGH' | 'HIGHEST') of a product's equation."""
  widest = max((v.aval.dtype for v in eqn.invars), key=lambda dtype: dtype.itemsize)
  precision = eqn.params.get("precision")
  names = {getattr(p, "name", "DEFAULT") for p in precision or ()}
  ordered = [name for name in ("HIGHEST", "HIGH") if name in names]
  return str(widest), ordered[0] if ordered else "DEFAULT"


def count(
  jaxpr: core.Jaxpr,
  *,
  trip_counts: bool = True,
  passes: Callable[[str, str], float] | None = None,
  path: str = "",
) -> dict[str, int]:
  """FLOPs over all devices by the path of names ('/jvp(Grain)/.../mlp/fc1') they stand under.

  Args:
    jaxpr: a traced function.
    trip_counts: bodies of scans count as often as they run; else once, as XLA's analysis has it.
    passes: `product_precision` -> passes of a chip's matrix unit over such a product, which then
      counts so many times.
    path: names above.

  Raises:
    ValueError: a while loop with a matrix product, which has no count.
  """
  found: dict[str, int] = {}
  for eqn in jaxpr.eqns:
    where = f"{path}/{eqn.source_info.name_stack}"
    if product_flops := _product(eqn):
      times = passes(*product_precision(eqn)) if passes else 1
      found[where] = found.get(where, 0) + round(times * product_flops)
      continue
    options = {"trip_counts": trip_counts, "passes": passes, "path": where}
    inner = [count(body, **options) for body in _inner(eqn.params)]
    name = eqn.primitive.name
    if name == "while" and any(inner):
      raise ValueError(f"{where}: a while loop with a matrix product has no FLOP count. Use scan.")
    if name == "cond":
      inner = [max(inner, key=lambda counts: sum(counts.values()))]
    times = eqn.params["length"] if name == "scan" and trip_counts else 1
    if name == "shard_map":
      shape = eqn.params["mesh"].shape
      times = math.prod(shape[axis] for axis in eqn.params["newly_manual_axes"])
    for counts in inner:
      for key, flops in counts.items():
        found[key] = found.get(key, 0) + times * flops
  return found
