"""Zero-shot classification on outside sets against scikit-learn and clip_benchmark."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from grain_jax.evals import zero_shot
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import PROTOCOLS, Options
from grain_jax.evals.sets import classification, labelled

E, QUERIES, SIZE = 8, 3, 4
NAMES = ["drum", "hen", "jar", "kite", "oak", "old car", "sea lion"]  # in the folders' order
DESCRIPTORS = {
  "Hen": ["two legs", "a beak", "feathers"],
  "SEA_LION": ["flippers"],
  "old car": ["wheels", "a roof"],
  "oak": ["leaves", "a trunk", "used for shade", "roots"],
  "jar": ["glass"],
  "kite": ["a tail", "wheels"],
  "drum": ["a skin"],
  "nobody's": ["nothing"],
}


def unit(values):
  values = np.asarray(values, np.float32)
  return values / np.linalg.norm(values, axis=-1, keepdims=True)


class Model:
  """A fixed random direction for each text and each shade of red; counts what it encodes."""

  def __init__(self):
    self.texts, self.images, self.fingerprint = [], 0, "a"
    self.encoders = Encoders(
      image=self.image,
      text=self.text,
      regions=self.regions,
      size=SIZE,
      batch_size=5,
      fingerprint=lambda: self.fingerprint,
    )

  def text(self, texts):
    self.texts += texts
    return unit([np.random.default_rng(list(t.encode())).normal(size=E) for t in texts])

  def image(self, images):
    assert images.shape[1:] == (SIZE, SIZE, 3) and images.dtype == np.uint8
    self.images += len(images)
    return unit([np.random.default_rng(int(i[0, 0, 0])).normal(size=E) for i in images])

  def regions(self, images):
    shades = [int(i[0, 0, 0]) for i in images]
    found = unit([np.random.default_rng([7, s]).normal(size=(QUERIES, E)) for s in shades])
    return found, np.zeros((len(images), QUERIES, 4), np.float32)


@pytest.fixture
def root(tmp_path):
  """A folder of 7 classes with uneven numbers of images, each its own shade; one is broken."""
  shade = itertools.count()
  for i, name in enumerate(NAMES):
    sub = tmp_path / "mine" / name.replace(" ", "_")
    sub.mkdir(parents=True)
    for j in range(3 + 2 * i):
      Image.new("RGB", (5, 5), (next(shade), 0, 0)).save(sub / f"{j:02d}.png")
  (tmp_path / "mine" / "hen" / "00.png").write_bytes(b"broken")
  (tmp_path / "mine" / "templates.json").write_text('["a {}.", "one {} outside"]')
  (tmp_path / "descriptors").mkdir()
  (tmp_path / "descriptors" / "mine.json").write_text(json.dumps(DESCRIPTORS))
  return tmp_path


def options(root, *protocols, **fields):
  fields = {"warn": lambda line: None, "protocols": protocols or ("templates",)} | fields
  return Options(root=root, descriptors=root / "descriptors", **fields)


def readable(root):
  """(shade, label) of all images but the broken one, straight from the files."""
  rows = []
  for label, sub in enumerate(sorted(p.name for p in (root / "mine").iterdir() if p.is_dir())):
    for path in sorted((root / "mine" / sub).iterdir()):
      if path.read_bytes() != b"broken":
        rows.append((np.asarray(Image.open(path))[0, 0, 0], label))
  return np.asarray(rows)


def expected(scores, labels):
  """The three figures by scikit-learn."""
  classes = np.arange(scores.shape[1])
  return {
    "top1": top_k_accuracy_score(labels, scores, k=1, labels=classes),
    "top5": top_k_accuracy_score(labels, scores, k=5, labels=classes),
    "mean_per_class": balanced_accuracy_score(labels, scores.argmax(axis=1)),
  }


def references(root):
  """Scores of each protocol, computed class by class."""
  model, rows = Model(), readable(root)
  pictures = np.zeros((len(rows), SIZE, SIZE, 3), np.uint8)
  pictures[:, 0, 0, 0] = rows[:, 0]
  images, regions = model.image(pictures), model.regions(pictures)[0]
  by_name = {key.lower().replace("_", " "): value for key, value in DESCRIPTORS.items()}
  clause = zero_shot.descriptor_clause
  prompts = {
    "name": [[n] for n in NAMES],
    "templates": [[f"a {n}.", f"one {n} outside"] for n in NAMES],
    "descriptors": [
      [f"{t.format(n)}, {clause(d)}" for t in ("a {}", "one {} outside") for d in by_name[n]]
      for n in NAMES
    ],
  }
  means = {head: np.stack([model.text(own).mean(0) for own in t]) for head, t in prompts.items()}
  # The mean over descriptors is not normalised again (GRAIN's our_eval.py).
  scores = {h: images @ (m if h == "descriptors" else unit(m)).T for h, m in means.items()}
  local = np.zeros_like(scores["name"])
  for c, n in enumerate(NAMES):
    phrases = model.text(by_name[n])
    for i in range(len(images)):
      local[i, c] = np.mean([max(float(q @ p) for p in phrases) for q in regions[i]])
  for alpha in (0.0, 0.3, 1.0):
    mixed = alpha * scores["descriptors"] + (1 - alpha) * local
    scores[f"regions/alpha={alpha:g}"] = mixed
  return scores, rows[:, 1]


def test_every_protocol_is_scikit_learns_in_one_pass(root):
  model, warned = Model(), []
  asked = options(
    root, "descriptors", "name", "templates", "regions", alphas=(0.0, 0.3, 1.0), warn=warned.append
  )
  classification.check("mine", asked)
  assert model.images == 0 and not model.texts
  results = classification.run(model.encoders, "mine", asked)
  scores, labels = references(root)
  for head, values in scores.items():
    for key, value in expected(values, labels).items():
      assert results[f"zero_shot/mine/{head}/{key}"] == pytest.approx(value, abs=1e-6), head
  for a, b in (("", "templates/"), ("descriptors/", "regions/alpha=1/")):
    for key in ("top1", "top5", "mean_per_class"):
      assert results[f"zero_shot/mine/{a}{key}"] == results[f"zero_shot/mine/{b}{key}"]
  assert results["zero_shot/mine/examples"] == len(labels) == model.images == 62
  assert results["zero_shot/mine/rows"] == 63 and results["zero_shot/mine/classes"] == 7
  assert len(results) == 6 * 3 + 3 + 3
  assert len(warned) == 2 and "1 of 63 pictures cannot be read" in warned[1]
  assert '1 of 8 keys are no class: "nobody\'s"' in warned[0]


def test_predictions_are_clip_benchmarks(root):
  torch = pytest.importorskip("torch")
  theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
  model = Model()
  model.encode_text = lambda texts: torch.from_numpy(2.5 * model.text(texts))
  model.encode_image = lambda shades: torch.from_numpy(
    np.stack([unit(np.random.default_rng(int(s)).normal(size=E)) for s in shades])
  )

  Tokens = type("Tokens", (list,), {"to": lambda self, device: self})
  rows = readable(root)

  templates = ["a {c}.", "one {c} outside"]
  classifier = theirs.zero_shot_classifier(model, Tokens, NAMES, templates, "cpu", amp=False)
  own = zero_shot.class_embeddings(
    model.text, zero_shot.class_prompts(NAMES, ["a {}.", "one {} outside"])
  )
  np.testing.assert_allclose(own, classifier.numpy().T, atol=1e-6)
  batches = [(torch.as_tensor(p[:, 0]), torch.as_tensor(p[:, 1])) for p in np.array_split(rows, 4)]
  logits, labels = theirs.run_classification(model, classifier, batches, "cpu", amp=False)
  images = model.encode_image(rows[:, 0]).numpy()
  np.testing.assert_array_equal((images @ own.T).argmax(axis=1), logits.numpy().argmax(axis=1))
  results = classification.run(model.encoders, "mine", options(root))
  for key, value in expected(logits.numpy(), labels.numpy()).items():
    assert results[f"zero_shot/mine/templates/{key}"] == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_region_scores_are_hand_worked_in_blocks_of_any_size(block):
  rng = np.random.default_rng(3)
  regions, phrases = unit(rng.normal(size=(5, QUERIES, E))), unit(rng.normal(size=(9, E)))
  counts = [2, 1, 4, 2]
  got = classification.region_scores(regions, phrases, counts, block=block)
  groups = [range(0, 2), range(2, 3), range(3, 7), range(7, 9)]
  for i, (c, group) in itertools.product(range(5), enumerate(groups)):
    best = [max(regions[i, q] @ phrases[d] for d in group) for q in range(QUERIES)]
    assert got[i, c] == pytest.approx(np.mean(best), abs=1e-6)


def test_classes_of_one_name_tie_and_the_lower_one_wins(root):
  """ImageNet has two classes 'missile': images of the second can only be second."""
  names = {p.name: "thing" for p in (root / "mine").iterdir() if p.is_dir()}
  (root / "mine" / "classes.json").write_text(json.dumps(names))
  (root / "descriptors" / "mine.json").write_text('{"thing": ["a part", "wheels"]}')
  asked = options(root, "name", "regions", alphas=(0.5,))
  results = classification.run(Model().encoders, "mine", asked)
  labels = readable(root)[:, 1]
  for head in ("name", "regions/alpha=0.5"):
    assert results[f"zero_shot/mine/{head}/top1"] == pytest.approx(np.mean(labels == 0))
    assert results[f"zero_shot/mine/{head}/top5"] == pytest.approx(np.mean(labels < 5))
    assert results[f"zero_shot/mine/{head}/mean_per_class"] == pytest.approx(1 / 7)


def test_limit_takes_pictures_of_all_classes_and_counts_them(root):
  asked = options(root, limit=14)
  results = classification.run(Model().encoders, "mine", asked)
  assert results["zero_shot/mine/rows"] == 14 and results["zero_shot/mine/examples"] == 13


def test_a_model_without_region_queries_is_told_before_anything_is_encoded(root):
  model = Model()
  encoders = dataclasses.replace(model.encoders, has_regions=False)
  with pytest.raises(ValueError, match="'regions' needs region queries"):
    classification.run(encoders, "mine", options(root, "name", "regions"))
  assert not model.texts and not model.images


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_name_means_one_thing_whatever_else_is_asked(root, count):
  known = {}
  for asked in itertools.permutations(PROTOCOLS, count):
    results = classification.run(Model().encoders, "mine", options(root, *asked, alphas=(0.3,)))
    assert ("zero_shot/mine/top1" in results) == ("templates" in asked), asked
    for name, value in results.items():
      assert known.setdefault(name, value) == pytest.approx(value, abs=1e-6), (name, asked)
  assert known["zero_shot/mine/name/top1"] != known["zero_shot/mine/top1"]


def test_top5_of_few_classes_is_left_out(root):
  for name in ("kite", "oak"):
    for path in (root / "mine" / name).iterdir():
      path.unlink()
    (root / "mine" / name).rmdir()
  results = classification.run(Model().encoders, "mine", options(root))
  assert results["zero_shot/mine/classes"] == 5 and "zero_shot/mine/top1" in results
  assert "zero_shot/mine/top5" not in results


def test_a_folder_without_templates_takes_the_encoders(root):
  (root / "mine" / "templates.json").unlink()
  model = Model()
  classification.run(model.encoders, "mine", options(root))
  assert sorted(model.texts) == sorted(f"a photo of a {name}." for name in NAMES)


def test_texts_are_encoded_once_and_kept_by_content(root):
  cached = options(root, "templates", "regions", cache=root / "c")
  first, second, other = Model(), Model(), Model()
  results = classification.run(first.encoders, "mine", cached)
  assert len(first.texts) == len(set(first.texts)) > 0
  assert len(list((root / "c").iterdir())) == 3  # two classifiers and the raw descriptors
  assert classification.run(second.encoders, "mine", cached) == results and not second.texts
  other.fingerprint = "b"
  assert classification.run(other.encoders, "mine", cached) == results
  assert sorted(other.texts) == sorted(first.texts)
  (root / "mine" / "templates.json").write_text('["the {}"]')
  changed = Model()
  classification.run(changed.encoders, "mine", options(root, cache=root / "c"))
  assert sorted(changed.texts) == sorted(f"the {name}" for name in NAMES)


def test_a_set_of_tfds_by_name_counts_its_broken_picture(monkeypatch):
  """The reader's own tests are in test_labelled; here a stream stands for it."""
  vocabulary = labelled.read_vocabulary("eurosat")
  labels = [0, 3, 9, 3, 5]
  stream = [np.full((6, 6, 3), 20 * i, np.uint8) for i in range(5)]
  stream[2] = b"broken"
  data = labelled.Labelled(
    labels=tuple(vocabulary.names),
    classes=tuple(vocabulary.names.values()),
    templates=vocabulary.templates,
    read=lambda: iter(zip(stream, labels, strict=True)),
  )
  monkeypatch.setattr(labelled, "load", lambda name, options, *, what, how: data)
  model, warned = Model(), []
  results = classification.run(model.encoders, "eurosat", Options(warn=warned.append))
  assert results["zero_shot/eurosat/examples"] == 4 and results["zero_shot/eurosat/rows"] == 5
  assert "zero_shot:eurosat: 1 of 5 pictures" in warned[0] and "number 2" in warned[0]
  assert "a centered satellite photo of a lake or sea." in model.texts
  data = dataclasses.replace(data, read=lambda: iter([(b"broken", 0)]))
  with pytest.raises(ValueError, match="1 of 1 pictures cannot be read"):
    classification.run(model.encoders, "eurosat", Options())


