"""Agreement between processes: what it costs, who is waited for, and that real processes agree."""

import collections
import os
import subprocess
import sys
import threading
import time
import types

import jax
import pytest

from bench import kills
from grain_jax import failures
from grain_jax.models import attention, norm_kernels
from grain_jax.runtime import distributed
from grain_jax.training import setup


class Store:
  """A key-value store with waiting reads, for threads that stand for processes.

  It counts the requests.
  """

  def __init__(self):
    self.keys, self.requests, self.lock = {}, collections.Counter(), threading.Lock()
    self.events = collections.defaultdict(threading.Event)

  def key_value_set(self, key, value, allow_overwrite=False):
    with self.lock:
      self.requests["set"] += 1
      assert allow_overwrite or key not in self.keys, key
      self.keys[key] = value
      self.events[key].set()

  def key_value_increment(self, key, increment):
    with self.lock:
      self.requests["increment"] += 1
      self.keys[key] = str(int(self.keys.get(key, 0)) + increment)
      return int(self.keys[key])

  def key_value_dir_get(self, key):
    with self.lock:
      self.requests["dir_get"] += 1
      return [(k, v) for k, v in self.keys.items() if k.startswith(key.rstrip("/") + "/")]

  def key_value_delete(self, key):
    with self.lock:
      self.requests["delete"] += 1
      for name in [k for k in self.keys if k == key or k.startswith(f"{key}/")]:
        del self.keys[name]

  def blocking_key_value_get(self, key, milliseconds):
    with self.lock:
      self.requests["get"] += 1
      event = self.events[key]
    if not event.wait(milliseconds / 1000):
      raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
    return self.keys[key]


