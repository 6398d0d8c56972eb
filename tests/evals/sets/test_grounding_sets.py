"""Grounding, detection, region classification and description choice on files, end to end.

The model of these tests knows the mean colour of what it sees; its queries are the four quarters of
the image and the whole. Images are quarters of plain colours, so every figure is known by hand.
"""

import json

import numpy as np
import pytest
from PIL import Image

from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import detection as detection_sets
from grain_jax.evals.sets import fine_grained as fine_grained_sets
from grain_jax.evals.sets import grounding as grounding_sets
from grain_jax.evals.sets import region_classification as region_classification_sets

FAMILIES = (grounding_sets, detection_sets, region_classification_sets, fine_grained_sets)
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
# Boxes of the quarters, (cx, cy, w, h): top left, top right, bottom left, bottom right; the whole.
QUERIES = np.array(
  [[x, y, 0.5, 0.5] for y in (0.25, 0.75) for x in (0.25, 0.75)] + [[0.5, 0.5, 1, 1]], np.float32
)
SIDE = 8  # of the images that the model sees


def embed_colors(colors):
  """RGB and how dark it is, at unit length: [..., 4]."""
  colors = np.asarray(colors, np.float32) / 255
  values = np.concatenate([colors, 1 - colors.max(axis=-1, keepdims=True)], axis=-1) + 1e-4
  return values / np.linalg.norm(values, axis=-1, keepdims=True)


def encode_text(texts):
  """By the first colour that a text names; grey without one."""
  found = [next((rgb for c, rgb in COLORS.items() if c in text), (128,) * 3) for text in texts]
  return embed_colors(found)


