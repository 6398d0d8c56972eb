"""Segmentation and grouping on folders of the published layout, made by the test."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics
from tensorflow_datasets.object_detection import voc

from grain_jax.evals import segmentation
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import grouping as grouping_sets
from grain_jax.evals.sets import segmentation as segmentation_sets

SIDE, CELL, WIDTH = 16, 4, 256
FOLDER = pathlib.Path(segmentation_sets.__file__).parent / "segmentation_vocabularies"


def encoders(texts, batch_size=2):
  """A world in which the red channel of a pixel is the index of the text that it shows."""
  axes = np.eye(WIDTH, dtype=np.float32)

  def nothing(images):
    raise AssertionError("only patches are needed")

  return Encoders(
    image=nothing,
    text=lambda asked: np.stack([axes[texts.index(t)] for t in asked]),
    regions=nothing,
    patches=lambda images: axes[images[:, CELL // 2 :: CELL, CELL // 2 :: CELL, 0]],
    size=SIDE,
    resize="center_crop",  # of no account here: dense evaluations squash
    batch_size=batch_size,
  )


def prompts_of(name):
  return segmentation.photo_prompts(segmentation_sets.load_vocabulary(name).prompts)


def wide(cells, size=(SIDE, SIDE)):
  """u8 of this size that shows a grid of ids."""
  rows, columns = (np.arange(n) * len(cells) // n for n in size)
  return np.asarray(cells, np.uint8)[rows][:, columns]


def save(path, values):
  """A PNG under whatever name."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(images_lib.png(np.asarray(values, np.uint8)))


def red(values):
  return np.repeat(values[..., None], 3, axis=-1)


def save_palette(path, values):
  """A PNG with a palette, as VOC's are."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(np.asarray(values, np.uint8)).convert("P")
  image.putdata(np.asarray(values).ravel().tolist())
  image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
  image.save(path, "PNG")


def index_of(name, prompt):
  """Index of a prompt, which the image shows in red."""
  return segmentation_sets.load_vocabulary(name).prompts.index(prompt)


def make_voc(root, pairs, *, inside="VOCdevkit/VOC2012", split="val"):
  """pairs: (image, mask, instances), each u8 [H, W]."""
  base = root / "voc2012" / inside
  keys = [f"2007_{i:06d}" for i in range(len(pairs))]
  for key, (picture, mask, instances) in zip(keys, pairs, strict=True):
    save(base / "JPEGImages" / f"{key}.jpg", red(picture))
    save_palette(base / "SegmentationClass" / f"{key}.png", mask)
    save_palette(base / "SegmentationObject" / f"{key}.png", instances)
  listing = base / "ImageSets" / "Segmentation" / f"{split}.txt"
  listing.parent.mkdir(parents=True)
  listing.write_text("".join(f"{key}\n" for key in keys))
  return base


def voc_pair(size=(SIDE, SIDE), shown=None):
  """A cat and grass on the left, a table taken for a dog on the right; the table's rim is void."""
  cat, grass, dog = (index_of("voc2012", p) for p in ("cat", "grass", "dog"))
  shown = shown or [[cat, cat, dog, dog], [cat, cat, dog, dog], [grass] * 4, [grass] * 4]
  true = [[8, 8, 11, 255], [8, 8, 11, 255], [0] * 4, [0] * 4]
  objects = [[1, 1, 2, 255], [1, 1, 2, 255], [0] * 4, [0] * 4]
  return tuple(wide(c, size) for c in (shown, true, objects))


@pytest.mark.parametrize("inside", ["VOCdevkit/VOC2012", "."])
def test_voc_with_prompts_for_its_background(tmp_path, options, inside):
  make_voc(tmp_path, [voc_pair()], inside=inside)
  segmentation_sets.check("voc2012", options)
  found = segmentation_sets.run(encoders(prompts_of("voc2012")), "voc2012", options)
  assert found == {
    # Background 1, cat 1, table 0, dog 0: IoU over the pixels that are not void.
    "segmentation/voc2012/miou": pytest.approx(2 / 4),
    "segmentation/voc2012/pixel_accuracy": pytest.approx(12 / 14),
    "segmentation/voc2012/classes": 4,
    "segmentation/voc2012/examples": 1,
    "segmentation/voc2012/rows": 1,
  }


