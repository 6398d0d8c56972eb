"""Vocabularies against TFDS's metadata, a dataset that TFDS wrote, and folders of images."""

import dataclasses
import io
import json
import pathlib
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import classification, labelled

KNOWN = sorted(name for name in classification.SETS if labelled.read_vocabulary(name))
# Sets whose classes TFDS numbers until, or even when, it has the data.
NUMBERED = {"cifar10", "cifar100", "cub200", "patch_camelyon"}
CLASSES = {
  "cifar10": 10, "cifar100": 100, "sun397": 397, "stanford_cars": 196, "dtd": 47,
  "oxford_pets": 37, "caltech101": 102, "flowers102": 102, "cub200": 200, "places365": 365,
  "food101": 101, "imagenet": 1000, "imagenet_v2": 1000, "eurosat": 10, "resisc45": 45,
  "patch_camelyon": 2,
}  # fmt: skip


def png(shade, size=(6, 4)):
  file = io.BytesIO()
  Image.new("RGB", size, (shade, 0, 0)).save(file, format="png")
  return file.getvalue()


def folder(root, name, pictures):
  """ROOT/NAME/SUB/FILE from {SUB: [FILE, ...]}; a folder a class, each image its own shade."""
  shade = 0
  for sub, names in pictures.items():
    (root / name / sub).mkdir(parents=True)
    for file in names:
      (root / name / sub / file).write_bytes(png(shade))
      shade += 1
  return root / name


def load(name, **options):
  return labelled.load(name, Options(**options), what=f"zero_shot:{name}")


def test_every_set_but_the_folder_has_a_vocabulary_of_the_right_size():
  assert {name: len(labelled.read_vocabulary(name).names) for name in KNOWN} == CLASSES
  assert set(classification.SETS) - set(KNOWN) == {"products2023"}


@pytest.mark.parametrize("name", KNOWN)
def test_vocabulary_says_where_it_is_from_and_its_prompts_have_one_gap(name):
  held = json.loads((labelled.VOCABULARIES / f"{name}.json").read_text(encoding="utf-8"))
  assert held["source"] and held["licence"] and held["notes"]
  assert all(template.count("{}") == 1 for template in held["templates"])
  for label, prompt in held["names"].items():
    assert prompt == " ".join(prompt.split()) and "_" not in prompt and prompt, label
  spelled = [labelled.spell(label) for label in held["names"]]
  assert len(set(spelled)) == len(spelled) and all(spelled)


@pytest.mark.parametrize("name", KNOWN)
def test_labels_are_tfdss_own_in_its_order(name, tmp_path):
  import tensorflow_datasets as tfds

  vocabulary = labelled.read_vocabulary(name)
  info = tfds.builder(vocabulary.tfds, data_dir=tmp_path).info
  names = info.features["label"].names
  assert len(names) == len(vocabulary.names) and "image" in info.features
  if name in NUMBERED:
    assert names == [str(i) for i in range(len(names))]
  else:
    assert names == list(vocabulary.names)


def test_tfdss_folder_may_be_named_by_a_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  with pytest.raises(ValueError, match=f"TFDS has no .* in {tmp_path}/tfds. "):
    load("cifar10", tfds_dir="~/tfds")


def test_order_of_the_sets_that_tfds_only_numbers():
  # The archives list CIFAR's fine labels and number CUB's folders in this order.
  hundred = list(labelled.read_vocabulary("cifar100").names)
  assert hundred == sorted(hundred) and hundred[1] == "aquarium_fish"
  birds = list(labelled.read_vocabulary("cub200").names)
  assert [int(label[:3]) for label in birds] == list(range(1, 201))
  assert labelled.read_vocabulary("cub200").names["001.Black_footed_Albatross"] == (
    "Black footed Albatross"
  )
  ten = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
  assert list(labelled.read_vocabulary("cifar10").names) == ten


