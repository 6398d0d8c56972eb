"""bench.train_step --device=gpu: the order of its cases, quiet while one is timed, what is lost."""

import json
import subprocess
import sys
import time

import pytest

from bench import kills
from bench import train_step_gpu as bench
from bench.train_step_gpu_sides import Case

# A worker that does as the task's 'plan' says of its case: (seconds to get ready, seconds of
# timing, error). It writes down when it works.
WORKER = """
import json, sys, time
task = json.loads(sys.stdin.readline())
case = task["case"]
ready, timing, error = task["plan"][str(case["batch"])]
def work(seconds, kind):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    time.sleep(0.01)
    print(case["batch"], kind, time.monotonic(), file=log, flush=True)
log = open(f"{task['log']}/{case['batch']}", "a")
print("a library says something")
work(ready, "ready")
if error == "crash":
  sys.exit(9)
if error and (error != "memory" or len(open(log.name).readlines()) < task["after"]):
  print(json.dumps({"failed": "RESOURCE_EXHAUSTED: out" if error == "memory" else error}))
  sys.exit(1)
print(json.dumps({"ready": {"seconds": ready}}), flush=True)
assert sys.stdin.readline() == "time\\n"
work(timing, "timing")
found = {"seconds_per_step": 0.5, "seconds_to_first_step": 1.0, "device": "NVIDIA H100 80GB HBM3"}
print(json.dumps({"timed": found}), flush=True)
"""


def run(tmp_path, plan, *, jobs=2, seconds=30.0, after=0):
  lines = []
  task = {"plan": {str(k): v for k, v in plan.items()}, "log": str(tmp_path), "after": after}
  task["rehearse"] = True
  missing = bench.Bench(
    task, [Case("ours", batch) for batch in plan], jobs=jobs, seconds=seconds, folder=tmp_path,
    emit=lines.append, command=(sys.executable, "-c", WORKER),
  ).run()  # fmt: skip
  return lines, [case.batch for case in missing]


def times(tmp_path, batch, kind):
  rows = [line.split() for line in (tmp_path / str(batch)).read_text().splitlines()]
  return [float(at) for _, found, at in rows if found == kind]


def test_one_is_timed_while_the_others_stand_still(tmp_path):
  lines, missing = run(tmp_path, {1: (0.3, 0.5, ""), 2: (1.2, 0.1, ""), 3: (0.1, 0.1, "")})
  assert [line["batch"] for line in lines] == [1, 3, 2] and missing == []
  assert lines[0]["case"] == "ours-1-none-device" and lines[0]["at_seconds"] > 0
  timed = times(tmp_path, 1, "timing")
  moved = [t for t in times(tmp_path, 2, "ready") if timed[0] + 0.05 < t < timed[-1] - 0.05]
  assert len(timed) > 5 and not moved
  # It could not get ready while it stood still.
  assert lines[2]["seconds_to_first_step"] < 1.0 - 0.3 and lines[0]["seconds_to_first_step"] == 1


def test_of_those_that_are_ready_the_more_important_comes_first(tmp_path):
  # Both get ready while the third is timed: its own words come back before theirs are heard.
  told = []
  found = bench.Bench(
    {}, [Case("ours", 1), Case("ours", 2), Case("ours", 3)], jobs=3, seconds=9, folder=tmp_path,
    emit=told.append,
  )  # fmt: skip
  workers = [bench._Worker(case, None, 0.0, stage="ready") for case in found._waiting]
  found._alive = workers[::-1]
  asked = []
  for worker in workers:
    worker.signal = lambda number: None
    worker.end = lambda: None

  def send(worker, line):
    asked.append((worker.case.batch, line))
    found._events.put((worker, {"timed": {"seconds_per_step": 1.0}}))

  found._send = send
  assert found._time_one() == []
  assert asked == [(1, "time"), (2, "time"), (3, "time")]
  assert [line["batch"] for line in told] == [1, 2, 3]


def test_what_ran_out_of_memory_beside_others_is_tried_alone(tmp_path):
  plan = {1: (0.2, 0.1, "memory"), 2: (0.8, 0.1, "")}
  lines, missing = run(tmp_path, plan, after=25)
  assert [(x["batch"], "error" in x) for x in lines] == [(2, False), (1, False)] and not missing
  (tmp_path / "again").mkdir()
  lines, missing = run(tmp_path / "again", plan, after=10_000)
  assert lines[1]["fits"] is False and "RESOURCE_EXHAUSTED" in lines[1]["error"]
  assert missing == []  # a result: it does not fit


