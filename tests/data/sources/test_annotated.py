"""Annotations looked up by key and added to what a source knows."""

import json

import pytest
import toy_data

from grain_jax.data import build, dataset
from grain_jax.data.sources import annotated, options
from grain_jax.data.sources import folder as folder_source


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "in"
  root.mkdir()
  region = {"description": "own", "box": [1, 1, 20, 30], "score": 0.5}
  with (root / "annotations.jsonl").open("w") as lines:
    for i in range(4):
      (root / f"{i}.jpg").write_bytes(toy_data.record(i)["image"])
      line = {"image": f"{i}.jpg", "captions": [f"picture {i}"], "regions": [region]}
      lines.write(json.dumps(line) + "\n")
  return root


def write(out, *parts, finished=True):
  (out / "annotations").mkdir(parents=True)
  for number, lines in enumerate(parts):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "annotations" / f"{number:06d}.jsonl").write_text(text)
  if finished:
    (out / "manifest.json").write_text('{"stage": "describe"}')
  return out


def built(folder, out, written):
  source = folder_source.source(folder, box_format="xyxy", box_units="pixels")
  source = options.apply(source, {"annotated": str(written)})
  build.build(source, out, workers=0, allow_dropped=1, say=toy_data.quiet)
  return dataset.open_dataset(out)


def test_captions_are_added_and_regions_take_the_place_of_the_sources(folder, tmp_path):
  """Whatever the source's own boxes are written in."""
  box = [0.1, 0.2, 0.5, 0.6]
  good = {"description": "found", "box": box, "score": 0.7, "negatives": ["a lie"]}
  written = write(
    tmp_path / "annotated",
    [{"key": "0.jpg", "captions": ["generated"], "descriptions": ["found"], "regions": [good]}],
    [{"key": "2.jpg", "regions": [good, {**good, "box": [0, 0, 9, 9]}], "negatives": [
      {"caption": "a false one", "kind": "object"}]},
     {"key": "3.jpg", "regions": []}],
  )  # fmt: skip
  opened = built(folder, tmp_path / "out", written)
  found = [opened.parse("train", i) for i in range(4)]
  assert [r.captions for r in found[:2]] == [[b"picture 0", b"generated"], [b"picture 1"]]
  assert [[d.decode() for d in r.descriptions] for r in found] == [
    ["found"],
    ["own"],
    ["found"],
    [],
  ]
  assert found[0].boxes[0].tolist() == pytest.approx(box)
  assert found[0].region_negatives == [[b"a lie"]]
  assert found[2].negatives == [(b"a false one", b"object")]
  dropped = opened.manifest["splits"]["train"]["dropped"]["regions"]
  assert dropped == {"box_outside_image": {"count": 1, "first": ["2.jpg"]}}
  (hint,) = opened.manifest["hints"]
  assert hint.startswith("1 of 4 images have no line in --annotated") and "1.jpg" in hint


def test_of_two_lines_with_one_key_the_first_counts(folder, tmp_path):
  """As of two records: else an image is given the boxes of another."""
  lines = [{"key": f"{i}.jpg", "captions": [f"line {i}"]} for i in range(4)]
  written = write(tmp_path / "annotated", lines, [{"key": "2.jpg", "captions": ["another"]}] * 2)
  opened = built(folder, tmp_path / "out", written)
  assert opened.parse("train", 2).captions == [b"picture 2", b"line 2"]
  assert opened.manifest["hints"] == [
    "2 lines in --annotated repeat the key of an earlier one, which counts"
  ]


def test_lines_of_other_images_are_a_line(folder, tmp_path):
  written = write(tmp_path / "annotated", [{"key": "in/0.jpg", "captions": ["generated"]}])
  with pytest.raises(ValueError, match=r"no line of any of the 4 images: its keys are like 'in"):
    built(folder, tmp_path / "out", written)
  with pytest.raises(ValueError, match=r"no line of any of the 4 images: it is empty"):
    built(folder, tmp_path / "out", write(tmp_path / "empty", []))
  assert not (tmp_path / "out").exists()
  source = folder_source.source(folder, box_format="xyxy", box_units="pixels")
  build.build(source, tmp_path / "out", workers=0, say=toy_data.quiet)
  with pytest.raises(ValueError, match=r"manifest.json is not that of a stage of grain"):
    annotated.Annotated.from_flag(tmp_path / "out")


@pytest.mark.parametrize("line", ["{", "3", '{"key": 3}', "{}"])
def test_a_line_without_a_key_is_said(folder, tmp_path, line):
  written = write(tmp_path / "annotated", [])
  (written / "annotations" / "000000.jsonl").write_text(f"{line}\n")
  with pytest.raises(ValueError, match=r"000000\.jsonl line 1 is no.* Mend it\.$"):
    built(folder, tmp_path / "out", written)


def test_a_folder_that_is_not_finished_is_a_line(folder, tmp_path):
  written = write(tmp_path / "annotated", [], finished=False)
  with pytest.raises(ValueError, match="has no manifest.json") as error:
    annotated.Annotated.from_flag(written)
  assert "\n" not in str(error.value)
