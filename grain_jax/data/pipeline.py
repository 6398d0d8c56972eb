"""Host batches from a built dataset: chosen by the sampler, read by index, made ahead of the step.

tf.data runs the work in parallel and keeps its order, or worker processes do (`feeding`); what is
done to a record stands in `examples`. Evaluations read a split once, in its own order.
"""

from __future__ import annotations

import collections
import functools
import os
import pathlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple, Protocol

import ml_collections
import numpy as np

from grain_jax import failures, schema
from grain_jax.data import bad_records, mixture, sampler
from grain_jax.data import dataset as dataset_lib
from grain_jax.data import examples as examples_lib

open_dataset = dataset_lib.open_dataset

# What `examples.Examples` keeps as its `failure`.
_FAILURES = (examples_lib.BadRecord, dataset_lib.ShardChanged, failures.TransientError)
_CHUNK = 32  # most records a call: small enough that a large batch is shared among threads


class ExampleInfo(NamedTuple):
  """What evaluations need beside the batch; a list entry an example, empty where it is padding."""

  index: np.ndarray  # i64 [b], of the record in its split; -1 for padding
  key: list[str]
  label: np.ndarray  # i64 [b]; -1 where there is none
  captions: list[list[str]]  # all captions of the record
  descriptions: list[list[str]]  # of the regions, in the order of batch["boxes"]
  mask: list[bytes]  # PNG of the segmentation mask; empty where there is none
  negatives: list[list[tuple[str, str]]]  # all false captions of the record, and their kinds


class ArrayBatches(Protocol):
  """What makes batches, whoever does the work."""

  def __next__(self) -> Sequence[np.ndarray]:
    """The arrays of the next batch, in the order of schema.BATCH."""

  def close(self) -> None:
    """Ends what works for it."""


class TrainBatches:
  """Iterator of host batches without end: {name: array} as in schema.BATCH.

  Attributes:
    bad: {record index: why} of the bad records met so far.
    steps_per_epoch: batches in a pass over the data.
  """

  def __init__(
    self,
    examples: examples_lib.Examples,
    batches: ArrayBatches,
    *,
    reads: Callable[[], dataset_lib.ReadCounts],
    steps_per_epoch: int,
    step: int,
    indices: Callable[[int], np.ndarray],
    limits: bad_records.Limits,
    names: Sequence[str],
  ):
    """A run's batches.

    Args:
      examples: what makes them.
      batches: their arrays.
      reads: what was read so far.
      steps_per_epoch: see above.
      step: of the first batch.
      indices: step -> records of its batch.
      limits: of bad records.
      names: of the arrays.
    """
    self._names = names
    self.bad = examples.bad
    self.steps_per_epoch = steps_per_epoch
    self._examples, self._indices, self._step = examples, indices, step
    self._counter = bad_records.BadRecordCounter(limits)
    self._count_reads, self._reads = reads, reads()
    self._false_texts = examples.false_texts.copy()
    self._batches = batches
    # While Python shuts down, a pipeline that still runs would wait for its lock for ever, and the
    # process with it.
    self._finalizer = weakref.finalize(self, batches.close)

  def __iter__(self) -> TrainBatches:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    """The next batch.

    Raises:
      examples.BadRecord: a record is bad, or one too many is, by the config; one line.
      dataset.ShardChanged: a shard was written anew under the run; one line.
      failures.TransientError: the storage of the records failed; one line.
    """
    try:
      batch = dict(zip(self._names, next(self._batches), strict=True))
      self._check(batch["example_mask"])
      self._step += 1
      return batch
    except BaseException as error:
      raised = error.with_traceback(None)  # its frames hold the iterator
    self.close()
    raise raised

  def shard_opens_per_1000(self) -> float:
    """Shards opened for 1,000 records read, since it was last asked; 0 where none was read."""
    before, self._reads = self._reads, self._count_reads()
    read = self._reads.records - before.records
    return 1000 * (self._reads.opens - before.opens) / read if read else 0.0

  def dropped_negatives(self) -> float | None:
    """Share of this process's false captions and descriptions that did not fit their rows.

    Of those met since it was last asked, with what is prepared ahead; None where there were none.
    """
    before, self._false_texts = self._false_texts, self._examples.false_texts.copy()
    met, dropped = self._false_texts - before
    return float(dropped / met) if met else None

  def _check(self, good: np.ndarray) -> None:
    """Raises where bad records are too many."""
    found = self._counter.add(good)
    if found is None:
      return
    place, what = found
    index = int(self._indices(self._step)[place])
    where, why = self._examples.dataset.locate(self._examples.split, index), self.bad[index]
    last = why if why.startswith(where) else f"{where}: {why}"
    raise examples_lib.BadRecord(
      f"{what}; the last one is {last.rstrip('.')}. Build or copy the data again, or raise the "
      "limit."
    )

  def close(self) -> None:
    """Ends the pipeline, its threads (outside the main thread without waiting) or processes."""
    self._finalizer()