def encode_regions(images):
  half = SIDE // 2
  parts = [images[:, y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
  means = [part.mean(axis=(1, 2)) for part in [*parts, images]]
  return embed_colors(np.stack(means, 1)), np.repeat(QUERIES[None], len(images), 0)


def encoders(**changes):
  values = {
    "image": lambda images: embed_colors(images.mean(axis=(1, 2))),
    "text": encode_text,
    "regions": encode_regions,
    "patches": lambda images: embed_colors(
      images.reshape(-1, 2, SIDE // 2, 2, SIDE // 2, 3).mean(axis=(2, 4))
    ),
    "size": SIDE,
    "batch_size": 2,
    "templates": ("a photo of a {}.",),
  }
  return Encoders(**(values | changes))


CLIP = {"regions": None, "has_regions": False}


def paint(path, *colors, width=80, height=40):
  """An image with a colour for each quarter."""
  path.parent.mkdir(parents=True, exist_ok=True)
  quarters = np.array([COLORS[c] for c in colors], np.uint8).reshape(2, 2, 3)
  picture = quarters.repeat(height // 2, 0).repeat(width // 2, 1)
  Image.fromarray(picture).save(path, format="png")  # lossless whatever its name says


def write_json(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


def write_lines(path, *entries):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(map(json.dumps, entries)) + "\n\n")


# Boxes of the quarters in pixels, (x, y, w, h).
TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT = ([x, y, 40, 20] for y in (0, 20) for x in (0, 40))


def annotation(id_, image, category, bbox, **more):
  row = {"id": id_, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0}
  return row | {"area": float(bbox[2] * bbox[3])} | more


def coco(root, *, annotations, images=2, file="instances_val2017.json", categories=None, **more):
  """COCO's files: image 1 is red, green, blue, black; image 2 red, red, black, black."""
  paint(root / "coco/val2017/1.jpg", "red", "green", "blue", "black")
  paint(root / "coco/val2017/2.jpg", "red", "red", "black", "black")
  names = {1: "red_thing", 5: "green_thing", 3: "blue_thing"}
  content = {
    "images": [
      {"id": i, "file_name": f"{i}.jpg", "width": 80, "height": 40} | more
      for i in range(1, images + 1)
    ],
    "annotations": annotations,
    "categories": categories or [{"id": i, "name": name} for i, name in names.items()],
  }
  write_json(root / "coco" / "annotations" / file, content)


RIGHT = [
  annotation(1, 1, 1, TOP_LEFT),
  annotation(2, 1, 5, TOP_RIGHT),
  annotation(3, 1, 3, BOTTOM_LEFT),
  annotation(4, 2, 1, TOP_LEFT),
  annotation(5, 2, 1, TOP_RIGHT),
]


def run(family, name, root, *, model=None, **more):
  """check and run; the results without the name of family and set, and the warnings."""
  lines = []
  given = Options(root=root, warn=lines.append, **more)
  family.check(name, given)
  results = family.run(model or encoders(), name, given)
  assert all(type(value) in (int, float) for value in results.values())
  word = family.__name__.rpartition(".")[2].removesuffix("_sets")
  prefix = f"{word}/{name}/"
  assert all(key.startswith(prefix) for key in results)
  return {key.removeprefix(prefix): value for key, value in results.items()}, lines


def test_grounding_by_the_categories_of_coco(tmp_path):
  coco(tmp_path, annotations=[*RIGHT, annotation(6, 2, 5, BOTTOM_LEFT, iscrowd=1)])
  results, lines = run(grounding_sets, "coco", tmp_path)
  # The two red quarters of image 2 are one description; one of them is found.
  assert results == {
    "mean_iou": pytest.approx(1, abs=1e-6),
    "recall@0.5": 1,
    "any_query_recall@0.5": 1,
    "merged_recall@0.5": 1,  # the smallest box around both has IoU .5 with one
    "box_recall@0.5": pytest.approx(4 / 5),
    "descriptions": 4,
    "boxes": 5,
    "examples": 2,
    "rows": 2,
    "clipped_boxes": 0,
    "dropped_boxes": 0,
  }
  assert not lines
  assert run(grounding_sets, "coco", tmp_path, limit=1)[0]["rows"] == 1


def test_grounding_by_referring_expressions(tmp_path):
  paint(tmp_path / "coco/train2014/COCO_train2014_1.jpg", "red", "green", "blue", "black")
  expressions = [("the green one", TOP_RIGHT), ("blue", BOTTOM_LEFT), ("red", BOTTOM_RIGHT)]
  image = {"file_name": "COCO_train2014_1.jpg", "width": 80, "height": 40, "original_id": 1}
  write_json(
    tmp_path / "refcoco" / "finetune_refcoco+_testA.json",
    {
      "images": [image | {"id": i, "caption": text} for i, (text, _) in enumerate(expressions)],
      "annotations": [annotation(i, i, 44, box) for i, (_, box) in enumerate(expressions)],
      "categories": [{"id": 44, "name": "bottle"}],
    },
  )
  results, _ = run(grounding_sets, "refcoco+_testA", tmp_path)
  assert results["recall@0.5"] == pytest.approx(2 / 3)  # the red quarter lies elsewhere
  assert (results["descriptions"], results["examples"]) == (3, 1)  # the image is seen once
  with pytest.raises(ValueError, match="finetune_refcocog_val.json. Get mdetr_annotations"):
    grounding_sets.check("refcocog_val", Options(root=tmp_path))


XML = """<annotation><filename>1.jpg</filename>
<size><width>80</width><height>40</height><depth>3</depth></size>
<object><name>11</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>41</xmax><ymax>21</ymax></bndbox>
</object>
<object><name>12</name><name>13</name>
<bndbox><xmin>41</xmin><ymin>1</ymin><xmax>81</xmax><ymax>21</ymax></bndbox></object>
<object><name>13</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>41</xmax><ymax>21</ymax></bndbox>
</object>
<object><name>14</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>
"""
SENTENCES = """[/EN#11/people A red man] next to [/EN#12/people/other a green dog] .
[/EN#13/people Two green people] in [/EN#14/scene a park] with [/EN#0/notvisual it] .
"""


def entities(root, xml=XML):
  folder = root / "flickr30k_entities"
  for name, text in {
    "test.txt": "1\n",
    "Annotations/1.xml": xml,
    "Sentences/1.txt": SENTENCES,
  }.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  paint(root / "flickr30k/images/1.jpg", "red", "green", "blue", "black")


def test_grounding_by_the_phrases_of_flickr30k_entities(tmp_path):
  entities(tmp_path)
  found = grounding_sets.load("flickr30k_entities_test", Options(root=tmp_path), what="test")
  (given,) = found.given
  assert list(given.descriptions) == ["A red man", "a green dog", "Two green people"]
  assert [len(boxes) for boxes in given.boxes] == [1, 1, 2]
  np.testing.assert_allclose(given.boxes[0], QUERIES[:1], atol=1e-6)
  np.testing.assert_allclose(given.boxes[2], QUERIES[[1, 0]], atol=1e-6)
  results, _ = run(grounding_sets, "flickr30k_entities_test", tmp_path)
  assert results["recall@0.5"] == 1 and results["box_recall@0.5"] == pytest.approx(3 / 4)
  entities(tmp_path, "<annotation><size>")
  with pytest.raises(ValueError, match="1.xml is no annotation of Flickr30k Entities"):
    grounding_sets.check("flickr30k_entities_test", Options(root=tmp_path))


def own_line(**changes):
  regions = [
    {"description": "red", "box": [0, 0, 0.5, 0.5]},
    {"description": "the green part", "box": [0, 0.5, 0.5, 1.2]},  # clipped
    {"description": "blue", "box": [0.5, 0.3, 0.5, 0.6]},  # no area
    {"description": "", "box": [0, 0, 1, 1]},
  ]
  return {"image": "images/a.png", "regions": regions} | changes


def test_grounding_on_ones_own_lines(tmp_path):
  paint(tmp_path / "mine/images/a.png", "red", "green", "blue", "black")
  write_lines(
    tmp_path / "mine/annotations.jsonl",
    own_line(captions=["four colours"], split="train"),
    {"image": "images/none.png", "captions": ["no regions"]},
  )
  results, lines = run(grounding_sets, "mine", tmp_path)
  assert results["mean_iou"] == pytest.approx(1, abs=1e-6)
  assert (results["descriptions"], results["rows"]) == (2, 1) and not lines
  assert (results["clipped_boxes"], results["dropped_boxes"]) == (1, 1)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "line 1 is not JSON"),
    ("[]", "line 1 names no image"),
    (json.dumps(own_line(regions={"a": 1})), "regions is no list of objects"),
    (json.dumps(own_line(regions=[{"description": "x", "box": [1, 2]}])), "box = .1, 2. is no"),
    (json.dumps(own_line(regions=[{"description": "x", "box": [0, 0, 40, 20]}])), "is in pixels"),
    (json.dumps(own_line(regions=[{"description": 3, "box": [0, 0, 1, 1]}])), "is a text"),
    (json.dumps(own_line(regions=[])), "no image has a description with a box"),
    (json.dumps(own_line()), "none of its 1 pictures is there"),
  ],
)
def test_ones_own_lines_that_are_wrong(tmp_path, line, message):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "regions.jsonl").write_text(line)
  with pytest.raises(ValueError, match=message) as error:
    grounding_sets.check("mine", Options(root=tmp_path))
  assert "\n" not in str(error.value)


