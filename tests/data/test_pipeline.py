"""Host batches: their contract, their order, and what happens to bad records."""

import numpy as np
import pytest
import toy_data
from PIL import Image

from grain_jax import schema, tokenizer
from grain_jax.data import dataset, decoding, pipeline, records, sampler


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  pairs = [toy_data.record(i) for i in range(11)]
  mask = np.ones((48, 48), np.uint8)
  pairs += [("val", toy_data.record(i, mask=mask, label=i)) for i in range(20, 26)]
  directory = tmp_path_factory.mktemp("data") / "toy"
  return toy_data.built(directory, pairs, with_mask=True, with_label=True)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
  """Eight records, of which 2 has half a JPEG, 5 none at all and 6 no caption."""
  good = [toy_data.record(i) for i in range(8)]
  good[2]["image"] = good[2]["image"][: len(good[2]["image"]) // 2]
  good[5]["image"] = b"no picture"
  directory = tmp_path_factory.mktemp("data") / "bad"
  return toy_data.built(directory, good, check_image=False)


@pytest.mark.parametrize("negatives", [0, 2])
def test_batches_are_as_the_schema_says(data, negatives):
  c = toy_data.config(data)
  sizes = dict(batch=4, image_size=48, row_length=64, regions=3, negatives=negatives)
  batches = pipeline.train_batches(data, c, negatives=negatives)
  for batch in toy_data.take(batches, 3):
    schema.check_batch(batch, **sizes)
    assert batch["example_mask"].all()
  for batch, extras in pipeline.eval_batches(data, "val", c, negatives=negatives):
    schema.check_batch(batch, **sizes)
    assert len(extras.key) == len(extras.captions) == len(extras.descriptions) == 4


def test_examples_are_the_records(data):
  c = toy_data.config(data, caption="original")
  batches = pipeline.train_batches(data, c)
  tok = tokenizer.Tokenizer()
  opened = pipeline.open_dataset(data)
  for step in range(4):  # two epochs
    batch = next(batches)
    chosen = sampler.indices(seed=0, epoch=step // 2, step=step % 2, batch_size=4, num_records=11)
    for i, index in enumerate(chosen):
      record = opened.parse("train", int(index))
      pixels = np.asarray(decoding.decode(record.image))
      np.testing.assert_array_equal(batch["image"][i], pixels)
      best = sorted(range(len(record.scores)), key=lambda r: -record.scores[r])[:3]
      count = len(best)
      assert batch["region_mask"][i].tolist() == [True] * count + [False] * (3 - count)
      np.testing.assert_allclose(
        schema.center_to_corners(batch["boxes"][i, :count]), record.boxes[best], atol=1e-6
      )
      assert not batch["boxes"][i, count:].any()
      texts = [record.captions[0], *(record.descriptions[r] for r in best)]
      want = np.concatenate([tok.encode(t) for t in texts])
      np.testing.assert_array_equal(batch["tokens"][i, : len(want)], want)
      assert not batch["tokens"][i, len(want) :].any()
      assert batch["text_mask"][i].tolist() == [True, *batch["region_mask"][i]]
      assert (batch["tokens"][i, batch["ends"][i, : 1 + count]] == tokenizer.END).all()


def test_starting_later_is_not_stopping(data):
  c = toy_data.config(data, resize="crop", flip=True)
  whole = toy_data.take(pipeline.train_batches(data, c), 5)
  toy_data.assert_equal(toy_data.take(pipeline.train_batches(data, c, start_step=3), 2), whole[3:])
  c.data.threads = 3
  toy_data.assert_equal(toy_data.take(pipeline.train_batches(data, c), 5), whole)


def test_hosts_share_the_batch(data):
  c = toy_data.config(data, resize="crop", flip=True)
  whole = toy_data.take(pipeline.train_batches(data, c), 3)
  parts = [toy_data.take(pipeline.train_batches(data, c, host=h, num_hosts=2), 3) for h in range(2)]
  joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
  toy_data.assert_equal(joined, whole)


def test_a_process_may_read_for_several_hosts_that_do_not_lie_together(data):
  c = toy_data.config(data, resize="crop", flip=True)
  c.batch_size = 8
  whole = toy_data.take(pipeline.train_batches(data, c), 3)
  for hosts, rows in (((0, 3), [0, 1, 6, 7]), ((1, 2), [2, 3, 4, 5])):
    parts = toy_data.take(pipeline.train_batches(data, c, host=hosts, num_hosts=4), 3)
    toy_data.assert_equal(parts, [{k: v[rows] for k, v in batch.items()} for batch in whole])


def test_large_batches_are_made_of_chunks(data, monkeypatch):
  c = toy_data.config(data)
  c.batch_size = 10
  whole = toy_data.take(pipeline.train_batches(data, c), 2)
  monkeypatch.setattr(pipeline, "_CHUNK", 4)  # 5 chunks of 2
  toy_data.assert_equal(toy_data.take(pipeline.train_batches(data, c), 2), whole)


def test_captions_are_drawn_half_and_half(data):
  tok = tokenizer.Tokenizer()
  second = tok.encode("picture")[1]
  shares = {}
  for caption in ("half", "original", "generated"):
    c = toy_data.config(data, caption=caption)
    first = np.concatenate(
      [b["tokens"][:, 1] for b in toy_data.take(pipeline.train_batches(data, c), 60)]
    )
    shares[caption] = (first == second).mean()
  assert shares["original"] == 0 and shares["generated"] == 1
  assert 0.4 < shares["half"] < 0.6


def test_joined_captions_are_all_descriptions_half_of_the_time(tmp_path):
  data = toy_data.built(tmp_path / "data", [toy_data.record(i, regions=3) for i in range(8)])
  c = toy_data.config(data, caption="joined", max_regions=0)
  tok = tokenizer.Tokenizer()
  joined = tok.encode("a red box, a green box, a blue box")
  rows = np.concatenate([b["tokens"] for b in toy_data.take(pipeline.train_batches(data, c), 60)])
  whole = (rows[:, : len(joined)] == joined).all(axis=1)
  generated = rows[:, 1] == tok.encode("picture")[1]
  assert 0.4 < whole.mean() < 0.6
  assert 0.15 < generated.mean() < 0.35  # half of the other half


def test_crop_and_flip_keep_boxes_on_their_rectangles(data):
  c = toy_data.config(data, resize="crop", flip=True, crop_min_area=0.4, caption="original")
  words = {name: tokenizer.Tokenizer().encode(name)[1] for name in toy_data.COLORS}
  checked, flipped = 0, set()
  for batch in toy_data.take(pipeline.train_batches(data, c), 20):
    for i, region in np.argwhere(batch["region_mask"]):
      text = batch["tokens"][i][batch["segments"][i] == region + 2]
      (name,) = [n for n, word in words.items() if word in text]
      cx, cy, _, _ = batch["boxes"][i, region]
      pixel = batch["image"][i, int(cy * 48), int(cx * 48)].astype(int)
      np.testing.assert_allclose(pixel, toy_data.COLORS[name], atol=45)
      checked += 1
    # Red stands left of green wherever it is not flipped.
    for i in range(4):
      tokens = [batch["tokens"][i][batch["segments"][i] == s + 2] for s in range(3)]
      x = {n: batch["boxes"][i, s, 0] for n, w in words.items() for s in range(3) if w in tokens[s]}
      if {"red", "green"} <= x.keys():
        flipped.add(bool(x["red"] > x["green"]))
  assert checked > 50 and flipped == {True, False}


def test_no_flip_where_a_text_says_left(tmp_path):
  sided = [toy_data.record(i, captions=["the left one", "x"]) for i in range(4)]
  out = toy_data.built(tmp_path / "d", sided)
  plain = toy_data.take(pipeline.train_batches(out, toy_data.config(out)), 6)
  flips = toy_data.take(pipeline.train_batches(out, toy_data.config(out, flip=True)), 6)
  toy_data.assert_equal(flips, plain)


def test_evaluation_reads_every_record_once(data):
  c = toy_data.config(data)
  (first, a), (last, b) = pipeline.eval_batches(data, "val", c)
  assert a.key + b.key == [f"r{i}" for i in range(20, 26)] + [""] * 2
  assert a.label.tolist() + b.label.tolist() == [*range(20, 26), -1, -1]
  assert last["example_mask"].tolist() == [True, True, False, False] and first["example_mask"].all()
  assert not last["image"][2:].any() and not last["text_mask"][2:].any()
  assert b.captions[2:] == [[], []] and b.descriptions[2:] == [[], []]
  for i, number in enumerate(range(20, 24)):
    record = toy_data.record(number)
    assert a.captions[i] == record["captions"]
    best = sorted(record["regions"], key=lambda r: -r["score"])[:3]
    assert a.descriptions[i] == [r["description"] for r in best]
    boxes = schema.center_to_corners(first["boxes"][i, : len(best)])
    np.testing.assert_allclose(boxes, [r["box"] for r in best], atol=1e-6)
    assert a.mask[i].startswith(b"\x89PNG")


def test_bad_records_are_skipped_and_counted(bad):
  c = toy_data.config(bad)
  batches = pipeline.train_batches(bad, c)
  got = toy_data.take(batches, 2)
  chosen = sampler.indices(seed=0, epoch=0, step=0, batch_size=4, num_records=8).tolist()
  chosen += sampler.indices(seed=0, epoch=0, step=1, batch_size=4, num_records=8).tolist()
  masks = np.concatenate([b["example_mask"] for b in got])
  assert {i for i, good in zip(chosen, masks, strict=True) if not good} == {2, 5}
  assert batches.bad.keys() == {2, 5} and "corrupt image" in batches.bad[2]
  for batch in got:
    off = ~batch["example_mask"]
    for name in ("image", "tokens", "text_mask", "boxes", "region_mask"):
      assert not batch[name][off].any()
    assert batch["text_mask"][~off, 0].all()


def test_bad_records_stop_where_the_config_says_so(bad):
  c = toy_data.config(bad, on_bad_record="stop")
  for read in (
    lambda: toy_data.take(pipeline.train_batches(bad, c), 2),
    lambda: list(pipeline.eval_batches(bad, "train", c)),
  ):
    with pytest.raises(ValueError, match=r"toy-train.array_record-0000.-of-00002, record") as error:
      read()
    assert "corrupt image" in str(error.value) and "on_bad_record=skip" in str(error.value)
    assert "\n" not in str(error.value)


def test_damage_within_a_shard_costs_its_records_alone(tmp_path):
  out = toy_data.built(tmp_path / "d", [toy_data.record(i) for i in range(8)], shard_size=8)
  (shard,) = out.glob("*array_record-*")
  content = bytearray(shard.read_bytes())
  at = content.find(toy_data.record(3)["image"][-100:])  # not the head, which all have in common
  assert at > 0
  content[at : at + 50] = bytes(50)
  shard.write_bytes(content)
  c = toy_data.config(out)
  batches = pipeline.train_batches(out, c)
  masks = np.concatenate([b["example_mask"] for b in toy_data.take(batches, 2)])
  assert masks.sum() == 7 and batches.bad.keys() == {3}


def damage(out, how):
  shard = sorted(out.glob("*array_record-*"))[1]
  if how == "cut":
    shard.write_bytes(shard.read_bytes()[:-100])
  elif how == "missing":
    shard.unlink()
  elif how == "manifest":
    (out / "manifest.json").unlink()
  elif how == "half manifest":
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text[: len(text) // 2])
  else:
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"format": 1', '"format": 99'))


@pytest.mark.parametrize(
  "how, message",
  [
    ("cut", r"00001-of-00002 has \d+ bytes instead of \d+.*--overwrite"),
    ("missing", "00001-of-00002 is missing"),
    ("manifest", "has no manifest.json"),
    ("half manifest", "is not a manifest"),
    ("format", "has format 99, this program reads 1"),
  ],
)
def test_damaged_directories_are_one_line(tmp_path, how, message):
  out = toy_data.built(tmp_path / "d", [toy_data.record(i) for i in range(8)])
  damage(out, how)
  with pytest.raises(ValueError, match=message) as error:
    pipeline.train_batches(out, toy_data.config(out))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"dir": ""}, "config.data.dir is empty.*data.build"),
    ({"dir": "/nowhere/data"}, "--source=folder --input=PICTURES --out=/nowhere/data"),
    (
      {"dir": "/nowhere/scenes_negatives"},
      "scenes --out=/nowhere/scenes_negatives --negatives=true",
    ),
    ({"dir": "/nowhere/data"}, "/nowhere/data cannot be opened: there is no such directory"),
    ({"split": "test"}, "split 'test' is not in .*it holds train, val"),
    ({"resize": "stretch"}, "config.data.resize = 'stretch' is unknown.*squash, crop"),
    ({"caption": "both"}, "config.data.caption = 'both'"),
    ({"on_bad_record": "cry"}, "config.data.on_bad_record = 'cry'"),
    ({"row_length": 1}, "config.data.row_length = 1"),
    ({"crop_min_area": 0.0}, "config.data.crop_min_area = 0.0"),
  ],
)
def test_wrong_settings_are_one_line(data, change, message):
  c = toy_data.config(data, **change)
  with pytest.raises(ValueError, match=message) as error:
    pipeline.train_batches(c.data.dir, c)
  assert "\n" not in str(error.value)


