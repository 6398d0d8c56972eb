"""Files of descriptors as Menon and Vondrick published them (ICLR 2023) and our class lists."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import classification, labelled

# Classes with an empty list, and keys that our lists spell otherwise, in the published files.
EMPTY = {
  "food101": ["donuts", "french fries", "fried calamari", "mussels", "oysters"],
  "places365": ["corn field"],
}
OTHERWISE = {
  "places365": {"arcade": "arcade (passageway)", "lock chamber": "lock_chamber (canal)"},
  "imagenet": {"newt": "eft", "tights": "maillot"},
  "imagenet_v2": {"newt": "eft", "tights": "maillot"},
}


@pytest.fixture
def known(monkeypatch):
  """The classes of a known set, without a picture."""

  def load(name, options, *, what, how):
    vocabulary = labelled.read_vocabulary(name)
    classes = tuple(vocabulary.names.values())
    return labelled.Labelled(
      tuple(vocabulary.names), classes, vocabulary.templates, lambda: iter(())
    )

  monkeypatch.setattr(labelled, "load", load)
  return load


def prompts(name, asked):
  classification.check(name, asked)
  data = labelled.load(name, asked, what="", how="")
  return data, classification._prompts(name, data, asked, default=())


@pytest.mark.parametrize("name", ["food101", "places365", "imagenet", "imagenet_v2"])
def test_empty_lists_and_other_names_as_published(name, tmp_path, known):
  classes = labelled.read_vocabulary(name).names.values()
  other, empty = OTHERWISE.get(name, {}), EMPTY.get(name, [])
  held = {
    other.get(c, c.replace(" ", "_")): [] if c in empty else [f"part {i}"]
    for i, c in enumerate(classes)
  }
  (tmp_path / f"{name}.json").write_text(json.dumps(held | {"nobody": ["nothing"]}))
  asked = Options(descriptors=tmp_path, protocols=("descriptors", "regions"))
  data, found = prompts(name, asked)
  for c, own, phrases in zip(data.classes, found.heads["descriptors"], found.phrases, strict=True):
    if c in empty:
      assert own == [t.replace("{}", c) for t in data.templates] and phrases == [c]
    else:
      assert phrases == held[other.get(c, c.replace(" ", "_"))]
      assert all(prompt.endswith(f"which has {phrases[0]}") for prompt in own)
  assert found.note.endswith(f"1 of {len(held) + 1} keys are no class: 'nobody'")
  if empty:
    alone = f"{len(empty)} of {len(data.classes)} classes by name alone (no text): "
    assert alone + ", ".join(map(repr, empty)) in found.note


@pytest.mark.parametrize(
  ("name", "file"),
  [
    ("oxford_pets", "descriptors_pets.json"),
    ("oxford_pets", "pets.json"),
    ("oxford_pets", "oxford_pets.json"),
    ("cub200", "descriptors_cub.json"),
    ("imagenet_v2", "descriptors_imagenet.json"),
    ("food101", "descriptors_food101.json"),
  ],
)
def test_files_under_their_published_names(name, file, tmp_path, known):
  classes = labelled.read_vocabulary(name).names.values()
  (tmp_path / file).write_text(json.dumps({c: ["legs"] for c in classes}))
  _, found = prompts(name, Options(descriptors=tmp_path, protocols=("descriptors",)))
  assert not found.note and len(found.heads["descriptors"]) == len(classes)


PUBLISHED = pathlib.Path(__file__).parents[4] / "shared" / "data" / "descriptors"


@pytest.mark.parametrize("name", ["dtd", "eurosat", "food101", "oxford_pets", "places365"])
def test_published_files_fit_the_vocabularies(name, tmp_path, known):
  source = PUBLISHED / f"{name.removeprefix('oxford_')}.json"
  if not source.exists():
    pytest.skip(f"{source} is not here: the published descriptor files do not come with the code")
  held = json.loads(source.read_text())
  asked = Options(descriptors=PUBLISHED, protocols=("regions",))
  data, found = prompts(name, asked)
  by_name = {key.lower().replace("_", " ").replace("-", " "): own for key, own in held.items()}
  for ours, theirs in OTHERWISE.get(name, {}).items():
    by_name[ours] = held[theirs]
  assert found.phrases == [by_name[c.lower().replace("-", " ")] or [c] for c in data.classes]
  assert "no class" not in found.note
  assert bool(found.note) == (name in EMPTY)


def test_a_class_by_its_name_alone_is_scored_and_said(tmp_path):
  """Two pictures, two classes, one without a text; every number by hand."""
  directions = {"a hen.": [1, 0], "a cow, which has horns": [0.6, 0.8], "hen": [1, 0]}
  directions["horns"] = [0, 1]
  for i, name in enumerate(("cow", "hen")):
    (tmp_path / "mine" / name).mkdir(parents=True)
    Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "mine" / name / "1.png")
  (tmp_path / "mine" / "templates.json").write_text('["a {}."]')
  (tmp_path / "mine.json").write_text('{"Hen": [], "COW": ["horns"], "cat": ["claws"]}')
  seen, warned = [], []

  def text(texts):
    seen.extend(texts)
    return np.array([directions[t] for t in texts], np.float32)

  def image(images):  # the cow's picture is nearer the hen, the hen's too
    return np.tile(np.array([[0.96, 0.28]], np.float32), (len(images), 1))

  encoders = Encoders(
    image=image,
    text=text,
    regions=lambda images: (
      np.tile(np.array([[[0, 1]]], np.float32), (len(images), 1, 1)),
      np.zeros((len(images), 1, 4), np.float32),
    ),
    size=4,
  )
  asked = Options(
    root=tmp_path, descriptors=tmp_path, protocols=("descriptors", "regions"), alphas=(0.0,),
    warn=warned.append,
  )  # fmt: skip
  results = classification.run(encoders, "mine", asked)
  assert sorted(seen) == sorted(directions)
  assert results["zero_shot/mine/descriptors/mean_per_class"] == 0.5  # both are called hens
  assert results["zero_shot/mine/regions/alpha=0/top1"] == 0.5  # both are called cows
  (line,) = warned
  assert line.endswith(
    "mine.json: 1 of 2 classes by name alone (no text): 'hen'; 1 of 3 keys are no class: 'cat'"
  )


def test_folders_of_a_known_set_may_be_named_as_its_descriptors(tmp_path):
  names = labelled.read_vocabulary("places365").names
  published = {"arcade": "arcade (passageway)", "lock_chamber": "lock_chamber (canal)"}
  subs = [published.get(label, label).replace("/", "-") for label in names]
  for sub in subs:
    (tmp_path / "places365" / sub).mkdir(parents=True)
    (tmp_path / "places365" / sub / "1.png").write_bytes(b"")
  data = labelled.load("places365", Options(root=tmp_path), what="places365")
  found = {path.parent.name: label for path, label in data.read()}
  assert found == {sub: i for i, sub in enumerate(subs)}
