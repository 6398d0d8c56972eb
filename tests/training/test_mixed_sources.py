"""A run on several datasets: metrics of each, the same on any devices, gone on with bit for bit."""

import json
import shutil

import numpy as np
import pytest
import stepping
from numpy.testing import assert_allclose

from bench import kills
from grain_jax import config as configs
from grain_jax.data import build
from grain_jax.data.scenes import scenes
from grain_jax.data.sources import scenes as scenes_source
from grain_jax.training import loop


@pytest.mark.parametrize("negatives", [0, 2])
def test_losses_of_each_source_on_any_devices(tiny, make_batch, negatives):
  """They add up to the loss of all, and are the same on eight devices by microbatches."""
  tiny.batch_size = 16
  tiny.model.image.depth = tiny.model.text.depth = 1
  tiny.model.text.vocab_size = 400
  tiny.model.decoder.dropout = 0.0
  tiny.data.update(negatives=negatives, row_length=120)
  batch = make_batch(tiny, rng=np.random.default_rng(0))
  tiny.data.sources = ({"dir": "x/a"}, {"dir": "x/b", "name": "named"}, {"dir": "x/c"})
  batch["source"] = np.arange(16, dtype=np.int32) % 2  # none of c
  batch["region_mask"][batch["source"] == 1] = False
  batch["text_mask"][batch["source"] == 1, 1 : 1 + tiny.data.max_regions] = False
  batch["example_mask"][3] = False
  one = stepping.gradients_of_step(tiny, batch, devices=1)
  metrics = one[0]
  for name in ("loss_caption", "loss_region"):
    parts = [metrics[f"source/{source}/{name}"] for source in ("a", "named", "c")]
    assert_allclose(np.sum(parts, axis=0), metrics[name], rtol=1e-5)
    assert parts[2] == (0.0, 0.0)
  assert metrics["source/named/loss_region"] == (0.0, 0.0)
  assert metrics["source/named/bad_examples"] == (1.0, 1.0)
  assert metrics["source/a/share"] == (8.0, 16.0)
  tiny.mesh.update(stepping.LAYOUTS["fsdp=2,tensor=2"])
  tiny.accumulate = 2
  stepping.assert_same(stepping.gradients_of_step(tiny, batch, devices=8), one)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  for seed, name in enumerate(("a", "b", "c")):
    some = scenes.SceneSettings(
      seed=seed, train=24, val=8, concepts=8, objects_per_class=1, image_size=32
    )
    build.build(scenes_source.source(some), root / name, say=lambda line: None)
  return root


@pytest.mark.slow
def test_a_run_that_goes_on_reads_and_reports_the_same(folders, tmp_path, capsys):
  c = configs.load(f"configs/quickstart.py:{kills.TINY}")
  c.loss.matcher = "device"  # whose program is found in the cache by the second run
  c.update(steps=12, save_every=6, evals=("retrieval",))
  c.data.dir = ""
  c.data.sources = (
    {"dir": str(folders / "a"), "weight": 2.0},
    {"dir": str(folders / "b"), "weight": 1.0, "regions": False},
    {"dir": str(folders / "c"), "weight": 1.0},
  )
  whole, again = tmp_path / "whole", tmp_path / "again"
  loop.train(c, str(whole))
  said = capsys.readouterr().out
  assert "72 records" in said and "evaluations and validation read config.data.sources[0]" in said
  shutil.copytree(whole, again)
  shutil.rmtree(again / "checkpoints" / "12")
  loop.train(c, str(again))
  assert "step 6 of 12" in capsys.readouterr().out
  assert kills.differences(kills.final_state(again), kills.final_state(whole)) == []
  ours, theirs = (last_rows(folder / "metrics.jsonl") for folder in (again, whole))
  for step in range(8, 13):
    names = [name for name in theirs[step] if name.startswith("train/source/")]
    assert len(names) >= 3 * 2 + 2
    assert [ours[step][name] for name in names] == [theirs[step][name] for name in names]
  share = np.mean([row["train/source/a/share"] for row in theirs.values()])
  assert abs(share - 0.5) < 0.1
  c.data.sources = tuple(dict(entry, weight=1.0) for entry in c.data.sources)
  with pytest.raises(ValueError, match="data.sources"):
    loop.train(c, str(again))
  c.steps = 18
  loop.train(c, str(again), continue_as=("data.sources", "steps"))


def last_rows(path):
  """{step: values} of training, the later lines of a step over the earlier."""
  rows = {}
  for line in path.read_text().splitlines():
    row = json.loads(line)
    if "train/loss" in row:
      rows[row["step"]] = row
  return rows
