"""Composition against clip_benchmark, naive loops and hand-made captions."""

import collections
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grain_jax.data.scenes import concepts, scenes
from grain_jax.data.scenes import texts as scene_texts
from grain_jax.evals import composition
from grain_jax.evals.composition import Crop, Item
from grain_jax.evals.inputs.encoders import Encoders

COLORS = composition.COLORS


def unit(values):
  values = np.asarray(values, np.float32)
  return values / np.linalg.norm(values, axis=-1, keepdims=True)


def encoders(image, text, **changes):
  return Encoders(image, text, regions=None, size=8, **changes)


def by_pixel(embeddings):
  """Looks an image's embedding up by its red value."""
  return lambda images: unit(embeddings)[images[:, 4, 4, 0]]


def by_name(embeddings):
  return lambda texts: unit([embeddings[text] for text in texts])


def picture(path, red):
  Image.new("RGB", (10, 10), (red, 0, 0)).save(path)
  return path


@pytest.fixture
def many(tmp_path, rng):
  """40 items on 12 images with 25 texts, and random encoders."""
  paths = [picture(tmp_path / f"{i}.png", i) for i in range(12)]
  images = rng.normal(size=(12, 6))
  texts = {f"text {i}": rng.normal(size=6) for i in range(25)}
  own = rng.integers(0, 12, 40)
  sides = [rng.choice(list(texts), 2, replace=False) for _ in own]
  items = [Item(paths[i], (a,), (b,), f"k{i % 3}") for i, (a, b) in zip(own, sides, strict=True)]
  expected = np.array(
    [
      unit(images[i]) @ (unit(texts[a]) - unit(texts[b])) > 0
      for i, (a, b) in zip(own, sides, strict=True)
    ]
  )
  return items, encoders(by_pixel(images), by_name(texts)), expected, own


def test_accuracy_is_clip_benchmarks(many, rng):
  selection = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
  import torch

  items, model, expected, own = many
  verdicts = composition.evaluate(model, items, what="test")
  np.testing.assert_array_equal(verdicts.correct, expected)
  assert 0 < expected.sum() < len(items)

  class Peer:
    def encode_image(self, images):
      values = images[:, 0, 0, 0].numpy().astype(np.uint8)
      return torch.from_numpy(
        model.image(np.broadcast_to(values[:, None, None, None], (len(values), 8, 8, 3)))
      )

    def encode_text(self, texts):
      return torch.from_numpy(model.text([f"text {i}" for i in texts[:, 0].tolist()]))

  pictures = torch.from_numpy(
    np.broadcast_to(own[:, None, None, None], (40, 3, 8, 8)).astype(np.float32)
  )
  captions = [(item.true[0], item.false[0]) for item in items]
  metrics = selection.evaluate(
    Peer(),
    [(pictures[:25], captions[:25]), (pictures[25:], captions[25:])],
    lambda texts: torch.tensor([[int(text.split()[1])] for text in texts]),
    "cpu",
    amp=False,
  )
  assert verdicts.correct.mean() == pytest.approx(metrics["text_acc"], abs=1e-6)


@given(data=st.data())
def test_every_true_caption_must_beat_every_false_one(data):
  corners = unit([[1, 0], [0, 1], [-1, 0], [3, 4], [1, 0]])  # many ties
  pick = st.integers(0, 4)
  images = corners[data.draw(st.lists(pick, min_size=1, max_size=4))]
  texts = {
    f"t{i}": corners[j] for i, j in enumerate(data.draw(st.lists(pick, min_size=1, max_size=9)))
  }
  captions = st.lists(st.sampled_from(sorted(texts)), min_size=1, max_size=3)
  n = data.draw(st.integers(1, 7))
  own = np.array([data.draw(st.integers(0, len(images) - 1)) for _ in range(n)])
  true, false = ([data.draw(captions) for _ in range(n)] for _ in range(2))
  naive = [
    all(images[i] @ texts[t] > images[i] @ texts[f] for t in ts for f in fs)
    for i, ts, fs in zip(own, true, false, strict=True)
  ]
  calls = []

  def encode(names):
    calls.extend(names)
    return np.stack([texts[name] for name in names])

  found = composition.judge(
    images, encode, own, true, false, texts_per_call=data.draw(st.integers(1, 5))
  )
  np.testing.assert_array_equal(found, naive)
  assert len(calls) == len(set(calls))


