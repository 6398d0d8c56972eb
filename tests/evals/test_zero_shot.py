"""Zero-shot classification against scikit-learn and hand-worked prompts."""

import io
import json
import os
import pathlib

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from grain_jax.data import dataset
from grain_jax.evals import built, zero_shot

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
    weights = np.stack([encode_text(own).mean(0) for own in prompts])
    weights = weights if head else unit(weights)  # GRAIN's mean is not normalised again
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
    predicted = (images[mask] @ weights.T).argmax(axis=1)
    assert results[f"zero_shot/{head}mean_per_class"] == pytest.approx(
      balanced_accuracy_score(labels[mask], predicted)
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


def test_the_mean_over_descriptors_is_shorter_where_they_disagree():
  """The published our_eval.py: F.normalize, then .mean(dim=0), and that as it is."""
  means = {"a": unit([1, 1.2, 0]), "a2": unit([1, -1.2, 0]), "b": unit([0.8, 0, 0.6])}
  prompts, image = [["a", "a2"], ["b", "b"]], unit([1, 0, 0.2])
  encode = lambda texts: np.stack([means[text] for text in texts])  # noqa: E731
  published = zero_shot.class_embeddings(encode, prompts, renormalize=False)
  np.testing.assert_allclose(published, [(means["a"] + means["a2"]) / 2, means["b"]], atol=1e-6)
  assert (published @ image).argmax() == 1
  assert (zero_shot.class_embeddings(encode, prompts) @ image).argmax() == 0


def test_a_text_of_several_classes_is_encoded_once():
  asked = []

  def encode(texts):
    asked.extend(texts)
    return encode_text(texts)

  prompts = [["a", "b"], ["b", "c"], ["c", "a", "a"], ["a", "b"]]
  got = zero_shot.class_embeddings(encode, prompts, texts_per_call=2)
  assert sorted(asked) == ["a", "b", "c"]
  np.testing.assert_allclose(got, unit([encode_text(own).mean(0) for own in prompts]), atol=1e-6)
  np.testing.assert_array_equal(got[0], got[3])


def random_scores(ties, seed=0, n=200, classes=9):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(n, classes)).astype(np.float32)
  return (np.round(scores) if ties else scores), rng.integers(0, classes - 2, n)


@pytest.mark.parametrize("ties", [False, True])
def test_label_ranks_are_a_stable_sorts(ties):
  scores, labels = random_scores(ties)
  order = np.argsort(-scores, axis=1, kind="stable")
  expected = [list(row).index(label) for row, label in zip(order, labels, strict=True)]
  np.testing.assert_array_equal(zero_shot.label_ranks(scores, labels), expected)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_figures_of_ranks_are_sklearns():
  scores, labels = random_scores(ties=False)  # of the last two classes there is no image
  ranks = zero_shot.label_ranks(scores, labels)
  for k in (1, 5):
    expected = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(9))
    assert np.mean(ranks < k) == pytest.approx(expected)
  assert zero_shot.mean_per_class(ranks, labels) == pytest.approx(
    balanced_accuracy_score(labels, scores.argmax(axis=1)), abs=1e-9
  )


class Cache:
  """A cache of classifiers in a folder, and what it had to encode and to warn of."""

  def __init__(self, folder):
    self.folder, self.asked, self.warned = folder, [], []

  def get(self, prompts, fingerprint="one", **how):
    def encode(texts):
      self.asked.extend(texts)
      return encode_text(texts)

    self.asked.clear()
    return zero_shot.cached_class_embeddings(
      encode, prompts, fingerprint=fingerprint, folder=self.folder, warn=self.warned.append, **how
    )


def test_cache_is_by_content(tmp_path):
  cache = Cache(tmp_path / "new" / "cache")
  first = cache.get([["a"], ["b", "c"]])
  assert cache.asked == ["a", "b", "c"] and len(list(cache.folder.iterdir())) == 1
  np.testing.assert_array_equal(cache.get([["a"], ["b", "c"]]), first)
  assert not cache.asked and not cache.warned
  # another encoder, another order, the same texts shared out otherwise
  for prompts, fingerprint in (
    ([["a"], ["b", "c"]], "two"),
    ([["b", "c"], ["a"]], "one"),
    ([["a", "b"], ["c"]], "one"),
    ([["a"], ["b", "d"]], "one"),
  ):
    cache.get(prompts, fingerprint)
    assert cache.asked, (prompts, fingerprint)
  assert len(list(cache.folder.iterdir())) == 5
  cache.get([["a"]], "")
  assert cache.asked and len(list(cache.folder.iterdir())) == 5
  mean = cache.get([["a"], ["b", "c"]], renormalize=False)
  assert cache.asked and np.linalg.norm(mean[1]) < 0.99
  np.testing.assert_array_equal(cache.get([["a"], ["b", "c"]], renormalize=False), mean)
  assert not cache.asked and not cache.warned


