"""Objects365 of both layouts."""

import box_layouts
from box_layouts import box


def test_the_second_version(tmp_path):
  box_layouts.objects365(tmp_path / "in")
  opened = box_layouts.built("objects365", tmp_path / "in", tmp_path / "out")
  regions = [("Sneakers", box(0.25, 0.25, 0.75, 0.75)), ("Person", box(0, 0, 0.1, 0.1))]
  assert box_layouts.content(opened) == {
    "train": {"patch8/objects365_v1_00420917.jpg": (["Sneakers, Person"], regions)}
  }
  assert box_layouts.dropped(opened) == {
    ("images", "known_missing_image"): 1,
    ("regions", "crowd"): 1,
  }
  assert opened.manifest["inputs"]["images"]["missing"] == 0


def test_an_image_known_to_be_missing_is_taken_where_it_is_there(tmp_path):
  box_layouts.objects365(tmp_path / "in")
  box_layouts.image(tmp_path / "in", "train/patch16/objects365_v2_00908726.jpg")
  opened = box_layouts.built("objects365", tmp_path / "in", tmp_path / "out")
  assert opened.num_records("train") == 2
  assert box_layouts.dropped(opened) == {("regions", "crowd"): 1}


def test_the_first_version(tmp_path):
  root = tmp_path / "in"
  for split, name in (("train", "obj365_train_000000000001.jpg"), ("val", "obj365_val_2.jpg")):
    box_layouts.image(root, f"{split}/{name}")
    content = {
      "images": [box_layouts.size(id=1, file_name=name)],
      "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [0, 0, 4, 2]}],
      "categories": [{"id": 5, "name": "Cup"}],
    }
    box_layouts.write(root, f"objects365_{split}.json", content)
  opened = box_layouts.built("objects365", root, tmp_path / "out")
  said = (["Cup"], [("Cup", box(0, 0, 0.1, 0.1))])
  assert box_layouts.content(opened) == {
    "train": {"obj365_train_000000000001.jpg": said},
    "val": {"obj365_val_2.jpg": said},
  }