@pytest.mark.parametrize("width", [1, 7, 33, 512])
def test_a_model_that_embeds_everything_alike_gets_nothing(tmp_path, rng, width):
  same = unit(rng.normal(size=width))
  model = encoders(
    lambda images: np.tile(same, (len(images), 1)), lambda texts: np.tile(same, (len(texts), 1))
  )
  items = [
    Item(picture(tmp_path / f"{i}.png", i), (f"true {i}",), (f"false {i}", "false"))
    for i in range(9)
  ]
  verdicts = composition.evaluate(model, items, what="test", texts_per_call=4)
  assert verdicts.counted.all()
  assert not verdicts.correct.any()


def test_pictures_and_texts_are_encoded_once_and_in_bounded_calls(many):
  items, model, expected, _ = many
  images, texts, longest = [], [], 0

  def image(batch):
    images.extend(batch[:, 4, 4, 0].tolist())
    return model.image(batch)

  def text(names):
    nonlocal longest
    longest = max(longest, len(names))
    texts.extend(names)
    return model.text(names)

  counted = encoders(image, text, batch_size=5)
  verdicts = composition.evaluate(counted, items, what="test", texts_per_call=4)
  np.testing.assert_array_equal(verdicts.correct, expected)
  assert sorted(images) == sorted({int(item.image.stem) for item in items})
  assert len(texts) == len(set(texts)) and longest == 4


def test_items_of_pictures_that_cannot_be_read_do_not_count(many, tmp_path):
  items, model, expected, _ = many
  broken = items[0].image
  broken.write_bytes(b"no picture")
  gone = next(item.image for item in items if item.image != broken)
  items = [
    Item(Crop(i.image, (0, 0, 10, 10)), i.true, i.false) if i.image == gone else i for i in items
  ]
  gone.unlink()
  lines = []
  verdicts = composition.evaluate(model, items, what="some set", warn=lines.append)
  lost = np.array([getattr(i.image, "path", i.image) in (broken, gone) for i in items])
  np.testing.assert_array_equal(verdicts.counted, ~lost)
  np.testing.assert_array_equal(verdicts.correct, expected & ~lost)
  assert len(lines) == 1 and lines[0].startswith("some set: 2 of ")
  scores = composition.by_kind([item.kind for item in items], verdicts)
  assert sum(s.examples for s in scores.values()) == (~lost).sum()
  assert sum(s.rows for s in scores.values()) == len(items)
  assert sum(s.correct for s in scores.values()) == (expected & ~lost).sum()


def test_a_crop_shows_its_box_only(tmp_path):
  pixels = np.zeros((20, 30, 3), np.uint8)
  pixels[5:15, 10:20] = 200
  Image.fromarray(pixels).save(tmp_path / "a.png")
  seen = []

  def image(images):
    seen.extend(images)
    return unit(np.ones((len(images), 2)))

  model = encoders(image, lambda texts: unit(np.ones((len(texts), 2))))
  items = [
    Item(Crop(tmp_path / "a.png", box), ("a",), ("b",))
    for box in ((10, 5, 20, 15), (0, 0, 10, 5), (10, 5, 20, 15))
  ]
  composition.evaluate(model, items, what="test")
  assert [int(image.mean()) for image in seen] == [200, 0]


def test_bad_items_and_embeddings_end_in_one_line(tmp_path):
  path = picture(tmp_path / "a.png", 1)
  fine = encoders(lambda x: unit(np.ones((len(x), 2))), lambda x: unit(np.ones((len(x), 2))))
  with pytest.raises(ValueError, match="item 0 lacks"):
    composition.evaluate(fine, [Item(path, ("a",), ())], what="test")
  long = encoders(lambda x: np.ones((len(x), 2)), fine.text)
  with pytest.raises(ValueError, match="L2-normalise"):
    composition.evaluate(long, [Item(path, ("a",), ("b",))], what="test")
  with pytest.raises(ValueError, match="cannot be read"):
    composition.evaluate(fine, [Item(tmp_path / "none.png", ("a",), ("b",))], what="test")