CLIP_BENCHMARK_NAMES = {
  "oxford_pets": "pets", "caltech101": "caltech101_vtab", "flowers102": "flowers",
  "eurosat": "eurosat", "imagenet": "imagenet1k", "imagenet_v2": "imagenet1k",
  "patch_camelyon": "pcam",
}  # fmt: skip
CLIP_BENCHMARK_TEMPLATES = CLIP_BENCHMARK_NAMES | {
  "caltech101": "caltech101", "cifar10": "cifar10", "cifar100": "cifar100", "sun397": "sun397",
  "stanford_cars": "cars", "dtd": "dtd", "food101": "food101", "resisc45": "resisc45",
}  # fmt: skip


def test_names_and_templates_are_clip_benchmarks():
  package = pytest.importorskip("clip_benchmark")
  data = pathlib.Path(package.__file__).parent / "datasets"
  names = json.loads((data / "en_classnames.json").read_text())
  templates = json.loads((data / "en_zeroshot_classification_templates.json").read_text())
  for ours, theirs in CLIP_BENCHMARK_NAMES.items():
    prompts = labelled.read_vocabulary(ours).names.values()
    assert list(prompts) == [" ".join(name.split()) for name in names[theirs]], ours
  for ours, theirs in CLIP_BENCHMARK_TEMPLATES.items():
    own = labelled.read_vocabulary(ours).templates
    assert list(own) == [t.replace("{c}", "{}") for t in templates[theirs]], ours


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """patch_camelyon as if TFDS had prepared it: five images to test on, one of them broken."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  data_dir = tmp_path_factory.mktemp("tfds")
  version = str(tfds.builder("patch_camelyon", data_dir=data_dir).version)
  features = tfds.features.FeaturesDict(
    {
      "id": tfds.features.Text(),
      "image": tfds.features.Image(shape=(None, None, 3)),
      "label": tfds.features.ClassLabel(num_classes=2),
    }
  )
  path = data_dir / "patch_camelyon" / version
  path.mkdir(parents=True)
  splits = []
  for split, labels in {"test": [0, 1, 1, 0, 1], "train": [0, -1], "validation": []}.items():
    template = tfds.core.ShardedFileTemplate(
      dataset_name="patch_camelyon", data_dir=path, split=split, filetype_suffix="tfrecord"
    )
    with tf.io.TFRecordWriter(
      str(path / f"patch_camelyon-{split}.tfrecord-00000-of-00001")
    ) as file:
      for i, label in enumerate(labels):
        image = b"no picture" if i == 3 else png(40 * i)
        row = features.encode_example({"id": str(i), "image": image, "label": label})
        file.write(features.serialize_example(row))
    splits.append(
      tfds.core.SplitInfo(
        name=split, shard_lengths=[len(labels)], num_bytes=1, filename_template=template
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=path, features=features, split_infos=splits, check_data=False
  )
  return str(data_dir)


def test_reads_what_tfds_prepared_and_hands_on_a_broken_picture(prepared):
  data = load("patch_camelyon", tfds_dir=prepared)
  assert data.labels == ("0", "1")
  assert data.classes == ("lymph node", "lymph node containing metastatic tumor tissue")
  rows = list(data.read())
  assert [label for _, label in rows] == [0, 1, 1, 0, 1]
  assert rows[2][0] == png(80) and rows[3][0] == b"no picture"
  assert [label for _, label in data.read()] == [0, 1, 1, 0, 1]  # a second pass


def changed(monkeypatch, **fields):
  """Lets the vocabularies be other ones."""
  read = labelled.read_vocabulary
  monkeypatch.setattr(
    labelled, "read_vocabulary", lambda name: dataclasses.replace(read(name), **fields)
  )


def test_a_picture_without_a_label_stops_the_set(prepared, monkeypatch):
  changed(monkeypatch, split="train")
  rows = load("patch_camelyon", tfds_dir=prepared).read()
  assert next(rows)[1] == 0
  with pytest.raises(ValueError, match="picture 1 of split train has the label -1; there are 2"):
    next(rows)


@pytest.mark.parametrize("split", ["validation", "absent", "absent[80%:]"])
def test_an_empty_or_absent_split_is_one_line(split, prepared, monkeypatch):
  changed(monkeypatch, split=split)
  with pytest.raises(ValueError, match="split .* of patch_camelyon/.* is empty or was not"):
    load("patch_camelyon", tfds_dir=prepared)


def test_wrong_class_count_and_order_of_tfds_are_found(prepared, monkeypatch):
  changed(monkeypatch, names={"0": "a", "1": "b", "2": "c"})
  with pytest.raises(ValueError, match="patch_camelyon has 2 classes, the vocabulary 3"):
    load("patch_camelyon", tfds_dir=prepared)
  labelled.check_labels(["0", "1"], ["cat", "dog"], what="x")  # only numbered
  with pytest.raises(ValueError, match="class 1 is 'emu' there and 'dog' in the vocabulary"):
    labelled.check_labels(["cat", "emu", "dog"], ["cat", "dog", "emu"], what="x")


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("food101", "TFDS has no food101/.* in .*. To prepare it: python -c .*'food101', data_dir='"),
    ("imagenet", "put ILSVRC2012_img_val.tar into .*/downloads/manual first; then prepare it: "),
    ("resisc45", "NWPU-RESISC45 first; then prepare it"),
    ("eurosat", r"builder\('eurosat/rgb'"),
  ],
)
def test_a_dataset_that_is_not_prepared_says_how_to_get_it(name, says, tmp_path):
  with pytest.raises(ValueError, match=says) as error:
    load(name, tfds_dir=str(tmp_path))
  assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
  code = re.search('python -c "(.*?)"', str(error.value)).group(1)
  compile(code, "command", "exec")


def test_download_is_tried_and_its_failure_is_one_line(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  def fail(self):
    raise OSError("no\nnetwork")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
  with pytest.raises(ValueError, match="cannot prepare dtd/.*: OSError: no network[.]") as error:
    load("dtd", tfds_dir=str(tmp_path), download=True)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("by", ["label", "prompt", "number", "loose"])
def test_a_known_set_as_a_folder_goes_before_tfds(by, tmp_path):
  vocabulary = labelled.read_vocabulary("eurosat")
  subs = {
    "label": list(vocabulary.names),
    "prompt": list(vocabulary.names.values()),
    "number": [str(i) for i in range(10)],
    "loose": [name.upper().replace(" ", "-") for name in vocabulary.names.values()],
  }[by]
  folder(tmp_path, "eurosat", {sub: ["1.png"] for sub in subs})
  data = load("eurosat", root=tmp_path, tfds_dir=str(tmp_path / "none"))
  assert data.classes == tuple(vocabulary.names.values())
  assert data.templates == vocabulary.templates
  rows = {picture.parent.name: label for picture, label in data.read()}
  assert rows == {sub: i for i, sub in enumerate(subs)}


def test_unknown_and_missing_folders_of_a_known_set_are_one_line(tmp_path):
  names = list(labelled.read_vocabulary("eurosat").names)
  path = folder(tmp_path, "eurosat", {sub: ["1.png"] for sub in names})
  folder(tmp_path, "eurosat", {"Volcano": ["1.png"]})
  with pytest.raises(ValueError, match="'Volcano' in .* is no class of this set. .* 'AnnualCrop'"):
    load("eurosat", root=tmp_path)
  shutil.rmtree(path / "Volcano")
  shutil.rmtree(path / "River")
  with pytest.raises(ValueError, match="has 9 of 10 classes; missing: 'river'"):
    load("eurosat", root=tmp_path)


def test_names_that_two_classes_share_stand_for_neither():
  index = labelled.class_index(["n1", "n2", "n3", "Bird"], ["crane", "crane", "Sea_Lion", "n1"])
  assert index == {"n1": 0, "n2": 1, "n3": 2, "bird": 3, "sea lion": 2}


@given(st.text())
def test_spelling_is_settled_and_blind_to_case_and_underscores(name):
  once = labelled.spell(name)
  assert labelled.spell(once) == once
  assert labelled.spell(name.replace(" ", "_")) == once
  assert "_" not in once and once == " ".join(once.split())
