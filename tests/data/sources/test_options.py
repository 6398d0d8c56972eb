"""What a build may ask of every source, from the flags to the shards, in any process."""

import io
import json

import numpy as np
import pytest
import toy_data
from PIL import Image

from grain_jax.data import build, dataset, decoding
from grain_jax.data.building import flags as build_flags


def picture(seed, size=(300, 200)):
  """Smooth noise, whose perceptual hash is far from that of another seed."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
  return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Twenty pictures of 300 x 200, of five regions each; the last one of 60 x 40."""
  root = tmp_path_factory.mktemp("in")
  regions = [
    {"description": "a", "box": [0.0, 0.0, 0.5, 0.5], "score": 0.9},
    {"description": "b", "box": [0.0, 0.0, 0.5, 0.48], "score": 0.8},  # over a
    {"description": "a", "box": [0.6, 0.6, 0.9, 0.9], "score": 0.7},  # a again
    {"description": "c", "box": [0.6, 0.0, 0.62, 0.02], "score": 0.6},  # small
    {"description": "d", "box": [0.6, 0.1, 0.9, 0.4], "score": 0.1},
  ]
  with (root / "annotations.jsonl").open("w") as lines:
    for i in range(20):
      shown = picture(i, (60, 40) if i == 19 else (300, 200))
      shown.save(root / f"{i:02d}.jpg", quality=92)
      line = {"image": f"{i:02d}.jpg", "captions": [f"picture {i}"]}
      lines.write(json.dumps({**line, "regions": regions if i else []}) + "\n")
  return root


def built(folder, out, *flags, workers=0):
  parsed = build_flags.parse(
    ["--source=folder", f"--input={folder}", f"--out={out}", *flags], description=""
  )
  build.build(build_flags.source(parsed), out, workers=workers, say=toy_data.quiet)
  return dataset.open_dataset(out)


def dropped(opened):
  entry = opened.manifest["splits"]["train"]["dropped"]
  return {f"{kind}/{why}": v["count"] for kind, of in entry.items() for why, v in of.items()}


def test_rules_are_counted_and_are_no_fault_of_the_data(folder, tmp_path):
  """Four of five regions may go where that was asked for."""
  flags = ["--min_score=0.2", "--nms=0.5", "--min_area=0.001", "--merge_equal_spans"]
  opened = built(folder, tmp_path / "out", *flags, "--drop_ungrounded")
  assert opened.num_records("train") == 19 and opened.num_regions("train") == 19
  assert opened.parse("train", 0).descriptions == [b"a"]
  assert dropped(opened) == {
    "records/record_without_regions": 1,
    "regions/score_under_min_score": 19,
    "regions/overlaps_a_better_region": 19,
    "regions/equal_span_merged": 19,
    "regions/area_under_min_area": 19,
  }
  assert opened.manifest["settings"]["nms"] == 0.5
  with pytest.raises(ValueError, match=r"nms: .*0.5.*--overwrite"):
    built(folder, tmp_path / "out", *flags[:1])


def test_pictures_are_made_smaller_where_they_are_larger(folder, tmp_path):
  opened = built(folder, tmp_path / "out", "--max_side=90")
  sizes = {decoding.decode(opened.parse("train", i).image).size for i in range(19)}
  assert sizes == {(90, 60)}
  small = opened.parse("train", 19).image
  assert small == (folder / "19.jpg").read_bytes()
  shown = np.asarray(decoding.decode(opened.parse("train", 3).image), float)
  want = np.asarray(picture(3).resize((90, 60), Image.Resampling.LANCZOS), float)
  assert np.abs(shown - want).mean() < 3


def test_what_looks_like_an_evaluation_image_is_left_out_in_any_process(folder, tmp_path):
  """Smaller, re-encoded and brighter copies too; others stay."""
  evaluation = tmp_path / "evaluation" / "deep"
  evaluation.mkdir(parents=True)
  for i in (3, 11):
    copy = picture(i).resize((120, 90)).point(lambda value: min(255, value + 8))
    copy.save(evaluation / f"other-{i}.jpg", quality=60)
  ids = tmp_path / "ids.txt"
  ids.write_text("07.jpg\n")
  flags = [f"--exclude={tmp_path / 'evaluation'}", f"--exclude_ids={ids}"]
  opened = built(folder, tmp_path / "out", *flags)
  keys = {opened.parse("train", i).key.decode() for i in range(opened.num_records("train"))}
  assert keys == {f"{i:02d}.jpg" for i in range(20)} - {"03.jpg", "07.jpg", "11.jpg"}
  assert dropped(opened) == {"records/near_an_evaluation_image": 2, "records/evaluation_id": 1}
  again = built(folder, tmp_path / "again", *flags, workers=2)
  assert dropped(again) == dropped(opened)


def test_options_reach_a_worker(folder, tmp_path, monkeypatch):
  """More lines than a block has, so that two processes read them."""
  lines = (folder / "annotations.jsonl").read_text().splitlines()
  many = tmp_path / "many.jsonl"
  with many.open("w") as file:
    for i in range(1100):
      name = f"{i % 20:02d}.jpg"
      link = folder / f"x{i}.jpg"
      if not link.exists():
        link.symlink_to(name)
      file.write(lines[i % 20].replace(name, link.name) + "\n")
  flags = [f"--annotations={many}", "--max_regions=1", "--max_side=50"]
  one = built(folder, tmp_path / "one", *flags)
  two = built(folder, tmp_path / "two", *flags, workers=2)
  assert one.fingerprint("train") == two.fingerprint("train")
  assert one.num_regions("train") == 1045 and "max_side" in one.manifest["settings"]


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--max_side=-1", "--max_side = -1: no number of pixels"),
    ("--nms=1.5", "--nms = 1.5: not a fraction"),
    ("--max_regions=-2", "fewer than none"),
    ("--exclude=/nowhere", "there is no such file or folder"),
    ("--exclude_distance=70", "not of 64 bits"),
  ],
)
def test_what_cannot_be_asked_is_a_line(folder, tmp_path, flag, words):
  with pytest.raises(ValueError, match=words) as error:
    built(folder, tmp_path / "out", flag)
  assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_evaluation_folder_without_pictures_is_a_line(folder, tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="holds no image that can be read"):
    built(folder, tmp_path / "out", f"--exclude={tmp_path / 'empty'}")
  bad = tmp_path / "bad"
  bad.mkdir()
  stream = io.BytesIO()
  picture(0).save(stream, "JPEG")
  (bad / "x.jpg").write_bytes(stream.getvalue()[:100])
  with pytest.raises(ValueError, match="x.jpg cannot be compared with"):
    built(folder, tmp_path / "out", f"--exclude={bad}")
