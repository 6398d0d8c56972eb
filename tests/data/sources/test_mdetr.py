"""Files of MDETR: spans of captions as descriptions."""

import box_layouts
import pytest
from box_layouts import box
from hypothesis import given
from hypothesis import strategies as st

from grain_jax.data.sources import base, coco_json, deliberate
from grain_jax.data.sources import mdetr as mdetr_source

REFERRED = "COCO_train2014_000000581857.jpg"


def test_refcoco_and_flickr30k_entities(tmp_path):
  box_layouts.mdetr(tmp_path / "in")
  opened = box_layouts.built("mdetr", tmp_path / "in", tmp_path / "out")
  expressions = ["the lady with the blue shirt", "lady back left"]
  assert box_layouts.content(opened) == {
    "train": {
      REFERRED: (expressions, [(text, box(0.25, 0.25, 0.75, 0.75)) for text in expressions])
    },
    "val": {
      "1000092795.jpg": (
        ["Two young guys with shaggy hair", "A café, deux 😀 amis"],
        [
          ("Two young guys", box(0.1, 0.1, 0.3, 0.3)),
          ("Two young guys", box(0.1, 0.5, 0.3, 0.7)),
          ("Two shaggy", box(0, 0, 1, 1)),
          ("😀 amis", box(0, 0, 1, 0.5)),  # offsets count characters
        ],
      )
    },
  }
  assert box_layouts.dropped(opened) == {
    ("regions", "span_outside_caption"): 2,
    ("regions", "no_span"): 1,
    ("regions", "annotation_without_image"): 1,
  }


def test_files_of_one_split_are_one_record_an_image(tmp_path):
  """Entries of both have the same ids, which have nothing in common."""
  root = tmp_path / "in"
  box_layouts.mdetr(root)
  name = "finetune_refcoco+_train.json"
  box_layouts.write(root, name, (root / "finetune_refcoco_train.json").read_text())
  file = root / name
  file.write_text(
    file.read_text().replace("lady back left", "lady very left").replace("[10, 5,", "[0, 0,")
  )
  opened = box_layouts.built("mdetr", root, tmp_path / "out")
  half, corner = box(0.25, 0.25, 0.75, 0.75), box(0, 0, 0.5, 0.5)
  blue, back, far = "the lady with the blue shirt", "lady back left", "lady very left"
  captions, regions = box_layouts.content(opened)["train"][REFERRED]
  assert sorted(captions) == sorted([blue, back, far])
  assert sorted(regions) == sorted([(blue, half), (back, half), (blue, corner), (far, corner)])


def test_a_region_that_several_files_hold_is_there_once(tmp_path):
  """As in mixed and mixed_no_coco; a file's own repetitions stay as they are."""
  root = tmp_path / "in"
  box_layouts.mdetr(root)
  once = box_layouts.built("mdetr", root, tmp_path / "once")
  given = (root / "final_flickr_separateGT_val.json").read_text()
  for name in ("final_flickr_mergedGT_val.json", "final_mixed_val.json"):
    box_layouts.write(root, name, given)
  opened = box_layouts.built("mdetr", root, tmp_path / "out")
  assert box_layouts.content(opened) == box_layouts.content(once)
  kept = sum(len(said[1]) for said in box_layouts.content(once)["val"].values())
  reason = ("regions", "region_of_another_file")
  assert box_layouts.dropped(opened)[reason] == 2 * kept and reason[1] in deliberate.REASONS


def test_captions_of_coco_go_before_expressions(tmp_path):
  root = tmp_path / "in"
  box_layouts.mdetr(root)
  said = [{"id": 1, "image_id": 581857, "caption": "Two ladies"}, {"image_id": 3, "caption": "x"}]
  box_layouts.write(root, "captions_train2014.json", {"images": [], "annotations": said})
  opened = box_layouts.built("mdetr", root, tmp_path / "out")
  captions = box_layouts.content(opened)["train"][REFERRED][0]
  assert captions == ["Two ladies", "the lady with the blue shirt", "lady back left"]


def test_coco_ids_are_handed_over(tmp_path):
  box_layouts.mdetr(tmp_path)
  items = [
    item for _, item in base.iterate(mdetr_source.source(tmp_path)) if isinstance(item, dict)
  ]
  assert sorted(item["ids"] for item in items) == [[], ["581857"]]


@pytest.mark.parametrize(
  ("name", "split"),
  [
    ("finetune_refcoco+_testA", "testA"),
    ("finetune_refcocog_val", "val"),
    ("final_mixed_train_no_coco", "train"),
    ("lvis_v1_minival", "val"),
    ("oidv6-train-annotations-bbox", "train"),
    ("trainees", "train"),
    ("captions_val2014", "val"),
  ],
)
def test_splits_of_names(name, split):
  assert coco_json.split_in(name) == split


@pytest.mark.parametrize(
  ("spans", "text"),
  [
    ([[0, 5]], "a dog"),
    ([[0, 1], [2, 5]], "a dog"),
    ([[2, 5], [0, 1]], "a dog"),
    ([[5, 7], [2, 5]], "dog's"),  # a token of its own in their files
    ([[0.0, 5.0]], "a dog"),
    ([[0, 1], [8, 12]], "a ball"),
    ([], ""),
    ([[0, 13]], None),
    ([[-1, 4]], None),
    ([[3, 3]], None),
    ([[0.5, 3]], None),
    ([[0, float("nan")]], None),
    ([[True, 3]], None),
    ([["0", 3]], None),
    ([[0, 3, 4]], None),
    ([3], None),
    ("03", None),
  ],
)
def test_spans(spans, text):
  assert coco_json.spanned("a dog's ball", spans) == text


@given(st.text(max_size=20), st.integers(-3, 25), st.integers(-3, 25))
def test_a_span_is_pythons_slice_or_none(caption, start, end):
  inside = 0 <= start < end <= len(caption)
  want = caption[start:end].strip() if inside else None
  assert coco_json.spanned(caption, [[start, end]]) == want
