"""Linear probe: `python -m grain_jax.evals.linear_probe --train=FILE.npz --test=FILE.npz`.

Logistic regression on frozen features, as CLIP is measured (Radford et al., 2021, appendix A.3):
L-BFGS, L2 regularisation, whose strength is chosen on a part of the training set over a logarithmic
grid, first coarse and then finer around the best; then it is fitted to the whole training set. The
files are those of `python -m grain_jax.embed` with labels. scikit-learn does the fitting.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from grain_jax import failures, places
from grain_jax.evals import evidence

# C of scikit-learn, 1 / strength: 8 a decade, 1e-6 to 1e6.
CS = tuple(np.logspace(-6, 6, 97).tolist())
_COARSE = 7  # points of the first pass, at least
_VAL_FRACTION = 0.2  # of each class, to choose C on
_ARRAYS = ("embeddings", "labels", "label_names", "metadata")  # what is read of a file


class Features(NamedTuple):
  """Labelled features of a file."""

  path: str
  features: np.ndarray  # f32 [n, E]
  labels: np.ndarray  # i64 [n]
  names: tuple[str, ...] | None  # of the labels
  metadata: dict[str, Any]  # {} where the file has none


def evaluate(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  cs: Sequence[float] = CS,
  seed: int = 0,
  standardize: bool = False,
  max_iterations: int = 1000,
) -> dict[str, float | int]:
  """Accuracy of a logistic regression on frozen features.

  Args:
    train_features: [n, E].
    train_labels: integers [n].
    test_features: [m, E].
    test_labels: integers [m], classes that the training set has too.
    cs: values of C, positive; a single one is taken without a search.
    seed: of the part of the training set that C is chosen on: a fifth of each class, or one example
      of it; classes of one example are never held out.
    standardize: features less their mean, divided by their deviation, both of the training set.
      Unit embeddings as they are need a larger C and more iterations.
    max_iterations: of L-BFGS.

  Returns:
    `linear_probe/top1`: share of test examples that are classified right;
    `linear_probe/mean_per_class`: mean over the test set's classes of that share;
    `linear_probe/c`: the chosen C; `linear_probe/val_top1`: its accuracy on the held-out part (left
    out without a search). Counts: `linear_probe/examples` and `linear_probe/rows` (of the test
    set), `linear_probe/train_examples`, `linear_probe/classes`, `linear_probe/iterations` of the
    last fit, and `linear_probe/unconverged`, fits that `max_iterations` ended.

  Raises:
    ValueError: shapes, labels or values that cannot be; no scikit-learn; one line.
  """
  train_features, train_labels = _checked(train_features, train_labels, "train")
  test_features, test_labels = _checked(test_features, test_labels, "test")
  if train_features.shape[1] != test_features.shape[1]:
    raise ValueError(
      f"features have {train_features.shape[1]} numbers in train and {test_features.shape[1]} in "
      "test. Embed both with one model."
    )
  classes = np.unique(train_labels)
  if len(classes) < 2:
    raise ValueError(f"train has {len(classes)} class: a probe tells at least two apart.")
  unknown = sorted(set(test_labels.tolist()) - set(classes.tolist()))
  if unknown:
    shown = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
    raise ValueError(f"test has {len(unknown)} classes that train lacks: {shown}. Give the same.")
  cs = sorted(float(c) for c in cs)
  if not cs or not cs[0] > 0 or not np.isfinite(cs[-1]):
    raise ValueError(f"cs = {cs}: positive values of C are needed, one at least.")
  if standardize:
    mean, deviation = train_features.mean(axis=0), train_features.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1)  # a constant feature stays constant
    train_features = (train_features - mean) / deviation
    test_features = (test_features - mean) / deviation

  unconverged = 0

  def fit(features: np.ndarray, labels: np.ndarray, c: float) -> Any:
    nonlocal unconverged
    model, converged = _fit(features, labels, c, max_iterations=max_iterations)
    unconverged += not converged
    return model

  results: dict[str, float | int] = {}
  c = cs[0]
  if len(cs) > 1:
    held = _held_out(train_labels, seed=seed)
    if not held.any():
      raise ValueError(
        "every class of train has one example: none can be held out to choose C. Give one C."
      )

    def score(index: int) -> float:
      model = fit(train_features[~held], train_labels[~held], cs[index])
      return float(np.mean(model.predict(train_features[held]) == train_labels[held]))

    best, results["linear_probe/val_top1"] = search(score, len(cs))
    c = cs[best]
  model = fit(train_features, train_labels, c)
  right = model.predict(test_features) == test_labels
  per_class = [right[test_labels == label].mean() for label in np.unique(test_labels)]
  return {
    "linear_probe/top1": float(right.mean()),
    "linear_probe/mean_per_class": float(np.mean(per_class)),
    **results,
    "linear_probe/c": c,
    "linear_probe/classes": len(classes),
    "linear_probe/train_examples": len(train_labels),
    "linear_probe/iterations": int(np.max(model.n_iter_)),
    "linear_probe/unconverged": unconverged,
    "linear_probe/examples": len(test_labels),
    "linear_probe/rows": len(test_labels),
  }


def search(score: Callable[[int], float], count: int) -> tuple[int, float]:
  """(index, score) of the best of `count` points on a line, the lowest of equals.

  Every 2^k-th point, seven or more of them, then half as far around the best, down to its
  neighbours: right where there is one peak.
  """
  step = 1 << max(count // (_COARSE - 1), 1).bit_length() - 1
  scores = {index: score(index) for index in range(0, count, step)}
  while True:
    best = min(scores, key=lambda index: (-scores[index], index))
    if step == 1:
      return best, scores[best]
    step //= 2
    for index in (best - step, best + step):
      if 0 <= index < count and index not in scores:
        scores[index] = score(index)


def load(path: str, flag: str) -> Features:
  """Labelled features of a file of `grain_jax.embed`; a one-line ValueError where it is none."""
  places.check(path, flag)
  file, where = places.at(path), f"{flag}={path}"
  if not file.is_file():
    raise ValueError(f"{where}: there is no such file. Make it with grain_jax.embed.")
  if not zipfile.is_zipfile(file):
    raise ValueError(f"{where} is no .npz file. Make it with grain_jax.embed.")
  try:
    with np.load(file, allow_pickle=False) as opened:
      arrays = {name: opened[name] for name in _ARRAYS if name in opened}
  except failures.DAMAGED_ARRAYS as error:
    if failures.is_storage(error):
      raise
    raise ValueError(
      f"{where} is damaged, or holds what is no array ({failures.one_line(error, limit=120)}). "
      "Make it again with grain_jax.embed."
    ) from error
  for name, how in (("embeddings", ""), ("labels", " with --labels=folders or a label column")):
    if name not in arrays:
      raise ValueError(f"{where} has no {name}. Make it with grain_jax.embed{how}.")
  labels = arrays["labels"]
  names = _names(arrays["label_names"], labels, where) if "label_names" in arrays else None
  metadata = _metadata(arrays["metadata"], where) if "metadata" in arrays else {}
  return Features(path, arrays["embeddings"], labels, names, metadata)


def _names(names: np.ndarray, labels: np.ndarray, where: str) -> tuple[str, ...]:
  """`label_names` as texts; raises where they are none, or a label is none of theirs."""
  if names.ndim != 1 or names.dtype.kind != "U":
    raise ValueError(f"{where}: its label_names are no texts. Make it again with grain_jax.embed.")
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"{where}: its labels are {labels.dtype}, not integers. Make it again.")
  beyond = labels[(labels < 0) | (labels >= len(names))]
  if beyond.size:
    raise ValueError(
      f"{where}: label {beyond.flat[0]} is none of its {len(names)} label_names. Make it again "
      "with grain_jax.embed."
    )
  return tuple(names.tolist())


def _metadata(array: np.ndarray, where: str) -> dict[str, Any]:
  """The JSON object of a file's `metadata`; raises where it is none."""
  try:
    found = json.loads(str(array))
  except (ValueError, RecursionError):
    found = None
  if not isinstance(found, dict) or not isinstance(found.get("rows", 0), int):
    raise ValueError(
      f"{where}: its metadata is no JSON object of grain_jax.embed. Make it again with that."
    )
  return found


