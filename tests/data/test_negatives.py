"""False captions and descriptions on their way into a batch: slots, draws, what does not fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_jax import schema, tokenizer
from grain_jax.data import build, dataset, false_captions, pipeline
from grain_jax.data.scenes import scenes
from grain_jax.data.sources import scenes as scenes_source

TOKENS = tokenizer.Tokenizer(77)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Scenes with false texts; not to be written to."""
  out = tmp_path_factory.mktemp("negatives") / "data"
  some = scenes.SceneSettings(negatives=True, train=16, val=1, concepts=12, objects_per_class=1)
  build.build(scenes_source.source(some), out, workers=1)
  return str(out)


@pytest.fixture
def config(tiny, data):
  tiny.data.update(dir=data, negatives=4, negatives_per_region=2, row_length=200, threads=1)
  tiny.data.caption = "original"
  return tiny


def texts_of(batch, row):
  """{slot: text} of a row, read back from its tokens."""
  found = {}
  for slot in np.flatnonzero(batch["text_mask"][row]):
    ids = batch["tokens"][row][batch["segments"][row] == slot + 1]
    found[int(slot)] = TOKENS.decode(ids).replace(" ,", ",")
  return found


def epochs(config, number):
  """[(record, {slot: text}, kinds, region mask, false mask)] of each epoch, in order of records."""
  opened = dataset.open_dataset(config.data.dir)
  by_caption = {opened.parse("train", i).captions[0].decode(): i for i in range(16)}
  batches = pipeline.train_batches(opened, config)
  found = []
  for _ in range(number):
    rows = []
    for _ in range(16 // config.batch_size):
      batch = next(batches)
      for row in range(config.batch_size):
        texts = texts_of(batch, row)
        record = opened.parse("train", by_caption[texts[0]])
        rows.append((record, texts, batch["region_mask"][row], batch["region_negative_mask"][row]))
    found.append(sorted(rows, key=lambda row: row[0].key))
  batches.close()
  return found


def test_a_slot_holds_a_negative_of_its_kind(config):
  for record, texts, _, _ in epochs(config, 1)[0]:
    kinds = {kind.decode(): text.decode() for text, kind in record.negatives}
    for slot, kind in enumerate(schema.NEGATIVE_KINDS):
      assert texts.get(1 + 3 + slot) == kinds.get(kind)


def test_any_of_them_are_drawn_anew_in_each_epoch(config):
  config.data.update(negatives=1, negatives_by="drawn")
  seen = [[texts.get(4) for _, texts, _, _ in epoch] for epoch in epochs(config, 6)]
  assert len(set(map(tuple, seen))) == 6
  again = [[texts.get(4) for _, texts, _, _ in epoch] for epoch in epochs(config, 6)]
  assert again == seen
  for row, (record, *_) in enumerate(epochs(config, 1)[0]):
    assert {epoch[row] for epoch in seen} <= {text.decode() for text, _ in record.negatives}


def plain(text):
  return text.replace(" ", "")


@pytest.mark.parametrize("by", ["kind", "drawn"])
def test_false_captions_are_of_the_caption_that_is_drawn(config, by):
  """The second caption of a scene has none; with 'any' it stands beside those of the first."""
  opened = dataset.open_dataset(config.data.dir)
  records = [opened.parse("train", i) for i in range(16)]
  captions = {plain(text.decode()): (r, n) for r in records for n, text in enumerate(r.captions)}
  config.data.update(caption="half", negatives=2, negatives_by=by)
  for of in ("any", "caption"):
    config.data.negatives_of = of
    batches, seen = pipeline.train_batches(opened, config), []
    for _ in range(4 * 16 // config.batch_size):
      batch = next(batches)
      for row in range(config.batch_size):
        texts = texts_of(batch, row)
        record, number = captions[plain(texts[0])]
        false = {text for slot, text in texts.items() if 4 <= slot < 6}
        assert false <= {text.decode() for text, _ in record.negatives}
        seen.append((number, bool(false)))
    batches.close()
    assert set(seen) == {(0, True), (1, of == "any")}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_nearest_caption_is_the_one_that_was_changed(data):
  captions = [[f"{'abcd'[n]}{i}" for i in range(data.draw(st.integers(4, 9)))] for n in range(3)]
  number = data.draw(st.integers(0, 2))
  false = data.draw(st.permutations(captions[number]))
  if data.draw(st.booleans()):
    false[0] = data.draw(st.sampled_from(["new", captions[number - 1][0]]))
  texts = [" ".join(words) for words in captions]
  assert false_captions.nearest([" ".join(false)], texts) == [[number]]
  encoded = [f"{text}.".upper().encode() for text in texts]
  assert false_captions.nearest([" ".join(false).encode()], encoded) == [[number]]
  assert false_captions.nearest(["nothing of it"], [texts[0], texts[0]]) == [[0, 1]]


def test_a_regions_false_descriptions_are_its_own_and_not_the_same_twice(config):
  drawn = set()
  for epoch in epochs(config, 3):
    for record, texts, regions, false in epoch:
      places = np.argsort(-record.scores, kind="stable")[: int(regions.sum())]
      assert false.shape == (3, 2) and not false[~regions].any() and false[regions].all()
      for slot, place in enumerate(places):
        assert texts[1 + slot] == record.descriptions[place].decode()
        own = [texts[1 + 3 + 4 + 2 * slot + n] for n in range(2)]
        assert len(set(own)) == 2
        assert set(own) <= {text.decode() for text in record.region_negatives[place]}
        drawn.add((record.key, slot, tuple(own)))
  assert len(drawn) > 16 * 2


def test_evaluations_see_none(config):
  for batch, _ in pipeline.eval_batches(config.data.dir, "val", config):
    assert batch["text_mask"].shape[1] == 4 and batch["negative_kind"].shape[1] == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_false_descriptions_go_first_then_descriptions_then_false_captions(data):
  """Of what is dropped: as few as must be, in that order."""
  regions, negatives, each = 3, 2, 2
  words = st.integers(0, 12).map(lambda n: " ".join(["dog"] * n) or None)
  slots = 1 + regions + negatives + regions * each
  texts = [data.draw(st.integers(1, 5).map(lambda n: " ".join(["dog"] * n)))]
  texts += [data.draw(words) for _ in range(slots - 1)]
  length = data.draw(st.integers(8, 120))
  scores = np.array([[data.draw(st.floats(0, 1)) for _ in range(regions)]])
  packed = TOKENS.pack_batch([texts], row_length=length, scores=scores, region_negatives=each)
  mask = packed.text_mask[0]
  sizes = np.array([len(TOKENS.encode_batch([t])[0]) if t else 0 for t in texts])
  first = 1 + regions
  dropped = (sizes > 0) & ~mask
  of_regions, of_captions = slice(first + negatives, None), slice(first, first + negatives)
  if dropped[1:first].any():
    assert not mask[of_regions].any()
  if dropped[of_captions].any():
    assert not mask[1:first].any()
  assert sizes[mask][1:].sum() + min(sizes[0], length) <= length
  order = [*range(slots - 1, first + negatives - 1, -1), *(
    1 + i for i in sorted(range(regions), key=lambda i: (scores[0, i], -i))
  ), *range(first + negatives - 1, first - 1, -1)]  # fmt: skip
  left, want = min(sizes[0], length) + sizes[1:].sum(), sizes > 0
  for slot in order:
    if left > length and sizes[slot]:
      left, want[slot] = left - sizes[slot], False
  np.testing.assert_array_equal(mask, want)
