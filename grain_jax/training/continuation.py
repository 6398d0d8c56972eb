"""A run that goes on otherwise than it began, on purpose: longer, at another rate, on other data.

Parameters, optimiser and the number of the step go on. The learning rate starts a schedule of its
own at that step (`optim.schedule`), and the order of the data is that of the new configuration from
there: with another batch size or other data an epoch may see an image twice, or not.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from grain_jax import config as configs
from grain_jax.data import mixture
from grain_jax.runtime import checkpoint

# Keys that may change in a run: neither the parameters nor the optimiser's state have another form.
KEYS = frozenset(
  {
    "batch_size",
    "data.caption",
    "data.crop_min_area",
    "data.dir",
    "data.flip",
    "data.reduced_decode",
    "data.resize",
    "data.row_length",
    "data.sources",
    "data.split",
    "epochs",
    "loss.aux_box_loss",
    "loss.box",
    "loss.box_giou_cost",
    "loss.box_l1_cost",
    "loss.box_loss_scale",
    "loss.caption",
    "loss.mask_duplicates",
    "loss.multi_positive",
    "loss.region",
    "loss.region_negatives",
    "model.decoder.dropout",
    "optimizer.clip_norm",
    "optimizer.lr",
    "optimizer.lr_end",
    "optimizer.lr_init",
    "optimizer.lr_scale",
    "optimizer.warmup_epochs",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "steps",
  }
)
# What a run keeps, whatever is asked for: set by a continuation, or past since its first step.
STARTS = tuple(f"optimizer.start_{what}" for what in ("step", "lr", "skipped", "clip_norm"))
_OWN = (*STARTS, "model.decoder.init")


def check_keys(keys: Sequence[str]) -> None:
  """Raises a line for a key of --continue_as that may not change in a run."""
  for key in keys:
    if key not in KEYS:
      near = difflib.get_close_matches(key, KEYS, n=1)
      hint = f"Did you mean {near[0]}? " if near else ""
      raise ValueError(
        f"--continue_as={key}: a run cannot go on with another {key}. {hint}These may change: "
        f"{', '.join(sorted(KEYS))}. For all else start a new run: --config.init.model=WORKDIR."
      )


def continue_as(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  keys: Sequence[str],
  *,
  say: Callable[[str], None],
) -> ml_collections.ConfigDict:
  """The configuration with which the run in a workdir goes on; all processes must call it.

  Args:
    config: as it is asked for now.
    folder: the workdir.
    keys: of the configuration that may be another than the run's so far.
    say: gets a line where something changes.

  Returns:
    The configuration with what the run keeps (`_OWN`), or, where one of the keys changes now, with
    its newest step and the learning rate there as `optimizer.start_step` and `start_lr`
    (`start_skipped`, `start_clip_norm`: what the optimiser's state at that step needs).

  Raises:
    ValueError: a key that cannot change, or there is no run in the workdir; one line.
  """
  check_keys(keys)
  path = folder / "config.json"
  if not path.is_file():
    if keys:
      raise ValueError(
        f"--continue_as={','.join(keys)}: there is no run in {folder}. Leave the flag away to "
        "start one, or check --workdir."
      )
    return config
  old = configs.read(path)
  config = ml_collections.ConfigDict(config.to_dict())
  for key in _OWN:
    configs.set_key(config, key, _value(old, key))
  changes = {key: (_value(old, key), _value(config, key)) for key in keys}
  changes = {key: values for key, values in changes.items() if values[0] != values[1]}
  begun = config.optimizer.start_step
  if not changes and "data.dir" not in keys and not (keys and begun):
    return config
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", read_only=True)
  meta = checkpoints.read_newest_meta()
  checkpoints.close()
  if meta is None or not meta["step"]:  # it has not begun: nothing is to be continued
    what = "checkpoint" if meta is None else "checkpoint of a step after 0"
    raise ValueError(
      f"--continue_as={','.join(keys)}: {folder} holds no {what}. Use a new workdir."
    )
  step, rate = meta["step"], meta.get("learning_rate", old.optimizer.lr_end)
  if "data.dir" in keys and "data.dir" not in changes:  # other data may lie where the old lay
    now = mixture.open_training(config).fingerprint(config.data.split)
    if meta.get("data", now) != now:
      changes["data.dir"] = (f"{old.data.dir} ({meta['data'][:12]})", f"the same ({now[:12]})")
  if not changes and step < begun:  # `check_step` asked for it
    changes["optimizer.start_step"] = (begun, step)
  if not changes:
    return config
  skipped = meta.get("skipped", 0)
  config.optimizer.update(start_step=step, start_lr=float(rate), start_skipped=skipped)
  if "optimizer.clip_norm" in changes and config.optimizer.start_clip_norm < 0:
    config.optimizer.start_clip_norm = old.optimizer.clip_norm
  said = ", ".join(f"config.{key} {was!r} -> {now!r}" for key, (was, now) in changes.items())
  say(
    f"goes on at step {step} with {said}; the learning rate starts a schedule of its own there, "
    f"from {rate:.3g}"
  )
  return config


def check_step(config: ml_collections.ConfigDict, step: int, folder: pathlib.Path) -> None:
  """That a run that was just continued otherwise goes on where its new schedule starts.

  Raises:
    ValueError: the newest checkpoint could not be read, and an older one was taken; one line.
  """
  start = config.optimizer.start_step
  if step < start:
    raise ValueError(
      f"{folder}: the learning rate's schedule starts at step {start}, but the newest checkpoint "
      f"that can be read is of step {step}. Restore checkpoint {start}; or, to go on from {step}, "
      f"move {folder / 'checkpoints' / str(start)} elsewhere and give --continue_as again."
    )


def _value(config: ml_collections.ConfigDict, key: str) -> Any:
  return dict(configs.flatten(config))[key]