def test_average_of_eleven_only_where_all_are_there():
  rng = np.random.default_rng(0)
  results = {}
  for name in classification.PAPER:
    results[f"zero_shot/{name}/templates/top1"] = float(rng.random())
    results[f"zero_shot/{name}/regions/alpha=0.3/top1"] = float(rng.random())
    results[f"zero_shot/{name}/examples"] = 5
  results["zero_shot/imagenet/templates/top1"] = 0.5
  averages = classification.average(results)
  assert averages == {
    f"zero_shot/average11/{tail}": pytest.approx(
      np.mean([results[f"zero_shot/{name}/{tail}"] for name in classification.PAPER])
    )
    for tail in ("templates/top1", "regions/alpha=0.3/top1")
  }
  del results["zero_shot/food101/templates/top1"]
  assert set(classification.average(results)) == {"zero_shot/average11/regions/alpha=0.3/top1"}
  assert classification.average({}) == {}
  assert len(classification.PAPER) == 11 and "imagenet" not in classification.PAPER


@pytest.mark.parametrize(
  ("name", "change", "says"),
  [
    ("nosuch", {}, "there is no .*nosuch. Sets known by name: cifar10, .*products2023; any other"),
    ("products2023", {}, "there is no .*products2023. Make it a folder .* a product"),
    ("", {}, "names no set"),
    ("../mine", {}, "names no set"),
    ("average11", {}, "results use this name already"),
    ("mine", {"protocols": ()}, "no protocol is asked for"),
    ("mine", {"protocols": ("regions",), "alphas": ()}, r"alphas = \(\): give"),
    ("mine", {"protocols": ("regions",), "alphas": (0.5, 0.5)}, "different weights"),
    ("mine", {"protocols": ("regions",), "alphas": (1.5,)}, "different weights"),
    ("mine", {"protocols": ("regions",), "alphas": (float("nan"),)}, "different weights"),
    ("mine", {"protocols": ("descriptors",), "descriptors": None}, "give --descriptors=DIR"),
    ("mine", {"protocols": ("regions",), "descriptors": pathlib.Path("x")}, "No such file"),
  ],
)
def test_wrong_input_is_one_line_before_anything_is_encoded(name, change, says, root):
  asked = dataclasses.replace(options(root), **change)
  with pytest.raises(ValueError, match=says) as error:
    classification.check(name, asked)
  assert "\n" not in str(error.value)


