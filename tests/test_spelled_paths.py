"""Accents as macOS writes them (NFD) and as others do (NFC) meet, in every reader of paths."""

import csv
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from grain_jax import places
from grain_jax.data import build, dataset
from grain_jax.data.sources import folder as folder_source
from grain_jax.data.sources import published as published_source
from grain_jax.evals import composition
from grain_jax.evals.inputs import files, given_images
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import (
  detection,
  fine_grained,
  grounding,
  region_classification,
  retrieval,
  segmentation,
  waterbirds,
)

OTHER = {"NFC": "NFD", "NFD": "NFC"}
NAME = "Ünï/caf\u00e9 \u1e69.png"
SIDE = 8


def unit(count):
  return np.tile(np.eye(4, dtype=np.float32)[0], (count, 1))


ENCODERS = Encoders(
  image=lambda images: unit(len(images)),
  text=lambda texts: unit(len(texts)),
  regions=lambda images: (
    unit(2 * len(images)).reshape(-1, 2, 4), np.full((len(images), 2, 4), 0.5, np.float32)
  ),
  patches=lambda images: unit(4 * len(images)).reshape(-1, 2, 2, 4),
  size=SIDE,
  templates=("a {}.",),
)  # fmt: skip


@pytest.fixture(params=OTHER)
def spelled(request, tmp_path):
  """(folder, path of a picture in it as annotations give it), the picture in the other form."""
  root = tmp_path / "in"
  path = root / unicodedata.normalize(OTHER[request.param], NAME)
  path.parent.mkdir(parents=True)
  Image.new("RGB", (20, 20), "red").save(path)
  (tmp_path / "in" / "plain.png").write_bytes(path.read_bytes())
  name = unicodedata.normalize(request.param, NAME)
  if (root / name).exists():
    pytest.skip("this file system takes both forms for one")
  return root, name


def built(root, source):
  out = root.parent / "out"
  build.build(source, out, say=lambda line: None)
  opened = dataset.open_dataset(out)
  assert opened.manifest["inputs"]["images"]["missing"] == 0
  return opened.num_records("train")


def build_jsonl(root, name):
  write_lines(root / "annotations.jsonl", {"image": name, "caption": "c"})
  return built(root, folder_source.source(root))


def build_absolute(root, name):
  write_lines(root / "annotations.jsonl", {"image": str(root / name), "caption": "c"})
  return built(root, folder_source.source(root))


def build_csv(root, name):
  (root / "annotations.csv").write_text(f"image,caption\n{name},c\n", encoding="utf-8")
  return built(root, folder_source.source(root))


def build_published(root, name):
  """The captions in one form, what else belongs to them in the other."""
  other = next(f for f in OTHER if unicodedata.normalize(f, name) != name)
  other = unicodedata.normalize(other, name)
  (root / "c.csv").write_text(f"filepath,title\n{name},c\n", encoding="utf-8")
  boxes = [{"description": "d", "bbox": [0, 0, 96, 96], "score": 1}]
  (root / "b.json").write_text(json.dumps({other: boxes}))
  (root / "t.json").write_text(json.dumps({other: "a longer one"}, ensure_ascii=False), "utf-8")
  source = published_source.source(
    root, captions=root / "c.csv", boxes=[root / "b.json"], generated=[root / "t.json"]
  )
  assert built(root, source) == 1
  record = dataset.open_dataset(root.parent / "out").parse("train", 0)
  assert record.descriptions == [b"d"] and record.captions == [b"c", b"a longer one"]
  return 1


def opened(paths):
  return sum(images_lib.open_image(path).size == (20, 20) for path in paths)


def embed_list(root, name):
  (root / "list.txt").write_text(f"{name}\n", encoding="utf-8")
  return opened(files.find(str(root / "list.txt")).files)


def embed_csv(root, name):
  (root / "list.csv").write_text(f"image,label\n{name},a\n", encoding="utf-8")
  return opened(files.find(str(root / "list.csv")).files)


def load(root, name):
  return given_images.to_pil(root / name, 0).size == (20, 20)


def evaluated(family, root, name="in"):
  """Pictures that count in a family's results; a set of its own is the folder `in`."""
  warned = []
  options = Options(root=root.parent, warn=warned.append)
  family.check(name, options)
  results = family.run(ENCODERS, name, options)
  assert not warned
  (count,) = (v for k, v in results.items() if k.endswith(f"/{name}/examples"))
  return count