def test_batch_larger_than_the_split(data):
  c = toy_data.config(data)
  c.batch_size = 12
  with pytest.raises(ValueError, match="batch_size = 12 is more than the split's 11 records"):
    pipeline.train_batches(data, c)


def test_pictures_of_other_sizes_and_modes(tmp_path):
  mixed = [toy_data.record(i) for i in range(4)]
  gray = Image.fromarray(np.arange(60 * 30, dtype=np.uint16).astype(np.uint8).reshape(30, 60))
  mixed[1]["image"] = toy_data.jpeg(np.asarray(gray))
  mixed[2]["image"] = toy_data.jpeg(np.full((7, 300, 3), 90))
  out = toy_data.built(tmp_path / "d", mixed)
  ((batch, extras),) = pipeline.eval_batches(out, "train", toy_data.config(out))
  assert batch["example_mask"].all()
  want = gray.convert("RGB").resize((48, 48), Image.BICUBIC)
  assert np.abs(batch["image"][1].astype(int) - np.asarray(want)).max() <= 12  # JPEG
  np.testing.assert_allclose(batch["image"][2], 90, atol=2)


def test_dataset_finds_records_across_shards(data):
  opened = dataset.open_dataset(data)
  assert opened.locate("train", 9)[-len("00002-of-00003, record 1") :] == "00002-of-00003, record 1"
  keys = [records.parse(r).key for r in opened.read("train", [10, 0, 5, 4, 0])]
  assert keys == [b"r10", b"r0", b"r5", b"r4", b"r0"]
  with pytest.raises(ValueError, match="record 11 is not one of the split's 11"):
    opened.read("train", [11])


