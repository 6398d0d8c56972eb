"""Visual Genome's region descriptions, oddities of its files included."""

import box_layouts
import pytest
from box_layouts import box

from grain_jax.data.sources import base
from grain_jax.data.sources import visual_genome as visual_genome_source


def test_regions_of_both_key_forms_and_folders(tmp_path):
  box_layouts.visual_genome(tmp_path / "in")
  opened = box_layouts.built("visual_genome", tmp_path / "in", tmp_path / "out")
  assert box_layouts.content(opened) == {
    "train": {
      "VG_100K_2/1.jpg": (
        ["shade is along the street. the clock is green"],
        [
          ("the clock is green", box(0.25, 0.25, 0.75, 0.75)),
          ("shade is along the street", box(0, 0, 1, 1)),  # a pixel over the edge
        ],
      ),
      "VG_100K/2.jpg": (["a 1 px dot"], [("a 1 px dot", box(0.95, 0.975, 1, 1))]),
    }
  }
  assert box_layouts.dropped(opened) == {
    ("regions", "empty_description"): 1,
    ("regions", "box_without_area"): 1,
    ("regions", "box_outside_image"): 1,
    ("regions", "annotation_without_image"): 1,
  }


def test_captions_are_cocos_where_an_image_is_one_of_cocos(tmp_path):
  root = tmp_path / "in"
  box_layouts.visual_genome(root)
  box_layouts.coco(tmp_path / "coco")
  captions = tmp_path / "coco/annotations/captions_train2017.json"
  twice = ["--captions", str(captions), str(captions)]  # as in the files of 2014 and 2017
  opened = box_layouts.built("visual_genome", root, tmp_path / "out", *twice)
  texts = {key: said[0] for key, said in box_layouts.content(opened)["train"].items()}
  assert texts["VG_100K/2.jpg"] == ["A meal.", "Lunch"]
  assert texts["VG_100K_2/1.jpg"][0] == "shade is along the street. the clock is green"
  assert ("captions", "annotation_without_image") not in box_layouts.dropped(opened)


def test_coco_ids_are_handed_over_and_not_written(tmp_path):
  box_layouts.visual_genome(tmp_path)
  source = visual_genome_source.source(tmp_path)
  items = [item for _, item in base.iterate(source) if isinstance(item, dict)]
  assert [item["ids"] for item in items] == [[], ["9"]]


def test_a_file_that_is_not_there_is_one_line(tmp_path):
  box_layouts.visual_genome(tmp_path)
  (tmp_path / "region_descriptions.json").rename(tmp_path / "regions.json")
  other = tmp_path / "regions.json"
  with pytest.raises(ValueError, match=rf"^--annotations = {other}: neither image_data.json nor"):
    visual_genome_source.source(tmp_path, annotations=other)
  with pytest.raises(ValueError, match=r"holds region_descriptions.json\. Give the folder"):
    visual_genome_source.source(tmp_path)
