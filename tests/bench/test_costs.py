"""What a step costs: FLOPs against hand-counted products, the protocol of the timing."""

import pytest

from bench import costs


def silent(line):
  """Says nothing."""


def test_timing_takes_turns_discards_the_first_and_takes_the_median(monkeypatch):
  order = []

  class Stepper:
    def __init__(self, config):
      self.config = config

    def time(self, number):
      order.append(self.config)
      return [100.0, 100.0] + [self.config * len(order)] * (number - 2)

  monkeypatch.setattr(costs, "_Stepper", Stepper)
  found = costs.seconds_per_step(
    {"a": 1, "b": 10}, rounds=3, steps_per_round=4, discard=2, say=silent
  )
  assert order == [1, 10, 1, 10, 1, 10]
  assert found == {"a": 3, "b": 40}  # of 1, 3, 5 and of 20, 40, 60


@pytest.mark.slow
def test_flops_count_every_layer(tiny):
  tiny.method, tiny.batch_size, tiny.model.text.depth = "clip", 32, 1
  tiny.data.max_regions = 0
  counts = []
  for depth in (1, 4):
    tiny.model.image.depth = depth
    counts.append(costs.flops_per_step(tiny))
  # A layer's matrix products on 5 tokens of width 32, forward and twice backward.
  tokens, width = 5, 32
  forward = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
  assert 1 < (counts[1] - counts[0]) / (3 * 3 * 32 * forward) < 1.4  # and element-wise work


@pytest.mark.slow
def test_timing_runs_the_real_step(tiny, make_batch, monkeypatch):
  from grain_jax.data import pipeline

  class Batches:
    def __init__(self, data, config, start_step):
      starts.append(start_step)
      self.config = config

    def __next__(self):
      return make_batch(self.config)

    def close(self):
      closed.append(True)

  tiny.method, tiny.model.text.depth, tiny.model.image.depth = "clip", 1, 1
  starts, closed = [], []
  monkeypatch.setattr(pipeline, "train_batches", Batches)
  found = costs.seconds_per_step({"clip": tiny}, rounds=2, steps_per_round=2, discard=1, say=silent)
  assert starts == [0, 3] and len(closed) == 2
  assert 0 < found["clip"] < 5
  assert costs.machine()["cores"] >= 1
