"""The training state and the train step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from grain_jax import objectives
from grain_jax.models import grain, initial
from grain_jax.runtime import mesh as meshes
from grain_jax.training import accumulation, optim

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, tuple[Array, Array]]


@flax.struct.dataclass
class TrainState:
  """All that a step changes; what a checkpoint holds."""

  step: Array  # i32 [], steps done; one whose batch held no usable example updated nothing
  params: Any
  opt_state: Any
  ema: Any = None  # mean of the parameters, newer ones weighing more; None: not kept
  terms: Any = None  # states of the objective's terms; None: none has one
  teacher: Any = None  # parameters of the frozen copy that terms look at; None: none does

  @property
  def eval_params(self) -> Any:
    """The parameters to evaluate and to hand on: the mean where one is kept."""
    return self.params if self.ema is None else self.ema


def create_state(
  model: grain.Grain,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  *,
  total_steps: int,
  steps_per_epoch: int,
) -> tuple[Callable[[], TrainState], TrainState, Any, optax.GradientTransformation]:
  """How to make the state, without making it yet.

  Returns:
    (init, abstract, shardings, optimizer): `init()` gives the fresh state, born sharded, and is to
    be called under `jax.set_mesh(mesh)`; `abstract` is its ShapeDtypeStructs with shardings, for
    restoring a checkpoint.
  """
  # Traced once for all three: the shapes, the state's shapes, and the program that makes the state.
  # All under the mesh: JAX traces again under a mesh what it has traced without.
  make_params = jax.jit(lambda: initial.init_params(model, config))
  with jax.set_mesh(mesh):
    params = jax.eval_shape(make_params)
  optimizer = optim.create(config, params, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

  def init() -> TrainState:
    params = make_params()
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
    terms = objectives.initial_state(config)
    teacher = jax.tree.map(jnp.copy, params) if objectives.needs_teacher(config) else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, terms, teacher)

  with jax.set_mesh(mesh):
    abstract = jax.eval_shape(init)
  shardings = meshes.state_shardings(abstract, mesh, config.mesh.rules)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
  )
  return jax.jit(init, out_shardings=shardings), abstract, shardings, optimizer


def encode(params: Any, batch: Batch, dropout_key: Array, *, model: grain.Grain) -> grain.Output:
  """The model's output for a training batch, or for a microbatch."""
  return model.apply(
    {"params": params},
    batch,
    num_regions=batch["boxes"].shape[1],
    train=True,
    rngs={"dropout": dropout_key},
  )


def encode_frozen(
  params: Any,
  batch: Batch,
  *,
  model: grain.Grain,
  mesh: Mesh | None = None,
  num_microbatches: int = 1,
) -> grain.Output:
  """The output of a teacher or of a validation: no dropout, all patches, no gradient into it.

  With microbatches `mesh` is the one over which the batch is sharded.
  """

  def encode(batch: Batch, key: Array | None = None) -> grain.Output:
    del key
    return model.apply({"params": params}, batch, num_regions=batch["boxes"].shape[1])

  if num_microbatches == 1:
    output = encode(batch)
  else:
    output = accumulation.encode_all(
      encode, batch, jax.random.key(0), num_microbatches=num_microbatches, mesh=mesh
    )
  return jax.lax.stop_gradient(output)


def objective(
  output: grain.Output,
  batch: Batch,
  *,
  config: ml_collections.ConfigDict,
  terms: objectives.State | None = None,
  teacher: grain.Output | None = None,
  batch_axes: tuple[str, ...] = (),
  platform: str = "cpu",
) -> tuple[Array, tuple[Metrics, objectives.State | None]]:
  """(loss, (its parts as (sum, weight) pairs, the terms' states after it)) of a full batch."""
  losses = objectives.total_loss(
    output, batch, config, state=terms, batch_axes=batch_axes, platform=platform, teacher=teacher
  )
  logits = {"logit_scale": (jnp.exp(output.logit_scale), jnp.ones(()))}
  if config.model.logit_bias:
    logits["logit_bias"] = (output.logit_bias, jnp.ones(()))
  return losses.total, ({**losses.parts, **logits}, losses.state)


def loss_function(
  params: Any,
  batch: Batch,
  dropout_key: Array,
  *,
  model: grain.Grain,
  config: ml_collections.ConfigDict,
  **options: Any,
) -> tuple[Array, tuple[Metrics, objectives.State | None]]:
  """`objective` of the model's output for a training batch, with options of it."""
  output = encode(params, batch, dropout_key, model=model)
  return objective(output, batch, config=config, **options)


class TrainStep:
  """The jitted update of a run whose batches this process holds whole.

  It sees itself whether a batch has any usable example. The program that would leave the state as
  it is compiled only when the first such batch comes: the selection in it costs the usual program
  its fusions, and with them the last bits of its results.
  """

  def __init__(self, step: Any, guarded: Any):
    """`step` and `guarded` are jitted; the second may be given a batch without examples."""
    self._step, self.guarded = step, guarded
    self.trace, self.lower = step.trace, step.lower

  def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    mask = batch["example_mask"]
    if isinstance(mask, jax.core.Tracer):
      return self._step(state, batch)
    # It was sent to the devices a moment ago: reading it waits for no earlier step.
    return (self._step if np.asarray(mask).any() else self.guarded)(state, batch)


