import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grain_jax.data import sampler


def epoch_of(seed, epoch, records, batch, hosts=1):
  return [
    [
      sampler.indices(
        seed=seed,
        epoch=epoch,
        step=step,
        batch_size=batch,
        num_records=records,
        host=host,
        num_hosts=hosts,
      )
      for host in range(hosts)
    ]
    for step in range(sampler.steps_per_epoch(records, batch))
  ]


@given(st.integers(0, 99), st.integers(0, 9), st.integers(1, 5), st.integers(1, 4), st.data())
def test_an_epoch_visits_each_record_once(seed, epoch, part, hosts, data):
  batch = part * hosts
  records = data.draw(st.integers(batch, 5 * batch))
  seen = np.concatenate(
    [np.concatenate(step) for step in epoch_of(seed, epoch, records, batch, hosts)]
  )
  assert len(seen) == records // batch * batch == len(set(seen.tolist()))
  assert set(seen.tolist()) <= set(range(records)) and seen.dtype == np.int64
  # The order over all hosts is NumPy's permutation, however many hosts there are.
  want = np.random.default_rng([seed, epoch]).permutation(records)
  np.testing.assert_array_equal(seen, want[: len(seen)])


def test_epochs_and_seeds_differ():
  first, second, other = (epoch_of(s, e, 64, 8) for s, e in ((0, 0), (0, 1), (1, 0)))
  assert not np.array_equal(first, second) and not np.array_equal(first, other)


@given(st.integers(1, 40), st.integers(1, 15), st.integers(1, 4))
def test_evaluation_reads_in_order_and_pads(records, batch, hosts):
  """Also where the hosts do not divide the batch: then some rows beyond it are -1."""
  part, seen = -(-batch // hosts), []
  for step in range(sampler.eval_steps(records, batch)):
    own = [
      sampler.eval_indices(
        step=step, batch_size=batch, num_records=records, host=host, num_hosts=hosts
      )
      for host in range(hosts)
    ]
    assert {len(indices) for indices in own} == {part}
    whole = np.concatenate(own)
    assert (whole[batch:] == -1).all()
    seen += whole[:batch].tolist()
  assert seen == list(range(records)) + [-1] * (-records % batch)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"batch_size": 11}, "batch_size = 11 is more than the split's 10 records"),
    ({"batch_size": 0}, "batch_size = 0"),
    ({"batch_size": 5, "num_hosts": 2}, "not divisible by 2 hosts"),
    ({"host": 2, "num_hosts": 2}, "host = 2 is not one of 2"),
    ({"step": 5}, "step = 5 is not within the 5 steps"),
  ],
)
def test_wrong_values_are_one_line(change, message):
  good = dict(seed=0, epoch=0, step=0, batch_size=2, num_records=10, host=0, num_hosts=1)
  with pytest.raises(ValueError, match=message) as error:
    sampler.indices(**{**good, **change})
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("host", [-1, 2])
def test_evaluation_knows_its_hosts(host):
  with pytest.raises(ValueError, match=f"host = {host} is not one of 2"):
    sampler.eval_indices(step=0, batch_size=4, num_records=9, host=host, num_hosts=2)
