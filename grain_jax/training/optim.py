"""The optimiser of a configuration: AdamW or Muon, schedule, who decays, freezes or slows down."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from optax import contrib

from grain_jax import config as configs
from grain_jax import trees

_NO_DECAY = re.compile(r"(^|/)(bias|scale|logit_scale|logit_bias|relative_bias)$")
# The published code decays these of the decoder nevertheless.
_PUBLISHED_DECAY = re.compile(
  r"^query_decoder/(.*norm\d?/scale|.*attention/(query|key|value)/bias)$"
)


def schedule(config: ml_collections.ConfigDict, *, total_steps: int, steps_per_epoch: int) -> Any:
  """Learning rate by step: linear from `lr_init` to `lr`, then a cosine to `lr_end`.

  In a run that goes on otherwise than it began (`continuation`) the same over the steps from
  `start_step` on, from the rate `start_lr` that it had there. Steps are those that the optimiser
  counts, which leaves out those that changed nothing.
  """
  o = config.optimizer
  if o.warmup_steps < 0:
    raise ValueError(
      f"config.optimizer.warmup_steps = {o.warmup_steps} is left open: give a number of steps."
    )
  warmup = o.warmup_steps or round(o.warmup_epochs * steps_per_epoch)
  steps = total_steps - o.start_step
  if o.start_step and steps <= 0:
    raise ValueError(
      f"config.steps: the run is at step {o.start_step} already, and is to end at {total_steps}. "
      "Name a later step."
    )
  if warmup >= steps:
    after = f" after step {o.start_step}" if o.start_step else ""
    raise ValueError(
      f"config.optimizer: the warm-up takes {warmup} steps of a run of {max(steps, 0)}{after}. "
      "Lower optimizer.warmup_steps or warmup_epochs, or train longer."
    )
  rate = optax.warmup_cosine_decay_schedule(
    init_value=o.start_lr if o.start_step else o.lr_init,
    peak_value=o.lr,
    warmup_steps=warmup,
    decay_steps=steps,
    end_value=o.lr_end,
  )
  start = o.start_step - o.start_skipped
  return (lambda step: rate(jnp.maximum(step - start, 0))) if o.start_step else rate


def updates_done(opt_state: Any) -> int:
  """Updates that the schedule has counted in the state of `create`'s optimiser: no skipped step."""

  def counts(x: Any) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)

  (found,) = filter(counts, jax.tree.leaves(opt_state, is_leaf=counts))
  return int(found.count)


def decay_mask(params: Any, kind: str) -> Any:
  """Which leaves weight decay touches, by name: bool tree.

  Args:
    params: parameters.
    kind: 'clean' (no norm, bias or scale) or 'published' (also the decoder's norm weights and
      attention input biases, as the published code does).
  """
  configs.check_choice("optimizer.decay_mask", kind)

  def decays(name: str, leaf: Any) -> bool:
    del leaf
    if kind == "published" and _PUBLISHED_DECAY.search(name):
      return True
    return not _NO_DECAY.search(name)

  return trees.map_with_name(decays, params)


def scale_by_muon(o: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Directions of Muon for the layers' matrices and of Adam for all else.

  A matrix goes in the direction of its orthogonalised momentum (Jordan et al., 2024), scaled to a
  root mean square of about `o.muon_rms` an entry (Liu et al., arXiv 2502.16982, sec. 2.2, with
  0.2), so that learning rate and decay mean what they mean for AdamW. Stacked layers are so many
  matrices. Embeddings, queries, positions, biases, norms and the logit scale are Adam's.
  """

  def label(name: str, leaf: Any) -> str:
    del leaf
    return "muon" if name.endswith("/kernel") else "adam"

  def dimensions(updates: Any) -> Any:
    return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), updates)

  def scale(updates: Any, _: Any) -> Any:
    return jax.tree.map(lambda x: x * o.muon_rms * max(x.shape[-2:]) ** 0.5, updates)

  muon = contrib.scale_by_muon(weight_dimension_numbers=dimensions)
  adam = optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)
  return optax.partition(
    {"muon": optax.chain(muon, optax.stateless(scale)), "adam": adam},
    functools.partial(trees.map_with_name, label),
  )


def create(
  config: ml_collections.ConfigDict, params: Any, *, total_steps: int, steps_per_epoch: int
) -> optax.GradientTransformation:
  """AdamW or Muon, both with decoupled decay; clipping, per-parameter rates, freezing by config.

  Frozen parameters have no moments, and their gradients no part in the norm that is clipped.
  """
  frozen = frozen_mask(config, params)
  if any(jax.tree.leaves(frozen)):
    labels = jax.tree.map(lambda f: "frozen" if f else "trained", frozen)
    trained = _create(config, params, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)
  return _create(config, params, total_steps=total_steps, steps_per_epoch=steps_per_epoch)


def frozen_mask(config: ml_collections.ConfigDict, params: Any) -> Any:
  """Which parameters stay as they are, by `config.optimizer.freeze`: bool tree."""
  rules = [(pattern, True) for pattern in config.optimizer.freeze]
  return trees.match(params, rules, False, what="config.optimizer.freeze")


def _create(
  config: ml_collections.ConfigDict, params: Any, *, total_steps: int, steps_per_epoch: int
) -> optax.GradientTransformation:
  """As if nothing were frozen; leaves that are masked out do not count."""
  o = config.optimizer
  if o.name == "muon":
    moments = scale_by_muon(o)
  else:
    moments = optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)
  steps = [
    *_clipping(o, moments),
    optax.add_decayed_weights(o.weight_decay, mask=lambda p: decay_mask(p, o.decay_mask)),
    optax.scale_by_learning_rate(
      schedule(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    ),
  ]
  if o.lr_scale:
    factors = trees.match(params, o.lr_scale, 1.0, what="config.optimizer.lr_scale")
    by_name = dict(trees.named_leaves(factors))
    scale = functools.partial(trees.map_with_name, lambda name, x: x * by_name[name])
    steps.append(optax.stateless(lambda updates, _: scale(updates)))
  return optax.chain(*steps)


def _clipping(
  o: ml_collections.ConfigDict, moments: optax.GradientTransformation
) -> list[optax.GradientTransformation]:
  """Clipping by `clip_norm` and the moments, their state named as when the run began.

  A run may be continued with clipping that it did not have, or without: the state of the moments
  stays at its place in the chain, behind that of clipping where the run began with it.
  """
  clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
  if o.clip_norm if o.start_clip_norm < 0 else o.start_clip_norm:
    return [clip, moments]
  if not o.clip_norm:
    return [moments]
  inner = optax.with_extra_args_support(moments)

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
    updates, _ = clip.update(updates, optax.EmptyState(), params)
    return inner.update(updates, state, params, **extra)

  return [optax.GradientTransformationExtraArgs(inner.init, update)]


def apply_updates(
  params: Any, updates: Any, frozen: Sequence[bool], largest_logit_scale: float
) -> Any:
  """Parameters after an update, the logit scale clamped to [0, largest] (CLIP).

  Frozen ones, whose flags stand in the order of the leaves, are handed on as they are.
  """
  new = clamp_logit_scale(optax.apply_updates(params, updates), largest_logit_scale)
  if not any(frozen):
    return new
  leaves, structure = jax.tree.flatten(params)
  kept = zip(leaves, jax.tree.leaves(new), frozen, strict=True)
  return structure.unflatten([old if fixed else moved for old, moved, fixed in kept])


def clamp_logit_scale(params: Any, largest: float) -> Any:
  """Parameters with the logit scale in [0, largest], applied after each update (CLIP)."""
  return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, largest)}
