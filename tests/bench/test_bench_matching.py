"""The bench's solvers solve the same problems, and it answers in one JSON object."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bench import kills, matching


def test_every_candidate_finds_the_least_cost():
  calls = matching.solvers(problems=3, queries=4, regions=2)
  cost = np.random.default_rng(0).random((3, 4, 2), np.float32)
  want = [columns[np.argsort(rows)] for rows, columns in calls["scipy"]()]
  total = lambda found: sum(cost[i, found[i], np.arange(2)].sum() for i in range(3))  # noqa: E731
  for solver in matching.SOLVERS:
    assert total(np.asarray(calls[solver]())) == pytest.approx(total(want))


def test_medians_leave_out_the_first_round():
  waits = iter([0.2, 0.0, 0.0, 0.0])
  import time

  assert matching.medians({"a": lambda: time.sleep(next(waits))}, rounds=3)["a"] < 0.1


@pytest.mark.long
def test_the_command_prints_one_object():
  done = subprocess.run(
    [
      sys.executable, "-m", "bench.matching", "--json", "--rounds=1", "--problems=8",
      f"--recipe=configs/quickstart.py:{kills.TINY},batch_size=2,optimizer.name=adamw",
    ],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout)
  assert set(found["solver_ms"]) == {"scipy", "host", "device"}
  assert found["settings"]["problems_in_step"] == 4  # two images, two decoder layers
  assert all(0 < share < 1 for share in found["share_of_step"].values())
