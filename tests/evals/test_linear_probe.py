"""The probe against scikit-learn used directly, separable data and hand-made files."""

import json
import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn import datasets, metrics
from sklearn.linear_model import LogisticRegression

from grain_jax.evals import linear_probe


def blobs(rng, *, classes=4, each=25, width=6, spread=1.0, labels=None):
  """Features around a centre a class, shuffled; [n, E], i64 [n]."""
  centers = 4 * np.eye(classes, width)
  labels = np.repeat(np.arange(classes) if labels is None else labels, each)
  features = centers[np.repeat(np.arange(classes), each)]
  features = features + spread * rng.normal(size=features.shape)
  order = rng.permutation(len(labels))
  return features[order].astype(np.float32), labels[order]


def save(path, features, labels, **more):
  np.savez(path, embeddings=features, labels=labels, **more)
  return str(path)


def test_separable_classes_are_all_found(rng):
  train, test = blobs(rng, spread=0.1), blobs(rng, spread=0.1, each=9)
  found = linear_probe.evaluate(*train, *test)
  assert found["linear_probe/top1"] == found["linear_probe/mean_per_class"] == 1
  assert found["linear_probe/val_top1"] == 1
  assert found["linear_probe/classes"] == 4 and found["linear_probe/train_examples"] == 100
  assert found["linear_probe/examples"] == found["linear_probe/rows"] == 36


@pytest.mark.parametrize("standardize", [False, True])
def test_one_c_is_scikit_learns_own(rng, standardize):
  features, labels = datasets.load_digits(return_X_y=True)
  features = features / np.linalg.norm(features, axis=1, keepdims=True)
  train, test = (features[:600], labels[:600]), (features[1200:], labels[1200:])
  found = linear_probe.evaluate(*train, *test, cs=[3.0], standardize=standardize)
  x, z = train[0], test[0]
  if standardize:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    x, z = scaler.transform(x), scaler.transform(z)
  guess = LogisticRegression(C=3.0, max_iter=1000).fit(x, train[1]).predict(z)
  assert_allclose(found["linear_probe/top1"], metrics.accuracy_score(test[1], guess), atol=1e-6)
  assert_allclose(
    found["linear_probe/mean_per_class"], metrics.balanced_accuracy_score(test[1], guess), atol=1e-6
  )
  assert found["linear_probe/top1"] != found["linear_probe/mean_per_class"]
  assert found["linear_probe/c"] == 3 and "linear_probe/val_top1" not in found
  assert found["linear_probe/unconverged"] == 0 and 0 < found["linear_probe/iterations"] < 1000


def test_the_chosen_c_is_the_best_on_the_held_out_part(rng):
  train, test = blobs(rng, spread=3.0, each=40), blobs(rng, spread=3.0)
  cs = np.logspace(-4, 3, 7)  # so few are all tried
  found = linear_probe.evaluate(*train, *test, cs=cs, seed=3)
  held = linear_probe._held_out(train[1], seed=3)
  scores = [
    LogisticRegression(C=c, max_iter=1000)
    .fit(train[0][~held].astype(float), train[1][~held])
    .score(train[0][held].astype(float), train[1][held])
    for c in cs
  ]
  assert len(set(scores)) > 2 and int(np.argmax(scores)) not in (0, 6)
  assert_allclose(found["linear_probe/c"], cs[np.argmax(scores)])
  assert_allclose(found["linear_probe/val_top1"], max(scores))
  final = LogisticRegression(C=found["linear_probe/c"], max_iter=1000)
  final.fit(train[0].astype(float), train[1])
  assert_allclose(found["linear_probe/top1"], final.score(test[0].astype(float), test[1]))
  assert found == linear_probe.evaluate(*train, *test, cs=cs[::-1], seed=3)


def test_a_part_of_each_class_is_held_out():
  labels = np.repeat([7, 2, 9, 4], [10, 2, 1, 33])
  held = linear_probe._held_out(labels, seed=0)
  assert [int(held[labels == c].sum()) for c in (7, 2, 9, 4)] == [2, 1, 0, 7]
  other = linear_probe._held_out(labels, seed=1)
  assert (held == linear_probe._held_out(labels, seed=0)).all() and (held != other).any()


@pytest.mark.parametrize("count", [1, 2, 6, 7, 13, 20, 96, 97])
def test_the_search_finds_every_peak_in_few_trials(count):
  for peak in range(count):
    tried = []

    def score(index, peak=peak, tried=tried):
      tried.append(index)
      return -float(abs(index - peak))

    assert linear_probe.search(score, count) == (peak, 0.0)
    assert len(tried) == len(set(tried)) <= 22


