"""The comparison of GRAIN with its controls: the whole protocol, its report and its command."""

import json
import subprocess
import sys

import pytest
from numpy.testing import assert_allclose

from bench import comparison as runs
from bench import costs, statistics
from bench import grain_vs_clip as bench

R1 = ("retrieval/image_to_text/r1", "retrieval/text_to_image/r1")
UNSEEN = "zero_shot/unseen/top1"
COSTS = {
  "flops_per_step": dict.fromkeys(runs.ARMS, 100) | {"clip": 50},
  "seconds_per_step": dict.fromkeys(runs.ARMS, 1.0) | {"clip": 0.5},
}


def silent(line):
  """Says nothing."""


class Runner:
  """Scores by formula; remembers what it was asked for."""

  def __init__(self):
    self.calls = []

  def __call__(self, run, cores):
    self.calls.append(run)
    level = 0.26 if run.arm == "grain" else 0.12
    level += 0.01 * run.seed * (run.seed != 100) + 1e-5 * run.steps
    best = 1e-3 if run.arm == "clip" else 2e-3
    r1 = 0.7 - abs(run.lr - best)
    metrics = {R1[0]: r1 + 0.1, R1[1]: r1 - 0.1}
    if run.seed != 100:
      metrics |= {UNSEEN: level, "zero_shot/seen/top1": level + 0.1}
      metrics |= {"grounding/mean_iou": 0.5} if run.arm == "grain" else {}
    return metrics


def play(
  store, runner, *, arms=("clip", "grain"), steps=700, budgets=runs.BUDGETS, jobs=1, tuning_steps=0
):
  """The whole protocol as `run_all` orders it."""
  comparison = bench.Comparison(arms, (0, 1, 2), (1e-3, 2e-3, 4e-3), steps, budgets, tuning_steps)
  store.write("costs", COSTS)
  runs.execute(comparison.tuning_runs(), store, runner, jobs=jobs, say=silent)
  planned = runs.reported_runs(
    comparison.learning_rates(store),
    seeds=comparison.seeds, steps=steps, budgets=budgets, costs=COSTS,
  )  # fmt: skip
  runs.execute(planned, store, runner, jobs=jobs, say=silent)
  return comparison


@pytest.fixture
def store(tmp_path):
  return runs.Store(tmp_path / "results")


def test_finished_runs_are_never_repeated(store):
  first = Runner()
  play(store, first)
  # 2 arms x 3 rates; then clip at 700 and 1,400 steps, grain at 700 alone; 3 seeds.
  assert len(first.calls) == len(set(first.calls)) == 6 + 3 * 3
  assert {r.lr for r in first.calls if r.arm == "clip" and r.seed != 100} == {1e-3}
  assert {r.lr for r in first.calls if r.arm == "grain" and r.seed != 100} == {2e-3}
  again = Runner()
  play(store, again)
  assert again.calls == []
  lost = first.calls[-2]
  (store.folder / f"{lost.name}.json").unlink()
  play(store, again)
  assert again.calls == [lost]


def test_costs_are_measured_once(store, monkeypatch):
  counted = []
  monkeypatch.setattr(costs, "flops_per_step", lambda c: counted.append(c) or 1e9)
  monkeypatch.setattr(costs, "seconds_per_step", lambda of, say: dict.fromkeys(of, 0.5))
  first = bench.measure(store, lambda arm: arm)
  assert counted == list(runs.ARMS) and set(first["seconds_per_step"]) == set(runs.ARMS)
  assert bench.measure(store, lambda arm: arm) == first and len(counted) == len(runs.ARMS)
  del first["seconds_per_step"]["clip"]
  store.write("costs", first)
  with pytest.raises(ValueError, match="costs.json lacks clip"):
    bench.measure(store, lambda arm: arm)


