"""FLOPs of the matrix products of a train step, counted alike in JAX and in PyTorch.

A product of [.., M, K] and [.., K, N] is 2 M N K a batch entry, and nothing else counts. Masked
attention counts whole, as both sides would compute it by dense products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import ml_collections
import numpy as np
import torch
from torch.utils import flop_counter

from bench import train_step_sides as sides
from bench.peers import grain_torch
from grain_jax import flops as counter
from grain_jax.models import grain, initial
from grain_jax.runtime import mesh as meshes
from grain_jax.training import steps

# Part of the step -> modules of it in grain_jax; all else is the last part.
PARTS = {"image tower": ("image_tower",), "text tower": ("text_tower", "text_projection")}
REST = "decoder, heads, losses"


def _by_part(flops: Mapping[str, int], samples: int) -> dict[str, float]:
  """{part: FLOPs a sample} of counts by paths of names."""
  parts = dict.fromkeys((*PARTS, REST), 0.0)
  for path, count in flops.items():
    names = path.split("/")
    part = next((p for p, modules in PARTS.items() if set(modules) & set(names)), REST)
    parts[part] += count / samples
  return parts


def ours(config: ml_collections.ConfigDict) -> dict[str, float]:
  """{part: FLOPs a sample} of grain_jax's train step, from its jaxpr; nothing is computed."""
  mesh = meshes.create(config, jax.devices()[:1])
  model = grain.build(config, unroll=-1)
  _, state, shardings, optimizer = steps.create_state(
    model,
    config,
    mesh,
    total_steps=sides.TOTAL_STEPS,
    steps_per_epoch=sides.STEPS_PER_EPOCH,
  )
  with jax.set_mesh(mesh):
    step = steps.make_train_step(model, config, mesh, optimizer, shardings)
    jaxpr = jax.make_jaxpr(step)(state, initial.dummy_batch(config, config.batch_size))
  return _by_part(counter.count(jaxpr.jaxpr), config.batch_size)


def _first_queries(cost: torch.Tensor, regions: Sequence[int]) -> torch.Tensor:
  """Some assignment: which queries are matched changes no product."""
  index = [i for number in regions for i in range(number)]
  return torch.tensor(index, device=cost.device)


def torch_flops(compute: Callable[[], torch.Tensor]) -> int:
  """FLOPs of `compute` and of its gradient, by PyTorch's counter; for the meta device.

  There attention is made of the products it stands for, two forward and four backward. On the CPU
  it is one fused operation, which the counter (of PyTorch 2.13) does not know and takes for 0.
  """
  with flop_counter.FlopCounterMode(display=False) as counter:
    result = compute()
    if result.device.type != "meta":
      raise ValueError(f"FLOPs are counted on the meta device, not on {result.device}.")
    result.sum().backward()
  return counter.get_total_flops()


def peer(config: ml_collections.ConfigDict, batch: grain_torch.Batch) -> dict[str, float]:
  """{part: FLOPs a sample} of the peer's train step on a batch; nothing is computed."""
  samples, batch = len(batch.image), batch.to("meta")
  with torch.device("meta"):
    model = grain_torch.GrainTorch(config)
    image = torch.empty(batch.image.shape)

  def whole() -> torch.Tensor:
    return grain_torch.losses(model, batch, config, matcher=_first_queries)["loss"]

  found = {
    "image tower": torch_flops(lambda: model.image_tower(image)),
    "text tower": torch_flops(lambda: model.encode_text(batch)),
  }
  found[REST] = torch_flops(whole) - sum(found.values())
  return {part: flops / samples for part, flops in found.items()}


def text_flops(config: ml_collections.ConfigDict, lengths: np.ndarray) -> float:
  """FLOPs of the text tower, its projection and their gradients on texts of these lengths.

  A layer of width D and hidden width H costs a text of n tokens n (8 D^2 + 4 D H) + 4 n^2 D, and
  the gradient as much again twice.
  """
  t, n = config.model.text, lengths[lengths > 0].astype(np.float64)
  hidden = round(t.width * t.mlp_ratio)
  layer = n * (8 * t.width**2 + 4 * t.width * hidden) + 4 * n**2 * t.width
  return float(3 * np.sum(t.depth * layer + 2 * t.width * config.model.embed_dim))


def report(
  config: ml_collections.ConfigDict, batch: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
  """{side: {part: FLOPs a sample}} of all sides, and of a peer 'unpadded' without any padding."""
  found = {"ours": ours(config)}
  for form in ("padded", "trimmed"):
    found[form] = peer(config, sides.peer_batch(batch, config, form=form))
  text = text_flops(config, sides.text_lengths(batch)) / config.batch_size
  found["unpadded"] = {**found["trimmed"], "text tower": text}
  return found