def test_classes_without_descriptors_are_listed(root):
  path = root / "descriptors" / "mine.json"
  path.write_text(json.dumps({k: v for k, v in DESCRIPTORS.items() if k not in ("oak", "jar")}))
  with pytest.raises(ValueError, match="mine.json: descriptors lack 2 of 7 .*: 'jar', 'oak'"):
    classification.check("mine", options(root, "descriptors"))
  path.write_text(json.dumps(DESCRIPTORS | {"oak": "leaves"}))
  with pytest.raises(ValueError, match=r"descriptors\['oak'\] = 'leaves': a list of"):
    classification.check("mine", options(root, "descriptors"))
  with pytest.raises(ValueError, match="a file. Give a folder"):
    classification.check("mine", options(root, cache=path))
  (root / "mine" / "templates.json").write_text('["a photo"]')
  with pytest.raises(ValueError, match="where {} stands"):
    classification.check("mine", options(root))


def named(root, names, descriptors):
  """The set 'mine' with other names in prompts, by folder, and other descriptors."""
  held = dict(zip([name.replace(" ", "_") for name in NAMES], names, strict=True))
  (root / "mine" / "classes.json").write_text(json.dumps(held))
  (root / "descriptors" / "mine.json").write_text(json.dumps(descriptors))


def test_descriptors_are_found_by_prompt_name_before_label_and_exactly_before_loosely(root):
  names = ["C++", "C#", "Sea  Lion", "old car", "e", "f", "g"]  # of drum, hen, jar, kite, oak ...
  found = {"C#": ["sharp"], "C++": ["plus"], "c": ["letter"], "JAR": ["label"]}
  found |= {"SEA LION": ["prompt"], "Kite": ["kite"], "oak": ["tree"], "F": ["old"], "g": ["gee"]}
  named(root, names, found)
  model = Model()
  asked = options(root, "regions")
  classification.run(model.encoders, "mine", asked)
  raw = [text for text in model.texts if "," not in text]
  assert raw == ["plus", "sharp", "prompt", "kite", "tree", "old", "gee"]


def test_a_class_that_lacks_descriptors_shows_though_its_namesake_has_them(root):
  named(root, ["thing"] * 7, {"sea_lion": ["fins"]})
  with pytest.raises(ValueError, match="mine.json: descriptors lack 6 of 7 classes: 'thing'"):
    classification.check("mine", options(root, "descriptors"))
