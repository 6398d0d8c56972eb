"""Open Images' boxes, in their own order."""

import box_layouts
import pytest
from box_layouts import box

from grain_jax.data.sources import base
from grain_jax.data.sources import open_images as open_images_source

FIRST = ("Person", box(0.148438, 0.0125, 0.5875, 0.195312))
GROUP = ("Person", box(0.25, 0.5, 0.75, 1))
DRAWN = ("Cat, big", box(0, 0, 0.5, 0.25))
CAT = ("Cat, big", box(0.125, 0.25, 1, 0.5))


def test_boxes_groups_and_depictions(tmp_path):
  box_layouts.open_images(tmp_path / "in")
  opened = box_layouts.built("open_images", tmp_path / "in", tmp_path / "out")
  assert box_layouts.content(opened) == {
    "train": {
      "000002b66c9c498e": (["Person"], [FIRST]),
      "00000b4dcff7f799": (["Cat, big"], [CAT]),
    },
    "val": {"0001eeaf4aed83f9": (["Cat, big"], [("Cat, big", box(0.25, 0, 0.75, 0.5))])},
  }
  assert box_layouts.dropped(opened) == {
    ("regions", "group_of"): 1,
    ("regions", "depiction"): 1,
    ("regions", "unknown_class"): 1,
    ("regions", "box_without_area"): 1,
    ("regions", "box_not_finite"): 1,
  }
  flags = ["--keep_groups", "--keep_depictions"]
  opened = box_layouts.built("open_images", tmp_path / "in", tmp_path / "kept", *flags)
  said = (["Person, Cat, big"], [FIRST, GROUP, DRAWN])
  assert box_layouts.content(opened)["train"]["000002b66c9c498e"] == said


def test_captions_of_localized_narratives(tmp_path):
  root = tmp_path / "in"
  box_layouts.open_images(root)
  said = {"dataset_id": "open_images_train", "image_id": "000002b66c9c498e", "caption": "A man."}
  lines = box_layouts.lines(said, {**said, "image_id": "elsewhere"}, "{", {"caption": "x"})
  name = "open_images_train_v6_localized_narratives-00000-of-00010.jsonl"
  box_layouts.write(root, name, lines)
  opened = box_layouts.built("open_images", root, tmp_path / "out")
  content = box_layouts.content(opened)["train"]
  assert [content[key][0] for key in sorted(content)] == [["A man."], ["Cat, big"]]
  assert box_layouts.dropped(opened)[("captions", "malformed")] == 2


def test_later_releases_name_the_classes_under_a_header(tmp_path):
  box_layouts.open_images(tmp_path)
  file = tmp_path / "class-descriptions-boxable.csv"
  file.write_text("LabelName,DisplayName\n" + file.read_text())
  file.rename(tmp_path / "oidv7-class-descriptions-boxable.csv")
  items = [i for _, i in base.iterate(open_images_source.source(tmp_path)) if isinstance(i, dict)]
  assert items[0]["regions"][0]["description"] == "Person"


def test_a_table_of_something_else_is_one_line(tmp_path):
  box_layouts.open_images(tmp_path)
  file = tmp_path / "validation-annotations-bbox.csv"
  for text in ("ImageID,LabelName\n", "a\n", "", 'ImageID,"\n'):
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"^{file} .*\.$") as raised:
      list(base.iterate(open_images_source.source(tmp_path)))
    assert "\n" not in str(raised.value)
  (tmp_path / "class-descriptions-boxable.csv").unlink()
  with pytest.raises(ValueError, match="^--classes: .* holds no class-descriptions-boxable.csv"):
    open_images_source.source(tmp_path)
