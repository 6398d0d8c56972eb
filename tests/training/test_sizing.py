"""Sizes that data and machine choose, and evaluations that the data can serve."""

import pytest

from grain_jax import config as configs
from grain_jax.training import loop, sizing


def mine(**changes):
  config = configs.resolve(configs.load("configs/mine.py"))
  for key, value in changes.items():
    configs.set_key(config, key.replace("__", "."), value)
  return config


@pytest.mark.parametrize(
  ("records", "devices", "platform", "batch", "steps", "warmup"),
  [
    (200, 1, "cpu", 8, 750, 75),  # 25 batches a pass, 30 passes
    (400, 1, "cpu", 16, 750, 75),
    (20, 1, "cpu", 8, 600, 60),  # 2 batches a pass: 300 passes are the fewest steps
    (36_000, 1, "cpu", 64, 16_860, 1686),
    (36_000, 8, "gpu", 1024, 1050, 105),
    (3_000_000, 16, "tpu", 4096, 21_960, 2000),
    (900, 6, "gpu", 24, 1110, 111),  # a multiple of the devices
  ],
)
def test_sizes_by_the_number_of_images(records, devices, platform, batch, steps, warmup):
  config = sizing.choose(mine(), records=records, devices=devices, platform=platform)
  got = config.batch_size, config.steps, config.optimizer.warmup_steps
  assert got == (batch, steps, warmup)
  assert config.eval_every == config.save_every == steps // 10
  assert config.model.dtype == ("float32" if platform == "cpu" else "bfloat16")
  configs.check(config)
  line = sizing.describe(mine(), config, records=records, platform=platform)
  assert ("; loss.precision bfloat16" in line) == (platform != "cpu")
  assert f"batch_size {batch}; steps {steps} ({steps * batch / records:.0f} passes)" in line


def test_what_is_given_stays():
  config = mine(batch_size=40, steps=77, optimizer__warmup_steps=5, save_every=3, eval_every=0)
  got = sizing.choose(config, records=500, devices=1, platform="cpu")
  assert (got.batch_size, got.steps, got.optimizer.warmup_steps) == (40, 77, 5)
  assert (got.save_every, got.eval_every) == (3, 0)
  none = mine(optimizer__warmup_steps=0)  # and warmup_epochs is 0: no warm-up
  chosen = sizing.choose(none, records=500, devices=1, platform="cpu")
  assert chosen.optimizer.warmup_steps == chosen.optimizer.warmup_epochs == 0
  published = configs.resolve(configs.load("configs/cc12m.py"))
  published.model.update(remat="block", unroll=1)
  same = sizing.choose(published, records=10_000_000, devices=16, platform="gpu")
  assert same.to_dict() == published.to_dict() and not sizing.is_open(published)
  assert sizing.describe(published, same, records=10_000_000) == ""


def test_too_little_data_is_one_line():
  with pytest.raises(
    ValueError, match="7 records in split 'train' fill no batch of 8, the least on"
  ):
    sizing.choose(mine(), records=7, devices=1, platform="cpu")
  with pytest.raises(ValueError, match="fill no batch of 16, the least on 16 device"):
    sizing.choose(mine(), records=15, devices=16, platform="gpu")


def test_a_run_that_has_begun_keeps_its_sizes(tmp_path):
  begun = sizing.choose(mine(), records=200, devices=1, platform="cpu")
  (tmp_path / "config.json").write_text(configs.to_json(begun))
  kept = sizing.keep(mine(), tmp_path)
  assert not sizing.is_open(kept)
  again = sizing.choose(kept, records=9000, devices=4, platform="gpu")  # more data, other machine
  assert configs.first_difference(begun, again) is None
  longer = sizing.keep(mine(steps=1500), tmp_path)
  assert (longer.steps, longer.optimizer.warmup_steps, longer.batch_size) == (1500, 75, 8)
  without = sizing.keep(mine(optimizer__warmup_steps=0), tmp_path)
  assert configs.first_difference(begun, without) == ("optimizer.warmup_steps", 75, 0)


class Data:
  splits = ("train",)
  class_names = ()
  mask_names = ()


def test_what_the_data_cannot_serve_is_left_out_with_its_reason():
  said = []
  got = sizing.available(mine(), Data(), say=said.append)
  assert got.evals == () and got.validation.batches == 0
  assert "no validation loss" in said[0] and "--val_fraction=0.1" in said[0]
  assert [line.split(": ")[1] for line in said[1:]] == list(sizing.AVAILABLE)
  with_outside = mine(evals=("available", "retrieval:coco"))
  assert sizing.available(with_outside, Data(), say=said.append).evals == ("retrieval:coco",)


