"""Ctrl-C and SIGTERM: what a process answers, also from within a call that holds it up."""

import signal
import subprocess
import sys
import time

import pytest

from grain_jax.runtime import preemption

# The main thread is within C, as in a compilation; `ready` says so a moment before.
PROGRAM = """
import ctypes, os, signal, sys, threading, time
from grain_jax.runtime import preemption

def end(code, line):
  print(line, file=sys.stderr, flush=True)
  os._exit(code)

mode = sys.argv[1]
with preemption.interruptible(end, several=mode == "several"):
  with preemption.Preemption(several=False) as stopping:
    if mode != "early":
      stopping.watch()
    if mode == "several":
      signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
    print("ready", flush=True)
    while mode in ("early", "twice"):
      ctypes.CDLL(None).sleep(30)
    until = time.monotonic() + 30
    while not stopping.reached() and time.monotonic() < until:
      time.sleep(0.01)
    print("reached", stopping.interrupted, flush=True)
"""


def start(mode):
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "ready\n"
  return process


def ends(process, signals):
  began = time.monotonic()
  for number in signals:
    time.sleep(0.3)
    process.send_signal(number)
  out, err = process.communicate(timeout=20)
  return process.returncode, out, err, time.monotonic() - began


def test_before_there_is_anything_to_save_it_ends_at_once():
  code, _, err, seconds = ends(start("early"), [signal.SIGINT])
  assert (code, err) == (130, "interrupted\n") and seconds < 5


def test_a_run_that_looks_is_asked_to_stop():
  assert ends(start("watched"), [signal.SIGINT])[:3] == (0, "reached True\n", "")
  assert ends(start("watched"), [signal.SIGTERM])[:3] == (0, "reached False\n", "")


def test_the_second_time_it_ends_at_once():
  code, _, err, seconds = ends(start("twice"), [signal.SIGINT, signal.SIGINT])
  assert code == 130 and err.startswith("interrupted again") and err.count("\n") == 1
  assert seconds < 5


def test_with_others_the_runtime_is_told_by_sigterm():
  code, out, err, _ = ends(start("several"), [signal.SIGINT])
  assert (code, out, err) == (0, "SIGTERM\nreached True\n", "")


def test_what_an_evaluation_catches_does_not_hold_it_up(monkeypatch):
  stopping = preemption.Preemption(several=False)
  stopping.check()
  stopping._noticed = True
  with pytest.raises(preemption.StopRequested):
    try:
      stopping.check()
    except Exception:
      pytest.fail("an Exception")


def test_the_code_says_who_asked():
  assert preemption.Preempted(3).code == 75 and "SIGTERM" in str(preemption.Preempted(3))
  asked = preemption.Preempted(3, interrupted=True)
  assert asked.code == 130 and str(asked).startswith("stopped by Ctrl-C: checkpoint 3 is saved")