def evaluate_files(train: Features, test: Features, **options: Any) -> dict[str, float | int]:
  """`evaluate` of two files; `linear_probe/rows` counts images that could not be read too.

  Where the files name their classes, equal names are equal classes, whatever their numbers.

  Raises:
    ValueError: the files are of different models, or name their classes differently; one line.
  """
  for key in ("fingerprint", "resize"):
    theirs = train.metadata.get(key), test.metadata.get(key)
    if None not in theirs and theirs[0] != theirs[1]:
      raise ValueError(
        f"{train.path} and {test.path} differ in {key}: {theirs[0]} and {theirs[1]}. Embed both "
        "with one model."
      )
  labels = test.labels
  if (train.names is None) != (test.names is None):
    named, bare = (train, test) if test.names is None else (test, train)
    raise ValueError(f"{named.path} names its classes and {bare.path} does not. Embed both alike.")
  if train.names is not None and test.names is not None:
    index = {name: i for i, name in enumerate(train.names)}
    unknown = [name for name in test.names if name not in index]
    if unknown:
      shown = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
      raise ValueError(
        f"{test.path} has {len(unknown)} classes that {train.path} lacks: {shown}. Give the same."
      )
    labels = np.array([index[name] for name in test.names], np.int64)[test.labels]
  results = evaluate(train.features, train.labels, test.features, labels, **options)
  if "rows" in test.metadata:
    results["linear_probe/rows"] = test.metadata["rows"]
  return results