def test_pictures_are_squashed_and_masks_keep_their_size(tmp_path, options):
  cat, grass = index_of("voc2012", "cat"), index_of("voc2012", "grass")
  cells = [[cat] * 4, [grass] * 4, [grass] * 4, [grass] * 4]  # a crop shows less of the cat
  sizes = [(40, 24), (16, 64), (20, 28)]
  make_voc(tmp_path, [voc_pair(size, cells) for size in sizes])
  encoder = encoders(prompts_of("voc2012"))
  found = segmentation_sets.run(encoder, "voc2012", options)
  counts = 0
  for size in sizes:
    # The world's patches upsampled by the tested function, the rest by sklearn.
    shown, true, _ = voc_pair((4, 4), cells)
    patches = np.eye(WIDTH, dtype=np.float32)[shown]
    prompts = segmentation.upsample(patches, size).argmax(axis=-1)
    owners = segmentation_sets.load_vocabulary("voc2012").owners
    true = wide(true, size)
    known = true != 255
    counts = counts + metrics.confusion_matrix(
      true[known], owners[prompts][known], labels=range(21)
    )
  assert found["segmentation/voc2012/pixel_accuracy"] == pytest.approx(
    np.trace(counts) / counts.sum()
  )
  assert found["segmentation/voc2012/miou"] == pytest.approx(segmentation.mean_iou(counts))


def test_voc_groups_are_held_against_its_objects(tmp_path, options):
  shown, true, objects = voc_pair()
  objects = np.where(objects == 1, [[1] * 4 + [3] * 12] * 16, objects)  # two cats side by side
  make_voc(tmp_path, [(shown, true, objects)])
  grouping_sets.check("voc2012", options)
  found = grouping_sets.run(encoders([]), "voc2012", options)
  groups = segmentation.label_map(
    segmentation.group_scores(np.eye(WIDTH, dtype=np.float32)[voc_pair((4, 4))[0]]), (16, 16)
  )
  known = objects != 255
  expected = [
    max(metrics.jaccard_score((objects == s)[known], (groups == g)[known]) for g in range(2))
    for s in (1, 2, 3)
  ]
  assert found == {
    "grouping/voc2012/jaccard": pytest.approx(np.mean(expected)),
    "grouping/voc2012/segments": 3,
    "grouping/voc2012/examples": 1,
    "grouping/voc2012/rows": 1,
  }


@pytest.mark.parametrize("inside", ["ADEChallengeData2016", "."])
def test_ade20k_ignores_what_is_not_labelled(tmp_path, options, inside):
  base = tmp_path / "ade20k" / inside
  wall, flag = index_of("ade20k", "wall"), index_of("ade20k", "flag")
  assert (wall, flag) == (0, 149)
  save(base / "images/validation/ADE_val_00000001.jpg", red(wide([[wall, flag], [wall, flag]])))
  save(base / "annotations/validation/ADE_val_00000001.png", wide([[1, 150], [150, 0]]))
  segmentation_sets.check("ade20k", options)
  found = segmentation_sets.run(encoders(prompts_of("ade20k")), "ade20k", options)
  assert found["segmentation/ade20k/miou"] == pytest.approx(1 / 2)  # of each, 1 quarter of 2
  assert found["segmentation/ade20k/pixel_accuracy"] == pytest.approx(2 / 3)
  assert found["segmentation/ade20k/classes"] == 2
  grouped = grouping_sets.run(encoders([]), "ade20k", options)
  assert grouped["grouping/ade20k/segments"] == 2  # wall, the first of the classes, is one too


def make_coco(root):
  """A person (value 0) before a brick wall (170), with an unlabelled corner."""
  shown = [[2, 3], [2, 3]]
  save(root / "coco/val2017/000000000139.jpg", red(wide(shown)))
  save(root / "coco_stuff/val2017/000000000139.png", wide([[0, 170], [255, 170]]))


def test_coco_stuff_and_object_read_the_same_masks(tmp_path, options):
  make_coco(tmp_path)
  wrong = ["-", "--", "a photo of a person", "a photo of a brick wall"]
  for name, classes in (("coco_stuff", 171), ("coco_object", 81)):
    texts = wrong + [t for t in prompts_of(name) if t not in wrong]
    segmentation_sets.check(name, options)
    found = segmentation_sets.run(encoders(texts), name, options)
    assert found[f"segmentation/{name}/miou"] == 1
    assert found[f"segmentation/{name}/classes"] == 2
    assert len(segmentation_sets.load_vocabulary(name).classes) == classes
  segments = {
    name: grouping_sets.run(encoders([]), name, options)[f"grouping/{name}/segments"]
    for name in ("coco_stuff", "coco_object")
  }
  assert segments == {"coco_stuff": 2, "coco_object": 1}  # the wall is an object's background


def test_pictures_that_cannot_be_read_are_counted(tmp_path, options, warnings):
  base = make_voc(tmp_path, [voc_pair()] * 3)
  (base / "JPEGImages" / "2007_000000.jpg").write_bytes(b"no picture")
  segmentation_sets.check("voc2012", options)
  found = segmentation_sets.run(encoders(prompts_of("voc2012")), "voc2012", options)
  assert found["segmentation/voc2012/examples"] == 2 and found["segmentation/voc2012/rows"] == 3
  assert found["segmentation/voc2012/miou"] == pytest.approx(2 / 4)
  assert len(warnings) == 1 and "1 of 3 pictures" in warnings[0]
  for i in (1, 2):
    (base / "JPEGImages" / f"2007_00000{i}.jpg").write_bytes(b"")
  with pytest.raises(ValueError, match="3 of 3 pictures"):
    grouping_sets.run(encoders([]), "voc2012", options)