def test_detection_on_coco(tmp_path):
  coco(tmp_path, annotations=RIGHT)
  results, lines = run(detection_sets, "coco", tmp_path)
  # Red: its three quarters first; green and blue: one each, found first.
  assert results["ap"] == results["ap50"] == pytest.approx(1)
  # Quarters have 800 square pixels: all small. One detection an image finds 2 of 3 red ones.
  assert results["ap_small"] == pytest.approx(1) and "ap_large" not in results
  assert results["ar1"] == pytest.approx((2 / 3 + 1 + 1) / 3)
  counts = ("classes", "boxes", "queries", "examples", "rows")
  assert [results[name] for name in counts] == [3, 5, 5, 2, 2] and not lines
  wrong = [row | {"bbox": [20, 10, 40, 20]} for row in RIGHT]  # across all quarters
  coco(tmp_path, annotations=wrong)
  assert run(detection_sets, "coco", tmp_path)[0]["ap"] == 0


def test_detection_on_lvis_judges_only_what_was_looked_for(tmp_path):
  categories = [
    {"id": i, "name": name, "frequency": f}
    for i, (name, f) in enumerate([("red_thing", "r"), ("black_thing", "c")], 1)
  ]
  rows = [annotation(1, 1, 1, TOP_LEFT), annotation(2, 1, 2, BOTTOM_RIGHT)]

  def ap(**image):
    coco(tmp_path, annotations=rows, file="lvis_v1_val.json", categories=categories, **image)
    return run(detection_sets, "lvis", tmp_path)[0]

  # Red is everywhere in the second image too, black in its lower half.
  unknown = ap(neg_category_ids=[], not_exhaustive_category_ids=[])
  assert unknown["ap_rare"] == pytest.approx(1) and "ap_frequent" not in unknown
  known = ap(neg_category_ids=[1], not_exhaustive_category_ids=[])
  assert known["ap_rare"] < 0.9 and known["ap_common"] == unknown["ap_common"]
  assert "ar300" in known and "ar100" not in known


