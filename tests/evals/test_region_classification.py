"""Classes of given boxes against scikit-learn, PIL and hand-worked numbers."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

from grain_jax.evals import region_classification as rc
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders


def unit(values):
  values = np.asarray(values, np.float32)
  return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


# Queries on the left and right halves, and one on the whole.
QUERIES = np.array([[0.25, 0.5, 0.5, 1], [0.75, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]], np.float32)


def mean_color(images):
  return unit(np.asarray(images, np.float32).mean(axis=(1, 2)) + 1e-3)


def color_encoders(size=8, **changes):
  """A model that knows colours: of the image, of its three queries and of 4 x 4 patches."""

  def regions(images):
    half = size // 2
    parts = [images[:, :, :half], images[:, :, half:], images]
    boxes = np.repeat(QUERIES[None], len(images), 0)
    return np.stack([mean_color(part) for part in parts], 1), boxes

  def patches(images):
    side = size // 4
    cells = images.reshape(-1, 4, side, 4, side, 3).astype(np.float32).mean(axis=(2, 4))
    return unit(cells + 1e-3)

  base = Encoders(
    image=mean_color,
    text=lambda texts: np.stack([np.eye(3, dtype=np.float32)[len(t) % 3] for t in texts]),
    regions=regions,
    patches=patches,
    size=size,
    batch_size=2,
  )
  return dataclasses.replace(base, **changes)


def two_colors(left, right, side=16):
  picture = np.zeros((side, side, 3), np.uint8)
  picture[:, : side // 2, left] = picture[:, side // 2 :, right] = 255
  return picture


def embeddings(method, annotated, encoders=None, unreadable=None):
  blocks = rc.embed(
    encoders or color_encoders(),
    method,
    annotated,
    what="test",
    unreadable=images_lib.Unreadable() if unreadable is None else unreadable,
  )
  index, values = zip(*blocks, strict=True)
  return np.concatenate(index), np.concatenate(values)


LEFT, RIGHT = [0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]
ANNOTATED = [
  rc.Annotated(two_colors(0, 1), np.array([RIGHT, LEFT])),
  rc.Annotated(two_colors(2, 0), np.array([[0.3, 0.5, 0.3, 0.9]])),
  rc.Annotated(two_colors(1, 2), np.array([RIGHT])),
]
COLORS = [1, 0, 2, 2]  # of the boxes


@pytest.mark.parametrize("method", rc.METHODS)
def test_each_method_sees_what_is_in_the_box(method):
  index, values = embeddings(method, ANNOTATED)
  assert index.tolist() == [0, 1, 2, 3]
  assert values.argmax(axis=1).tolist() == COLORS
  # A crop is resized with its own pixels alone; a patch at the edge has a little of the other side.
  tolerance = 0.01 if method == "crop" else 0.05
  np.testing.assert_allclose(values, np.eye(3)[COLORS], atol=tolerance)
  np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("method", rc.METHODS)
def test_an_unreadable_picture_takes_its_own_boxes_along(method, tmp_path):
  broken = rc.Annotated(tmp_path / "none.png", np.array([LEFT, RIGHT]))
  unreadable = images_lib.Unreadable()
  index, values = embeddings(method, [ANNOTATED[0], broken, *ANNOTATED[1:]], unreadable=unreadable)
  assert index.tolist() == [0, 1, 4, 5]
  assert values.argmax(axis=1).tolist() == COLORS
  assert list(unreadable.reasons) == [1]
  with pytest.raises(ValueError, match="test: 1 of 1 pictures cannot be read"):
    embeddings(method, [broken])


def test_a_model_is_asked_for_what_it_can_do():
  encoders = color_encoders()
  assert rc.methods(encoders) == rc.METHODS
  clip = Encoders(image=encoders.image, text=encoders.text, regions=None, has_regions=False)
  assert rc.methods(clip) == ("crop",)
  with pytest.raises(ValueError, match="test by queries needs region queries"):
    embeddings("query", ANNOTATED, clip)
  with pytest.raises(ValueError, match="no patch features"):
    embeddings("patches", ANNOTATED, clip)
  with pytest.raises(ValueError, match="'mask' is unknown"):
    embeddings("mask", ANNOTATED)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_patches_in_a_box_are_those_whose_centres_it_holds(data):
  rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
  x, y = (data.draw(st.floats(0, 1)) for _ in "xy")
  w, h = (data.draw(st.floats(1e-6, 1)) for _ in "wh")
  mask = rc.inside(np.array([x, y, w, h]), rows, columns)
  centres = [
    (r, c)
    for r in range(rows)
    for c in range(columns)
    if abs((r + 0.5) / rows - y) <= h / 2 and abs((c + 0.5) / columns - x) <= w / 2
  ]
  if centres:
    assert [tuple(at) for at in np.argwhere(mask)] == centres
  else:
    (at,) = np.argwhere(mask)  # one: no other centre is nearer in either direction
    nearest = abs((at + 0.5) / [rows, columns] - [y, x])
    assert (nearest <= np.array([0.5 / rows, 0.5 / columns]) + 1e-9).all()


def test_a_patch_mean_is_normalised():
  # Half of the patches red, half blue: the mean lies between, at unit length.
  annotated = [
    rc.Annotated(two_colors(0, 2), np.array([[0.5, 0.5, 1.0, 1.0], [0.1, 0.1, 0.01, 0.01]]))
  ]
  _, values = embeddings("patches", annotated)
  np.testing.assert_allclose(values, [unit([1, 0, 1]), [1, 0, 0]], atol=0.02)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_window_is_the_pixels_that_a_box_touches(data):
  width, height = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
  left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
  right, bottom = (
    data.draw(st.integers(low + 1, high)) for low, high in ((left, width), (top, height))
  )
  whole = np.array([left / width, top / height, right / width, bottom / height])
  box = np.concatenate([(whole[:2] + whole[2:]) / 2, whole[2:] - whole[:2]])
  assert rc.window(box, width, height) == (left, top, right, bottom)
  tiny = np.concatenate([box[:2], [1e-12, 1e-12]])
  l, t, r, b = rc.window(tiny, width, height)
  assert 0 <= l < r <= width and 0 <= t < b <= height
  cropped = Image.new("RGB", (width, height)).crop((l, t, r, b))
  assert min(cropped.size) >= 1


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_are_those_of_scikit_learn(seed):
  rng = np.random.default_rng(seed)
  classes = unit(rng.normal(size=(12, 6)))
  labels = rng.integers(0, 9, 300)  # some classes never occur
  values = unit(classes[labels] + rng.normal(0, 0.8, (300, 6)))
  order = np.sort(rng.choice(300, 280, replace=False))  # some boxes could not be seen
  blocks = [rc.Block(part, values[part]) for part in np.array_split(order, 7)]
  found = rc.evaluate(iter(blocks), labels, classes, what="test")
  scores, own = values[order] @ classes.T, labels[order]
  every = np.arange(12)
  assert found["top1"] == pytest.approx(accuracy_score(own, scores.argmax(1)), abs=1e-6)
  assert found["top5"] == pytest.approx(
    top_k_accuracy_score(own, scores, k=5, labels=every), abs=1e-6
  )
  assert found["mean_per_class"] == pytest.approx(
    balanced_accuracy_score(own, scores.argmax(1)), abs=1e-6
  )
  assert found["boxes"] == 280
  with pytest.raises(ValueError, match="test: there is no box"):
    rc.evaluate(iter([]), labels, classes, what="test")


def test_choices_are_those_of_argmax_and_a_tie_is_wrong():
  rng = np.random.default_rng(0)
  values, texts = unit(rng.normal(size=(200, 5))), unit(rng.normal(size=(50, 5)))
  candidates = np.stack([rng.choice(50, 4, replace=False) for _ in range(200)])
  hits = rc.choose(values, texts, candidates[:, 0], candidates[:, 1:].tolist())
  scores = np.einsum("ne,nke->nk", values, texts[candidates])
  assert hits.mean() == pytest.approx(accuracy_score(np.zeros(200), scores.argmax(1)))
  axes = np.eye(2, dtype=np.float32)
  chosen = rc.choose(axes[[0, 0, 0]], axes[[0, 1, 0]], [0, 1, 0], [[1], [0], [1, 2]])
  assert chosen.tolist() == [True, False, False]  # the last: two texts embed alike
  assert rc.chance([[1], [1, 2, 3]]) == pytest.approx((1 / 2 + 1 / 4) / 2)


@pytest.mark.parametrize(
  ("description", "others"),
  [
    ("a red apple", ["a blue apple", "an orange apple"]),
    ("an orange cat", ["a red cat", "a blue cat"]),
    ("An orange cat", ["A red cat", "A blue cat"]),
    ("a small red apple", ["a small blue apple", "a small orange apple"]),
    ("red shoes", ["blue shoes", "orange shoes"]),
    ("a redwood tree", []),  # no word of its own
    ("a red and blue ball", []),  # which of them?
    ("a dog", []),
  ],
)
def test_other_colors(description, others):
  assert rc.other_colors(description, ["red", "blue", "orange"]) == others


def test_without_colors_there_is_nothing_to_change():
  assert rc.other_colors("a red apple", []) == []


TEXTS = {
  "a red cat": [1, 0, 0],
  "a blue cat": [0, 0, 1],
  "a green cat": [0, 1, 0],
  "a red dog": [0.8, 0.6, 0],
  "a green dog": [0, 1, 0.1],
  "a blue dog": [0.1, 0, 1],
  "a hen": [0, 0.1, 1],
}


def built(descriptions, mask=(True, True, False)):
  """Halves: red and green; green and red; masked. Boxes right then left, left, both."""
  batch = {
    "image": np.stack([two_colors(0, 1, 8), two_colors(1, 0, 8), two_colors(2, 2, 8)]),
    "example_mask": np.array(mask),
    "boxes": np.array([[RIGHT, LEFT], [LEFT, RIGHT], [LEFT, RIGHT]], np.float32),
    "region_mask": np.array([[True, True], [True, False], [True, True]]),
  }
  return batch, {"key": list("abc"), "descriptions": descriptions}


def built_encoders(**changes):
  return color_encoders(
    text=lambda texts: unit([TEXTS[text] for text in texts]),
    **changes,
  )


def test_built_scenes_hand_worked():
  batches = [built([["a green dog", "a red cat"], ["a red dog", "gone"], ["gone", "gone"]])]
  results = rc.evaluate_built(built_encoders(), batches)
  # The third box is green and said to be a red dog: nearest is the green dog, then that one.
  for method in rc.METHODS:
    assert results.pop(f"region_classification/{method}/top1") == pytest.approx(2 / 3)
    assert results.pop(f"region_classification/{method}/top5") == 1
    assert results.pop(f"region_classification/{method}/mean_per_class") == pytest.approx(2 / 3)
    # Colours that occur are red and green: a green dog is no red one, a red cat no green one.
    assert results.pop(f"fine_grained/{method}/accuracy") == pytest.approx(2 / 3)
  assert results == {
    "region_classification/classes": 3,
    "region_classification/boxes": 3,
    "region_classification/examples": 2,
    "region_classification/rows": 3,
    "fine_grained/chance": 0.5,
    "fine_grained/boxes": 3,
    "fine_grained/examples": 2,
    "fine_grained/rows": 3,
  }


def test_built_scenes_without_colors_or_queries():
  batches = [built([["a hen", "a red cat"], ["", "gone"], ["gone", "gone"]])]
  encoders = built_encoders(has_regions=False, regions=None)
  results = rc.evaluate_built(encoders, batches)
  # One colour alone: nothing to take it for.
  assert results["fine_grained/boxes"] == 0 and "fine_grained/chance" not in results
  assert not [name for name in results if "query" in name or "accuracy" in name]
  assert results["region_classification/crop/top1"] == pytest.approx(1)
  assert results["region_classification/boxes"] == 2
  named = rc.evaluate_built(encoders, batches, colors=["red"])
  assert named == results
  with pytest.raises(ValueError, match="none of 3 rows has a described region"):
    rc.evaluate_built(encoders, [built([["", ""]] * 3)])
