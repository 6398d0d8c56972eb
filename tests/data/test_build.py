"""Built directories: read back by TFDS, checked record by record, whole or not there."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import toy_data

from grain_jax.data import build, dataset, decoding, example_proto, metadata, records

REGION = {"description": "a red box", "box": (0.1, 0.2, 0.5, 0.6), "score": 0.5, "negatives": []}


def test_encoding_is_tfds():
  tf = pytest.importorskip("tensorflow")
  tfds = pytest.importorskip("tensorflow_datasets")
  mask = np.arange(48 * 48, dtype=np.uint8).reshape(48, 48) % 5
  negatives = [{"caption": "two dogs", "kind": "object"}, {"caption": "é", "kind": "action"}]
  with_negatives = [{**REGION, "negatives": ["x", "y"]}, REGION]
  for r in (
    toy_data.record(3, regions=3, mask=mask, label=7, negatives=negatives),
    toy_data.record(4, regions=0, mask=mask, label=0),
    toy_data.record(5, mask=mask, label=2, regions=1) | {"regions": with_negatives},
  ):
    features = metadata.features(with_mask=True, with_label=True)
    theirs = dict(r, mask=mask[..., None])
    theirs["regions"] = [{**g, "box": tfds.features.BBox(*g["box"])} for g in r["regions"]]
    want = tf.train.Example.FromString(features.serialize_example(features.encode_example(theirs)))
    encoded = records.encode(r, with_mask=True, with_label=True)
    ours = tf.train.Example.FromString(encoded)
    # Else the order of features, and with it each shard, differs from process to process.
    assert encoded == ours.SerializeToString(deterministic=True)
    want, ours = (dict(e.features.feature) for e in (want, ours))
    assert ours.keys() == want.keys()
    np.testing.assert_array_equal(
      features["mask"].decode_example(ours.pop("mask").bytes_list.value[0])[..., 0], mask
    )
    want.pop("mask")
    assert ours == want


def test_parse_reverses_encode():
  r = toy_data.record(3, regions=3, label=5)
  parsed = records.parse(records.encode(r, with_label=True))
  assert parsed.key == b"r3" and parsed.image == r["image"] and parsed.label == 5
  assert [c.decode() for c in parsed.captions] == r["captions"]
  assert [d.decode() for d in parsed.descriptions] == [g["description"] for g in r["regions"]]
  np.testing.assert_allclose(parsed.boxes, [g["box"] for g in r["regions"]], rtol=1e-6)
  np.testing.assert_allclose(parsed.scores, [g["score"] for g in r["regions"]], rtol=1e-6)
  for broken in (b"not a proto", records.encode(r)[:-40]):
    with pytest.raises(ValueError, match="tf.train.Example|descriptions"):
      records.parse(broken)


@pytest.mark.parametrize(
  "name, change",
  [
    ("regions/negatives/ragged_row_lengths_0", [1]),
    ("regions/negatives/ragged_row_lengths_0", [1, 1]),
    ("regions/negatives/ragged_row_lengths_0", [3, -2]),
    ("negatives/kind", [b"object"]),
  ],
)
def test_parts_of_a_record_that_do_not_belong_together_are_a_line(name, change):
  r = toy_data.record(3, regions=2)
  r["regions"][0]["negatives"] = ["a lie"]
  example = example_proto.Example.FromString(records.encode(r))
  feature = example.features.feature[name]
  values = feature.int64_list.value if isinstance(change[0], int) else feature.bytes_list.value
  values[:] = change
  with pytest.raises(ValueError, match=r"^\d+ (descriptions|false captions)[^\n]*$"):
    records.parse(example.SerializeToString())


def test_empty_false_texts_and_scores_that_are_none_are_counted(tmp_path):
  """Training would see neither: packing leaves empty texts out, and 0 stands for the score."""
  false = [{"caption": text, "kind": "object"} for text in ("", " \n", "a lie")]
  r = toy_data.record(0, regions=3, negatives=false)
  r["regions"][0] |= {"negatives": ["\u2003", "another"], "score": float("nan")}
  r["regions"][1]["score"], r["regions"][2]["score"] = 1e300, None
  opened = dataset.open_dataset(toy_data.built(tmp_path / "d", [r]))
  parsed = opened.parse("train", 0)
  assert parsed.negatives == [(b"a lie", b"object")]
  assert parsed.region_negatives == [[b"another"], [], []]
  assert parsed.scores.tolist() == [0, 0, 1]
  counts = opened.manifest["kept_and_dropped"]["negatives"]
  assert counts["reasons"] == {"empty_negative": 3} and counts["kept"] == 1
  assert opened.manifest["hints"] == [
    "2 regions have a score that is NaN or infinite: it becomes 0"
  ]


def test_tfds_reads_the_directory(tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")
  mask = np.full((48, 48), 3, np.uint8)
  pairs = [("train", toy_data.record(i)) for i in range(6)]
  pairs += [("val", toy_data.record(i, mask=mask, label=i)) for i in range(6, 9)]
  out = toy_data.built(tmp_path / "d", pairs, with_mask=True, with_label=True)
  builder = tfds.builder_from_directory(str(out))
  for split, numbers in (("train", range(6)), ("val", range(6, 9))):
    data = builder.as_data_source(split=split)
    assert len(data) == len(numbers)
    for got, i in zip(data, numbers, strict=True):
      want = toy_data.record(i)
      assert got["key"].decode() == f"r{i}"
      assert [c.decode() for c in got["captions"]] == want["captions"]
      assert len(got["regions"]["description"]) == len(want["regions"])
      np.testing.assert_allclose(got["regions"]["box"], [g["box"] for g in want["regions"]])
      pixels = np.asarray(decoding.decode(want["image"]), int)
      assert np.abs(got["image"].astype(int) - pixels).max() <= 3  # another JPEG decoder
      assert got["label"] == (i if split == "val" else -1)
      assert got["mask"].shape == ((48, 48, 1) if split == "val" else (1, 1, 1))
  opened = dataset.open_dataset(out)
  assert opened.splits == ("train", "val") and opened.num_records("train") == 6
  assert [s["records"] for s in opened.manifest["splits"]["train"]["shards"]] == [4, 2]
  assert opened.parse("val", 1).key == b"r7"


def test_a_build_does_without_tensorflow(tmp_path):
  """It is seconds of one core, at the end, while all others wait."""
  paths = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parent)]
  out = str(tmp_path / "d")
  program = (
    f"import sys; sys.path[:0] = {paths!r}; import toy_data\n"
    f"toy_data.built({out!r}, [toy_data.record(0)], with_mask=True, with_label=True)\n"
    "print(sorted({'tensorflow', 'keras', 'jax'} & set(sys.modules)))"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.stdout == "[]\n", done.stderr
  assert (tmp_path / "d" / "features.json").is_file()


def test_a_manifest_is_utf_8_in_any_locale(tmp_path):
  out = toy_data.built(tmp_path / "d", [toy_data.record(0)], about={"class_names": ["crème"]})
  program = "from grain_jax.data import dataset; import sys; "
  program += "print(ascii(dataset.open_dataset(sys.argv[1]).class_names))"
  locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
  done = subprocess.run(
    [sys.executable, "-c", program, str(out)],
    capture_output=True, text=True, env=os.environ | locale,
    cwd=pathlib.Path(__file__).parents[2],
  )  # fmt: skip
  assert done.stdout.strip("()[],\n") == "'cr\\xe8me'", done.stderr


@pytest.mark.parametrize(
  "box, want",
  [
    ((0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
    ((-0.0005, 0, 1.0005, 1), (0, 0, 1, 1)),
    ((-0.01, 0, 1, 1), records.BOX_OUTSIDE),
    ((0, 0, 1, 1.5), records.BOX_OUTSIDE),
    ((0.5, 0.5, 0.5, 0.9), records.BOX_NO_AREA),
    ((0.5, 0.9, 0.9, 0.5), records.BOX_NO_AREA),
    ((0.1, 1, 0.2, 1.0009), records.BOX_NO_AREA),
    ((0.5, 0.5, 0.5 + 1e-12, 0.9), records.BOX_NO_AREA),
    ((0, 0, float("nan"), 1), records.BOX_NOT_FINITE),
    ((0, 0, float("inf"), 1), records.BOX_NOT_FINITE),
    ((0, 0, 1), records.MALFORMED),
    (None, records.MALFORMED),
    (("a", 0, 1, 1), records.MALFORMED),
  ],
)
def test_boxes(box, want):
  got = records.check_box(box)
  assert got == want if isinstance(want, str) else got == pytest.approx(want)


def test_what_is_dropped_is_counted(tmp_path):
  good = toy_data.record(0)
  bad_regions = [
    {**REGION, "description": "  "},
    {**REGION, "box": (0, 0, 2, 1)},
    {**REGION, "box": (0.2, 0.2, 0.2, 0.4)},
    {**REGION, "box": (0.2, float("nan"), 0.3, 0.4)},
    REGION,
  ]
  source = [
    good,
    toy_data.record(1, image=good["image"][: len(good["image"]) // 2]),
    toy_data.record(2, image=b"no picture"),
    toy_data.record(3, captions=["", "  "]),
    toy_data.record(4, captions=["", "a second caption"]),
    toy_data.record(5) | {"regions": bad_regions},
    toy_data.record(6, regions=0),
    toy_data.record(7, image=pathlib.Path("/nowhere/x.jpg")),
    good,
  ]
  out = toy_data.built(tmp_path / "d", source)
  entry = json.loads((out / "manifest.json").read_text())["splits"]["train"]
  assert entry["dropped"] == {
    "records": {
      "corrupt_image": {"count": 2, "first": ["r1", "r2"]},
      "no_caption": {"count": 1, "first": ["r3"]},
      "missing_image": {"count": 1, "first": ["r7"]},
      "duplicate_key": {"count": 1, "first": ["r0"]},
    },
    "captions": {"empty_caption": {"count": 3, "first": ["r3", "r3", "r4"]}},
    "regions": {
      name: {"count": 1, "first": ["r5"]}
      for name in ("empty_description", "box_outside_image", "box_without_area", "box_not_finite")
    },
    "negatives": {},
  }
  assert entry["records"] == 4 and entry["records_without_regions"] == 1
  opened = dataset.open_dataset(out)
  assert [opened.parse("train", i).key for i in range(4)] == [b"r0", b"r4", b"r5", b"r6"]
  assert opened.parse("train", 1).captions == [b"a second caption"]
  assert opened.parse("train", 2).descriptions == [b"a red box"]


def test_shards_and_sums_are_in_the_manifest(tmp_path):
  import hashlib

  out = toy_data.built(tmp_path / "d", [toy_data.record(i) for i in range(9)])
  shards = json.loads((out / "manifest.json").read_text())["splits"]["train"]["shards"]
  assert [s["records"] for s in shards] == [4, 4, 1]
  for shard in shards:
    data = (out / shard["file"]).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_a_build_that_fails_leaves_nothing(tmp_path):
  def read():
    for i in range(6):
      yield "train", toy_data.record(i)
    raise ValueError("the source broke")

  broken = toy_data.base.Source("toy", {}, read, {})
  with pytest.raises(ValueError, match="the source broke"):
    build.build(broken, tmp_path / "d", shard_size=2, say=toy_data.quiet)
  assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
import toy_data
from grain_jax.data import build
from grain_jax.data.sources import base
def read():
  for i in range(6):
    yield "train", toy_data.record(i)
  print("ready", flush=True)
  time.sleep(60)
build.build(base.Source("toy", {{}}, read, {{}}, check_image=False), {out!r}, shard_size=2)
"""


