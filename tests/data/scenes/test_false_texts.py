"""False captions and descriptions of a scene: one thing exchanged, and false indeed."""

import re

import numpy as np
import pytest

from grain_jax.data.scenes import false_texts, scenes, texts


@pytest.fixture(scope="module")
def made():
  return scenes.Scenes(scenes.SceneSettings(negatives=True, train=400, val=1))


def things_in(text, settings, names):
  """(colour, name) pairs that a text names; longer names first."""
  colors = "|".join(color for color, _ in settings.colors)
  options = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
  return re.findall(rf"({colors}) ({options})", text)


def test_false_captions_differ_in_one_thing_of_their_kind(made):
  """Held against the scene itself: what it shows, and where."""
  names, kinds, exchanged = [c.name for c in made.concepts], [], []
  for index in range(400):
    scene, record = made.scene("train", index), made.record("train", index)
    caption = record["captions"][0]
    own = things_in(caption, made.settings, names)
    for negative in record["negatives"]:
      text, kind = negative["caption"], negative["kind"]
      kinds.append(kind)
      found = things_in(text, made.settings, names)
      assert text != caption and text not in record["captions"]
      if kind == "relation":
        assert sorted(found) == sorted(own)
        if len(scene.classes) > 1:
          assert found[:2] == own[1::-1] and found[2:] == own[2:]
          ids = {thing: i for i, thing in enumerate(_things(made, scene))}
          a, b = (scene.boxes[ids[thing]].tolist() for thing in own[:2])
          said = next(k for k, v in texts.RELATIONS.items() if any(f" {w} " in text for w in v))
          assert texts.relation_of(b, a) != said and said != "near"
        continue
      new, old = set(found) - set(own), set(own) - set(found)
      if {c for c, _ in found} == {c for c, _ in own} and len(new) == 2:
        exchanged.append(kind)
        (a, b), (c, d) = old
        assert new == {(a, d), (c, b)}
        places = [own.index(thing) for thing in old], [found.index(thing) for thing in new]
        assert sorted(places[0]) == sorted(places[1])
        kept = {i: own[i][kind == "attribute"] for i in places[0]}
        assert kept == {i: found[i][kind == "attribute"] for i in places[0]}
        continue
      assert len(new) == len(old) == 1 and not new & set(_things(made, scene))
      (new,), (old,) = new, old
      same, other = (1, 0) if kind == "attribute" else (0, 1)
      assert new[same] == old[same] and new[other] != old[other]
      if kind == "object":
        assert new[1] not in {name for _, name in _things(made, scene)}
  assert len(kinds) > 900 and set(kinds) == {"relation", "attribute", "object"}
  assert all(80 < exchanged.count(kind) < 200 for kind in ("attribute", "object"))


def _things(made, scene):
  colors = [color for color, _ in made.settings.colors]
  names = [c.name for c in made.concepts]
  return [(colors[c % len(colors)], names[c // len(colors)]) for c in scene.classes]


def test_false_descriptions_are_of_nothing_in_the_scene(made):
  names, number = [c.name for c in made.concepts], 0
  for index in range(400):
    scene, record = made.scene("train", index), made.record("train", index)
    for region in record["regions"]:
      assert 2 <= len(set(region["negatives"])) == len(region["negatives"]) <= 4
      for text in region["negatives"]:
        (thing,) = things_in(text, made.settings, names)
        assert thing not in _things(made, scene) and text != region["description"]
        size = [w for w in ("small", "large") if f" {w} " in f" {region['description']} "]
        assert [w for w in ("small", "large") if f" {w} " in f" {text} "] == size
        number += 1
  assert number > 2000


def test_no_false_text_names_a_pair_that_is_held_out(made):
  """Else training says of each unseen class that it is never there."""
  names = scenes.class_names(made.settings)
  unseen = {tuple(names[i].split(" ", 1)) for i in scenes.unseen_pairs(made.settings)}
  concepts, found = [c.name for c in made.concepts], []
  for split, count in (("train", 400), ("val", 1)):
    for index in range(count):
      record = made.record(split, index)
      false = [n["caption"] for n in record["negatives"]]
      false += [text for region in record["regions"] for text in region["negatives"]]
      for text in false:
        found += things_in(text, made.settings, concepts)
  assert len(set(found)) > 500 and not unseen & set(found)


def test_without_the_setting_the_records_are_as_ever(made):
  plain = scenes.Scenes(scenes.SceneSettings(train=400, val=1))
  for index in (0, 7, 399):
    a, b = plain.record("train", index), made.record("train", index)
    assert a["negatives"] == [] and all(r["negatives"] == [] for r in a["regions"])
    assert (a["image"], a["captions"]) == (b["image"], b["captions"])


def test_two_things_next_to_each_other_have_no_false_place():
  boxes = [[0.4, 0.4, 0.5, 0.5], [0.42, 0.42, 0.52, 0.52]]
  found = false_texts.of_caption(
    "a red cat next to a blue dog", [("red", "cat"), ("blue", "dog")],
    ["a red cat", "a blue dog"], boxes,
    colors=["red", "blue", "gray"], names=["cat", "dog", "owl"], choose=lambda n: 0,
  )  # fmt: skip
  assert found == [
    {"caption": "a blue cat next to a blue dog", "kind": "attribute"},
    {"caption": "a red owl next to a blue dog", "kind": "object"},
  ]


def test_a_name_inside_another_is_not_taken_for_it():
  """Of a car and a carrot of one colour, the car is exchanged, and no carrot becomes a lionrot."""
  things = [("gray", "car"), ("gray", "carrot")]
  for seed in range(20):
    made, _ = false_texts.of_scene(
      things, caption="a gray carrot above a gray car",
      descriptions=["a gray car", "a gray carrot"],
      boxes=[(0.6, 0.1, 0.9, 0.4), (0.1, 0.1, 0.4, 0.4)], colors=["gray", "pink"],
      names=["car", "carrot", "lion"], rng=np.random.default_rng(seed),
    )  # fmt: skip
    for negative in made:
      words = set(negative["caption"].split())
      assert words <= {"a", "gray", "pink", "car", "carrot", "lion", "above"}, negative
      assert {"above"} <= words and len(negative["caption"].split()) == 7
