"""The three sides of `bench.train_step`: one batch, our step, the PyTorch peer's two forms.

As a module it is a worker: `python -m bench.train_step_sides SIDE` reads a configuration in JSON as
its first line, makes the side, and then answers each line 'step' with the seconds of a train step
and 'end' with its peak memory, a JSON object a line.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from grain_jax import config as configs
from grain_jax import schema

SIDES = ("ours", "padded", "trimmed")
CAPTION_TOKENS = (12, 40)  # fewest and most, start and end included
DESCRIPTION_TOKENS = (6, 14)
# What the peer is written for, and in which our step must agree with it.
PEER = {
  "method": "grain",
  "model.decoder.memory_positions": False,
  "loss.aux_box_loss": False,
  "loss.multi_positive": 0.0,
  "loss.permute_regions": False,
  "optimizer.decay_mask": "clean",
  "optimizer.clip_norm": 0.0,
  "optimizer.freeze": (),
  "optimizer.lr_scale": (),
}
_FLOAT32 = {"model.dtype": "float32", "model.remat": "none", "model.unroll": 1}
# Both sides follow the schedule of a run of so many steps.
TOTAL_STEPS, STEPS_PER_EPOCH = 1000, 100


def setting(
  recipe: str,
  *,
  batch_size: int,
  row_length: int,
  seed: int,
  changes: Mapping[str, Any] = _FLOAT32,
) -> ml_collections.ConfigDict:
  """The recipe's configuration on one device, with keys changed; a one-line error if it cannot be.

  By default in float32, with nothing computed again.
  """
  config = configs.load(recipe)
  for key, value in changes.items():
    configs.set_key(config, key, value)
  config.batch_size = config.eval_batch_size = batch_size
  config.data.row_length, config.seed = row_length, seed
  config.mesh.update(data=1, fsdp=1, tensor=1)
  config = configs.resolve(config)
  configs.check(config)
  flat = dict(configs.flatten(config))
  for key, value in PEER.items():
    if flat[key] != value:
      raise ValueError(
        f"config.{key} = {flat[key]!r} is nothing the PyTorch peer knows. Set it to {value!r}."
      )
  if config.data.max_regions < 1:
    raise ValueError("config.data.max_regions = 0 leaves the peer no regions. Set at least 1.")
  if config.model.text.context < CAPTION_TOKENS[1]:
    raise ValueError(
      f"config.model.text.context = {config.model.text.context} is shorter than the captions of "
      f"this benchmark, {CAPTION_TOKENS[1]} tokens. Raise it."
    )
  longest = CAPTION_TOKENS[1] + config.data.max_regions * DESCRIPTION_TOKENS[1]
  if row_length < longest:
    raise ValueError(
      f"--row_length={row_length}: texts of up to {longest} tokens an image would be dropped from "
      f"their row. Use at least {longest}."
    )
  return config


def host_batch(config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
  """A batch as the input pipeline makes it (`schema.BATCH`), drawn from `config.seed`.

  Noise for images; texts of random tokens and lengths; as many boxes, each with a description, as
  an image may have. The row holds all texts: nothing is dropped.
  """
  rng = np.random.default_rng(config.seed)
  b, regions, vocabulary = config.batch_size, config.data.max_regions, config.model.text.vocab_size
  shapes = schema.batch_shapes(
    batch=b,
    image_size=config.model.image.size,
    row_length=config.data.row_length,
    regions=regions,
  )
  batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
  batch["image"][:] = rng.integers(0, 256, batch["image"].shape, np.uint8)
  for i in range(b):
    at = 0
    for text in range(1 + regions):
      fewest, most = DESCRIPTION_TOKENS if text else CAPTION_TOKENS
      length = int(rng.integers(fewest, most + 1))
      words = rng.integers(1, vocabulary - 2, length - 2)
      batch["tokens"][i, at : at + length] = [vocabulary - 2, *words, vocabulary - 1]
      batch["segments"][i, at : at + length] = text + 1
      batch["positions"][i, at : at + length] = np.arange(length)
      batch["ends"][i, text] = at + length - 1
      at += length
  size = rng.uniform(0.1, 0.5, (b, regions, 2))
  center = rng.uniform(size / 2, 1 - size / 2)
  batch["boxes"][:] = np.concatenate([center, size], -1)
  for name in ("text_mask", "region_mask", "example_mask"):
    batch[name][:] = True
  return batch


def text_lengths(batch: Mapping[str, np.ndarray]) -> np.ndarray:
  """Tokens of each text of a packed batch: i64 [B, T], 0 where there is none."""
  texts = np.arange(1, 1 + batch["ends"].shape[1])
  return np.sum(batch["segments"][:, None] == texts[:, None], axis=-1)


def peer_batch(
  batch: Mapping[str, np.ndarray], config: ml_collections.ConfigDict, *, form: str
) -> Any:
  """The same images, boxes and texts for the peer (`grain_torch.Batch`), texts unpacked.

  Args:
    batch: of `schema.BATCH`, in which each region that exists has its text.
    config: its text context is the length of a padded row.
    form: 'padded', all texts in one batch of rows of the whole context, as published; or 'trimmed',
      captions and descriptions as a batch each, of rows as long as its own longest text: fewer
      tokens than one batch of both, whose rows the longest caption would stretch.
  """
  import torch

  from bench.peers import grain_torch

  described = batch["text_mask"][:, 1:]
  if not (batch["example_mask"].all() and (described == batch["region_mask"]).all()):
    raise ValueError("the peer needs whole examples and regions that all have their description.")

  def group(images: np.ndarray, texts: np.ndarray) -> tuple[Any, Any]:
    lengths = text_lengths(batch)[images, texts]
    length = config.model.text.context if form == "padded" else int(lengths.max(initial=1))
    rows = np.zeros((len(images), length), np.int64)
    for row, image, text in zip(rows, images, texts, strict=True):
      ids = batch["tokens"][image][batch["segments"][image] == text + 1]
      row[: len(ids)] = ids
    return torch.from_numpy(rows), torch.from_numpy(lengths - 1)

  owner, region = np.nonzero(batch["region_mask"])
  images, caption = np.arange(len(described)), np.zeros(len(described), np.int64)
  if form == "padded":
    groups = [(np.r_[images, owner], np.r_[caption, 1 + region])]
  else:
    groups = [(images, caption), (owner, 1 + region)]
  return grain_torch.Batch(
    image=torch.from_numpy(np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2))),
    texts=tuple(group(*pair) for pair in groups),
    boxes=torch.from_numpy(batch["boxes"][batch["region_mask"]]),
    owner=torch.from_numpy(owner),
    regions=tuple(int(n) for n in batch["region_mask"].sum(axis=1)),
  )


def cores() -> int:
  """CPU cores this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