@pytest.mark.slow
def test_a_killed_build_is_not_taken_for_a_whole_one(tmp_path):
  out = tmp_path / "d"
  paths = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parent)]
  program = KILLED.format(paths=paths, out=str(out))
  process = subprocess.Popen(
    [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  assert not out.exists() and [p.name for p in tmp_path.iterdir()] == ["d.part"]
  with pytest.raises(ValueError, match=r"only an unfinished build \(d.part\).*Build it") as error:
    dataset.open_dataset(out)
  assert "\n" not in str(error.value)
  toy_data.built(out, [toy_data.record(0)])
  assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_the_same_again_is_not_built_again(tmp_path):
  out = toy_data.built(tmp_path / "d", [toy_data.record(i) for i in range(3)])
  before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}

  def read():
    raise AssertionError("read again")

  said = []
  same = toy_data.base.Source("toy", {"records": 3}, read, {})
  build.build(same, out, shard_size=4, say=said.append)
  assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
  assert said == [f"{out} is already built with these settings: train 3."]


def test_other_settings_need_overwrite(tmp_path):
  out = toy_data.built(tmp_path / "d", [toy_data.record(i) for i in range(3)])
  other = toy_data.source([toy_data.record(i) for i in range(2)])
  with pytest.raises(
    ValueError, match=r"\(records: 3 -> 2; shard_size: 4 -> 16384\).*--overwrite"
  ) as error:
    build.build(other, out, say=toy_data.quiet)
  assert "\n" not in str(error.value) and dataset.open_dataset(out).num_records("train") == 3
  build.build(other, out, overwrite=True, say=toy_data.quiet)
  assert dataset.open_dataset(out).num_records("train") == 2
  assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_foreign_directory_is_never_replaced(tmp_path):
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(ValueError, match="is not a dataset"):
    build.build(toy_data.source([toy_data.record(0)]), tmp_path, overwrite=True)
  assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_nothing_usable_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="no usable record.*corrupt_image"):
    toy_data.built(tmp_path / "d", [toy_data.record(0, image=b"x")])
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "required: --source"),
    (["--source=cats", "--out=x"], "invalid choice: 'cats'"),
    (["--source=scenes"], "required: --out"),
    (["--source=scenes", "--out=x", "--trane=4"], "unrecognized arguments: --trane=4"),
    (["--source=scenes", "--out=x", "--seed=one"], "argument --seed: invalid int value: 'one'"),
    (["--source=scenes", "--out=x", "--seed=-1"], "settings.seed = -1"),
    (["--source=scenes", "--out=x", "--shard_size=0"], "--shard_size = 0"),
    (["--source=folder", "--out=x", "--input=/nowhere"], "--input = /nowhere: there is no"),
    (["--source=folder", "--out=x", "--input=."], "neither annotations.jsonl nor"),
    (
      ["--source=folder", "--out=x", "--input=.", "--max_pixels=0"],
      "--max_pixels = 0 is not in [1",
    ),
    (
      ["--source=published", "--out=x", "--images=.", "--captions=c", "--max_pixels=178956971"],
      "--max_pixels = 178956971 is not in [1, 178956970]",
    ),
  ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  try:
    code = build.main(flags)
  except SystemExit as error:
    code = error.code
  assert code == 2 and list(tmp_path.iterdir()) == []
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


def test_scenes_from_the_command_line(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  flags = ["--source=scenes", "--train=5", "--val=3", "--objects_per_class=1", "--concepts=2"]
  flags += ["--workers=0", f"--out={tmp_path / 'scenes'}"]
  assert build.main(flags) == 0
  assert "train 5, val 3, objects 16 in" in capsys.readouterr().out
  assert build.main(flags) == 0
  assert "already built" in capsys.readouterr().out
  opened = dataset.open_dataset(tmp_path / "scenes")
  assert len(opened.class_names) == 16 and len(opened.unseen_pairs) == 3
  assert opened.descriptors.keys() == set(opened.class_names)
  assert opened.manifest["licence"] == "CC BY-SA 4.0"
  labels = [opened.parse("objects", i).label for i in range(16)]
  assert sorted(labels) == list(range(16)) and opened.parse("train", 0).label == -1
  assert opened.parse("val", 0).mask.startswith(b"\x89PNG")