def test_json_has_the_promised_shape(store):
  comparison = play(store, Runner())
  found = json.loads(json.dumps(comparison.summary(store, "images")))
  assert list(found) == ["clip", "grain"]
  for metrics in found.values():
    for interval in metrics.values():
      assert list(interval) == ["mean", "low", "high"]
  assert set(found["clip"]) == {UNSEEN, "zero_shot/seen/top1", *R1}
  assert "grounding/mean_iou" in found["grain"]
  # Seeds 0, 1, 2: 0.26 + 0.007 + 0, 0.01, 0.02; pairs differ by 0.14 each.
  assert_allclose(list(found["grain"][UNSEEN].values()), statistics.mean_interval(
    [0.267, 0.277, 0.287]))  # fmt: skip
  assert_allclose(list(found["grain"][f"{UNSEEN} - clip"].values()), [0.14] * 3)
  # clip has 1,400 steps for the FLOPs of grain's 700.
  longer = comparison.summary(store, "flops")
  assert_allclose(longer["grain"][f"{UNSEEN} - clip"]["mean"], 0.14 - 0.007)
  assert found["grain"][UNSEEN] == longer["grain"][UNSEEN]


def test_one_seed_has_no_interval(store):
  play(store, Runner())
  comparison = bench.Comparison(("grain", "clip"), (1,), (1e-3, 2e-3, 4e-3), 700)
  found = comparison.summary(store, "images")["grain"]
  assert found[UNSEEN]["low"] is None and found[f"{UNSEEN} - clip"]["high"] is None
  assert "one seed decides nothing" in bench.tables(comparison, store)


def test_learning_rates_can_be_chosen_in_shorter_runs(store):
  runner = Runner()
  comparison = play(store, runner, budgets=("images",), tuning_steps=100)
  assert {(r.seed == 100, r.steps) for r in runner.calls} == {(True, 100), (False, 700)}
  assert comparison.learning_rates(store) == {"clip": 1e-3, "grain": 2e-3}
  assert comparison.notes(store)[1:] == []
  again = Runner()
  play(store, again, budgets=("images",), steps=1400, tuning_steps=100)
  assert {r.steps for r in again.calls} == {1400}  # none is repeated


def test_tables_and_notes(store):
  comparison = play(store, Runner())
  text = bench.tables(comparison, store)
  for line in (
    "### At equal images",
    "### At equal flops",
    "### At equal seconds",
    "grain against the best control on unseen pairs at equal images, clip: +14.0 points "
    "[+14.0, +14.0]; the claim holds.",
    "grain against the best control on unseen pairs at equal flops, clip: +13.3 points",
    "Synthetic scenes with exact boxes are evidence for the mechanism, not for CC12M.",
  ):
    assert line in text
  rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| clip |")]
  assert [row[3] for row in rows] == ["700", "1400", "1400"]
  assert all(len(row) == 6 + len(runs.METRICS) for row in rows)
  assert comparison.notes(store) == [
    "clip: the best learning rate 0.001 is at the edge of the values."
  ]
  store.folder.joinpath("grain-lr0.002-seed1-steps700.json").unlink()
  assert "grain at equal images: no result of seed 1." in comparison.notes(store)
  text = bench.tables(comparison, store)
  assert "| grain | 0.002 | 2 | 700" in text
  assert "at equal images: not measured yet (grain to be run)." in text


def test_an_empty_folder_gives_tables_without_rows(store):
  comparison = bench.Comparison(tuple(runs.ARMS), (0,), (1e-3,), 700)
  assert comparison.summary(store, "flops") == {}
  assert bench.tables(comparison, store).count("not measured yet") == 3
  assert "grain: its learning rate is not chosen yet." in comparison.notes(store)