def test_of_equal_strengths_the_lowest_wins_and_cs_are_eight_a_decade():
  assert linear_probe.search(lambda index: 1.0, 97) == (0, 1.0)
  assert_allclose([linear_probe.CS[0], linear_probe.CS[8], linear_probe.CS[-1]], [1e-6, 1e-5, 1e6])


def test_fits_that_do_not_converge_are_counted(rng, recwarn):
  train = blobs(rng, spread=3.0)
  found = linear_probe.evaluate(*train, *train, cs=[1e-3, 1e3], max_iterations=2)
  assert found["linear_probe/unconverged"] == 3 and not recwarn.list


def test_classes_of_files_are_the_same_by_name(rng, tmp_path):
  features, labels = blobs(rng, spread=0.1)
  names = np.array(["ant", "bee", "cow", "dog"])
  train = save(
    tmp_path / "a.npz", features, labels, label_names=names,
    metadata=json.dumps({"fingerprint": "f", "resize": "squash", "rows": 100}),
  )  # fmt: skip
  keep = labels >= 2  # without ant and bee, the rest counted from the other end
  test = save(
    tmp_path / "b.npz", features[keep], 3 - labels[keep], label_names=names[[3, 2]],
    metadata=json.dumps({"fingerprint": "f", "resize": "squash", "rows": 53}),
  )  # fmt: skip
  found = linear_probe.evaluate_files(
    linear_probe.load(train, "--train"), linear_probe.load(test, "--test"), cs=[1.0]
  )
  assert found["linear_probe/top1"] == 1 and found["linear_probe/examples"] == 50
  assert found["linear_probe/rows"] == 53


def test_files_that_do_not_belong_together(rng, tmp_path):
  features, labels = blobs(rng)
  named = {"label_names": np.array(["a", "b", "c", "d"])}

  def load(name, **more):
    return linear_probe.load(save(tmp_path / name, features, labels, **more), "--train")

  one = load("1.npz", metadata=json.dumps({"fingerprint": "f1"}), **named)
  other = load("2.npz", metadata=json.dumps({"fingerprint": "f2"}), **named)
  with pytest.raises(ValueError, match=r"1\.npz and .*2\.npz differ in fingerprint: f1 and f2"):
    linear_probe.evaluate_files(one, other)
  with pytest.raises(ValueError, match=r"1\.npz names its classes and .*3\.npz does not"):
    linear_probe.evaluate_files(one, load("3.npz"))
  with pytest.raises(ValueError, match=r"4\.npz has 2 classes that .*1\.npz lacks: 'x', 'y'"):
    linear_probe.evaluate_files(one, load("4.npz", label_names=np.array(["a", "x", "b", "y"])))


def test_files_that_are_none(tmp_path, rng):
  with pytest.raises(ValueError, match="--test=nowhere.npz: there is no such file"):
    linear_probe.load("nowhere.npz", "--test")
  (tmp_path / "text.npz").write_text("embeddings")
  with pytest.raises(ValueError, match=r"text\.npz is no \.npz file"):
    linear_probe.load(str(tmp_path / "text.npz"), "--test")
  np.savez(tmp_path / "bare.npz", embeddings=np.zeros((2, 3)))
  with pytest.raises(ValueError, match=r"has no labels\. .* --labels=folders"):
    linear_probe.load(str(tmp_path / "bare.npz"), "--test")
  np.savez(tmp_path / "pickle.npz", embeddings=np.array([{}], object), labels=np.zeros(1, int))
  with pytest.raises(ValueError, match="allow_pickle"):
    linear_probe.load(str(tmp_path / "pickle.npz"), "--test")


