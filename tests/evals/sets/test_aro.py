"""ARO from files of its documented formats: what is left out, crops, perturbations, averages."""

import collections

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from toy_pairs import MODEL, evaluate, picture, right, write

from grain_jax.data import transforms
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import aro
from grain_jax.evals.sets import composition as sets


def vg_entry(i, **more):
  return {
    "image_path": f"{i % 6}.jpg",
    "bbox_x": 2,
    "bbox_y": 3,
    "bbox_w": 6,
    "bbox_h": 5,
    "true_caption": f"true {i}",
    "false_caption": f"false {i}",
    **more,
  }


def test_aro_relation_is_averaged_over_relations_that_are_not_left_out(tmp_path):
  names = ["riding", "behind", "on", "near", "wading in"]  # the last two are left out
  relations = [names[i % 5 if i < 40 else 0] for i in range(90)]
  for i in range(6):
    picture(tmp_path / "aro" / "images" / f"{i}.jpg", i)
  entries = [vg_entry(i, relation_name=name) for i, name in enumerate(relations)]
  write(tmp_path / "aro" / "visual_genome_relation.json", entries)
  results, _ = evaluate("aro_relation", tmp_path)
  correct = [right(i % 6, f"true {i}", f"false {i}") for i in range(90)]
  kept = [i for i, name in enumerate(relations) if name in names[:3]]
  # A wrong item is told as a relation that no item has, so recall is accuracy.
  told = [relations[i] if correct[i] else "wrong" for i in kept]
  with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
    macro = balanced_accuracy_score([relations[i] for i in kept], told)
  micro = accuracy_score([True] * 90, correct)
  assert results == {
    "composition/aro_relation/macro": pytest.approx(macro, abs=1e-6),
    "composition/aro_relation/micro": pytest.approx(micro, abs=1e-6),
    "composition/aro_relation/relations": 3,
    "composition/aro_relation/examples": 90,
    "composition/aro_relation/rows": 90,
  }
  assert macro != pytest.approx(micro)
  assert len(aro.LEFT_OUT) == 157 and {"next to", "around", "adjusting"} < aro.LEFT_OUT


def test_aro_shows_the_box_and_nothing_around_it(tmp_path, rng):
  whole = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
  path = tmp_path / "aro" / "images" / "0.jpg"
  path.parent.mkdir(parents=True)
  whole.save(path, format="png")
  entry = vg_entry(0, relation_name="on")
  write(tmp_path / "aro" / "visual_genome_relation.json", [entry])
  seen = []

  def image(images):
    seen.extend(images)
    return MODEL.image(images)

  model = Encoders(image, MODEL.text, regions=None, size=8)
  sets.run(model, "aro_relation", Options(root=tmp_path))
  part = Image.fromarray(np.asarray(whole)[3 : 3 + 5, 2 : 2 + 6])
  assert len(seen) == 1
  np.testing.assert_array_equal(seen[0], transforms.resize(part, 8, "squash"))
  write(tmp_path / "aro" / "visual_genome_relation.json", [entry | {"bbox_w": 0}])
  with pytest.raises(ValueError, match="entry 0: a box of 0 x 5 pixels"):
    sets.check("aro_relation", Options(root=tmp_path))


def test_aro_attribution_is_averaged_over_pairs_with_25_items(tmp_path):
  pairs = [("red", "old")] * 30 + [("wet", "tall")] * 25 + [("big", "open")] * 24
  for i in range(6):
    picture(tmp_path / "aro" / "images" / f"{i}.jpg", i)
  entries = [vg_entry(i, attributes=list(pair)) for i, pair in enumerate(pairs)]
  write(tmp_path / "aro" / "visual_genome_attribution.json", entries)
  results, _ = evaluate("aro_attribution", tmp_path)
  correct = [right(i % 6, f"true {i}", f"false {i}") for i in range(79)]
  macro = (np.mean(correct[:30]) + np.mean(correct[30:55])) / 2
  assert results["composition/aro_attribution/macro"] == pytest.approx(macro, abs=1e-6)
  assert results["composition/aro_attribution/micro"] == pytest.approx(np.mean(correct), abs=1e-6)
  assert results["composition/aro_attribution/pairs"] == 2


