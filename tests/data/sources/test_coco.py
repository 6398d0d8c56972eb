"""COCO's captions and instances, of both years and in Karpathy's splits."""

import json

import box_layouts
import pytest
from box_layouts import box

from grain_jax.data.sources import base
from grain_jax.data.sources import coco as coco_source

NINE = ("traffic light", box(0.25, 0.25, 0.75, 0.75))
TWENTY_FIVE = ("person", box(2 / 20, 4 / 40, 6.25 / 20, 12.5 / 40))


def test_captions_and_instances(tmp_path):
  box_layouts.coco(tmp_path / "in")
  opened = box_layouts.built("coco", tmp_path / "in", tmp_path / "out")
  assert box_layouts.content(opened) == {
    "train": {
      "000000000009": (["A meal.", "Lunch"], [NINE]),
      "000000000025": (["A giraffe"], [TWENTY_FIVE]),
    },
    "val": {"000000000139": (["A room"], [])},
  }
  assert box_layouts.dropped(opened) == {
    ("captions", "annotation_without_image"): 1,
    ("regions", "crowd"): 1,
    ("regions", "unknown_category"): 1,
    ("regions", "box_without_area"): 1,
    ("regions", "box_outside_image"): 1,
    ("regions", "box_not_finite"): 1,
    ("regions", "malformed"): 1,
  }


def test_instances_alone_give_a_caption_of_names(tmp_path):
  box_layouts.coco(tmp_path / "in")
  file = tmp_path / "in/annotations/instances_train2017.json"
  opened = box_layouts.built("coco", tmp_path / "in", tmp_path / "out", f"--annotations={file}")
  assert box_layouts.content(opened)["train"] == {
    "000000000009": (["traffic light"], [NINE]),
    "000000000025": (["person"], [TWENTY_FIVE]),
  }


def test_names_of_2014_and_images_elsewhere(tmp_path):
  root, images = tmp_path / "in", tmp_path / "pictures"
  name = "COCO_val2014_000000391895.jpg"
  box_layouts.image(images, f"val2014/{name}")
  entry = box_layouts.size(id=391895, file_name=name)
  captions = [{"id": 1, "image_id": 391895, "caption": "A man"}]
  content = {"images": [entry], "annotations": captions}
  file = box_layouts.write(root, "captions_val2014.json", content)
  flags = [f"--annotations={file}", f"--images={images}"]
  opened = box_layouts.built("coco", root, tmp_path / "out", *flags)
  assert box_layouts.content(opened) == {"val": {"000000391895": (["A man"], [])}}
  (images / "val2014").rename(images / "elsewhere")  # the same image as 2017 names it
  box_layouts.image(images, "train2017/000000391895.jpg")
  opened = box_layouts.built("coco", root, tmp_path / "other", *flags)
  assert opened.num_records("val") == 1
  box_layouts.write(root, "captions_val2017.json", content)
  with pytest.raises(ValueError, match=r"of 2014 and 2017, of the same images.*--year=2017\.$"):
    coco_source.source(root)
  assert coco_source.source(root, year="2014").settings["files"][0]["path"] == str(file)


def test_karpathys_splits_with_boxes_of_instances(tmp_path):
  root = tmp_path / "in"
  box_layouts.coco(root)
  images = [
    {"filepath": "train2014", "filename": f"COCO_train2014_{n:012d}.jpg", "cocoid": n}
    | {"split": split, "sentences": [{"raw": f"{n}.", "tokens": [str(n)], "sentid": n}]}
    for n, split in ((9, "restval"), (25, "test"), (139, "val"))
  ]
  box_layouts.write(root, "dataset_coco.json", {"images": images, "dataset": "coco"})
  opened = box_layouts.built("coco", root, tmp_path / "out")
  assert box_layouts.content(opened) == {
    "train": {"000000000009": (["9."], [NINE])},
    "test": {"000000000025": (["25."], [TWENTY_FIVE])},
    "val": {"000000000139": (["139."], [])},
  }
  annotations = root / "annotations"
  for split in ("train", "val"):  # of 2014: the same boxes under other names
    content = (annotations / f"instances_{split}2017.json").read_text()
    box_layouts.write(annotations, f"instances_{split}2014.json", content)
  with pytest.raises(ValueError, match=r"of 2014 and 2017, of the same images.*--year=2017\.$"):
    coco_source.source(root)
  for year in ("2014", "2017"):
    again = box_layouts.built("coco", root, tmp_path / year, f"--year={year}")
    assert box_layouts.content(again) == box_layouts.content(opened)


def test_coco_ids_are_handed_over(tmp_path):
  box_layouts.coco(tmp_path)
  items = [item for _, item in base.iterate(coco_source.source(tmp_path)) if isinstance(item, dict)]
  assert [item["ids"] for item in items] == [["9"], ["25"], ["139"]]


@pytest.mark.parametrize("bad", [3, None, [1], {"id": True, "file_name": "a.jpg"}, {"id": 5}])
def test_a_malformed_image_or_annotation_costs_itself_alone(tmp_path, bad):
  root = tmp_path / "in"
  box_layouts.coco(root)
  file = root / "annotations/captions_train2017.json"
  content = json.loads(file.read_text())
  content["images"].insert(0, bad)
  content["annotations"].insert(0, bad)
  file.write_text(json.dumps(content))
  opened = box_layouts.built("coco", root, tmp_path / "out")
  assert opened.num_records("train") == 2
  assert box_layouts.dropped(opened)[("images", "malformed")] == 1


def test_an_image_that_leads_out_of_the_folder_is_refused(tmp_path):
  root = tmp_path / "in"
  box_layouts.coco(root)
  file = root / "annotations/captions_train2017.json"
  file.write_text(file.read_text().replace('"000000000009.jpg"', '"../../../etc/9.jpg"'))
  opened = box_layouts.built("coco", root, tmp_path / "out")
  assert box_layouts.dropped(opened)[("images", "outside_the_folder")] == 1


def test_a_folder_of_something_else_is_one_line(tmp_path):
  with pytest.raises(ValueError, match=r"neither it nor its folder annotations holds captions_"):
    coco_source.source(tmp_path)