def test_colours_are_those_of_the_scenes():
  assert tuple(dict(scenes.SceneSettings().colors)) == COLORS


def test_false_captions_by_example():
  true = "a small red apple above a blue cat"
  assert composition.from_captions([true]) == [
    ("swap_att", true, "a small blue apple above a red cat"),
    ("replace_att", true, "a small red apple above a gray cat"),
    ("swap_obj", true, "a small red cat above a blue apple"),
  ]
  plural = "an orange dog is left of blue skis"  # articles follow the nouns and the letters
  pairs = {pair.kind: pair.false for pair in composition.from_captions([plural])}
  assert pairs["swap_att"] == "a blue dog is left of orange skis"
  assert pairs["swap_obj"] == "orange skis is left of a blue dog"
  for alike in ("a red apple and a red cat", "a red apple and a green apple", "a red apple"):
    assert [pair.kind for pair in composition.from_captions([alike])] == ["replace_att"]
  for unknown in ("a dog in the park", "the dog is red", "a red and blue flag", ""):
    assert composition.from_captions([unknown]) == []


def draw_scene(random_, names):
  """Objects (size, colour, name) of a scene, their boxes and kinds."""
  objects = [
    (random_.choice(("", "small", "large")), random_.choice(COLORS), random_.choice(names))
    for _ in range(random_.randint(1, 5))
  ]
  boxes = [[random_.random() for _ in range(4)] for _ in objects]
  return objects, boxes, ["fruit"] * len(objects)


@pytest.mark.parametrize("seed", range(4))
def test_false_captions_are_the_captions_of_other_objects(seed):
  """Each is what `scene_texts` would write of a scene that differs as its kind says."""
  random_ = random.Random(seed)
  names = [concept.name for concept in concepts.all_concepts()]
  made = collections.Counter()
  for _ in range(150):
    few = random_.sample(names, 3)  # so that objects repeat
    objects, boxes, kinds = draw_scene(random_, few)
    order = random_.random()

    def write(described, order=order, boxes=boxes, kinds=kinds):
      again = random.Random(order)
      texts = [scene_texts.describe(name, color, size) for size, color, name in described]
      return scene_texts.captions(texts, boxes, kinds, choose=lambda n: again.randrange(n))

    others = collections.defaultdict(set)
    for i, (size, color, name) in enumerate(objects):
      for new in set(COLORS) - {c for _, c, _ in objects}:
        others["replace_att"].add((*objects[:i], (size, new, name), *objects[i + 1 :]))
      for j, (size2, color2, name2) in enumerate(objects):
        if color != color2 and name != name2:
          for kind, a, b in (
            ("swap_att", (size, color2, name), (size2, color, name2)),
            ("swap_obj", (size, color, name2), (size2, color2, name)),
          ):
            changed = list(objects)
            changed[i], changed[j] = a, b
            others[kind].add(tuple(changed))
    for which, caption in enumerate(write(objects)):
      pairs = composition.from_captions([caption])
      assert {pair.kind for pair in pairs} == {kind for kind, value in others.items() if value}
      assert pairs == composition.from_captions([caption])
      for kind, true, false in pairs:
        meant = [scene for scene in others[kind] if write(scene)[which] == false]
        assert true == caption and meant, (caption, kind, false)
        for scene in meant:
          same = collections.Counter(scene) == collections.Counter(objects)
          assert not same, (caption, kind, false)
        made[kind] += 1
  assert min(made[kind] for kind in composition.KINDS) > 50


CAPTIONS = [
  ["a red apple above a blue cat", "a blue cat and a red apple"],
  ["a green dog in the middle"],
  ["nothing of it"],
  ["a pink hat next to a gray bell"],
  ["a red drum left of a yellow key"],  # masked
]


def built(mask):
  for start in (0, 3):
    rows = range(start, min(start + 3, 5))
    image = np.zeros((len(rows), 8, 8, 3), np.uint8)
    image[:, 4, 4, 0] = rows
    batch = {"image": image, "example_mask": np.array([mask[i] for i in rows])}
    yield batch, {"captions": [CAPTIONS[i] for i in rows], "key": [str(i) for i in rows]}