def karpathy_file(root, dataset, captions):
  images = []
  for i, own in enumerate(captions):
    name = f"COCO_val2014_{i:012}.jpg" if dataset == "coco" else f"{i}.jpg"
    folder = root / ("coco/val2014" if dataset == "coco" else "flickr30k/images")
    picture(folder / name, i)
    images.append(
      {"filename": name, "split": "test", "sentences": [{"raw": caption} for caption in own]}
    )
  images.append({"filename": "x", "split": "train", "sentences": [{"raw": "not of the test"}]})
  write(root / "karpathy" / f"dataset_{dataset}.json", {"images": images, "dataset": dataset})


@pytest.mark.parametrize("dataset", ["coco", "flickr30k"])
def test_order_sets_made_of_karpathys_captions(tmp_path, dataset):
  captions = [
    ["A man is riding a brown horse.", "Two dogs: one big, one small!", "go go go go"],
    ["The end"],
  ]
  karpathy_file(tmp_path, dataset, captions)
  name = f"aro_{dataset}_order"
  results, lines = evaluate(name, tmp_path)
  outcomes = []
  for red, own in enumerate(captions):
    for caption in own:
      true, false = aro.clean(caption), aro.trigram_perturbations(caption)
      if false:
        outcomes.append(all(right(red, true, text) for text in false))
  assert len(outcomes) == 3  # a shuffle of equal words is no false caption
  assert results == {
    f"composition/{name}/accuracy_trigrams": pytest.approx(np.mean(outcomes), abs=1e-6),
    f"composition/{name}/perturbations": 2,
    f"composition/{name}/examples": 3,
    f"composition/{name}/rows": 3,
  }
  assert len(lines) == 1 and "no published figure" in lines[0]


def test_order_sets_as_given(tmp_path):
  picture(tmp_path / "flickr30k" / "images" / "7.jpg", 7)
  entries = [
    {"image": "flickr30k-images/7.jpg", "caption": f"c {i}", "perturbations": [f"{i} c", f"p {i}"]}
    for i in range(20)
  ]
  entries.append({"image": "7.jpg", "caption": "same", "perturbations": ["same"]})
  write(tmp_path / "aro" / "flickr30k_order.json", entries)
  results, lines = evaluate("aro_flickr30k_order", tmp_path)
  expected = [right(7, f"c {i}", f"{i} c") and right(7, f"c {i}", f"p {i}") for i in range(20)]
  assert results["composition/aro_flickr30k_order/accuracy"] == pytest.approx(np.mean(expected))
  assert results["composition/aro_flickr30k_order/rows"] == 20
  assert lines == []


def test_trigram_perturbations_move_words_as_they_say():
  caption = 'One two three, "four" five six; seven (eight) nine ten.'
  words = ["one", "two", "three,", "four", "five", "six", "seven", "eight", "nine", "ten"]
  assert aro.clean(caption).split() == words
  groups = [words[0:3], words[3:6], words[6:9], words[9:]]
  between, within = aro.trigram_perturbations(caption)
  assert aro.trigram_perturbations(caption) == (between, within)
  assert collections.Counter(between.split()) == collections.Counter(words)
  assert all(" ".join(group) in between for group in groups)
  parts = [within.split()[i : i + 3] for i in range(0, 10, 3)]
  assert [sorted(part) for part in parts] == [sorted(group) for group in groups]
  assert " ".join(words) not in (between, within)
  assert len(aro.clean("word " * 50).split()) == 30
  assert aro.trigram_perturbations("dog") == ()
  assert aro.trigram_perturbations("a dog") == ("dog a",)