def damages(data):
  """Files of the same bytes but for a few: flipped, overwritten, cut."""
  for at in (7, 28, 200, len(data) // 2, len(data) - 30, *range(0, len(data), 97)):
    for bit in (1, 8, 128):
      yield data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
    yield data[:at] + b"\0\xff\0\xff" + data[at + 4 :]
    yield data[:at]


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_one_line(rng, tmp_path, write):
  path, arrays = tmp_path / "a.npz", dict(zip(("embeddings", "labels"), blobs(rng), strict=True))
  write(path, **arrays)
  reasons = []
  for data in damages(path.read_bytes()):
    path.write_bytes(data)
    try:
      found = linear_probe.load(str(path), "--test")
    except ValueError as error:
      reasons.append(str(error))
    else:  # of bytes that say nothing of the content
      np.testing.assert_array_equal(found.features, arrays["embeddings"])
  for line in reasons:
    assert line.startswith(f"--test={path}") and "grain_jax.embed" in line and "\n" not in line
  assert sum("is damaged" in line for line in reasons) > 50
  assert write is np.savez or any("decompressing" in line for line in reasons)


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({"labels": np.array([0, 4])}, "label 4 is none of its 4 label_names"),
    ({"labels": np.array([-1, 0])}, "label -1 is none of its 4 label_names"),
    ({"labels": np.array([0.0, 1.0])}, "its labels are float64, not integers"),
    ({"label_names": np.arange(4)}, "its label_names are no texts"),
    ({"label_names": np.array("abcd")}, "its label_names are no texts"),
    ({"metadata": json.dumps([1])}, "its metadata is no JSON object"),
    ({"metadata": json.dumps({"rows": "2"})}, "its metadata is no JSON object"),
    ({"metadata": "{"}, "its metadata is no JSON object"),
  ],
)
def test_a_file_that_contradicts_itself_is_one_line(tmp_path, changes, line):
  arrays = {
    "embeddings": np.zeros((2, 3)), "labels": np.array([0, 3]),
    "label_names": np.array(["a", "b", "c", "d"]), "metadata": json.dumps({"rows": 2}),
  }  # fmt: skip
  np.savez(tmp_path / "a.npz", **arrays)
  assert linear_probe.load(str(tmp_path / "a.npz"), "--test").names == ("a", "b", "c", "d")
  np.savez(tmp_path / "a.npz", **arrays | changes)
  with pytest.raises(ValueError, match=rf"--test=.*a\.npz: {line}") as caught:
    linear_probe.load(str(tmp_path / "a.npz"), "--test")
  assert "\n" not in str(caught.value)


def test_the_users_folder_may_be_named_by_a_tilde(rng, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  path = save(tmp_path / "a.npz", *blobs(rng))
  found, whole = linear_probe.load("~/a.npz", "--test"), linear_probe.load(path, "--test")
  np.testing.assert_array_equal(found.features, whole.features)


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (lambda a: a.update(train_labels=a["train_labels"][:-1]), r"train: features \[100, 6\] and"),
    (lambda a: a.update(train_labels=a["train_labels"] * 1.0), "train: labels are float64"),
    (lambda a: a.update(test_features=a["test_features"][:, :5]), "6 numbers in train and 5 in"),
    (lambda a: a.update(test_labels=a["test_labels"] + 2), "2 classes that train lacks: 4, 5"),
    (lambda a: a.update(train_labels=a["train_labels"] * 0), "train has 1 class"),
    (lambda a: a.update(cs=[0.0, 1.0]), r"cs = \[0\.0, 1\.0\]: positive"),
    (lambda a: a.update(cs=[]), r"cs = \[\]"),
    (lambda a: a.update(test_features=a["test_features"] * np.nan), "test: 100 of 100 features"),
    (
      lambda a: a.update(train_features=a["train_features"][:4], train_labels=np.arange(4)),
      "every class of train has one example",
    ),
  ],
)
def test_wrong_input_is_one_line(rng, change, line):
  features, labels = blobs(rng)
  given = {
    "train_features": features, "train_labels": labels, "test_features": features,
    "test_labels": labels,
  }  # fmt: skip
  change(given)
  positional = [given.pop(f"{part}_{what}") for part in ("train", "test") for what in ("features", "labels")]  # fmt: skip  # noqa: E501
  with pytest.raises(ValueError, match=line) as caught:
    linear_probe.evaluate(*positional, **given)
  assert "\n" not in str(caught.value)


def test_without_scikit_learn_it_says_how_to_get_it(rng, monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with pytest.raises(ValueError, match="pip install scikit-learn"):
    linear_probe.evaluate(*blobs(rng), *blobs(rng))


def test_the_command(rng, tmp_path):
  train = save(tmp_path / "train.npz", *blobs(rng, spread=0.1))
  test = save(tmp_path / "test.npz", *blobs(rng, spread=0.1))
  command = [sys.executable, "-m", "grain_jax.evals.linear_probe", f"--train={train}"]
  done = subprocess.run([*command, f"--test={test}", "--json"], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == linear_probe.evaluate_files(
    linear_probe.load(train, "--train"), linear_probe.load(test, "--test")
  )
  done = subprocess.run([*command, "--test=nowhere.npz"], capture_output=True, text=True)
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith("ValueError: --test=nowhere.npz") and done.stderr.count("\n") == 1