@pytest.mark.parametrize("read", [decoding.decode, decoding.as_jpeg])
def test_what_is_no_image_says_so_in_words(read):
  with pytest.raises(ValueError) as error:
    read(b"<html>")
  assert str(error.value) == "corrupt image: no format that PIL knows"


def test_an_image_is_decoded_no_larger_than_it_has_to_be():
  smooth = np.asarray(Image.new("RGB", (4, 3), "teal").resize((640, 480)))
  data = toy_data.jpeg(smooth)
  sizes = {(224, 224): (320, 240), (320, 240): (320, 240), (321, 240): (640, 480), (1, 1): (80, 60)}
  for enough, size in sizes.items():
    seen = []
    image = decoding.decode(data, enough=lambda w, h: seen.append((w, h)) or enough)  # noqa: B023
    assert image.size == size and seen == [(640, 480)]
  assert decoding.decode(data).size == (640, 480)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_reduced_decoding_shows_the_same_picture_and_boxes(tmp_path, resize):
  """Of 480-pixel images at 48; evaluations decode whole."""
  data = toy_data.built(tmp_path / "large", [toy_data.record(i, size=480) for i in range(8)])
  batches = {}
  for reduced in (False, True):
    c = toy_data.config(data, resize=resize, reduced_decode=reduced)
    batches[reduced] = next(pipeline.train_batches(data, c))
    evaluated = next(pipeline.eval_batches(data, "train", c))[0]["image"]
    toy_data.assert_equal(
      [{"image": evaluated}], [batches.setdefault("eval", {"image": evaluated})]
    )
  whole, reduced = batches[False], batches[True]
  difference = np.abs(whole["image"].astype(int) - reduced["image"])
  assert 0 < difference.mean() < 3  # another program, the same image
  for name in whole.keys() - {"image", "boxes"}:
    np.testing.assert_array_equal(whole[name], reduced[name])
  np.testing.assert_allclose(whole["boxes"], reduced["boxes"], atol=1 / 48)