def test_a_limit_takes_the_first(tmp_path):
  make_voc(tmp_path, [voc_pair()] * 3)
  found = segmentation_sets.run(
    encoders(prompts_of("voc2012")), "voc2012", Options(root=tmp_path, limit=2)
  )
  assert found["segmentation/voc2012/examples"] == found["segmentation/voc2012/rows"] == 2


@pytest.mark.parametrize(
  ("family", "name"),
  [(family, name) for family in (segmentation_sets, grouping_sets) for name in family.SETS],
)
def test_a_missing_dataset_says_how_to_get_it(tmp_path, family, name):
  for root, match in ((None, "give --datasets=DIR"), (tmp_path, f"no {tmp_path}")):
    with pytest.raises(ValueError, match=match) as error:
      family.check(name, Options(root=root))
    assert "Get " in str(error.value) and "\n" not in str(error.value)


def _one_less(base):
  (base / "SegmentationClass" / "2007_000001.png").unlink()


def _no_list(base):
  (base / "ImageSets" / "Segmentation" / "val.txt").unlink()


def _empty_list(base):
  (base / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")


def _other_size(base):
  save_palette(base / "SegmentationClass" / "2007_000000.png", np.zeros((8, 16)))


@pytest.mark.parametrize(
  ("damage", "match"),
  [
    (_one_less, "1 of 2 files are missing, the first .*2007_000001.png"),
    (_no_list, "there is no .*val.txt"),
    (_empty_list, "val.txt is empty"),
    (_other_size, "16 x 8 pixels, its picture 16 x 16"),
  ],
)
def test_damage_is_found_before_anything_is_encoded(tmp_path, options, damage, match):
  damage(make_voc(tmp_path, [voc_pair()] * 2))
  with pytest.raises(ValueError, match=match) as error:
    segmentation_sets.check("voc2012", options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (np.full((16, 16), 21), "has the value 21, which is no label"),
    (np.zeros((16, 16, 3)), "of mode RGB"),
    (b"none", "cannot be read"),
  ],
)
def test_masks_that_are_none(tmp_path, options, content, match):
  base = make_voc(tmp_path, [voc_pair()])
  path = base / "SegmentationClass" / "2007_000000.png"
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    save(path, content)
  with pytest.raises(ValueError, match=match) as error:
    segmentation_sets.run(encoders(prompts_of("voc2012")), "voc2012", options)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "classes", "prompts"),
  [("voc2012", 21, 60), ("ade20k", 150, 150), ("coco_stuff", 171, 171), ("coco_object", 81, 172)],
)
def test_vocabularies(name, classes, prompts):
  words = segmentation_sets.load_vocabulary(name)
  assert len(words.classes) == len(set(words.classes)) == classes
  assert len(words.prompts) == len(words.owners) == prompts
  assert set(words.owners) == set(range(classes))
  assert set(words.labels) >= set(range(classes))  # each has a value in the masks
  # Two names of one class may be equal (a mirror is a thing and stuff), never of two classes.
  owners = dict(zip(words.prompts, words.owners.tolist(), strict=True))
  assert all(owners[p] == o for p, o in zip(words.prompts, words.owners.tolist(), strict=True))
  content = json.loads((FOLDER / f"{name}.json").read_text())
  assert content["source"] and content["licence"]


def test_every_vocabulary_is_used():
  assert {p.stem for p in FOLDER.iterdir()} == {
    s.vocabulary for s in segmentation_sets.SETS.values()
  }


def test_labels_of_voc_are_those_of_tfds():
  words = segmentation_sets.load_vocabulary("voc2012")
  assert words.classes == ("background", *voc._VOC_LABELS)
  assert [words.labels[i] for i in range(21)] == list(range(21)) and words.labels[255] == 255


@pytest.mark.parametrize(
  ("category", "name"),  # of labels.txt of COCO-Stuff; a mask holds the number less one
  [
    (1, "person"),
    (11, "fire hydrant"),
    (13, "stop sign"),
    (28, "umbrella"),
    (44, "bottle"),
    (67, "dining table"),
    (90, "toothbrush"),
    (92, "banner"),
    (128, "house"),
    (149, "road"),
    (171, "wall-brick"),
    (182, "wood"),
  ],
)
def test_values_of_coco_masks(category, name):
  stuff = segmentation_sets.load_vocabulary("coco_stuff")
  assert stuff.classes[stuff.labels[category - 1]] == name
  things = segmentation_sets.load_vocabulary("coco_object")
  expected = name if category < 92 else "background"
  assert things.classes[things.labels[category - 1]] == expected
