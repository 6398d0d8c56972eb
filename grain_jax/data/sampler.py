"""Which records a step reads: a pure function of (seed, epoch, step, host).

No state and no shuffle buffer: resuming means asking for another step, and the order of the records
over all hosts together does not depend on how many hosts there are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np


def steps_per_epoch(num_records: int, batch_size: int) -> int:
  """Whole batches in a pass over the records; the last partial one is left out."""
  if batch_size < 1:
    raise ValueError(f"batch_size = {batch_size}: a batch holds at least one image. Raise it.")
  if num_records < batch_size:
    raise ValueError(
      f"batch_size = {batch_size} is more than the split's {num_records} records: no batch can be "
      "filled. Lower batch_size or build more data."
    )
  return num_records // batch_size


def indices(
  *,
  seed: int,
  epoch: int,
  step: int,
  batch_size: int,
  num_records: int,
  host: int = 0,
  num_hosts: int = 1,
) -> np.ndarray:
  """Records that a host reads at a step of an epoch.

  Args:
    seed: of the order, at least 0.
    epoch: passes completed.
    step: batch within the epoch, below `steps_per_epoch`.
    batch_size: images a step over all hosts (B).
    num_records: records of the split.
    host: this host.
    num_hosts: hosts; each takes a contiguous shard of the batch.

  Returns:
    i64 [B / num_hosts].
  """
  own = places(
    step=step, batch_size=batch_size, num_records=num_records, host=host, num_hosts=num_hosts
  )
  return _permutation(seed, epoch, num_records)[own]


def places(
  *, step: int, batch_size: int, num_records: int, host: int = 0, num_hosts: int = 1
) -> slice:
  """Where in an epoch's order a host reads at a step; see `indices`."""
  steps = steps_per_epoch(num_records, batch_size)
  if not 0 <= step < steps:
    raise ValueError(f"step = {step} is not within the {steps} steps of an epoch.")
  start, stop = _host_range(batch_size, host, num_hosts)
  return slice(step * batch_size + start, step * batch_size + stop)


def eval_indices(
  *, step: int, batch_size: int, num_records: int, host: int = 0, num_hosts: int = 1
) -> np.ndarray:
  """Records in their own order; -1 fills the last batch up: i64 [ceil(batch_size / num_hosts)].

  Where hosts do not divide the batch, -1 fills up those that would read beyond it too.
  """
  _check_host(host, num_hosts)
  per_host = -(-batch_size // num_hosts)
  rows = np.arange(host * per_host, (host + 1) * per_host)
  chosen = step * batch_size + rows
  return np.where((rows < batch_size) & (chosen < num_records), chosen, -1)


def eval_steps(num_records: int, batch_size: int) -> int:
  """Batches in one pass over all records, the last one filled up."""
  return -(-num_records // batch_size)


def _host_range(batch_size: int, host: int, num_hosts: int) -> tuple[int, int]:
  if batch_size % num_hosts:
    raise ValueError(
      f"batch_size = {batch_size} is not divisible by {num_hosts} hosts. Use a multiple."
    )
  _check_host(host, num_hosts)
  per_host = batch_size // num_hosts
  return host * per_host, (host + 1) * per_host


def _check_host(host: int, num_hosts: int) -> None:
  if not 0 <= host < num_hosts:
    raise ValueError(f"host = {host} is not one of {num_hosts} hosts (0 to {num_hosts - 1}).")


def permutation(seeds: Sequence[int], num_records: int) -> np.ndarray:
  """An order of so many records, i64 [num_records], the same for the same seeds."""
  order = np.random.default_rng(list(seeds)).permutation(num_records)
  order.flags.writeable = False
  return order


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_records: int) -> np.ndarray:
  return permutation([seed, epoch], num_records)
