"""The scenes: frozen, deterministic, exact in boxes and masks, and true in what they say.

`python tests/data/scenes/test_scenes.py > tests/data/scenes/golden/scenes.json` writes the golden
file anew.
Whoever does so changes the data of every published figure, and reruns every arm of
bench/grain_vs_clip before the table in the README may stand.
"""

import collections
import colorsys
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from grain_jax import schema
from grain_jax.data.scenes import backgrounds, concepts, scenes, sprites
from grain_jax.data.scenes import texts as scene_texts
from grain_jax.data.scenes import workers as scene_workers

GOLDEN = pathlib.Path(__file__).parent / "golden" / "scenes.json"
TINY = scenes.SceneSettings(train=200, val=20, concepts=8, objects_per_class=1)


@pytest.fixture(scope="module")
def default():
  return scenes.Scenes()


def golden():
  maker = scenes.Scenes()
  digests = {}
  for split in scenes.SPLITS:
    digest = hashlib.sha256()
    for index in (0, 1, 2, 3, maker.split_sizes[split] - 1):
      scene = maker.scene(split, index)
      texts = [scene.captions, scene.descriptions, scene.classes]
      digest.update(json.dumps(texts).encode())
      digest.update(np.round(scene.boxes.astype(np.float64) * 1e4).astype("<i4").tobytes())
      digest.update(scene.pixels.tobytes())
    digests[split] = digest.hexdigest()
  return {
    "comment": "Frozen. Whoever changes this reruns every arm of bench/grain_vs_clip.",
    "settings": json.loads(json.dumps(dataclasses.asdict(maker.settings))),
    "concepts": {c.name: c.codepoint for c in maker.concepts},
    "unseen": hashlib.sha256(json.dumps(scenes.unseen_pairs(maker.settings)).encode()).hexdigest(),
    "sizes": maker.split_sizes,
    "sha256": digests,
  }


def test_scenes_are_the_frozen_ones():
  want, got = json.loads(GOLDEN.read_text()), golden()
  assert got["settings"] == want["settings"], "SceneSettings changed: see the module's docstring"
  assert got == want, "the scenes changed: see the module's docstring"


# Classes.


