"""voc2012_clippy: the figure of CLIPpy's notebook by its own steps, in torch and by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from test_segmentation_sets import (
  SIDE,
  encoders,
  index_of,
  make_voc,
  prompts_of,
  save,
  voc_pair,
  wide,
)

from grain_jax.data import transforms
from grain_jax.evals import segmentation
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.sets import grouping as grouping_sets
from grain_jax.evals.sets import segmentation as segmentation_sets
from grain_jax.evals.sets import suite

NAME = "voc2012_clippy"
# github.com/kahnchana/clippy, src/evaluation/datasets.py: 21 classes, then what is background.
CLASSES = (
  "background aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike "
  "person potted_plant sheep sofa train television_monitor"
)
OTHERS = (
  "bag bed bench book building cabinet ceiling cloth computer cup door fence floor flower food "
  "grass ground keyboard light mountain mouse curtain platform sign plate road rock shelves "
  "sidewalk sky snow bedclothes track tree truck wall water window wood"
)
NAMES = [name.replace("_", " ") for name in f"{CLASSES} {OTHERS}".split()]


def test_the_prompts_are_the_published_sixty():
  words = segmentation_sets.load_vocabulary("voc2012")
  assert len(NAMES) == 60 and sorted(words.prompts) == sorted(NAMES)
  ours = {words.prompts[i]: int(owner) for i, owner in enumerate(words.owners)}
  assert ours == {name: i if i < 21 else 0 for i, name in enumerate(NAMES)}
  prompts = segmentation.photo_prompts(words.prompts)
  for name in ("a background", "an aeroplane", "a table", "a television monitor"):
    assert f"a photo of {name}" in prompts


def random_encoders(rng):
  """A pixel's red channel says which of 256 random unit vectors its patch has."""
  vectors = rng.standard_normal((256 + 60, 32)).astype(np.float32)
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  texts = {f"a photo of {'an' if n[0] in 'aeiou' else 'a'} {n}": i for i, n in enumerate(NAMES)}

  def nothing(images):
    raise AssertionError("only patches are needed")

  encoder = Encoders(
    image=nothing,
    text=lambda asked: np.stack([vectors[256 + texts[t]] for t in asked]),
    regions=nothing,
    patches=lambda images: vectors[images[:, 2::4, 2::4, 0]],
    size=SIDE,
    batch_size=2,
  )
  return encoder, vectors[:256], vectors[256:]


def published(base, keys, vectors, texts):
  """The notebook's steps: crop, features to 224 in torch, argmax, `pred >= 21 -> 0`, one matrix."""
  total = 0
  for key in keys:
    image = Image.open(base / f"JPEGImages/{key}.jpg").convert("RGB")
    pixels = transforms.center_crop(image, SIDE)
    features = torch.as_tensor(vectors[pixels[2::4, 2::4, 0]]).permute(2, 0, 1)[None]
    features = torch.nn.functional.interpolate(features, (224, 224), mode="bilinear")
    predicted = torch.einsum("bchw,nc->bnhw", features, torch.as_tensor(texts)).argmax(1)[0].numpy()
    predicted[predicted >= 21] = 0
    label = Image.open(base / f"SegmentationClass/{key}.png")
    assert label.mode == "P"  # of which PIL takes the nearest pixel, whatever it is asked for
    label = np.array(label.resize((224, 224), Image.Resampling.BILINEAR))
    total = total + metrics.confusion_matrix(
      label[label < 255], predicted[label < 255], labels=range(21)
    )
  hits = np.diagonal(total)
  union = total.sum(0) + total.sum(1) - hits
  return np.nanmean(hits / (union + np.finfo(np.float32).eps)), hits.sum() / total.sum()


def test_the_published_figure_and_the_right_one_on_the_same_images(tmp_path, options, rng):
  sizes = [(40, 24), (16, 64), (20, 28), (300, 451)]  # labels are up- and downsampled
  pairs = []
  for height, width in sizes:
    shown = wide(rng.integers(0, 256, (5, 6)), (height, width))
    true = wide(rng.choice([0, 1, 2, 8, 255], (4, 7)), (height, width))
    pairs.append((shown, true, true))
  base = make_voc(tmp_path, pairs, split="train")
  encoder, vectors, texts = random_encoders(rng)
  segmentation_sets.check(NAME, options)
  found = segmentation_sets.run(encoder, NAME, options)
  keys = [f"2007_{i:06d}" for i in range(len(pairs))]
  miou, accuracy = published(base, keys, vectors, texts)
  assert 0.001 < miou < 0.2
  assert found[f"segmentation/{NAME}/miou"] == pytest.approx(miou, abs=1e-6)
  assert found[f"segmentation/{NAME}/pixel_accuracy"] == pytest.approx(accuracy, abs=1e-6)
  (base / "ImageSets/Segmentation/train.txt").rename(base / "ImageSets/Segmentation/val.txt")
  right = segmentation_sets.run(encoder, "voc2012", options)
  for metric in ("miou", "pixel_accuracy"):
    want = right[f"segmentation/voc2012/{metric}"]
    assert (
      found[f"segmentation/{NAME}/{metric}_aligned"]
      == want
      != found[f"segmentation/{NAME}/{metric}"]
    )
  assert found[f"segmentation/{NAME}/examples"] == found[f"segmentation/{NAME}/rows"] == 4


def test_misaligned_places_and_absent_classes_by_hand(tmp_path, options):
  """A cat in the left quarter of a wide picture, which the crop does not show."""
  cat, grass = index_of("voc2012", "cat"), index_of("voc2012", "grass")
  pair = voc_pair((SIDE, 4 * SIDE), [[cat, grass, grass, grass]] * 4)
  true = wide([[8, 0, 0, 0]] * 4, (SIDE, 4 * SIDE))
  base = make_voc(tmp_path, [(pair[0], true, true)], split="train")
  found = segmentation_sets.run(encoders(prompts_of("voc2012")), NAME, options)
  assert found == {
    # Of the squashed label a quarter is cat, none is found, and 19 classes are not there.
    f"segmentation/{NAME}/miou": pytest.approx((3 / 4 + 0) / 21),
    f"segmentation/{NAME}/pixel_accuracy": pytest.approx(3 / 4),
    f"segmentation/{NAME}/miou_aligned": 1,
    f"segmentation/{NAME}/pixel_accuracy_aligned": 1,
    f"segmentation/{NAME}/classes": 2,
    f"segmentation/{NAME}/examples": 1,
    f"segmentation/{NAME}/rows": 1,
  }
  save(base / "JPEGImages/2007_000000.jpg", np.zeros((SIDE, SIDE, 3)))
  with pytest.raises(ValueError, match="its picture 16 x 16"):
    segmentation_sets.check(NAME, options)


def test_what_cannot_be_read_is_said_once(tmp_path, options, warnings):
  base = make_voc(tmp_path, [voc_pair()] * 2, split="train")
  (base / "JPEGImages/2007_000001.jpg").write_bytes(b"no picture")
  found = segmentation_sets.run(encoders(prompts_of("voc2012")), NAME, options)
  assert found[f"segmentation/{NAME}/examples"] == 1 and found[f"segmentation/{NAME}/rows"] == 2
  assert len(warnings) == 1


def test_it_is_asked_for_by_name_and_no_set_of_grouping():
  assert suite.parse([f"segmentation:{NAME}"]) == [("segmentation", NAME)]
  assert NAME not in grouping_sets.SETS
  with pytest.raises(ValueError, match="grouping:voc2012_clippy' is unknown"):
    suite.parse([f"grouping:{NAME}"])