def train_batches(
  data_dir: str | dataset_lib.Dataset | mixture.Mixture,
  config: ml_collections.ConfigDict,
  *,
  start_step: int = 0,
  host: int | Sequence[int] = 0,
  num_hosts: int = 1,
  negatives: int | None = None,
) -> TrainBatches:
  """Batches of this host from `start_step` on.

  Args:
    data_dir: directory written by `data.build`, or such a dataset opened, or several (`mixture`).
    config: whole configuration.
    start_step: steps done before; the batches are those of a run that never stopped.
    host: this host, or several of them for which one process reads (`mesh.process_batch_shards`).
    num_hosts: hosts; config.batch_size counts images over all of them.
    negatives: slots for hard negatives (K); None: config.data.negatives.
  """
  dataset: Any = open_dataset(data_dir) if isinstance(data_dir, (str, pathlib.Path)) else data_dir
  mixed = isinstance(dataset, mixture.Mixture)
  num_records = dataset.num_records(config.data.split)
  steps = sampler.steps_per_epoch(num_records, config.batch_size)
  hosts = (host,) if isinstance(host, int) else tuple(host)
  sizes_of = dict(batch_size=config.batch_size, num_records=num_records, num_hosts=num_hosts)

  def choose(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of a step, and the pass over its data that each is of."""
    epoch, step = divmod(step, steps)
    if not mixed:
      of_hosts = [
        sampler.indices(seed=config.seed, epoch=epoch, step=step, host=h, **sizes_of) for h in hosts
      ]
      records = np.concatenate(of_hosts)
      return records, np.full(len(records), epoch, np.int64)
    own = [sampler.places(step=step, host=h, **sizes_of) for h in hosts]
    places = np.concatenate([np.arange(part.start, part.stop) for part in own])
    return dataset.choose(places, epoch, images=steps * config.batch_size)

  batch = len(choose(0)[0])  # says what is wrong with hosts and sizes
  chunk = max(d for d in range(1, min(batch, _CHUNK) + 1) if batch % d == 0)
  negatives = config.data.negatives if negatives is None else negatives
  examples = examples_lib.Examples(
    dataset, config.data.split, config, training=True, negatives=negatives
  )

  def pick(step: int) -> tuple[np.ndarray, np.ndarray]:
    records, passes = choose(int(step))
    return records.reshape(-1, chunk), passes.reshape(-1, chunk)

  sizes = dict(image_size=examples.size, row_length=examples.row_length)
  sizes |= dict(regions=examples.regions, negatives=negatives)
  sizes |= dict(region_negatives=examples.region_negatives)
  sizes |= dict(sources=len(dataset.names) if mixed else 0)
  reads = functools.partial(dataset.reads, config.data.split)
  if config.data.workers:
    from grain_jax.data.feeding import pool

    shapes = list(schema.batch_shapes(batch=batch, **sizes).values())
    made = pool.WorkerBatches(
      examples, config, shapes=shapes, chunk=chunk, start_step=start_step, pick=pick
    )
    batches, reads = made, lambda: made.reads
  else:
    batches = _threaded(
      examples, config, sizes=sizes, batch=batch, chunk=chunk, start_step=start_step, pick=pick
    )
  return TrainBatches(
    examples,
    batches,
    reads=reads,
    steps_per_epoch=steps,
    step=start_step,
    indices=lambda step: choose(step)[0],
    limits=bad_records.Limits.from_config(config),
    names=list(schema.batch_shapes(batch=chunk, **sizes)),
  )


def _threaded(
  examples: examples_lib.Examples,
  config: ml_collections.ConfigDict,
  *,
  sizes: dict[str, int],
  batch: int,
  chunk: int,
  start_step: int,
  pick: Callable[[int], tuple[np.ndarray, np.ndarray]],
) -> _ThreadBatches:
  """Arrays of batches without end, made by threads of tf.data; `pick` as for `WorkerBatches`."""
  from grain_jax.data.host_tensorflow import tf

  def load(indices, epochs):
    """Arrays of a chunk, and whether it was made: tf.data would log an error at length."""
    try:
      return *examples.chunk(indices, epochs).arrays, np.ones(chunk, bool)
    except _FAILURES:  # kept as `examples.failure`
      return *(np.zeros(shape, dtype) for shape, dtype in shapes), np.zeros(chunk, bool)

  shapes = list(schema.batch_shapes(batch=chunk, **sizes).values())
  types = [*(tf.as_dtype(dtype) for _, dtype in shapes), tf.bool]

  def load_chunk(indices, epochs):
    arrays = tf.numpy_function(load, [indices, epochs], types, stateful=False)
    for array, shape in zip(arrays, [*(shape for shape, _ in shapes), (chunk,)], strict=True):
      array.set_shape(shape)
    return tuple(arrays)

  def pick_chunks(step):
    picked = tf.numpy_function(pick, [step], [tf.int64, tf.int64], stateful=False)
    for array in picked:
      array.set_shape((batch // chunk, chunk))
    return tf.data.Dataset.from_tensor_slices(tuple(picked))

  threads = config.data.threads
  parallel = threads if threads > 0 else tf.data.AUTOTUNE
  ds = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max).flat_map(pick_chunks)
  ds = ds.map(load_chunk, num_parallel_calls=parallel, deterministic=True)
  ds = ds.batch(batch // chunk, drop_remainder=True)
  ds = ds.map(lambda *arrays: tuple(tf.reshape(a, (batch, *a.shape[2:])) for a in arrays))
  options = tf.data.Options()
  options.deterministic = True
  if threads > 0:
    options.threading.private_threadpool_size = threads
  return _ThreadBatches(examples, ds.prefetch(config.data.prefetch).with_options(options))


class _ThreadBatches:
  """The arrays of a tf.data pipeline, or what failed in it."""

  def __init__(self, examples: examples_lib.Examples, batches: Any):
    self._examples = examples
    # Without the iterator the pipeline ends, so nothing else may hold on to it.
    self._batches = [batches.as_numpy_iterator()]

  def __next__(self) -> list[np.ndarray]:
    *arrays, done = next(self._batches[0])
    if not done.all():
      raise self._examples.failure
    return arrays

  def close(self) -> None:
    """Lets go of the iterator, which waits for the pipeline's threads.

    Python may collect garbage in any thread, so in one of these too: it would wait for itself, and
    with it whatever shares tf.data's threads.
    """
    if threading.current_thread() is threading.main_thread():
      self._batches.clear()
    else:
      threading.Thread(target=self._batches.clear).start()  # Python waits for it when it ends


def eval_batches(
  data_dir: str | dataset_lib.Dataset,
  split: str,
  config: ml_collections.ConfigDict,
  *,
  host: int = 0,
  num_hosts: int = 1,
  negatives: int = 0,
  resize: str = "squash",
) -> Iterator[tuple[dict[str, np.ndarray], ExampleInfo]]:
  """One pass over a split in its own order, as (batch, extras).

  Every batch has config.eval_batch_size images over all hosts (each reads as many, rounded up); the
  last one is filled up with examples whose example_mask is false. The caption is the first one.
  Boxes hold where images are squashed, not by another way to `resize` them.
  """
  dataset = data_dir if isinstance(data_dir, dataset_lib.Dataset) else open_dataset(data_dir)
  num_records, size = dataset.num_records(split), config.eval_batch_size
  examples = examples_lib.Examples(
    dataset, split, config, training=False, negatives=negatives, resize=resize
  )

  def load(step: int) -> tuple[dict[str, np.ndarray], ExampleInfo]:
    indices = sampler.eval_indices(
      step=step, batch_size=size, num_records=num_records, host=host, num_hosts=num_hosts
    )
    chunk = examples.chunk(indices, 0)
    return dict(zip(schema.BATCH, chunk.arrays, strict=True)), _example_info(indices, chunk)

  ahead: collections.deque[futures.Future] = collections.deque()
  with futures.ThreadPoolExecutor(config.data.threads or os.cpu_count()) as pool:
    try:
      for step in range(sampler.eval_steps(num_records, size)):
        ahead.append(pool.submit(load, step))
        if len(ahead) > max(config.data.prefetch, 1):
          yield ahead.popleft().result()
      while ahead:
        yield ahead.popleft().result()
    finally:
      for future in ahead:
        future.cancel()


def _example_info(indices: np.ndarray, chunk: examples_lib.Chunk) -> ExampleInfo:
  parsed = chunk.parsed
  return ExampleInfo(
    index=indices,
    key=["" if r is None else r.key.decode() for r in parsed],
    label=np.array([-1 if r is None else r.label for r in parsed], np.int64),
    captions=[[] if r is None else [c.decode() for c in r.captions] for r in parsed],
    descriptions=[
      [] if r is None else [r.descriptions[p].decode() for p in places]
      for r, places in zip(parsed, chunk.chosen, strict=True)
    ],
    mask=[b"" if r is None else r.mask for r in parsed],
    negatives=[
      [] if r is None else [(text.decode(), kind.decode()) for text, kind in r.negatives]
      for r in parsed
    ],
  )
