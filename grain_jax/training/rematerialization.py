"""What the backward pass computes again, and whether layers are a loop: chosen for a machine.

Bytes are those that a step keeps for its backward pass, from shapes alone: of what the compiler
adds to them `_SHARE` leaves room. Dimensions: D width of a tower.
"""

from __future__ import annotations

import jax
import ml_collections

from grain_jax.models import grain, initial, vit
from grain_jax.training import optim

# Arrays of a token's width that a block keeps. In words: its input; queries, keys and values, twice
# with QK-norm; attention's result and what is added of it; the hidden layer before and after the
# activation; both normalised inputs.
_KEPT = {
  "none": lambda ratio, qk: 8 + 2 * qk + 2 * ratio,
  "elementwise": lambda ratio, qk: 7 + ratio,  # matrix products alone
  "attention": lambda ratio, qk: 7 + ratio,
  "block": lambda ratio, qk: 1.0,
}
# Fastest first, where memory allows. On a GPU layers are written out, which leaves nothing to be
# stacked for a loop, and storing everything is fastest (docs/performance.md: 2,813 images/s of 768
# stored against 2,774 of 1,024 whose element-wise work is done again). On a TPU the loop's stacking
# of all that costs more than computing it again.
_ORDER = {"gpu": ("none", "elementwise", "block"), "cpu": ("none", "elementwise", "block")}
_ORDER_ELSEWHERE = ("elementwise", "block")
_SHARE = 0.9  # of the memory that the estimate may fill
_CPU_BYTES = 4e9  # that a step on a CPU may keep
_STATE_BYTES = 16  # a parameter: itself, its gradient and two moments in float32
_NOT_FROZEN_BYTES = 12  # of these, what one that stays as it is does without


def kept_bytes(config: ml_collections.ConfigDict, remat: str) -> float:
  """Bytes an image that a step keeps for the backward pass of its towers.

  Args:
    config: a resolved configuration.
    remat: one of config.CHOICES['model.remat'] but 'auto'.
  """
  m = config.model
  size = 4 if m.dtype == "float32" else 2
  patches = (m.image.size // m.image.patch) ** 2
  patches = vit.kept_patches(patches, m.image.patch_dropout) + 1
  towers = ((m.image, patches, m.image.qk_norm), (m.text, config.data.row_length, False))
  total = 0.0
  for tower, tokens, qk in towers:
    one = size * tokens * tower.width
    layers = one * tower.depth * _KEPT[remat](tower.mlp_ratio, qk)
    again = one * _KEPT["none"](tower.mlp_ratio, qk) if remat == "block" else 0.0
    total += layers + again
  return total


def state_bytes(config: ml_collections.ConfigDict, *, shards: int) -> float:
  """Bytes of parameters, gradients and optimizer on a device, by the towers' shapes."""
  m = config.model
  parameters = m.text.vocab_size * m.text.width
  for tower in (m.image, m.text):
    parameters += tower.depth * tower.width**2 * (4 + 2 * tower.mlp_ratio)
  if config.method == "grain":
    d = m.decoder
    parameters += d.depth * (8 * d.width**2 + 2 * d.width * d.mlp_dim)
  each = _STATE_BYTES + 4 * (config.optimizer.ema_decay > 0)
  total = each * parameters
  if config.optimizer.freeze:
    total -= _NOT_FROZEN_BYTES * _frozen_parameters(config)
  return total / shards


def _frozen_parameters(config: ml_collections.ConfigDict) -> int:
  """How many parameters stay as they are, and have neither gradient nor moments."""
  model = grain.build(config)
  params = jax.eval_shape(lambda: initial.init_params(model, config))
  frozen = jax.tree.leaves(optim.frozen_mask(config, params))
  leaves = zip(jax.tree.leaves(params), frozen, strict=True)
  return sum(leaf.size for leaf, fixed in leaves if fixed)


def choose(
  config: ml_collections.ConfigDict, *, platform: str, memory: int | None, devices: int
) -> tuple[str, int]:
  """(`model.remat`, `model.unroll`) with which a step is fastest that fits.

  Args:
    config: a resolved configuration with a batch size; what it says itself stays.
    platform: 'cpu', 'gpu' or 'tpu'.
    memory: bytes of a device that a program may use; None: not known (CPUs).
    devices: that share a batch, along data and fsdp.

  Raises:
    ValueError: not one image fits with anything; one line.
  """
  m = config.model
  unroll = m.unroll or (-1 if platform == "gpu" else 1)
  room = None
  if memory is not None:
    fsdp = config.mesh.fsdp if config.mesh.fsdp > 0 else devices // max(config.mesh.data, 1)
    state = state_bytes(config, shards=max(fsdp, 1))
    room = _SHARE * memory - state
    if room < kept_bytes(config, "block"):
      least = (state + kept_bytes(config, "block")) / _SHARE
      raise ValueError(
        f"a {platform.upper()} device has {memory / 1e9:.1f} GB for a program, too little for this "
        f"model and one image (about {least / 1e9:.1f} GB). Take a smaller model (config.model), "
        "share it over devices (config.mesh.fsdp), or free the device."
      )
  if m.remat != "auto":
    return m.remat, unroll
  images = -(-config.batch_size // devices // max(config.accumulate, 1))
  order = _ORDER.get(platform, _ORDER_ELSEWHERE)
  if room is None:
    room = _CPU_BYTES if platform == "cpu" else float("inf")
  for remat in order:
    if images * kept_bytes(config, remat) <= room:
      return remat, unroll
  return order[-1], unroll
