"""FLOPs of the matrix products of a train step, counted before any compiler sees it.

A product of [.., M, K] and [.., K, N] is 2 M N K a batch entry, and nothing else counts. The count
is exact for the program as written: bodies of scans count as often as they run, and what
rematerialisation computes again counts again. Masked attention counts whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from jax.extend import core

_TEXT = ("text_tower", "text_projection")  # modules that see tokens


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


def count(jaxpr: core.Jaxpr, *, turns: bool = True, path: str = "") -> dict[str, int]:
  """FLOPs over all devices by the path of names ('/jvp(Grain)/.../mlp/fc1') they stand under.

  Args:
    jaxpr: a traced function.
    turns: bodies of scans count as often as they run; else once, as XLA's cost analysis has it.
    path: names above.

  Raises:
    ValueError: a while loop with a matrix product, which has no count.
  """
  found: dict[str, int] = {}
  for eqn in jaxpr.eqns:
    where = f"{path}/{eqn.source_info.name_stack}"
    if own := _product(eqn):
      found[where] = found.get(where, 0) + own
      continue
    inner = [count(body, turns=turns, path=where) for body in _inner(eqn.params)]
    name = eqn.primitive.name
    if name == "while" and any(inner):
      raise ValueError(f"{where}: a while loop with a matrix product has no FLOP count. Use scan.")
    if name == "cond":
      inner = [max(inner, key=lambda counts: sum(counts.values()))]
    times = eqn.params["length"] if name == "scan" and turns else 1
    if name == "shard_map":
      shape = eqn.params["mesh"].shape
      times = math.prod(shape[axis] for axis in eqn.params["newly_manual_axes"])
    for counts in inner:
      for key, flops in counts.items():
        found[key] = found.get(key, 0) + times * flops
  return found


def text_tower(config: ml_collections.ConfigDict, *, caption: float, description: float) -> float:
  """FLOPs a sample of the text tower and its gradient without padding.

  A layer of width D and hidden width H costs a text of n tokens n (8 D^2 + 4 D H) + 4 n^2 D. Of the
  last layer only the token at the end of each text is computed, from keys and values of all. The
  gradient costs as much again twice.

  Args:
    config: a resolved configuration.
    caption: mean tokens of a caption.
    description: mean tokens of a description.
  """
  t, regions = config.model.text, config.data.max_regions
  hidden = round(t.width * t.mlp_ratio)
  lengths = [caption] + [description] * (regions if config.method == "grain" else 0)
  per_token = 8 * t.width**2 + 4 * t.width * hidden
  layer = sum(n * per_token + 4 * n**2 * t.width for n in lengths)
  last = sum(n * 4 * t.width**2 + (per_token - 4 * t.width**2) + 4 * n * t.width for n in lengths)
  projection = 2 * t.width * config.model.embed_dim * len(lengths)
  return 3.0 * ((t.depth - 1) * layer + last + projection)


def useful(
  counts: Mapping[str, int],
  config: ml_collections.ConfigDict,
  *,
  batch: int,
  caption: float,
  description: float,
) -> float:
  """FLOPs of a step that any implementation needs: nothing computed again, no padded token.

  Args:
    counts: `count` of the step without rematerialisation.
    config: its configuration.
    batch: images of a step.
    caption: mean tokens of a caption.
    description: mean tokens of a description.
  """
  rest = sum(n for path, n in counts.items() if not any(m in path.split("/") for m in _TEXT))
  padded = sum(counts.values()) - rest
  text = batch * text_tower(config, caption=caption, description=description)
  return rest + min(text, padded)