def _compiler_options(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Any]:
  """XLA's options for the step on the mesh's devices."""
  options: dict[str, Any] = {}
  if config.compile_effort:
    options["exec_time_optimization_effort"] = config.compile_effort
  if mesh.devices.flat[0].platform in ("gpu", "cuda"):
    # Else XLA takes a bfloat16 array and its sum for two uses of the float32 one, and writes that.
    options["xla_allow_excess_precision"] = False
  return options


def make_train_step(
  model: grain.Grain,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  optimizer: optax.GradientTransformation,
  shardings: Any,
  *,
  steps_per_epoch: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The jitted update: gradients -> optimiser -> clamp of the logit scale; the state is donated.

  A batch without any usable example changes `step` alone. It has `trace` and `lower` as a jitted
  function has.

  With `steps_per_epoch` the states of terms begin anew in each epoch (`config.loss.rank_reset`).

  Call it under `jax.set_mesh(mesh)`. Metrics are (sum, weight) pairs on the device; a loss or
  gradient that is not finite shows in 'nonfinite'.
  """
  platform = mesh.devices.flat[0].platform
  options = {"config": config, "batch_axes": meshes.BATCH_AXES, "platform": platform}
  frozen = jax.tree.leaves(optim.frozen_mask(config, shardings.params))

  def gradients_of(params: Any, batch: Batch, dropout_key: Array, terms: Any, taught: Any) -> Any:
    """((loss, (metrics, terms)), gradients of the parameters not frozen, as a list)."""
    leaves, structure = jax.tree.flatten(params)

    def merge(trained: list[Array]) -> Any:
      rest = iter(trained)
      return structure.unflatten(
        [leaf if fixed else next(rest) for leaf, fixed in zip(leaves, frozen, strict=True)]
      )

    def loss_of(trained: list[Array], *arguments: Any) -> tuple[Array, Any]:
      return loss_function(
        merge(trained), *arguments, model=model, terms=terms, teacher=taught, **options
      )

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if config.accumulate > 1:
      value_and_grad = accumulation.value_and_grad(
        lambda trained, *arguments: encode(merge(trained), *arguments, model=model),
        functools.partial(objective, terms=terms, teacher=taught, **options),
        num_microbatches=config.accumulate,
        mesh=mesh,
      )
    trained = [leaf for leaf, fixed in zip(leaves, frozen, strict=True) if not fixed]
    return value_and_grad(trained, batch, dropout_key)

  def fill_in(trained: list[Array], params: Any) -> Any:
    """A tree like `params`, of `trained` and zeros where parameters are frozen."""
    leaves, structure = jax.tree.flatten(params)
    rest = iter(trained)
    return structure.unflatten(
      [
        jnp.zeros_like(leaf) if fixed else next(rest)
        for leaf, fixed in zip(leaves, frozen, strict=True)
      ]
    )

  def train_step(state: TrainState, batch: Batch, *, guarded: bool) -> tuple[TrainState, Metrics]:
    dropout_key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
    terms = state.terms
    if terms is not None and steps_per_epoch and config.loss.rank_reset:
      begins = state.step % steps_per_epoch == 0
      start = objectives.initial_state(config)
      terms = jax.tree.map(lambda first, now: jnp.where(begins, first, now), start, terms)
    taught = None
    if state.teacher is not None:
      taught = encode_frozen(
        state.teacher, batch, model=model, mesh=mesh, num_microbatches=config.accumulate
      )
    (value, (metrics, terms)), trained = gradients_of(
      state.params, batch, dropout_key, terms, taught
    )
    gradients = fill_in(trained, state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optim.apply_updates(state.params, updates, frozen, config.model.logit_scale_max)
    norm = optax.global_norm(trained)
    one = jnp.ones(())
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    metrics |= {"gradient_norm": (norm, one), "nonfinite": (1.0 - finite.astype(jnp.float32), one)}
    ema = state.ema
    if ema is not None:
      ema = optax.incremental_update(params, ema, 1 - config.optimizer.ema_decay)
    teacher = state.teacher
    if teacher is not None and config.loss.anchor_teacher == "ema":
      teacher = optax.incremental_update(params, teacher, 1 - config.loss.anchor_decay)
    metrics["skipped_updates"] = (jnp.zeros(()), one)
    if guarded:
      # Without an example there is no gradient, but decay, moments and the schedule would move on.
      any_example = jnp.any(batch["example_mask"])
      updated = any_example.astype(jnp.float32)
      metrics |= {"skipped_updates": (1.0 - updated, one), "gradient_norm": (norm, updated)}
      params, opt_state, ema, terms, teacher = jax.tree.map(
        lambda new, old: jnp.where(any_example, new, old),
        (params, opt_state, ema, terms, teacher),
        (state.params, state.opt_state, state.ema, state.terms, state.teacher),
      )
    return TrainState(state.step + 1, params, opt_state, ema, terms, teacher), metrics

  replicated = meshes.replicated(mesh)
  compiler_options = _compiler_options(config, mesh)

  def jit(guarded: bool) -> Any:
    return jax.jit(
      functools.partial(train_step, guarded=guarded),
      in_shardings=(shardings, meshes.batch_sharding(mesh)),
      out_shardings=(shardings, replicated),
      donate_argnums=0,
      compiler_options=compiler_options or None,
    )

  # Of several processes none sees the whole batch before the devices do.
  return jit(True) if mesh.is_multi_process else TrainStep(jit(False), jit(True))