def saved(array):
  file = io.BytesIO()
  np.save(file, array, allow_pickle=True)
  return file.getvalue()


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"no array",
    saved(np.ones((2, 6), np.float32))[:-7],
    saved(np.ones((2, 6), np.float32))[:20],
    saved(unit(np.ones((3, 6)))),
    saved(np.full((2, 6), np.nan, np.float32)),
    saved(np.asarray([[1], {}], object)),
  ],
  ids=["empty", "text", "cut", "header", "classes", "nan", "pickle"],
)
def test_a_cache_file_that_is_no_use_is_made_anew_with_a_warning(content, tmp_path):
  cache = Cache(tmp_path)
  first = cache.get([["a"], ["b"]])
  (path,) = tmp_path.iterdir()
  path.write_bytes(content)
  np.testing.assert_array_equal(cache.get([["a"], ["b"]]), first)
  assert cache.asked == ["a", "b"]
  assert len(cache.warned) == 1 and str(path) in cache.warned[0] and "\n" not in cache.warned[0]
  np.testing.assert_array_equal(cache.get([["a"], ["b"]]), first)
  assert not cache.asked and list(tmp_path.iterdir()) == [path]


class Touches:
  """What a pickle can do: it makes a file when it is read."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def test_a_cache_file_runs_no_code(tmp_path):
  cache, mark = Cache(tmp_path / "cache"), tmp_path / "mark"
  first = cache.get([["a"]])
  (path,) = cache.folder.iterdir()
  path.write_bytes(saved(np.asarray([[Touches(mark)]], object)))
  np.testing.assert_array_equal(cache.get([["a"]]), first)
  assert not mark.exists() and len(cache.warned) == 1


def test_a_cache_that_cannot_be_written_leaves_no_half_file(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
  with pytest.raises(OSError, match="full"):
    Cache(tmp_path).get([["a"]])
  assert not list(tmp_path.iterdir())


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
  got = zero_shot.class_prompts(["cow", "hen"], ["a {}.", "one {}"], {"HEN": ["legs"], "cow": []})
  assert got == [["a cow.", "one cow"], ["a hen, which has legs", "one hen, which has legs"]]
  # A template as GRAIN's 46 are written.
  got = zero_shot.class_prompts(["hen"], ["a bad photo of a {},"], {"hen": ["two legs"]})
  assert got == [["a bad photo of a hen, which has two legs"]]


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
  warned = []
  got = zero_shot.load_descriptors(path, ["Hen", "cow"], warn=warned.append)
  assert got == {"Hen": ["two legs"], "cow": ["horns"]}
  assert len(warned) == 1 and warned[0].endswith("1 of 3 keys are no class: 'cat'")
  assert zero_shot.load_descriptors(path, ["hen", "cat"]) == {"hen": ["two legs"], "cat": []}
  with pytest.raises(ValueError, match="lack 2 of 4 classes: 'dog', 'pig' .no class for .* 'cow'"):
    zero_shot.load_descriptors(path, ["hen", "cat", "dog", "pig"])
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


def test_descriptors_of_built_data_are_held_against_its_classes_before_a_run(
  scenes_dir, tiny, tmp_path, caplog
):
  data = dataset.open_dataset(scenes_dir)
  tiny.zero_shot.descriptors = str(tmp_path / "d.json")
  held = {name.replace(" ", "_"): ["a part"] for name in data.class_names} | {"x": ["y"]}
  (tmp_path / "d.json").write_text(json.dumps(held))
  built.check("zero_shot", tiny, data)
  (line,) = caplog.messages
  assert line.endswith(f"d.json': 1 of {len(held)} keys are no class: 'x'")
  (tmp_path / "d.json").write_text('{"x": ["y"]}')
  with pytest.raises(ValueError, match="config.zero_shot: descriptors lack .*no class for 1 keys"):
    built.check("zero_shot", tiny, data)


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