def test_evaluate_built_counts_pairs_of_rows_that_count(rng):
  images = rng.normal(size=(5, 4))
  texts = collections.defaultdict(lambda: rng.normal(size=4))
  results = composition.evaluate_built(
    by_pixel(images), by_name(texts), built([True] * 4 + [False]), texts_per_call=2
  )
  outcomes = collections.defaultdict(list)
  for i in range(4):
    for kind, true, false in composition.from_captions(CAPTIONS[i]):
      outcomes[kind].append(unit(images[i]) @ (unit(texts[true]) - unit(texts[false])) > 0)
  means = {kind: float(np.mean(values)) for kind, values in outcomes.items()}
  assert not any("drum" in text for text in texts)
  assert results == {
    **{f"composition/{kind}": pytest.approx(value) for kind, value in means.items()},
    "composition/average": pytest.approx(np.mean(list(means.values()))),
    "composition/swap_att/pairs": 3,
    "composition/replace_att/pairs": 4,
    "composition/swap_obj/pairs": 3,
    "composition/images": 3,
    "composition/examples": 4,
    "composition/rows": 5,
  }


def test_evaluate_built_of_perfect_and_of_equal_embeddings():
  known = {caption for captions in CAPTIONS for caption in captions}
  one = lambda images: np.tile(unit([1, 0]), (len(images), 1))  # noqa: E731
  perfect = composition.evaluate_built(
    one, lambda texts: unit([[1, 0] if t in known else [0, 1] for t in texts]), built([True] * 5)
  )
  equal = composition.evaluate_built(one, one, built([True] * 5))
  for kind in (*composition.KINDS, "average"):
    assert (perfect[f"composition/{kind}"], equal[f"composition/{kind}"]) == (1, 0)


def test_evaluate_built_without_a_coloured_object_says_so():
  one = lambda images: np.tile(unit([1, 0]), (len(images), 1))  # noqa: E731
  with pytest.raises(ValueError, match=r"none of 1 captions in 5 rows"):
    composition.evaluate_built(one, one, built([False, False, True, False, False]))
  only = composition.evaluate_built(one, one, built([False, True, False, False, False]))
  assert only["composition/swap_att/pairs"] == 0
  assert "composition/swap_att" not in only and "composition/average" not in only


def test_own_negatives_are_held_against_the_caption_they_were_made_of():
  captions = ["a red cat on a mat", "the photo shows some cat, red and asleep"]
  false = [("the photo shows some cat, red and awake", "action"), ("a red cat on a sofa", "object")]
  pairs = composition._own(captions, false)
  assert [(pair.true, pair.kind) for pair in pairs] == [
    (captions[1], "action"), (captions[0], "object"),
  ]  # fmt: skip


def test_own_negatives_are_judged_by_their_kinds():
  """What has no caption or no false one does not count."""
  negatives = [
    [("a blue apple above a red cat", "attribute"), ("a red cat above a blue apple", "relation")],
    [("a green cat in the middle", "object")],
    [],
    [("a pink hat next to a bell", "attribute")],
    [("never seen", "object")],
  ]

  def with_negatives():
    for start, (batch, extras) in zip((0, 3), built([True] * 4 + [False]), strict=True):
      yield batch, extras | {"negatives": negatives[start : start + len(extras["key"])]}

  near = {"a red apple above a blue cat", "a green cat in the middle", "a pink hat next to a bell"}
  one = lambda images: np.tile(unit([1, 0]), (len(images), 1))  # noqa: E731
  text = lambda texts: unit([[1, 0] if t in near else [0, 1] for t in texts])  # noqa: E731
  results = composition.evaluate_built(one, text, with_negatives(), own_negatives=True)
  assert results == {
    "composition/attribute": 0.5, "composition/attribute/pairs": 2,  # apple and cat; hat and bell
    "composition/object": 0.0, "composition/object/pairs": 1,
    "composition/relation": 1.0, "composition/relation/pairs": 1,
    "composition/average": 0.5,
    "composition/images": 3, "composition/examples": 4, "composition/rows": 5,
  }  # fmt: skip
