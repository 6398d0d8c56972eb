"""The ablation: its arms exist, its data are what they say, its expectations decide rightly."""

import json
import pathlib

import numpy as np
import pytest

from bench import ablation, ablation_data, expectations, statistics
from bench import comparison as runs
from grain_jax import config as configs
from grain_jax.data import dataset
from grain_jax.data.scenes import scenes
from grain_jax.data.sources import scenes as scenes_source


@pytest.mark.parametrize("arm", ablation.ARMS | ablation.FOLLOW_UPS)
def test_every_arm_is_a_configuration_that_can_run(arm, tmp_path):
  config = ablation.config_of(arm, recipe="configs/quickstart.py", data=tmp_path)
  configs.check(configs.resolve(config))
  differs = (ablation.ARMS | ablation.FOLLOW_UPS)[arm]
  assert config.data.dir == str(tmp_path / differs.get("data", "plain"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  out = tmp_path_factory.mktemp("ablation")
  some = scenes.SceneSettings(
    negatives=True, train=600, val=3, concepts=8, objects_per_class=1, image_size=32
  )
  said = []
  ablation_data.build_all(some, out, say=said.append)
  ablation_data.build_all(some, out, say=said.append)
  assert sum("already built" in line for line in said) == 3
  return {name: dataset.open_dataset(out / name) for name in ablation_data.VARIANTS}


def records(opened, split="train"):
  return [opened.parse(split, i) for i in range(opened.num_records(split))]


def test_random_negatives_are_other_images_captions(built):
  plain, random = records(built["plain"]), records(built["random_negatives"])
  captions = {record.captions[0] for record in plain}
  assert len(plain) == len(random) == 600
  own = 0
  for a, b in zip(plain, random, strict=True):
    assert a.key == b.key and a.captions == b.captions
    assert [kind for _, kind in a.negatives] == [kind for _, kind in b.negatives]
    assert {text for text, _ in b.negatives} <= captions
    own += any(text == b.captions[0] for text, _ in b.negatives)
  assert own < 12  # two scenes may look alike


def test_spoilt_regions_lack_a_third_and_are_off_by_a_tenth(built):
  plain, spoilt = records(built["plain"]), records(built["spoilt_regions"])
  before = sum(len(record.boxes) for record in plain)
  after = sum(len(record.boxes) for record in spoilt)
  assert abs(after / before - 0.7) < 0.03
  moved = []
  for a, b in zip(plain, spoilt, strict=True):
    for text, box in zip(b.descriptions, b.boxes, strict=True):
      near = [c for t, c in zip(a.descriptions, a.boxes, strict=True) if t == text]
      moved.append(min(np.abs(c - box).max() / np.ptp(c.reshape(2, 2), axis=0).max() for c in near))
  assert np.mean(moved) > 0.03 and np.max(moved) < 0.11


def test_what_is_evaluated_is_the_same_in_all(built):
  for split in ("val", "objects"):
    want = records(built["plain"], split)
    for name in ("random_negatives", "spoilt_regions"):
      for a, b in zip(want, records(built[name], split), strict=True):
        assert (a.key, a.captions, a.negatives) == (b.key, b.captions, b.negatives)
        np.testing.assert_array_equal(a.boxes, b.boxes)


def make(**arms):
  """{arm: three seeds} of {metric: mean}, the seeds a hundredth apart."""
  table = {}
  for arm, values in arms.items():
    values = dict(values)
    composition = values.pop("composition", 0.5)
    of = {"retrieval/image_to_text/r1": 0.5, "retrieval/text_to_image/r1": 0.5,
          "zero_shot/unseen/top1": 0.1, "zero_shot/top1": 0.3, "segmentation/miou": 0.1,
          "grounding/mean_iou": 0.5, "composition/average": composition, **values}  # fmt: skip
    table[arm] = {seed: {m: v + 0.01 * seed for m, v in of.items()} for seed in range(3)}
  return table


def test_expectations_hold_or_not_by_the_figures():
  table = make(
    clip={}, ce_clip={"composition": 0.7, "zero_shot/top1": 0.2},
    ce_clip_anchor={"zero_shot/top1": 0.26}, clippy={"segmentation/miou": 0.2},
    grain={"zero_shot/unseen/top1": 0.3}, grain_spoilt={"zero_shot/unseen/top1": 0.22},
    grain_plus={"composition": 0.7, "zero_shot/unseen/top1": 0.31, "segmentation/miou": 0.2},
  )  # fmt: skip
  assert [e.holds for e in expectations.check(table)] == [True] * 5
  worse = table | make(
    ce_clip={"composition": 0.5, "zero_shot/top1": 0.2}, ce_clip_anchor={"zero_shot/top1": 0.24},
    clippy={"segmentation/miou": 0.1}, grain_spoilt={"zero_shot/unseen/top1": 0.19},
    grain_plus={"segmentation/miou": 0.02},
  )  # fmt: skip
  assert [e.holds for e in expectations.check(worse)] == [False] * 5
  assert "no price" in expectations.check(table | make(ce_clip={}))[1].found
  assert [e.holds for e in expectations.check(make(clip={}))] == [None] * 5
  behind = make(clip={}, grain={"zero_shot/unseen/top1": 0.06}, grain_spoilt={})
  assert expectations.check(behind)[4].holds is False  # a cost below nought is no evidence
  one = {arm: {0: of[0]} for arm, of in table.items()}
  assert [e.holds for e in expectations.check(one)] == [None] * 5
  json.dumps(expectations.to_json(worse))


def test_the_report_and_its_json_of_a_part_of_the_runs(tmp_path, monkeypatch, capsys):
  store, tuned = runs.Store(tmp_path / "results"), runs.Store(tmp_path / "tuned")
  with pytest.raises(ValueError, match="no choice of a learning rate for clip"):
    ablation.learning_rates(tuned)
  choice = {"retrieval/image_to_text/r1": 0.5, "retrieval/text_to_image/r1": 0.5}
  for arm, best in (("clip", 1e-3), ("grain", 2e-3)):
    for lr in (5e-4, 1e-3, 2e-3):
      score = {name: value + 0.1 * (lr == best) for name, value in choice.items()}
      tuned.write(runs.Run(arm, lr, runs.TUNING_SEED, 600).name, {"metrics": score})
  lrs = ablation.learning_rates(tuned)
  assert lrs == {"clip": 1e-3, "grain": 2e-3}
  planned = ablation.runs_of(["clip", "clippy"], seeds=(0, 1, 2), steps=600, lrs=lrs)
  table = make(clip={}, clippy={"segmentation/miou": 0.2})
  called = []

  def runner(run, cores):
    called.append(run)
    return table[run.arm][run.seed]

  runs.execute(planned, store, runner, say=lambda line: None)
  runs.execute(planned, store, runner, say=lambda line: None)
  assert len(called) == 6
  assert ablation.notes(store, planned) == []
  lost = [runs.Run("clip", 1e-3, 7, 600), runs.Run("clip", 1e-3, 8, 600)]
  store.write(lost[0].name, {"metrics": {}})
  assert ablation.notes(store, [*planned, *lost]) == [
    f"note: 1 of 8 runs are missing, {lost[1].name} the first",
    f"note: 1 of 8 runs diverged and are not in the tables, {lost[0].name} the first",
  ]
  found = ablation.measured(store, planned)
  text = ablation.tables(found, costs={"clip": 1e12}, steps=600)
  assert "| clippy − clip |" in text and "+10.0 [+10.0, +10.0]" in text and "600.0" in text
  written = ablation.to_json(found, costs={"clip": 1e12}, steps=600)
  assert written["differences"]["clippy - clip"]["segmentation/miou"]["mean"] == pytest.approx(0.1)
  assert written["flops"] == {"clip": 6e14} and written["expected"][2]["holds"] is True
  ablation.check_protocol(store, recipe="configs/quickstart.py", steps=600)
  with pytest.raises(ValueError, match="steps was 600 and is 700"):
    ablation.check_protocol(store, recipe="configs/quickstart.py", steps=700)


def test_scenes_without_negatives_are_no_plain_variant(tmp_path):
  """The settings say so: a folder of other data is not taken for them."""
  some = scenes.SceneSettings(train=4, val=1, concepts=8, objects_per_class=1, image_size=32)
  from grain_jax.data import build

  build.build(scenes_source.source(some), tmp_path / "plain")
  with pytest.raises(ValueError, match="overwrite"):
    ablation_data.build_all(
      scenes.SceneSettings(
        negatives=True, train=4, val=1, concepts=8, objects_per_class=1, image_size=32
      ),
      tmp_path,
      say=print,
    )


def rows_of(text):
  """Rows of Markdown tables as tuples of cells, without the backticks."""
  lines = (line for line in text.splitlines() if line.startswith("| "))
  return {tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in lines}


def test_the_tables_of_the_documentation_are_those_of_the_results():
  root = pathlib.Path(__file__).parents[2]
  store = runs.Store(root / "bench/results/ablation")
  lrs = ablation.learning_rates(runs.Store(root / "bench/results/grain_vs_clip"))
  costs = store.read("flops")

  def measured(arms):
    planned = ablation.runs_of(arms, seeds=(0, 1, 2), steps=1300, lrs=lrs)
    found = ablation.measured(store, planned)
    assert {arm: len(of) for arm, of in found.items()} == dict.fromkeys(arms, 3)
    return found

  whole = measured(list(ablation.ARMS))
  told = (root / "docs/ablation.md").read_text()
  documented = rows_of(told)
  made = ablation.tables(whole, costs=costs, steps=1300)
  assert rows_of(made) <= documented
  for line in made.splitlines():
    assert not line.startswith("* expected") or line in told
  later = measured(["grain_plus", *ablation.FOLLOW_UPS])
  assert rows_of(ablation.tables(later, costs=costs, steps=1300)) <= documented
  start = runs.Store(root / "bench/results/ablation_from_grain")
  pooled = {
    arm: {seed: start.metrics(runs.Run(arm, 1e-3, seed, 600)) for seed in range(3)}
    for arm in ("clip", "clippy")
  }
  for metric in ("segmentation/miou", "segmentation/pixel_accuracy_foreground"):
    found = statistics.difference(pooled, "clippy", "clip", metric)
    assert statistics.percent(found, sign=True) in told

  metrics = (
    "zero_shot/unseen/top1", "zero_shot/top1", "retrieval/image_to_text/r1",
    "composition/average", "grounding/mean_iou", "segmentation/miou",
  )  # fmt: skip
  short = (root / "README.md").read_text().splitlines()
  for arm, of in whole.items():
    values = [[seed[m] for seed in of.values() if m in seed] for m in metrics]
    cells = [f"{100 * statistics.mean_interval(v).mean:.1f}" if v else "–" for v in values]
    end = f" | {1300 * costs[arm] / 1e12:.1f} | " + " | ".join(cells) + " |"
    assert [line for line in short if line.startswith(f"| `{arm}`") and line.endswith(end)], arm