@pytest.fixture
def processes(monkeypatch):
  """Runs a function in a thread a process: (what it returned or raised for each, the store)."""
  here = threading.local()

  class Rounds:  # each process has its own count
    def __getitem__(self, key):
      return here.__dict__.setdefault("rounds", {}).get(key, 0)

    def __setitem__(self, key, value):
      here.rounds[key] = value

  monkeypatch.setattr(distributed, "process_index", lambda: here.index)
  monkeypatch.setattr(distributed, "_rounds", Rounds())

  def run(function, count):
    store, told = Store(), {}
    state = types.SimpleNamespace(client=store)
    monkeypatch.setattr(distributed, "process_count", lambda: count)
    monkeypatch.setattr(distributed, "_state", lambda: state)

    def process(index):
      here.index = index
      try:
        told[index] = function(index)
      except (ValueError, failures.TransientError) as error:
        told[index] = error

    threads = [threading.Thread(target=process, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(100)
    return [told[i] for i in range(count)], store

  return run


def test_agreement_names_the_first_difference(processes):
  def both(a, b):
    check = lambda i: distributed.check_equal("configuration", (a, b)[i])  # noqa: E731
    return processes(check, 2)[0]

  assert both({"a": 1, "b": (1, 2)}, {"a": 1, "b": (1, 2)}) == [None, None]
  one, two = map(str, both({"a": 1, "lr": 0.1}, {"a": 1, "lr": 0.2}))
  assert one == two and "lr is 0.1 on process 0 and 0.2 on process 1" in one


def test_processes_that_chose_other_kernels_end_in_a_line(processes, monkeypatch):
  """The reasons of a refusal, which may name an address, are no difference."""
  index = lambda: distributed.process_index()  # noqa: E731
  towers = {0: "cuDNN, 197 padded to 200 tokens", 1: "XLA (cuDNN refuses: no plan at 0x1)"}
  monkeypatch.setattr(attention, "implementations", lambda: {"image tower": towers[index()]})
  check = lambda _: setup.check_same_program()  # noqa: E731
  one, two = map(str, processes(check, 2)[0])
  assert one == two and "\n" not in one
  assert "attention of the image tower is 'cuDNN, 197 padded to 200 tokens' on process 0" in one
  assert "'XLA' on process 1" in one and "config.model.attention=xla" in one
  towers[0] = "XLA (cuDNN refuses: no plan at 0x2)"
  assert processes(check, 2)[0] == [None, None]
  norms = {0: "Pallas", 1: "XLA"}
  monkeypatch.setattr(norm_kernels, "implementations", lambda: {"LayerNorm": norms[index()]})
  assert "LayerNorm is 'Pallas' on process 0" in str(processes(check, 2)[0][0])


def test_1024_processes_agree_with_three_requests_each(processes):
  """Not with 1,024 each: process 0, which answers, would have a million to serve."""
  count = 1024
  values, store = processes(lambda i: distributed.gather("x", f"of {i}"), count)
  assert all(found == [f"of {i}" for i in range(count)] for found in values)
  assert store.requests == {"set": count + 1, "increment": count, "dir_get": 1, "get": count - 1}
  values, store = processes(lambda i: distributed.broadcast("x", f"of {i}"), count)
  assert values == ["of 0"] * count and store.requests.total() == 3 * count + 1


def test_who_does_not_come_is_named_after_the_own_time(processes):
  """One that failed waits for less than the others; what it gives up does not end their wait."""
  seconds = {0: 30.0, 1: 0.2, 2: 30.0}

  def process(index):
    if index == 2:
      time.sleep(0.6)
    return distributed.gather("x", f"of {index}", seconds=seconds[index])

  told, _ = processes(process, 3)
  assert told[0] == told[2] == ["of 0", "of 1", "of 2"]
  assert str(told[1]) == "process 2 did not come to 'x' within 0.2 s; the others wait there."
  told, store = processes(lambda i: i > 1 or distributed.gather("y", "here", seconds=0.2), 5)
  assert str(told[0]) == str(told[1])
  assert str(told[0]).startswith("process 2 and 2 more did not come to 'y' within 0.2 s; the")


def test_a_value_is_not_lost_with_the_one_that_should_hand_it_on(processes):
  """The last to come dies between its own value and the key of all."""

  def process(index):
    if index == 0:
      return distributed.gather("x", "a", seconds=0.5)
    key = "grain_jax/gather/x/0"
    distributed._state().client.key_value_set(f"{key}/values/1", "=b")
    return distributed._state().client.key_value_increment(f"{key}/came", 1)

  assert processes(process, 2)[0][0] == ["a", "b"]


def test_what_was_agreed_on_does_not_pile_up(processes):
  def process(index):
    return [distributed.gather("x", f"{index}{n}") for n in range(50)]

  told, store = processes(process, 3)
  assert told == [[[f"{i}{n}" for i in range(3)] for n in range(50)]] * 3
  assert len(store.keys) == 2 * 5  # values, count and all of the last two rounds


AGREE = r"""
import sys
from absl import flags
from grain_jax import failures
from grain_jax.runtime import addresses, distributed

flags.FLAGS(sys.argv[:1])
address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with distributed.session(addresses.Address("flags", address, count, index)):
  for n in range(20):
    found = distributed.gather("x", f"{index} {n} \u00e9\n" if index else "")
    assert found == ["", *(f"{i} {n} \u00e9\n" for i in range(1, count))], found
    assert distributed.broadcast("y", str(index + n)) == str(n)
  if index != count - 1:
    try:
      distributed.gather("z", "", seconds=1)
    except failures.TransientError as error:
      print(error)
"""


@pytest.mark.parametrize("count", [2, 4])
def test_real_processes_agree(count):
  address = f"127.0.0.1:{kills.free_port()}"
  env = os.environ | {"PYTHONPATH": str(kills.ROOT), "JAX_PLATFORMS": "cpu"}
  group = [
    subprocess.Popen(
      [sys.executable, "-c", AGREE, address, str(count), str(i)],
      env=env, stdout=subprocess.PIPE, text=True,
    )
    for i in range(count)
  ]  # fmt: skip
  said = [process.communicate(timeout=120)[0].splitlines() for process in group]
  assert [process.returncode for process in group] == [0] * count
  line = f"process {count - 1} did not come to 'z' within 1 s; the others wait there."
  assert [lines[-1] == line for lines in said] == [True] * (count - 1) + [False], said