def retrieve(root, name):
  """Two lines of one picture, a form each."""
  forms = [unicodedata.normalize(form, name) for form in OTHER]
  write_lines(root / "captions.jsonl", *({"image": form, "caption": form} for form in forms))
  return evaluated(retrieval, root)


def ground(root, name):
  write_lines(root / "regions.jsonl", regions(name))
  return evaluated(grounding, root)


def choose(root, name):
  write_lines(root / "regions.jsonl", regions(name))
  return evaluated(fine_grained, root)


def detect(root, name):
  write_instances(root, name)
  return evaluated(detection, root)


def classify(root, name):
  write_instances(root, name)
  return evaluated(region_classification, root)


def compose(root, name):
  items = [
    composition.Item(image, ("a",), ("b",))
    for image in (root / name, composition.Crop(root / name, (0, 0, 9, 9)))
  ]
  verdicts = composition.evaluate(ENCODERS, items, what="composition", warn=pytest.fail)
  return verdicts.counted.all()


def segment(root, name):
  """A list of VOC in one form, its picture and mask in the other."""
  voc = root.parent / "voc2012"
  stem = "caf\u00e9"
  listed, shown = (unicodedata.normalize(form, stem) for form in OTHER)
  if unicodedata.is_normalized("NFD", name):
    listed, shown = shown, listed
  for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
    (voc / folder).mkdir(parents=True)
  (voc / "ImageSets/Segmentation/val.txt").write_text(f"{listed}\n", encoding="utf-8")
  Image.new("RGB", (20, 20)).save(voc / "JPEGImages" / f"{shown}.jpg")
  Image.new("L", (20, 20), 3).save(voc / "SegmentationClass" / f"{shown}.png")
  return evaluated(segmentation, root, "voc2012")


def birds(root, name):
  folder = root.parent / "waterbirds"
  folder.mkdir()
  (root / name.split("/")[0]).parent.rename(folder / "in")
  with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows(
      [["img_filename", "y", "place", "split"], [f"in/{name}", "0", "0", "2"]]
    )
  return evaluated(waterbirds, root, "test")


def regions(name):
  region = {"description": "a", "box": [0, 0, 1, 1], "negatives": ["b"]}
  return {"image": name, "regions": [region]}


def write_lines(path, *entries):
  text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
  path.write_text(text, encoding="utf-8")


def write_instances(root, name):
  content = {
    "images": [{"id": 1, "width": 20, "height": 20, "file_name": name}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}],
    "categories": [{"id": 1, "name": "cat"}],
  }
  (root / "instances.json").write_text(json.dumps(content))


READERS = (
  build_jsonl, build_absolute, build_csv, build_published, embed_list, embed_csv, load, retrieve,
  ground, choose, detect, classify, compose, segment, birds,
)  # fmt: skip


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_both_forms_find_the_picture(spelled, reader):
  assert reader(*spelled) == 1


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  parts=st.lists(st.text("aé\u1e69Å", min_size=1, max_size=4), min_size=1, max_size=3),
  forms=st.lists(st.sampled_from(["NFC", "NFD"]), min_size=6, max_size=6),
)
def test_each_part_of_a_path_may_have_a_form_of_its_own(tmp_path_factory, parts, forms):
  root = tmp_path_factory.mktemp("x")
  there = root.joinpath(*map(unicodedata.normalize, forms[:3], parts))
  there.mkdir(parents=True)
  asked = root.joinpath(*map(unicodedata.normalize, forms[3:], parts))
  assert places.find_file(asked).samefile(there)
  assert places.find_file(asked / "none") == asked / "none"  # what is not there keeps its name


def test_what_is_there_as_it_stands_comes_first_and_no_way_leads_up(tmp_path):
  forms = [tmp_path / unicodedata.normalize(form, "é") for form in OTHER]
  for path in forms:
    path.mkdir()
  if forms[0].samefile(forms[1]):
    pytest.skip("this file system takes both forms for one")
  assert [places.find_file(path) for path in forms] == forms
  forms[0].rmdir()
  up = forms[0] / ".." / "x"
  assert places.find_file(up) == up
  for odd in ("é\0", "\ud83dé"):
    assert places.find_file(tmp_path / odd) == tmp_path / odd
