"""Zero-shot classification against scikit-learn and hand-worked prompts."""

import json

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from grain_jax.evals import zero_shot

CLASSES = [f"thing {i}" for i in range(12)]


def unit(values):
  values = np.asarray(values, np.float32)
  return values / np.linalg.norm(values, axis=-1, keepdims=True)


def encode_text(texts):
  """A fixed random direction for each text."""
  return unit([np.random.default_rng(list(t.encode())).normal(size=6) for t in texts])


def split(n=90, rows=16, seed=0):
  """Images, labels and mask of a made-up split, and its batches."""
  rng = np.random.default_rng(seed)
  images, labels = unit(rng.normal(size=(n, 6))), rng.integers(0, len(CLASSES), n)
  mask = rng.random(n) < 0.8
  pictures = np.zeros((n, 1, 1, 3), np.uint8)
  pictures[:, 0, 0, 0] = np.arange(n)
  batches = [
    (
      {"image": pictures[i : i + rows], "example_mask": mask[i : i + rows]},
      {"label": labels[i : i + rows].tolist(), "key": [f"k{j}" for j in range(i, i + rows)]},
    )
    for i in range(0, n, rows)
  ]
  for batch, extras in batches:
    extras["key"] = extras["key"][: len(batch["image"])]
    extras["label"] = [
      label if ok else -1 for label, ok in zip(extras["label"], batch["example_mask"], strict=True)
    ]
  images[~mask] = np.nan
  return images, labels, mask, batches


def test_top_k_is_sklearns_for_all_and_for_each_group():
  images, labels, mask, batches = split()
  descriptors = {name: ["two legs", f"a {name} of wood"] for name in CLASSES}
  groups = {"seen": range(0, 12, 2), "unseen": range(1, 12, 2)}
  results = zero_shot.evaluate(
    lambda pictures: images[pictures[:, 0, 0, 0]],
    encode_text,
    batches,
    classes=CLASSES,
    templates=["a photo of a {}.", "a {}"],
    descriptors=descriptors,
    groups=groups,
    texts_per_call=5,
  )
  plain = [[f"a photo of a {c}.", f"a {c}"] for c in CLASSES]
  described = [
    [
      f"a photo of a {c}, which has two legs",
      f"a {c}, which has two legs",
      f"a photo of a {c}, which is a {c} of wood",
      f"a {c}, which is a {c} of wood",
    ]
    for c in CLASSES
  ]
  for head, prompts in {"": plain, "descriptors/": described}.items():
    weights = unit([encode_text(own).mean(0) for own in prompts])
    for group, members in {
      "": range(12),
      "seen/": groups["seen"],
      "unseen/": groups["unseen"],
    }.items():
      rows = mask & np.isin(labels, list(members))
      for k in (1, 5):
        expected = top_k_accuracy_score(
          labels[rows], images[rows] @ weights.T, k=k, labels=np.arange(12)
        )
        assert results[f"zero_shot/{head}{group}top{k}"] == pytest.approx(expected), (
          head,
          group,
          k,
        )
  assert results["zero_shot/classes"] == 12
  assert results["zero_shot/examples"] == mask.sum() and results["zero_shot/rows"] == 90
  assert results["zero_shot/seen/examples"] + results["zero_shot/unseen/examples"] == mask.sum()


@pytest.mark.parametrize("texts_per_call", [1, 4, 7, 1000])
def test_class_embedding_is_the_mean_renormalised_however_texts_are_cut(texts_per_call):
  prompts = [["a"], ["b", "c", "d"], ["e", "f"]]
  got = zero_shot.class_embeddings(encode_text, prompts, texts_per_call=texts_per_call)
  expected = unit([encode_text(own).mean(0) for own in prompts])
  np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
  ("descriptor", "clause"),
  [
    ("two legs", "which has two legs"),
    ("a long tail", "which is a long tail"),
    ("an orange beak", "which is an orange beak"),
    ("used for cooking", "which is used for cooking"),
    ("has wings", "which has wings"),
    ("often red", "which often red"),
    ("typically round", "which typically round"),
    ("may be striped", "which may be striped"),
    ("can fly", "which can fly"),
    ("antlers", "which has antlers"),
    ("canine teeth", "which has canine teeth"),
    (" A long tail ", "which is A long tail"),
  ],
)
def test_descriptor_clause(descriptor, clause):
  assert zero_shot.descriptor_clause(descriptor) == clause


def test_prompts_with_and_without_descriptors():
  assert zero_shot.class_prompts(["hen"], ["a photo of a {}."]) == [["a photo of a hen."]]
  got = zero_shot.class_prompts(["hen"], ["a photo of a {}."], {"hen": ["two legs"], "cow": []})
  assert got == [["a photo of a hen, which has two legs"]]


def test_a_group_without_images_has_a_count_of_zero_and_no_share():
  images, _, _, batches = split()
  results = zero_shot.evaluate(
    lambda pictures: images[pictures[:, 0, 0, 0]],
    encode_text,
    batches,
    classes=[*CLASSES, "never shown"],
    templates=["{}"],
    groups={"odd": [12]},
  )
  assert results["zero_shot/odd/examples"] == 0 and "zero_shot/odd/top1" not in results


def test_descriptor_file(tmp_path):
  path = tmp_path / "d.json"
  path.write_text(json.dumps({"hen": ["two legs"], "cow": ["horns"], "cat": []}))
  assert zero_shot.load_descriptors(path, ["hen", "cow"]) == {"hen": ["two legs"], "cow": ["horns"]}
  with pytest.raises(ValueError, match="lack 2 of 3 classes: 'cat', 'dog'"):
    zero_shot.load_descriptors(path, ["hen", "cat", "dog"])
  with pytest.raises(ValueError, match="No such file"):
    zero_shot.load_descriptors(tmp_path / "none.json", ["hen"])
  path.write_text("{")
  with pytest.raises(ValueError, match="is not JSON"):
    zero_shot.load_descriptors(path, ["hen"])
  path.write_text("[]")
  with pytest.raises(ValueError, match="holds a list"):
    zero_shot.load_descriptors(path, ["hen"])
  path.write_text('{"hen": "two legs"}')
  with pytest.raises(ValueError, match="list of non-empty strings"):
    zero_shot.load_descriptors(path, ["hen"])


UNLABELLED = [
  (
    {"image": np.ones((1, 1, 1, 3), np.uint8), "example_mask": np.array([True])},
    {"label": [-1], "key": ["u"]},
  )
]


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"classes": []}, "class names"),
    ({"classes": CLASSES[:5]}, r"of 'k\d+': the split has 5 classes"),
    ({"templates": []}, "Give at least one"),
    ({"templates": "a {}"}, "a list of prompts"),
    ({"templates": ["a photo"]}, "where {} stands"),
    ({"groups": {"seen": [12]}}, "class 12: there are 12 classes"),
    ({"groups": {"descriptors": [1]}}, "results use it already"),
    ({"batches": []}, "0 of 0 rows"),
    ({"batches": UNLABELLED}, "label = -1 of 'u'"),
    ({"descriptors": {}}, "lack 12 of 12 classes: .*, [.]{3}"),
  ],
)
def test_wrong_input_is_one_clear_line(change, says):
  images, _, _, batches = split()
  settings = {"classes": CLASSES, "templates": ["a {}"], "batches": batches} | change
  with pytest.raises(ValueError, match=says) as error:
    zero_shot.evaluate(
      lambda pictures: images[pictures[:, 0, 0, 0]],
      encode_text,
      settings.pop("batches"),
      **settings,
    )
  assert "\n" not in str(error.value)