def test_what_fails_is_a_line_and_is_missing(tmp_path):
  plan = {1: (0.1, 0.1, "ValueError: no"), 2: (0.1, 0.1, "crash"), 3: (0.1, 0.1, "")}
  lines, missing = run(tmp_path, plan)
  errors = {line["batch"]: line.get("error") for line in lines}
  assert errors[1] == "ValueError: no" and "ended with code 9" in errors[2] and errors[3] is None
  assert sorted(missing) == [1, 2]


def test_a_run_cut_short_loses_what_it_did_not_reach(tmp_path):
  plan = {1: (0.1, 0.1, ""), 2: (60.0, 0.1, ""), 3: (0.1, 60.0, ""), 4: (0.1, 0.1, "")}
  began = time.monotonic()
  lines, missing = run(tmp_path, plan, jobs=1, seconds=2.0)
  assert time.monotonic() - began < 30  # not the 60 that a case takes
  assert [line["batch"] for line in lines] == [1] and missing == [2, 3, 4]


def test_speed_and_both_mfus():
  line = {"side": "ours", "batch": 256, "seconds_per_step": 0.2, "device": "NVIDIA H200"}
  found = bench.with_speed(line, {"useful": 100e9, "padded": 110e9})
  assert found["samples_per_s"] == 1280
  assert found["mfu_useful"] == pytest.approx(1280 * 100e9 / 989e12)
  assert found["mfu_padded"] == pytest.approx(1280 * 110e9 / 989e12)
  peer = bench.with_speed({**line, "side": "peer"}, {"useful": 100e9, "padded": 110e9})
  assert "mfu_padded" not in peer and peer["mfu_useful"] == found["mfu_useful"]
  assert bench.with_speed({"error": "no"}, {}) == {"error": "no"}


def test_each_side_is_compared_at_its_own_best_and_at_equal_batch():
  lines = [
    {"case": case, "side": side, "batch": batch, "samples_per_s": speed}
    for case, side, batch, speed in [
      ("a", "ours", 256, 100.0), ("b", "ours", 256, 110.0), ("c", "ours", 1024, 150.0),
      ("d", "peer", 256, 220.0), ("e", "peer", 512, 300.0),
    ]
  ]  # fmt: skip
  found = bench.best([*lines, {"case": "f", "side": "ours", "batch": 512, "error": "no"}])
  assert found["own_best"] == {"ours": "c", "peer": "e", "ratio": 0.5}
  assert found["batch_256"] == {"ours": "b", "peer": "d", "ratio": 0.5}
  assert found["batch_512"] == {"ours": None, "peer": "e", "ratio": None}


def test_useful_flops_are_those_of_the_recipe():
  found = bench.flops_per_sample("configs/cc12m.py", batch=256, row_length=128)
  assert 122.5e9 < found["useful"] < 123.5e9 < found["padded"] < 140e9


def command(*args):
  done = [sys.executable, "-m", "bench.train_step", "--device=gpu", *args]
  return subprocess.run(done, capture_output=True, text=True)


@pytest.mark.slow
def test_it_is_rehearsed_without_a_gpu_and_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", kills.XLA_FLAGS)  # one device
  done = command("--rehearse", "--only=128", f"--cache={tmp_path}", "--minutes=3")
  assert done.returncode == 0, done.stderr[-2000:]
  *lines, end = map(json.loads, done.stdout.splitlines())
  assert {line["case"] for line in lines} == {"ours-2-none-device", "peer-2"}
  assert all(line["samples_per_s"] > 0 and line["mfu_useful"] is None for line in lines)
  assert end["missing"] == [] and end["rehearsal"] and end["compared"]["batch_2"]["ratio"] > 0


def test_wrong_flags_and_no_gpu_are_lines(tmp_path):
  done = command("--only=nothing")
  assert done.returncode == 1 and "--only=nothing fits none of ours-256" in done.stderr
  done = command("--only=peer-128", f"--cache={tmp_path}", "--minutes=1")
  line, end = map(json.loads, done.stdout.splitlines())
  assert done.returncode == 1 and "PyTorch sees no GPU" in line["error"]
  assert end["missing"] == ["peer-128"]
