"""The objective of a batch: a table of terms, weighed and added up (GRAIN, arXiv 2412.04429).

A term is a function (shared, state) -> ({metric name: (sum, weight)}, state): of the output and the
batch, in `shared.Shared`, and of a state of its own, a dict of arrays that the train state keeps.
What it calls 'loss_NAME' is minimised with the weight `config.loss.NAME`; the rest is reported. A
further term is a file with such a function, and a line in TERMS.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections

from grain_jax.models import grain
from grain_jax.objectives import anchor, terms
from grain_jax.objectives.shared import Pair, Shared

Array = jax.Array
State = dict[str, dict[str, Array]]

# In the order in which they are added up.
TERMS: dict[str, terms.Term] = {
  "caption": terms.Term(terms.caption),
  "auxiliary": terms.Term(terms.auxiliary),
  "hard_negatives": terms.Term(terms.hard_negative, terms.first_thresholds),
  "multi_positive": terms.Term(terms.multi_positive),
  "box": terms.Term(terms.box),
  "region": terms.Term(terms.region),
  "anchor": terms.Term(anchor.anchor),
  "grounded": terms.Term(anchor.grounded),
}


@flax.struct.dataclass
class Losses:
  """The loss to minimise, its parts as (sum, weight) pairs, and the states of the terms."""

  total: Array  # []
  parts: dict[str, Pair]  # {metric name: (sum, weight)}, each []
  state: Any = None  # State, or None where no term has one


def mean(pair: Pair) -> Array:
  """sum / weight, and 0 where the weight is 0."""
  return pair[0] / jnp.maximum(pair[1], 1.0)


def needs_teacher(config: ml_collections.ConfigDict) -> bool:
  """Whether a term asks for the output of a frozen copy of the model."""
  return bool(config.loss.anchor or config.loss.text_grounded)


def initial_state(config: ml_collections.ConfigDict) -> State | None:
  """The states of all terms at the start; None where no term has one."""
  found = {name: term.initial_state(config) for name, term in TERMS.items()}
  return {name: state for name, state in found.items() if state} or None


def total_loss(
  output: grain.Output,
  batch: dict[str, Array],
  config: ml_collections.ConfigDict,
  *,
  state: State | None = None,
  batch_axes: tuple[str, ...] = (),
  platform: str = "cpu",
  teacher: grain.Output | None = None,
) -> Losses:
  """The weighted sum of the means of all terms.

  Args:
    output: of the model, for this batch.
    batch: device batch (`schema.BATCH`).
    config: `config.loss` gives weights and choices.
    state: of the terms; None: as at the start.
    batch_axes: mesh axes that shard the batch, under `jax.set_mesh`; none: it is not sharded.
    platform: of the devices, for `config.loss.precision`.
    teacher: output of a frozen model for this batch, or None.
  """
  shared = Shared(output, batch, config, batch_axes=batch_axes, platform=platform, teacher=teacher)
  before = initial_state(config) if state is None else state
  total, parts, after = jnp.zeros(()), {}, {}
  for name, term in TERMS.items():
    pairs, own = term.loss(shared, (before or {}).get(name, {}))
    for metric, pair in pairs.items():
      weight = config.loss.get(metric.removeprefix("loss_")) if metric[:5] == "loss_" else None
      if weight is not None:
        total += weight * mean(pair)
    parts |= pairs
    if own:
      after[name] = own
  return Losses(total=total, parts=parts | _counts(shared, total), state=after or None)


def _counts(shared: Shared, total: Array) -> dict[str, Pair]:
  """What a batch lost, beside its loss."""
  batch, one, texts = shared.batch, jnp.ones(()), 1 + shared.num_regions
  missing = batch["region_mask"] & ~batch["text_mask"][:, 1:texts]
  full = _full(batch, shared.config) & batch["text_mask"]
  of_sources = {}
  if shared.groups is not None:
    usable, size = batch["example_mask"].astype(jnp.float32), len(batch["example_mask"])
    share = usable @ shared.groups, jnp.full(shared.groups.shape[1], size, jnp.float32)
    bad = (1 - usable) @ shared.groups, jnp.ones(shared.groups.shape[1])
    of_sources = shared.of_sources("share", share) | shared.of_sources("bad_examples", bad)
  return of_sources | {
    "loss": (total, jnp.any(batch["example_mask"]).astype(jnp.float32)),
    "dropped_texts": (jnp.sum(missing, dtype=jnp.float32), one),
    "truncated_texts": (jnp.sum(full, dtype=jnp.float32), one),
    "bad_examples": (jnp.sum(~batch["example_mask"], dtype=jnp.float32), one),
  }


def _full(batch: dict[str, Array], config: ml_collections.ConfigDict) -> Array:
  """Which texts are as long as the context: truncated, but for the few of exactly that length.

  Of texts that are padded to it those that do not end in two pads, or in an end and the same pad:
  where the pad is no end, one token short counts too. Bool [B, T].
  """
  context = config.model.text.context
  last = jnp.take_along_axis(batch["positions"], batch["ends"], axis=1) + 1
  full = last >= context
  if config.model.text.kind != "siglip" or context < 2:
    return full
  columns = jnp.stack([batch["ends"], jnp.maximum(batch["ends"] - 1, 0)])
  end, before = (jnp.take_along_axis(batch["tokens"], at, axis=1) for at in columns)
  return full & (end != before)
