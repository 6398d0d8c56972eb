"""The watchdog's verdicts, on two that share a store and whose time stands still, and its end."""

import threading
import time

import pytest

from grain_jax.runtime import watchdog


class Store(dict):
  """The key-value store of `jax.distributed`, as the watchdog uses it."""

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self
    self[key] = value

  def key_value_dir_get(self, key):
    return [(k, v) for k, v in self.items() if k.startswith(key)]


@pytest.fixture
def pair(monkeypatch):
  """(clock, two watchdogs on one store, exit codes); nothing runs by itself."""
  clock, codes = [100.0], []
  monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + 1))
  store = Store()
  dogs = [
    watchdog.Watchdog(store, index=i, count=2, limit=60, leave=lambda code, i=i: codes.append(
      (i, code)
    ))
    for i in range(2)
  ]  # fmt: skip
  return clock, dogs, codes


def test_who_is_late(pair):
  clock, (zero, one), _ = pair
  zero.set_phase("step", 42)
  one.set_phase("data", 42)
  assert zero.check() is None and one.check() is None
  clock[0] += 50
  one.check()
  zero.set_phase("step", 43)
  clock[0] += 20
  assert zero.check() is None
  code, line, tell = one.check()
  assert (code, tell) == (75, True)
  assert "no progress for 70 s (config.watchdog_seconds = 60)" in line
  assert "process 1 of 2" in line and "is late: it waits for the data of step 42 for 70 s" in line
  assert "process 0 is in step 43" in line


def test_a_process_that_was_stopped_is_not_late_for_it(pair, monkeypatch):
  clock, (zero, one), _ = pair
  for dog in (zero, one):
    dog.set_phase("step", 7)
    dog.check()
  zero.check()
  clock[0] += 40
  one.check()
  wait = lambda seconds: clock.__setitem__(0, clock[0] + seconds + 500)  # noqa: E731
  monkeypatch.setattr(zero._stopped, "wait", wait)
  zero._sleep()
  assert zero.check() is None
  clock[0] += 21
  code, line, _ = zero.check()
  assert code == 75 and "no progress for 62 s" in line


def test_compiling_and_being_done_have_no_limit(pair):
  clock, (zero, one), _ = pair
  zero.set_phase("compiling", 1)
  one.set_phase("done", 9)
  one.check()
  zero.check()
  clock[0] += 5000
  assert zero.check() is None  # nor is the silence of a process that is done
  assert watchdog.Watchdog(limit=0).check() is None


def test_a_silent_process_is_lost(pair):
  clock, (zero, one), _ = pair
  for dog in (zero, one):
    dog.set_phase("step", 7)
    dog.check()
  zero.check()
  clock[0] += 29
  zero.set_phase("step", 8)
  assert zero.check() is None
  clock[0] += 2
  code, line, _ = zero.check()
  assert code == 75 and "process 1 of 2" in line and "no sign of it for 31 s" in line
  assert "it was last seen where it is in step 7" in line


def test_an_error_on_one_process_ends_the_other_with_the_same_line(pair, capsys):
  _, (zero, one), codes = pair
  one.end(1, "ValueError: no data here")
  code, line, tell = zero.check()
  assert (code, tell) == (1, False) and line == f"{one.name}: ValueError: no data here"
  zero.end(code, line, tell=tell)
  assert codes == [(1, 1), (0, 1)]
  said = capsys.readouterr().err.splitlines()
  assert said == ["ValueError: no data here", line]


def test_no_call_of_the_store_outlives_the_watchdog(monkeypatch):
  """Such a call would come back to a Python that ends, and abort it."""
  began = threading.Event()

  class Slow(Store):
    def key_value_dir_get(self, key):
      began.set()
      time.sleep(0.3)
      return super().key_value_dir_get(key)

  dog = watchdog.Watchdog(Slow(), count=2)
  monkeypatch.setattr(watchdog, "_last_words", lambda name: None)
  dog.start()
  assert began.wait(10) and dog._thread.is_alive()
  dog.done()
  dog.stop()
  assert not dog._thread.is_alive()
