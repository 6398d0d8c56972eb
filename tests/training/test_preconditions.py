"""GRAIN on data without regions: said before step 1, and the end unless it is allowed."""

import json
import logging as python_logging

import numpy as np
import pytest
from PIL import Image

from grain_jax import config as configs
from grain_jax.data import build, dataset
from grain_jax.data.sources import folder as folder_source
from grain_jax.runtime import metrics
from grain_jax.training import loop, preconditions, steps

COUNT = 16


@pytest.fixture(scope="module")
def captions_only(tmp_path_factory):
  """A dataset built from a folder whose annotations are captions alone."""
  root = tmp_path_factory.mktemp("own")
  for i in range(COUNT):
    Image.fromarray(np.full((32, 32, 3), 9 * i, np.uint8)).save(root / f"{i}.jpg")
  rows = "".join(f"{i}.jpg,grey number {i}\n" for i in range(COUNT))
  (root / "annotations.csv").write_text("image,caption\n" + rows)
  build.build(folder_source.source(root), root / "out", say=lambda line: None)
  return root / "out"


@pytest.fixture
def config(tiny, captions_only):
  tiny.method, tiny.evals, tiny.steps, tiny.log_every = "grain", (), 2, 1
  tiny.data.update(dir=str(captions_only), split="train", threads=1)
  return tiny


def test_it_ends_before_anything_is_compiled_or_written(config, tmp_path, monkeypatch):
  def create_state(*_, **__):
    raise AssertionError("compiles")

  monkeypatch.setattr(steps, "create_state", create_state)
  with pytest.raises(
    ValueError, match="^config.method = 'grain' and split 'train' of .* has no"
  ) as e:
    loop.train(config, str(tmp_path / "run"))
  assert "\n" not in str(e.value) and not (tmp_path / "run").exists()
  assert str(config.data.dir) in str(e.value)
  assert "config.method=clip" in str(e.value)
  assert "config.data.allow_no_regions=True" in str(e.value)


def test_allowed_it_says_so_and_trains(config, tmp_path, caplog):
  config.data.allow_no_regions = True
  with caplog.at_level(python_logging.WARNING):
    loop.train(config, str(tmp_path / "run"))
  assert "has no regions" in caplog.text and "allow_no_regions allows" in caplog.text
  last = metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
  assert last["step"] == 2 and "train/loss_box" not in last  # there was no box to sum over


@pytest.mark.parametrize(
  "change",
  [
    {"method": "clip"},
    {"loss.box": 0.0, "loss.region": 0.0},  # the control without the decoder's losses
    {"data.max_regions": 0},
  ],
)
def test_nothing_is_said_where_no_region_is_asked_for(config, captions_only, change, caplog):
  config.update_from_flattened_dict(change)
  preconditions.check_regions(config, dataset.open_dataset(captions_only))
  assert not caplog.records


def test_nothing_is_said_of_data_with_regions_or_without_the_count(config, scenes_dir, caplog):
  preconditions.check_regions(config, dataset.open_dataset(scenes_dir))
  opened = dataset.open_dataset(config.data.dir)
  manifest = json.loads(json.dumps(opened.manifest))
  assert manifest["splits"]["train"].pop("regions") == 0
  preconditions.check_regions(config, dataset.Dataset(opened.directory, manifest))
  assert not caplog.records


def test_a_config_of_before_the_key_goes_on(config, captions_only):
  values = config.to_dict()
  del values["data"]["allow_no_regions"]
  old = configs.from_json(json.dumps(values))
  preconditions.check_regions(old, dataset.open_dataset(captions_only))
  assert configs.first_difference(old, config) is None


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"data.negatives": 4}, "has no false captions. Set it to 0, or build data with negatives"),
    ({"data.negatives_per_region": 1}, "has no false descriptions of regions"),
    ({"data.negatives": 5}, "a slot holds one of the 4 kinds"),
    ({"loss.rank": 0.2}, "loss.rank = 0.2: false captions are needed"),
    ({"data.negatives_per_region": 1, "method": "clip"}, "needs region queries"),
  ],
)
def test_losses_of_negatives_need_some(tiny, changes, words):
  class Data:
    def num_negatives(self, split, *, of_regions=False):
      return 0 if "has no" in words else 9

  for key, value in changes.items():
    configs.set_key(tiny, key, value)
  with pytest.raises(ValueError, match=words) as error:
    preconditions.check_negatives(tiny, Data())
  assert "\n" not in str(error.value)


def test_data_that_does_not_count_its_negatives_is_believed(tiny):
  class Data:
    def num_negatives(self, split, *, of_regions=False):
      return None

  tiny.data.update(negatives=4, negatives_per_region=2)
  preconditions.check_negatives(tiny, Data())


def test_slots_without_a_false_caption_that_count_are_said(tiny):
  said = []
  for negatives, masked in ((0, False), (4, True), (4, False)):
    tiny.data.negatives, tiny.loss.mask_invalid = negatives, masked
    preconditions.check_empty_slots(tiny, said.append)
  assert len(said) == 1 and said[0].startswith(
    "config.loss.mask_invalid = False: each slot without"
  )