def test_regions_of_coco_are_classified(tmp_path):
  crowd = annotation(9, 1, 5, BOTTOM_LEFT, iscrowd=1)
  wrong = annotation(6, 2, 3, TOP_LEFT)  # said to be blue, and red
  coco(tmp_path, annotations=[*RIGHT, wrong, crowd])
  results, lines = run(region_classification_sets, "coco", tmp_path)
  for method in ("crop", "query", "patches"):
    assert results[f"{method}/top1"] == pytest.approx(5 / 6)
    assert results[f"{method}/top5"] == 1
    assert results[f"{method}/mean_per_class"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert results[f"{method}/boxes"] == 6
  assert (results["classes"], results["examples"], results["rows"]) == (3, 2, 2) and not lines
  clip, _ = run(region_classification_sets, "coco", tmp_path, model=encoders(**CLIP))
  assert clip["crop/top1"] == results["crop/top1"] and "query/top1" not in clip


def fg_ovd(root, file="1_attributes", **more):
  paint(root / "coco/val2017/1.jpg", "red", "green", "blue", "black")
  texts = ["A red cup.", "A green cup.", "A blue cup.", "A cup, rather red."]
  rows = [
    annotation(2, 1, 2, BOTTOM_LEFT, neg_category_ids=[3, 1]),  # it is blue
    annotation(3, 1, 1, TOP_LEFT, neg_category_ids=[4]),  # a tie: both red
    annotation(1, 1, 1, TOP_LEFT, neg_category_ids=[2, 3]),  # right
    annotation(4, 1, 2, TOP_RIGHT, neg_category_ids=[]),
  ]
  content = {
    "images": [{"id": 1, "file_name": "val2017/1.jpg", "width": 80, "height": 40}],
    "annotations": rows,
    "categories": [{"id": i, "name": text} for i, text in enumerate(texts, 1)],
  }
  write_json(root / "fg_ovd" / f"{file}.json", content | more)


def test_descriptions_of_fg_ovd_are_chosen(tmp_path):
  fg_ovd(tmp_path)
  results, lines = run(fine_grained_sets, "fg_ovd_hard", tmp_path)
  for method in ("crop", "query", "patches"):
    assert results[f"{method}/accuracy"] == pytest.approx(1 / 3)
    assert results[f"{method}/boxes"] == 3
  assert results["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)
  assert (results["without_negatives"], results["examples"], results["rows"]) == (1, 1, 1)
  assert not lines
  with pytest.raises(ValueError, match="3_attributes.json. Get the JSON files"):
    fine_grained_sets.check("fg_ovd_easy", Options(root=tmp_path))
  fg_ovd(tmp_path, annotations=[annotation(1, 1, 1, TOP_LEFT, neg_category_ids=[77])])
  with pytest.raises(ValueError, match="neg_category_ids has 77, which is no category"):
    fine_grained_sets.check("fg_ovd_hard", Options(root=tmp_path))


def test_descriptions_of_ones_own_lines_are_chosen(tmp_path):
  paint(tmp_path / "mine/images/a.png", "red", "green", "blue", "black")
  region = {"description": "red", "box": [0, 0, 0.5, 0.5], "negatives": ["green", "blue"]}
  write_lines(tmp_path / "mine/regions.jsonl", own_line(regions=[region]))
  results, _ = run(fine_grained_sets, "mine", tmp_path)
  assert results["crop/accuracy"] == results["query/accuracy"] == 1
  write_lines(tmp_path / "mine/regions.jsonl", own_line())
  with pytest.raises(ValueError, match="none of its boxes has a wrong description"):
    fine_grained_sets.check("mine", Options(root=tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_unreadable_pictures_are_counted_and_named_once(family, tmp_path):
  coco(tmp_path, annotations=RIGHT)
  fg_ovd(tmp_path)
  (tmp_path / "coco/val2017/2.jpg").unlink()
  name = "coco"
  if family is fine_grained_sets:
    name = "fg_ovd_hard"
    content = json.loads((tmp_path / "fg_ovd/1_attributes.json").read_text())
    content["images"].append(content["images"][0] | {"id": 2, "file_name": "val2017/2.jpg"})
    content["annotations"].append(annotation(8, 2, 1, TOP_LEFT, neg_category_ids=[2]))
    write_json(tmp_path / "fg_ovd/1_attributes.json", content)
  results, lines = run(family, name, tmp_path)
  assert (results["examples"], results["rows"]) == (1, 2)
  (line,) = lines
  assert "1 of 2 pictures cannot be read" in line and "2.jpg" in line
  (tmp_path / "coco/val2017/1.jpg").write_bytes(b"no picture")
  with pytest.raises(ValueError, match="2 of 2 pictures cannot be read"):
    run(family, name, tmp_path)


@pytest.mark.parametrize(
  ("family", "what"), [(grounding_sets, "grounding"), (detection_sets, "detection")]
)
def test_a_model_without_region_queries_is_told_so(family, what, tmp_path):
  coco(tmp_path, annotations=RIGHT)
  with pytest.raises(ValueError, match=f"{what}:coco needs region queries"):
    run(family, "coco", tmp_path, model=encoders(**CLIP))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_known_set_says_how_to_get_it(family, tmp_path):
  for name in family.SETS:
    with pytest.raises(ValueError, match="there is no .* Get .*DIR/") as error:
      family.check(name, Options(root=tmp_path))
    assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match="for your own, write DIR/nothing/"):
    family.check("nothing", Options(root=tmp_path))


def test_the_cut_into_batches_changes_nothing(tmp_path):
  coco(tmp_path, annotations=RIGHT)
  for family in FAMILIES[:3]:
    one, two = (
      run(family, "coco", tmp_path, model=encoders(batch_size=size))[0] for size in (1, 64)
    )
    assert one == pytest.approx(two)
