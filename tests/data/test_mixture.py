"""Several datasets as one: what an epoch holds of each, in an order of seed and step alone."""

import collections
import shutil
import types

import numpy as np
import pytest
import toy_data
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_jax import schema, tokenizing
from grain_jax.data import dataset, mixture, pipeline

SIZES = {"few": 5, "some": 9, "bare": 12}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Three datasets whose captions name them; the last has no region."""
  root = tmp_path_factory.mktemp("sources")
  for number, (name, count) in enumerate(SIZES.items()):
    regions = 0 if name == "bare" else 2
    records = [
      toy_data.record(i, key=f"{name}{i}", captions=[f"{name} {i}"], size=48, regions=regions)
      for i in range(100 * number, 100 * number + count)
    ]
    toy_data.built(root / name, records)
  return {name: str(root / name) for name in SIZES}


def sources_of(folders, **weights):
  return tuple({"dir": folders[name], "weight": w} for name, w in weights.items())


@pytest.fixture
def config(folders):
  c = toy_data.config(folders["few"])
  c.data.sources = sources_of(folders, few=1.0, some=2.0, bare=1.0)
  return c


class Fake(mixture.Mixture):
  """Without data behind it."""

  def __init__(self, counts, weights, seed, patch):
    opened = {
      str(i): types.SimpleNamespace(num_records=lambda split, n=n: n) for i, n in enumerate(counts)
    }
    patch.setattr(dataset, "open_dataset", lambda directory, **_: opened[directory])
    sources = [{"dir": str(i), "weight": w} for i, w in enumerate(weights)]
    super().__init__(sources, split="train", seed=seed)


@settings(max_examples=100)
@given(
  parts=st.lists(st.tuples(st.integers(1, 30), st.floats(0.2, 5)), min_size=1, max_size=4),
  seed=st.integers(0, 5),
  batch=st.integers(1, 8),
)
def test_of_each_source_none_is_seen_again_before_all_others_were(parts, seed, batch):
  """Step by step; an epoch has of each its weight's part, and a pass is told from the next."""
  counts, weights = zip(*parts, strict=True)
  steps = sum(counts) // min(batch, sum(counts))
  total = steps * min(batch, sum(counts))
  with pytest.MonkeyPatch.context() as patch:
    try:
      mixed = Fake(counts, weights, seed, patch)
      mixed.choose(np.arange(1), 0, images=total)
    except ValueError as error:
      assert "Raise its weight" in str(error)
      return
  seen = [[] for _ in counts]
  for epoch in range(4):
    read = [mixed.choose(at, epoch, images=total) for at in np.split(np.arange(total), steps)]
    ids, passes = (np.concatenate(part) for part in zip(*read, strict=True))
    numbers = mixed.sources_of(ids)
    for number, weight in enumerate(weights):
      mine = numbers == number
      assert abs(mine.sum() - total * weight / sum(weights)) < 1
      inside = ids[mine] - mixed.parts[number].offset
      seen[number] += zip(inside.tolist(), passes[mine].tolist(), strict=True)
  for count, told in zip(counts, seen, strict=True):
    for number, start in enumerate(range(0, len(told), count)):
      ids, passes = zip(*told[start : start + count], strict=True)
      assert len(set(ids)) == len(ids) and set(ids) <= set(range(count))
      assert set(passes) == {number}


def test_an_image_that_comes_twice_in_an_epoch_comes_with_other_draws(folders, config):
  config.data.sources = sources_of(folders, few=6.0, some=1.0)
  config.data.resize, config.batch_size = "crop", 14  # an epoch
  (whole,) = batches(config, steps=1)
  few = whole["image"][whole["source"] == 0]
  assert len(few) > 2 * SIZES["few"]
  assert len(np.unique(few.reshape(len(few), -1), axis=0)) == len(few)


def batches(config, *, steps, start=0, host=0, num_hosts=1):
  mixed = mixture.open_training(config)
  read = pipeline.train_batches(mixed, config, start_step=start, host=host, num_hosts=num_hosts)
  found = [next(read) for _ in range(steps)]
  read.close()
  return found


def test_the_order_is_one_of_seed_and_step_on_any_hosts(config):
  whole = batches(config, steps=13)
  assert schema.SOURCE in whole[0]
  for start in (0, 5, 11):
    for a, b in zip(whole[start:], batches(config, steps=13 - start, start=start), strict=True):
      for name in a:
        np.testing.assert_array_equal(a[name], b[name])
  halves = [batches(config, steps=13, host=h, num_hosts=2) for h in range(2)]
  for step, batch in enumerate(whole):
    for name, value in batch.items():
      both = np.concatenate([halves[h][step][name] for h in range(2)])
      np.testing.assert_array_equal(value, both)
  config.seed = 1
  assert not np.array_equal(batches(config, steps=1)[0]["image"], whole[0]["image"])


def test_each_example_is_of_its_source(config):
  names, told = mixture.open_training(config).names, tokenizing.make(config)
  counted = collections.Counter()
  for batch in batches(config, steps=12):  # two epochs of 26 images in batches of 4
    for row, number in enumerate(batch["source"]):
      ids = batch["tokens"][row][batch["segments"][row] == 1]
      assert told.decode(ids).split()[0] == names[number]
      assert batch["region_mask"][row].any() == (names[number] != "bare")
      counted[names[number]] += 1
  assert names == ["few", "some", "bare"] and counted["some"] > 1.5 * counted["few"]


def test_a_source_whose_regions_are_not_looked_at(config):
  entries = [dict(entry) for entry in config.data.sources]
  entries[1]["regions"] = False
  config.data.sources = tuple(entries)
  for batch in batches(config, steps=6):
    assert not batch["region_mask"][batch["source"] == 1].any()
    assert batch["region_mask"][batch["source"] == 0].any(axis=1).all()
  assert mixture.open_training(config).num_regions("train") == 2 * SIZES["few"]


def test_what_a_mixture_is_told_by(config, folders):
  same = mixture.open_training(config).fingerprint("train")
  assert mixture.open_training(config).fingerprint("train") == same
  config.data.sources = sources_of(folders, few=1.0, some=1.0, bare=1.0)
  assert mixture.open_training(config).fingerprint("train") != same
  config.data.sources = ()
  assert isinstance(mixture.open_training(config), dataset.Dataset)


@pytest.mark.parametrize(
  ("sources", "words"),
  [
    (("data/a",), r"sources\[0\] = 'data/a' is not"),
    (({"weight": 1.0},), "dir is needed"),
    (({"dir": "a", "wait": 1.0},), "has the keys dir, wait"),
    (({"dir": "a", "weight": 0.0},), "weight = 0.0 is no positive number"),
    (({"dir": "a", "weight": "1"},), "weight = '1' is no positive number"),
    (({"dir": "x/a"}, {"dir": "y/a"}), "the names a, a are not all different"),
    (({"dir": "/nowhere/a"},), "there is no such directory"),
  ],
)
def test_what_no_mixture_can_be_is_a_line(config, sources, words):
  config.data.sources = sources
  with pytest.raises(ValueError, match=words) as error:
    mixture.open_training(config)
  assert "\n" not in str(error.value)


def test_a_bad_record_is_told_with_its_source(config, folders, tmp_path):
  spoilt = tmp_path / "spoilt"
  toy_data.built(spoilt, [toy_data.record(i, image=b"none") for i in range(5)], check_image=False)
  config.data.sources = ({"dir": str(spoilt)}, {"dir": folders["some"]})
  config.data.max_bad_in_a_row = 1
  with pytest.raises(Exception, match="the last one is spoilt: "):
    batches(config, steps=6)
  shutil.rmtree(spoilt)