class Ours:
  """grain_jax's own train step on one device."""

  def __init__(self, config: ml_collections.ConfigDict, batch: Mapping[str, np.ndarray]):
    import jax

    from grain_jax.models import grain
    from grain_jax.runtime import mesh as meshes
    from grain_jax.training import steps

    self.mesh = meshes.create(config, jax.devices()[:1])
    with jax.set_mesh(self.mesh):
      model = grain.build(config)
      init, _, shardings, optimizer = steps.create_state(
        model, config, self.mesh, total_steps=TOTAL_STEPS, steps_per_epoch=STEPS_PER_EPOCH
      )
      self.state, self.batch = init(), meshes.to_global(dict(batch), self.mesh)
      self.train_step = steps.make_train_step(model, config, self.mesh, optimizer, shardings)

  def step(self) -> float:
    """One update, waited for; the loss before it."""
    import jax

    with jax.set_mesh(self.mesh):
      self.state, metrics = self.train_step(self.state, self.batch)
      jax.block_until_ready(self.state)
    return float(metrics["loss"][0])


class Peer:
  """The PyTorch peer on all cores."""

  def __init__(
    self, config: ml_collections.ConfigDict, batch: Mapping[str, np.ndarray], *, form: str
  ):
    import torch

    from bench.peers import grain_torch

    torch.set_num_threads(cores())
    torch.manual_seed(config.seed)
    o = config.optimizer
    warmup = o.warmup_steps or round(o.warmup_epochs * STEPS_PER_EPOCH)
    self.trainer = grain_torch.Trainer(config, total_steps=TOTAL_STEPS, warmup_steps=warmup)
    self.batch = peer_batch(batch, config, form=form)

  def step(self) -> float:
    """One update; the loss before it."""
    return float(self.trainer.step(self.batch)["loss"])


def create(side: str, config: ml_collections.ConfigDict, batch: Mapping[str, np.ndarray]) -> Any:
  """The side of that name."""
  return Ours(config, batch) if side == "ours" else Peer(config, batch, form=side)


def peak_bytes() -> int:
  """Most memory this process has had resident.

  `ru_maxrss`, but from /proc where there is one: the former starts at the parent's peak.
  """
  status = pathlib.Path("/proc/self/status")
  if status.exists():
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
  import resource

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def work(side: str) -> None:
  """The worker's conversation on stdin and stdout."""
  config = configs.from_json(sys.stdin.readline())
  if side == "ours":
    from grain_jax.training import steps  # noqa: F401
  else:
    from bench.peers import grain_torch  # noqa: F401
  imported = peak_bytes()
  runner = create(side, config, host_batch(config))
  for line in sys.stdin:
    if line.strip() == "step":
      began = time.perf_counter()
      loss = runner.step()
      answer = {"seconds": time.perf_counter() - began, "loss": loss}
    else:
      answer = {"peak_bytes": peak_bytes() - imported}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  work(sys.argv[1])