def test_what_a_model_without_region_queries_is_not_asked_for_is_said(scenes_dir):
  from grain_jax import evaluate
  from grain_jax.data import dataset

  said = []
  config = mine(method="clip", data__dir=str(scenes_dir))
  data = dataset.open_dataset(scenes_dir)
  config.evals = sizing.available(config, data, say=said.append).evals + ("grounding",)
  evaluate.check(config, data, say=said.append)
  assert said == [
    "not evaluated: grounding: the model has no region queries (config.method = clip)"
    for _ in range(2)
  ]
  config.update(method="grain", evals=("retrieval", "grounding"))
  evaluate.check(config, data, say=said.append)
  assert len(said) == 2


def test_a_run_with_negatives_evaluates_what_they_may_cost(scenes_dir, capsys):
  """Asked for or not; where the data cannot, it says so."""
  from grain_jax.data import dataset

  said, data = [], dataset.open_dataset(scenes_dir)
  config = mine(evals=())
  config.data.update(dir=str(scenes_dir), negatives=4)
  assert sizing.available(config, data, say=said.append).evals == ("zero_shot", "composition")
  assert [line.split(": ")[1] for line in said] == ["zero_shot", "composition"]
  config.evals = ("composition:sugarcrepe", "zero_shot:imagenet")
  assert sizing.available(config, data, say=said.append).evals == tuple(config.evals)
  said.clear()
  config.evals = ("retrieval",)
  assert sizing.available(config, Data(), say=said.append).evals == ("retrieval",)
  assert len(said) == 2 and all(line.startswith("warning: a run with negatives") for line in said)
  config.data.negatives = 0
  assert sizing.available(config, data, say=said.append).evals == ("retrieval",)


@pytest.mark.parametrize(
  ("best", "changes"),
  [
    ("retrieval/text_to_image/r1", {}),
    ("composition/accuracy", {"evals": ("retrieval",), "data__negatives": 4}),
    ("zero_shot/imagenet/top1", {"evals": ("zero_shot:imagenet",)}),
    ("grouping/jaccard", {"evals": ("segmentation",)}),
  ],
)
def test_the_best_metric_may_be_of_any_evaluation_that_the_run_will_have(scenes_dir, best, changes):
  """Evaluations that the data choose count: before that none is refused, after it all others."""
  from grain_jax.data import dataset

  config = mine(data__dir=str(scenes_dir), checkpoint__best_metric=best, **changes)
  configs.check(config)
  config.evals = sizing.available(config, dataset.open_dataset(scenes_dir), say=print).evals
  configs.check(config, settled=True)
  config.evals = ("grounding",)
  with pytest.raises(ValueError, match=f"best_metric = '{best}' needs config.eval_every > 0"):
    configs.check(config, settled=True)


@pytest.mark.long
def test_validation_is_the_loss_of_the_model_without_dropout(scenes_dir, tmp_path):
  """Worked out once more by hand: the same batches, through the model and the objective."""
  import jax
  import numpy as np

  from bench import kills
  from grain_jax import objectives
  from grain_jax.convert import weights
  from grain_jax.data import pipeline
  from grain_jax.models import grain

  config = configs.load(f"configs/quickstart.py:{kills.TINY}")
  config.data.dir = str(scenes_dir)
  config.update(evals=(), eval_every=2, steps=4, log_every=2)
  config.optimizer.warmup_steps = 1
  config.validation.batches = 2
  config.model.decoder.dropout = 0.5
  results = loop.train(config, str(tmp_path / "run"))
  held, params, step = weights.load_run(tmp_path / "run")
  held.data.update(split="val", flip=False, resize="squash")
  batches, values = pipeline.train_batches(str(scenes_dir), held), []
  model, params = grain.build(held), jax.tree.map(np.asarray, params)

  @jax.jit
  def parts_of(batch):
    output = model.apply({"params": params}, batch, num_regions=held.data.max_regions)
    return objectives.total_loss(output, batch, held).parts

  for _ in range(2):
    parts = parts_of(next(batches))
    values.append([parts["loss"][0], *parts["loss_caption"], parts["loss"][1]])
  batches.close()
  total, caption, rows, weight = np.sum(values, axis=0)
  assert step == 4
  np.testing.assert_allclose(results["validation/loss"], total / weight, rtol=1e-5)
  np.testing.assert_allclose(results["validation/loss_caption"], caption / rows, rtol=1e-5)
  assert results["validation/examples"] == 2 * held.batch_size
  lines = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert lines.count("validation/loss_caption") == 2  # at step 2 and at the end