def test_flags_are_checked():
  with pytest.raises(
    ValueError, match="--arms: 'grain_captoin' is unknown. Did you mean grain_cap"
  ):
    bench.parse_names("arms", ["grain_captoin"], list(runs.ARMS))
  with pytest.raises(ValueError, match="--budgets: 'x' is unknown. Choose from images, flops"):
    bench.parse_names("budgets", ["x"], runs.BUDGETS)
  with pytest.raises(ValueError, match="--arms is empty"):
    bench.parse_names("arms", [], list(runs.ARMS))
  assert bench.parse_names("arms", ["grain", "clip"], list(runs.ARMS)) == ("clip", "grain")
  assert bench.parse_seeds(["2", "0", "2"]) == (2, 0)
  for bad, match in (
    (["x"], "'x' is not a whole number"),
    (["-1"], "'-1' is not a whole"),
    (["0", "100"], "seed 100 chooses the learning rates and is not reported"),
    ([], "--seeds is empty"),
  ):
    with pytest.raises(ValueError, match=match):
      bench.parse_seeds(bad)
  assert bench.parse_lrs(["1e-3", "0.002"]) == (1e-3, 2e-3)
  for bad in (["1e-3", "x"], ["0"], ["-1"], ["nan"], ["inf"], ["1e-3", "0.001"], []):
    with pytest.raises(ValueError, match="--lrs"):
      bench.parse_lrs(bad)


@pytest.mark.parametrize(
  "flag, line",
  [
    ("--arms=clip,gran", "ValueError: --arms: 'gran' is unknown. Did you mean grain?"),
    ("--seeds=100", "ValueError: --seeds: seed 100 chooses"),
    ("--budgets=flops", "ValueError: --budget=images is not in --budgets=flops."),
    ("--steps=-1", "ValueError: --steps=-1: the length"),
    ("--tuning_steps=-1", "ValueError: --tuning_steps=-1: the length"),
  ],
)
def test_the_command_ends_in_one_line(flag, line):
  done = subprocess.run(
    [sys.executable, "-m", "bench.grain_vs_clip", "--json", flag], capture_output=True, text=True
  )
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_the_command_prints_one_json_object(store):
  play(store, Runner())
  command = [sys.executable, "-m", "bench.grain_vs_clip", "--report", f"--results={store.folder}"]
  command.append("--steps=700")
  done = subprocess.run([*command, "--json", "--budget=flops"], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert_allclose(json.loads(done.stdout)["grain"][f"{UNSEEN} - clip"]["mean"], 0.133)
  assert "note: clip_text: its learning rate is not chosen yet." in done.stderr


def test_results_are_tied_to_recipe_and_data(store, monkeypatch):
  class Built:
    manifest = {"splits": {"train": {"shards": [{"file": "a", "bytes": 3, "records": 1}]}}}

  monkeypatch.setattr(bench.dataset, "open_dataset", lambda path: Built)
  recipe = "configs/quickstart.py"
  bench.check_protocol(store, recipe, data="x")
  bench.check_protocol(store, recipe + ":seed=4,steps=9,log_every=3", data="y")
  now = store.read("protocol")
  with pytest.raises(ValueError, match="config.batch_size was [0-9]* and is 7. Give another"):
    bench.check_protocol(store, recipe + ":batch_size=7", data="x")
  protocol = store.read("protocol")
  del protocol["config"]["model.decoder.init"]  # results of before there was the key
  store.write("protocol", protocol)
  bench.check_protocol(store, recipe + ":model.decoder.init=per_matrix", data="x")
  with pytest.raises(ValueError, match="model.decoder.init was 'per_matrix' and is 'torch'"):
    bench.check_protocol(store, recipe, data="x")
  del protocol["model"]
  store.write("protocol", protocol)
  with pytest.raises(ValueError, match="model.initial was 1 and is 2"):
    bench.check_protocol(store, recipe + ":model.decoder.init=per_matrix", data="x")
  store.write("protocol", now)
  monkeypatch.setitem(runs.ARMS, "clip", {"method": "clip"})
  with pytest.raises(ValueError, match="arms.clip was"):
    bench.check_protocol(store, recipe, data="x")
  monkeypatch.undo()
  Built.manifest["splits"]["train"]["shards"][0]["bytes"] = 4
  monkeypatch.setattr(bench.dataset, "open_dataset", lambda path: Built)
  with pytest.raises(ValueError, match="data.digest was"):
    bench.check_protocol(store, recipe, data="x")
