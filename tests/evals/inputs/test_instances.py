"""Annotations in COCO's format: as pycocotools reads them, LVIS's fields, and what is wrong."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from grain_jax.evals.inputs import instances
from grain_jax.evals.inputs.options import Options

IMAGES = [
  {"id": 7, "file_name": "a.png", "width": 200, "height": 100},
  {"id": 3, "file_name": "b.png", "width": 50, "height": 50},
]
CATEGORIES = [{"id": 18, "name": "traffic_light"}, {"id": 2, "name": "cat"}]
BOX = {"id": 1, "image_id": 7, "category_id": 2, "bbox": [20, 10, 100, 50], "area": 3000.0}


def write(path, **changes):
  content = {"images": IMAGES, "annotations": [BOX], "categories": CATEGORIES} | changes
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))
  return path


def test_a_file_is_read_as_pycocotools_reads_it(tmp_path):
  rng = np.random.default_rng(0)
  annotations = [
    BOX
    | {
      "id": i,
      "image_id": int(rng.choice([7, 3])),
      "category_id": int(rng.choice([18, 2])),
      "bbox": rng.integers(1, 20, 4).tolist(),
      "area": float(i),
      "iscrowd": int(i % 5 == 0),
    }
    for i in range(1, 30)
  ]
  file = write(tmp_path / "x.json", annotations=annotations)
  with contextlib.redirect_stdout(io.StringIO()):
    coco = COCO(str(file))
  content = instances.read(file)
  assert content.names == {18: "traffic light", 2: "cat"}
  assert [p.id for p in content.images] == [7, 3] and not content.federated
  assert content.clipped == content.dropped == 0
  for picture in content.images:
    theirs = coco.loadAnns(coco.getAnnIds(imgIds=picture.id))
    x, y, w, h = np.array([a["bbox"] for a in theirs]).T
    expected = np.stack([x + w / 2, y + h / 2, w, h], 1)
    side = [picture.width, picture.height] * 2
    np.testing.assert_allclose(picture.boxes * side, expected, atol=1e-9)
    assert picture.category.tolist() == [a["category_id"] for a in theirs]
    assert picture.area.tolist() == [a["area"] for a in theirs]
    assert picture.crowd.tolist() == [bool(a["iscrowd"]) for a in theirs]
    assert picture.single().tolist() == np.flatnonzero(~picture.crowd).tolist()


@settings(max_examples=100, deadline=None)
@given(
  box=st.lists(st.floats(-300, 300), min_size=4, max_size=4),
)
def test_boxes_end_up_inside_or_are_dropped(tmp_path_factory, box):
  file = write(tmp_path_factory.mktemp("x") / "x.json", annotations=[BOX | {"bbox": box}])
  content = instances.read(file)
  boxes = content.images[0].boxes
  assert len(boxes) == 1 - content.dropped and content.clipped <= 1 - content.dropped
  x, y, w, h = box
  visible = max(min(x + w, 200) - max(x, 0), 0) * max(min(y + h, 100) - max(y, 0), 0)
  if w <= 0 or h <= 0:
    visible = 0
  for cx, cy, width, height in boxes:
    assert cx - width / 2 >= -1e-9 and cx + width / 2 <= 1 + 1e-9 and width > 0
    assert cy - height / 2 >= -1e-9 and cy + height / 2 <= 1 + 1e-9 and height > 0
    assert width * 200 * height * 100 == pytest.approx(visible, rel=1e-6, abs=1e-9)
  if visible > 1e-6:
    assert len(boxes) == 1


def test_clipped_and_degenerate_boxes_are_counted(tmp_path):
  boxes = [
    [-10, 0, 30, 30],  # clipped
    [150, 50, 50.5, 50],  # half a pixel: rounding, not counted
    [10, 10, 0, 5],  # no area
    [300, 10, 5, 5],  # outside
    [0, 0, 200, 100],
  ]
  file = write(tmp_path / "x.json", annotations=[BOX | {"bbox": box} for box in boxes])
  content = instances.read(file)
  assert (content.clipped, content.dropped) == (1, 2)
  np.testing.assert_allclose(
    content.images[0].boxes,
    [[0.05, 0.15, 0.1, 0.3], [0.875, 0.75, 0.25, 0.5], [0.5, 0.5, 1, 1]],
  )


def test_lvis_has_urls_and_says_what_was_looked_for(tmp_path):
  image = {k: v for k, v in IMAGES[0].items() if k != "file_name"} | {
    "coco_url": "http://images.cocodataset.org/train2017/000000000007.jpg",
    "neg_category_ids": [18],
    "not_exhaustive_category_ids": [2],
  }
  categories = [c | {"frequency": f} for c, f in zip(CATEGORIES, "rf", strict=True)]
  file = write(tmp_path / "x.json", images=[image], categories=categories)
  content = instances.read(file)
  (picture,) = content.images
  assert content.federated and content.frequency == {18: "r", 2: "f"}
  assert (picture.absent, picture.not_exhaustive) == ({18}, {2})
  assert picture.name == "train2017/000000000007.jpg" and not picture.crowd.any()
  assert instances.SETS["lvis"].file(tmp_path, picture.name) == (
    tmp_path / "coco" / "train2017" / "000000000007.jpg"
  )
  assert instances.SETS["coco"].file(tmp_path, "1.jpg") == tmp_path / "coco" / "val2017" / "1.jpg"


def test_area_is_that_of_the_box_where_the_file_has_none(tmp_path):
  annotation = {k: v for k, v in BOX.items() if k != "area"}
  content = instances.read(write(tmp_path / "x.json", annotations=[annotation]))
  assert content.images[0].area == pytest.approx([5000])


def test_a_changed_file_is_read_again(tmp_path):
  file = write(tmp_path / "x.json")
  assert len(instances.read(file).images) == 2
  write(file, images=IMAGES[:1])
  assert len(instances.read(file).images) == 1


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({"images": None}, "not of COCO's format: it has no list 'images'"),
    ({"annotations": {}}, "has no list 'annotations'"),
    ({"images": [{"id": 7, "file_name": "a.png"}]}, r"images\[0\] has width = None"),
    ({"images": [IMAGES[0], IMAGES[0]]}, r"images\[1\]: id 7 stands there twice"),
    ({"images": [IMAGES[0] | {"width": 0}]}, "0 x 100 pixels"),
    ({"images": [IMAGES[0] | {"file_name": ""}]}, "neither file_name nor coco_url"),
    ({"annotations": [BOX | {"image_id": 9}]}, r"annotations\[0\]: there is no image 9"),
    ({"annotations": [BOX | {"category_id": 9}]}, "there is no category 9"),
    ({"annotations": [BOX | {"bbox": [1, 2, 3]}]}, r"bbox = \[1, 2, 3\] is no"),
    ({"annotations": [BOX | {"bbox": [1, 2, 3, "4"]}]}, "is no "),
    ({"annotations": ["box"]}, r"annotations\[0\] has image_id = None"),
    ({"categories": [{"id": 2}]}, r"categories\[0\] has name = None"),
    (
      {"categories": [*CATEGORIES, CATEGORIES[0] | {"name": "other"}]},
      rf"categories\[2\]: id {CATEGORIES[0]['id']} stands there twice",
    ),
    ({"annotations": [BOX, BOX | {"bbox": [0, 0, 10**400, 1]}]}, r"annotations\[1\]: bbox = "),
    ({"annotations": [BOX, BOX | {"area": 10**400}]}, r"annotations\[1\]: area = 1000"),
    ({"annotations": [BOX | {"area": "large"}]}, "area = 'large' is no number of pixels"),
    (
      {"annotations": [BOX | {"neg_category_ids": 5}]},
      r"annotations\[0\]: neg_category_ids = 5 is",
    ),
    (
      {"annotations": [BOX | {"neg_category_ids": [[2]]}]},
      r"neg_category_ids = \[\[2\]\] is no list",
    ),
    ({"images": [IMAGES[0] | {"neg_category_ids": 5}]}, r"images\[0\]: neg_category_ids = 5 is"),
    (
      {"images": [IMAGES[0] | {"not_exhaustive_category_ids": {}}]},
      r"images\[0\]: not_exhaustive_category_ids = \{\} is no list",
    ),
    ({"images": [IMAGES[0] | {"width": 10**400}]}, r"images\[0\] has width = 10+, which 64 bits"),
    (
      {
        "categories": [{"id": 10**20, "name": "cat"}],
        "annotations": [BOX | {"category_id": 10**20}],
      },
      r"categories\[0\] has id = 1\d+, which 64 bits",
    ),
  ],
)
def test_a_malformed_file_is_one_clear_line(tmp_path, changes, line):
  with pytest.raises(ValueError, match=line) as error:
    instances.read(write(tmp_path / "x.json", **changes))
  assert "\n" not in str(error.value) and "x.json" in str(error.value)


def test_what_is_missing_is_one_clear_line(tmp_path):
  def check(name="mine", root=tmp_path):
    instances.check(name, Options(root=root), what=f"detection:{name}")

  with pytest.raises(ValueError, match="give --datasets=DIR"):
    check("coco", None)
  with pytest.raises(ValueError, match="no .*instances_val2017.json. Get val2017.zip"):
    check("coco")
  with pytest.raises(ValueError, match="Known sets are coco, lvis; for your own"):
    check()
  file = write(tmp_path / "mine" / "instances.json")
  with pytest.raises(ValueError, match="none of its 2 pictures is there, not .*images/a.png"):
    check()
  write(file, annotations=[BOX | {"iscrowd": 1}])
  with pytest.raises(ValueError, match="has no box for its 2 images"):
    check()
  file.write_text("[1, 2")
  with pytest.raises(ValueError, match="is not JSON"):
    check()