def test_class_names_are_every_pair_in_order():
  settings = scenes.SceneSettings()
  names = scenes.class_names(settings)
  assert len(names) == len(set(names)) == 800
  for index in (0, 7, 8, 799):
    concept, color = divmod(index, 8)
    want = f"{settings.colors[color][0]} {scenes.concept_names(settings)[concept]}"
    assert names[index] == want
  assert scenes.descriptors(settings).keys() == set(names)
  assert all(scenes.descriptors(settings).values())


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(2, 100), st.floats(0, 0.5), st.integers(0, 1000))
def test_unseen_pairs_are_spread_evenly(count, fraction, seed):
  settings = scenes.SceneSettings(concepts=count, unseen_fraction=fraction, seed=seed)
  unseen = scenes.unseen_pairs(settings)
  assert len(unseen) == len(set(unseen)) == round(fraction * count * 8)
  assert unseen == sorted(unseen)
  of_concept = np.bincount([i // 8 for i in unseen], minlength=count)
  of_color = np.bincount([i % 8 for i in unseen], minlength=8)
  assert of_concept.max() - of_concept.min() <= 1 and of_concept.max() <= 4
  assert of_color.max() - of_color.min() <= 1 and of_color.max() < count


def test_unseen_pairs_stay_out_of_train_and_val_and_objects_cover_all():
  maker, unseen = scenes.Scenes(TINY), set(scenes.unseen_pairs(TINY))
  shown = {
    split: collections.Counter(
      label for i in range(maker.split_sizes[split]) for label in maker.scene(split, i).classes
    )
    for split in scenes.SPLITS
  }
  assert not unseen & (shown["train"].keys() | shown["val"].keys())
  assert shown["train"].keys() == set(range(64)) - unseen
  assert shown["objects"] == dict.fromkeys(range(64), 1)
  assert scenes.Scenes().split_sizes == {"train": 36000, "val": 500, "objects": 3200}


# Records.


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_record_has_the_keys_of_the_schema(split, default):
  record = default.record(split, 5)
  scene = default.scene(split, 5)
  common = {"key", "image", "captions", "regions", "negatives"}
  extra = {"train": set(), "val": {"mask"}, "objects": {"mask", "label"}}[split]
  assert record.keys() == common | extra
  assert record[schema.RECORD_KEY] == f"{split}-000005"
  pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
  assert pixels.shape == (96, 96, 3) and pixels.dtype == np.uint8
  assert np.abs(pixels.astype(int) - scene.pixels).mean() < 4  # JPEG's loss
  assert len(record["captions"]) == len(set(record["captions"])) == 2
  for region in record["regions"]:
    assert region.keys() == {"description", "box", "score", "negatives"}
    assert region["box"].dtype == np.float32 and region["box"].shape == (4,)
    assert 0.5 <= region["score"] <= 1
  if split == "objects":
    concept, color = divmod(record["label"], 8)
    assert len(record["regions"]) == 1
    words = record["regions"][0]["description"].split()
    assert words[-1] == default.concepts[concept].name
    assert words[-2] == default.settings.colors[color][0]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.sampled_from(scenes.SPLITS), st.integers(0, 499))
def test_scene_is_what_it_says(default, split, index):
  scene, s = default.scene(split, index), default.settings
  count = len(scene.classes)
  assert 1 <= count <= 5 and len(set(scene.classes)) == count
  ymin, xmin, ymax, xmax = scene.boxes.T
  assert (scene.boxes >= 0).all() and (scene.boxes <= 1).all()
  assert (ymin < ymax).all() and (xmin < xmax).all()
  # Each attribute that a description uses stands in both captions.
  for label, size, text in zip(scene.classes, scene.sizes, scene.descriptions, strict=True):
    word = "small " if size < 0.26 else "large " if size > 0.4 else ""
    phrase = word + scenes.class_names(s)[label]
    assert text == ("an " if phrase[0] == "o" else "a ") + phrase
    for caption in scene.captions:
      assert re.search(rf"\b{text}\b", caption), (text, caption)
  # Overlap is limited (whole pixels of a small box add a few hundredths).
  for i in range(count):
    for j in range(i):
      height = min(ymax[i], ymax[j]) - max(ymin[i], ymin[j])
      width = min(xmax[i], xmax[j]) - max(xmin[i], xmin[j])
      smaller = min((ymax - ymin)[[i, j]] * (xmax - xmin)[[i, j]])
      assert max(height, 0) * max(width, 0) <= (s.max_overlap + 0.08) * smaller
  # The relation holds of the centres.
  y, x = (ymin + ymax) / 2, (xmin + xmax) / 2
  where = {text: k for k, text in enumerate(scene.descriptions)}
  names = "|".join(map(re.escape, sorted(where, key=len, reverse=True)))
  match = re.match(f"({names}) (?:is )?(.*? of|above|below|next to) ({names})", scene.captions[0])
  if count > 1:
    a, b = where[match[1]], where[match[3]]
    difference = {"left": x[b] - x[a], "right": x[a] - x[b]}
    difference |= {"above": y[b] - y[a], "below": y[a] - y[b]}
    key = match[2].removeprefix("to the ").removesuffix(" of")
    if key != "next to":
      assert difference[key] >= scene_texts.RELATION_MARGIN
      assert difference[key] >= max(difference.values()) - 1e-6
  else:
    place = scene.captions[0].removeprefix(scene.descriptions[0]).split()
    assert ("left" in place) == (x[0] < 0.4) and ("right" in place) == (x[0] > 0.6)
    assert ("top" in place) == (y[0] < 0.4) and ("bottom" in place) == (y[0] > 0.6)


def test_boxes_and_masks_match_the_pixels(default, monkeypatch):
  """Boxes against SciPy's, found in the difference between a scene and its bare background."""
  flat = np.full((96, 96, 3), 255, np.uint8)
  monkeypatch.setattr(backgrounds, "draw", lambda kind, *, size, rng: flat.copy())
  hidden = 0
  for index in range(120):
    scene, record = default.scene("val", index), default.record("val", index)
    changed = np.abs(scene.pixels.astype(int) - flat).max(-1)
    assert ((changed > 0) >= (scene.owner > 0)).all()
    assert (changed[scene.owner == 0] < 90).all()  # only soft edges lie outside
    assert record["mask"].dtype == np.uint8 and ((record["mask"] > 0) == (scene.owner > 0)).all()
    for k, label in enumerate(scene.classes):
      shown = scene.owner == k + 1
      assert set(record["mask"][shown]) == {1 + label // 8}
      rows, columns = ndimage.find_objects(shown.astype(int))[0]
      tight = np.array([rows.start, columns.start, rows.stop, columns.stop]) / 96
      if scene.visible[k] == 1:
        np.testing.assert_allclose(scene.boxes[k], tight, atol=1e-6)
      else:  # amodal: the box goes on under what covers it
        hidden += 1
        assert (scene.boxes[k][:2] <= tight[:2] + 1e-6).all()
        assert (scene.boxes[k][2:] >= tight[2:] - 1e-6).all()
    assert scene.visible[-1] == 1  # the last drawn lies on top, in the mask too
  assert 0 < hidden < 100


def test_sizes_rotations_and_counts_are_drawn_as_set(default):
  drawn = [default.scene("train", i) for i in range(600)]
  counts = np.bincount([len(s.classes) for s in drawn], minlength=6)[1:] / len(drawn)
  np.testing.assert_allclose(counts, default.settings.count_chances, atol=0.06)
  for scene in drawn:
    low, high = default.settings.sizes[len(scene.sizes) - 1]
    assert all(low * 0.75 <= size <= high for size in scene.sizes)
  words = collections.Counter(d.split()[1] for s in drawn for d in s.descriptions)
  total = sum(words.values())
  assert 0.1 < words["small"] / total < 0.4 and 0.1 < words["large"] / total < 0.4


def test_turned_sprite_reaches_as_far_as_announced():
  sprite = sprites.load(concepts.CONCEPTS_100[30], max_side=60, max_rotation=20)
  for rotation in (-20, 0, 13):
    patch = sprites.transform_sprite(sprite, side=40, rotation=rotation, center=(48.3, 50.7))
    rows = np.flatnonzero((patch.pixels[..., 1] > 127).any(1)) + patch.top
    columns = np.flatnonzero((patch.pixels[..., 1] > 127).any(0)) + patch.left
    left, top, right, bottom = (40 * e for e in sprite.extents[rotation])
    want = [48.3 - left, 50.7 - top, 48.3 + right, 50.7 + bottom]
    got = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(got, want, atol=1.2)


def nearest_tint(pixels):
  """Name of the tint of u8 [n, 3], outlines aside: nearest of hues worked out by hand."""
  hues = {"red": 0, "orange": 32, "yellow": 53, "green": 132, "blue": 222, "purple": 276}
  hues["pink"] = 330
  fill = pixels[pixels.max(1) > 90] / 255
  assert len(fill) > 20
  hue, saturation, _ = colorsys.rgb_to_hsv(*fill.mean(0))
  if saturation < 0.04:
    return "gray"
  assert saturation > 0.25
  turn = {name: abs((hue * 360 - h + 180) % 360 - 180) for name, h in hues.items()}
  return min(turn, key=turn.get)


def test_every_tint_of_every_concept_is_recognised(default):
  for concept in range(100):
    sprite = default._sprite(concept)
    patch = sprites.transform_sprite(sprite, side=40, rotation=0, center=(48, 48))
    for name, rgb in default.settings.colors:
      canvas = np.zeros((96, 96, 3), np.uint8)
      alpha = sprites.compose(canvas, patch, rgb=rgb)
      top, left, bottom, right = patch.window(96)
      inside = canvas[top:bottom, left:right][alpha > 200]
      assert nearest_tint(inside) == name, default.concepts[concept]


def test_objects_in_scenes_have_the_colour_that_the_text_says(default):
  for index in range(60):
    scene = default.scene("val", index)
    for k, text in enumerate(scene.descriptions):
      inside = ndimage.binary_erosion(scene.owner == k + 1)  # away from the background
      if np.count_nonzero(scene.pixels[inside].max(1) > 90) > 40:
        assert nearest_tint(scene.pixels[inside]) == text.split()[-2], (index, text)


@pytest.mark.parametrize("kind", backgrounds.KINDS)
def test_backgrounds_are_pale_and_vary(kind):
  drawn = [backgrounds.draw(kind, size=48, rng=np.random.default_rng(i)) for i in range(30)]
  assert all(d.shape == (48, 48, 3) and d.dtype == np.uint8 and d.flags.writeable for d in drawn)
  spread = [np.ptp(d.reshape(-1, 3).mean(0)) for d in drawn]
  assert max(spread) < 40  # of 255, between channels
  assert np.std([d.mean() for d in drawn]) > 20
  assert (kind == "plain") == (max(d.std((0, 1)).max() for d in drawn) < 1e-9)


# Same records whoever makes them.


def digest(record):
  return hashlib.sha256(scene_workers.encode(record)).hexdigest()


def test_records_depend_on_seed_split_and_index_alone():
  one, two = scenes.Scenes(TINY), scenes.Scenes(TINY)
  forward = [digest(one.record("train", i)) for i in range(12)]
  assert [digest(two.record("train", i)) for i in reversed(range(12))] == forward[::-1]
  assert len(set(forward)) == 12
  texts = one.scene("train", 3).captions
  assert scenes.Scenes(dataclasses.replace(TINY, seed=1)).scene("train", 3).captions != texts
  assert one.scene("val", 3).captions != texts
  # A longer split begins like a shorter one.
  longer = scenes.Scenes(dataclasses.replace(TINY, train=5000))
  assert digest(longer.record("train", 3)) == forward[3]


def test_workers_give_the_same_records_in_order():
  alone = list(map(digest, scenes.iterate(TINY, "train", workers=0)))
  assert list(map(digest, scenes.iterate(TINY, "train", workers=2))) == alone
  masks = dataclasses.replace(TINY, val=130)
  record = next(scenes.iterate(masks, "val", workers=2))
  assert record["mask"].shape == (96, 96) and record["regions"][0]["box"].dtype == np.float32


def test_a_worker_that_dies_is_named(monkeypatch, capfd):
  bad = dataclasses.asdict(TINY) | {"no_such": 1}
  with pytest.raises(RuntimeError, match="record 0 of train ended with code 1"):
    list(scene_workers.records(bad, "train", size=4, workers=1))
  assert "settings.no_such" in capfd.readouterr().err


def test_making_scenes_imports_neither_jax_nor_tensorflow():
  code = (
    "import sys; from grain_jax.data.scenes import scenes\n"
    "scenes.Scenes().record('train', 0)\n"
    "sys.exit(' '.join({'jax', 'tensorflow', 'torch', 'emoji'} & set(sys.modules)))"
  )
  root = str(pathlib.Path(scenes.__file__).parents[3])
  done = subprocess.run(
    [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True
  )
  assert not done.stderr.strip(), done.stderr


# Settings.


def test_settings_survive_json():
  settings = dataclasses.replace(TINY, names=("volcano", "apple", "dog"), masks=False)
  assert scenes.from_dict(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings
  with pytest.raises(ValueError, match="settings.color: no such setting"):
    scenes.from_dict({"color": 1})


@pytest.mark.parametrize(
  "key, value",
  [
    ("seed", -1),
    ("train", -1),
    ("concepts", 1),
    ("concepts", 300),
    ("image_size", 8),
    ("colors", (("red", (1, 2, 3)),)),
    ("unseen_fraction", 0.9),
    ("count_chances", (0.5, 0.2, 0.1, 0.1, 0.2)),
    ("sizes", ((0.2, 0.3),)),
    ("max_side", 0.9),
    ("max_rotation", 90),
    ("max_overlap", 2.0),
    ("alpha_threshold", 0),
    ("backgrounds", ("sea",)),
    ("jpeg_quality", 0),
  ],
)
def test_wrong_settings_are_named_in_one_line(key, value):
  with pytest.raises(ValueError, match=rf"^settings\.{key} = [^\n]+: [^\n]+\.$"):
    scenes.SceneSettings(**{key: value})


def test_wrong_split_and_index_are_named(default):
  with pytest.raises(ValueError, match="split = 'test': unknown"):
    default.record("test", 0)
  with pytest.raises(IndexError, match="val has 500 records"):
    default.record("val", 500)


def test_other_sizes_and_many_concepts_work():
  settings = scenes.SceneSettings(image_size=160, concepts=600, masks=False, train=20)
  maker = scenes.Scenes(settings)
  assert len(maker.concepts) == 600 and "mask" not in maker.record("val", 0)
  for index in range(20):
    assert maker.scene("train", index).pixels.shape == (160, 160, 3)


# Words: see also test_scene_texts.py.


def test_captions_are_short_and_differ_in_wording(default):
  drawn = [default.scene("train", i).captions for i in range(300)]
  assert max(len(re.findall(r"\w+|[,:]", text)) for pair in drawn for text in pair) <= 38
  starts = collections.Counter(b.split(" a")[0][:12] for _, b in drawn)
  assert len(starts) >= 5


if __name__ == "__main__":
  print(json.dumps(golden(), indent=2))