def _checked(features: np.ndarray, labels: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
  """As f64 [n, E] and i64 [n]; raises where they are not."""
  features, labels = np.asarray(features, np.float64), np.asarray(labels)
  if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
    raise ValueError(
      f"{what}: features {list(features.shape)} and labels {list(labels.shape)} are no [n, E] and "
      "[n] with n > 0."
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"{what}: labels are {labels.dtype}, not integers.")
  broken = int(np.sum(~np.isfinite(features).all(axis=1)))
  if broken:
    raise ValueError(f"{what}: {broken} of {len(features)} features are not finite.")
  return features, labels.astype(np.int64)


def _held_out(labels: np.ndarray, *, seed: int) -> np.ndarray:
  """Which examples choose C: bool [n]."""
  rng = np.random.default_rng(seed)
  held = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    own = rng.permutation(np.flatnonzero(labels == label))
    held[own[: max(round(_VAL_FRACTION * len(own)), 1) if len(own) > 1 else 0]] = True
  return held


def _fit(
  features: np.ndarray, labels: np.ndarray, c: float, *, max_iterations: int
) -> tuple[Any, bool]:
  """(fitted LogisticRegression, whether it converged)."""
  try:
    from sklearn import exceptions, linear_model
  except ImportError as error:
    raise ValueError(
      "the linear probe needs scikit-learn, which is not installed: pip install scikit-learn"
    ) from error
  import warnings

  model = linear_model.LogisticRegression(C=c, max_iter=max_iterations)
  with warnings.catch_warnings(record=True) as caught:  # counted: `linear_probe/unconverged`
    warnings.simplefilter("always", exceptions.ConvergenceWarning)
    model.fit(features, labels)
  failed = [w for w in caught if issubclass(w.category, exceptions.ConvergenceWarning)]
  for other in caught:
    if other not in failed:
      warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
  return model, not failed


def main() -> None:
  from absl import flags

  flag = flags.FLAGS
  train, test = load(flag.train, "--train"), load(flag.test, "--test")
  options = {"seed": flag.seed, "standardize": flag.standardize}
  if flag.c is not None:
    options["cs"] = (flag.c,)
  results = evaluate_files(train, test, **options)
  if flag.json:
    print(json.dumps(results))
    return
  for name, value in results.items():
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    note = evidence.note(name, results)
    print(f"{name:<30} {shown}" + f"  ({note})" * bool(note))


if __name__ == "__main__":
  from absl import flags as _flags

  from grain_jax import cli

  _flags.DEFINE_string("train", None, "Embeddings with labels to fit to.", required=True)
  _flags.DEFINE_string("test", None, "Embeddings with labels to classify.", required=True)
  _flags.DEFINE_float("c", None, "C of scikit-learn; by default it is chosen.", lower_bound=1e-12)
  _flags.DEFINE_bool("standardize", False, "Features to mean 0 and deviation 1.")
  _flags.DEFINE_integer("seed", 0, "Of the part of --train that C is chosen on.")
  _flags.DEFINE_bool("json", False, "One JSON object on stdout.")
  cli.run(main)
