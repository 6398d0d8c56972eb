"""Datasets that TFDS itself prepared here, read with a mapping by flags."""

import numpy as np
import pytest
import web_sets

from grain_jax.data import build, decoding
from grain_jax.data import host_tensorflow as tf_lib
from grain_jax.data.building import flags as build_flags
from grain_jax.data.sources import base, tfds

BOX = [0.25, 0.125, 0.75, 0.5]


def prepare(folder, *, file_format="tfrecord", count=7):
  """A detection set and one of captions, as `tfds build` leaves them."""
  library = tf_lib.datasets()
  features = library.features
  images = [np.asarray(decoding.decode(web_sets.image(i))) for i in range(count)]
  objects = {
    "bbox": features.BBoxFeature(),
    "label": features.ClassLabel(names=["dog", "fire_hat"]),
    "is_crowd": np.bool_,
  }
  spec = features.FeaturesDict(
    {
      "image": features.Image(encoding_format="png"),
      "image/id": features.Text(),
      "captions": features.Sequence({"text": features.Text(), "id": np.int64}),
      "raw_caption": features.Text(),
      "label": features.ClassLabel(names=["indoors", "out_doors"]),
      "objects": features.Sequence(objects),
    }
  )
  boxes = library.features.BBox(*BOX)

  def example(i):
    return {
      "image": images[i],
      "image/id": f"id{i}",
      "captions": [{"text": f"first {i}", "id": i}, {"text": "second", "id": 0}],
      "raw_caption": f"raw {i} é",
      "label": i % 2,
      "objects": [
        {"bbox": boxes, "label": n % 2, "is_crowd": n == 2} for n in range(i % 3 + (i == 5))
      ],
    }

  library.dataset_builders.store_as_tfds_dataset(
    name="toy_set",
    version="1.0.0",
    features=spec,
    split_datasets={
      "train": [(i, example(i)) for i in range(count)],
      "validation": [(0, example(0)), (1, example(5))],
    },
    config="plain",
    data_dir=folder,
    file_format=file_format,
    disable_shuffling=True,
  )
  return images


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_prepared_dataset(tmp_path, file_format, monkeypatch):
  images = prepare(tmp_path / "tfds", file_format=file_format)
  monkeypatch.setattr(tfds, "BLOCK", 3)
  source = tfds.source(tmp_path / "tfds", dataset="toy_set/plain:1.0.0")
  assert len(list(source.blocks(tmp_path))) == 3 + 1
  opened = web_sets.built(source, tmp_path / "out")
  found = web_sets.parsed(opened)
  assert {key: record.captions for key, record in found.items()} == {
    f"train/{i}": [f"first {i}".encode(), b"second"] for i in range(7)
  }
  last = found["train/5"]
  assert last.descriptions == [b"dog", b"fire hat"] and last.boxes.tolist() == [BOX, BOX]
  error = np.asarray(decoding.decode(last.image)).astype(int) - images[5]
  assert np.abs(error).mean() < 3  # a PNG, stored as JPEG
  assert list(web_sets.parsed(opened, "val")) == ["validation/0", "validation/1"]
  assert web_sets.dropped(opened) == {"regions": {"crowd": 1}}


def test_the_mapping_by_flags(tmp_path):
  prepare(tmp_path / "tfds")
  flags = ["--source=tfds", f"--data_dir={tmp_path / 'tfds'}", "--out=o", "--split=validation"]
  flags += ["--dataset=toy_set/plain", "--image_key=image", "--id_key=image/id"]
  flags += ["--caption_key", "captions/text", "label", "--val_fraction=0"]
  flags += ["--boxes_key=objects/bbox", "--labels_key=objects/label", "--box_format=xyxy"]
  source = build_flags.source(build_flags.parse(flags, description=""))
  opened = web_sets.built(source, tmp_path / "out", workers=2)
  found = web_sets.parsed(opened, "val")
  assert {key: record.captions for key, record in found.items()} == {
    "id0": [b"first 0", b"second", b"indoors"],
    "id5": [b"first 5", b"second", b"out doors"],
  }
  ymin, xmin, ymax, xmax = BOX
  assert found["id5"].boxes.tolist() == [[xmin, ymin, xmax, ymax]] * 2


def test_the_folder_of_a_version_of_our_own(tmp_path, capsys):
  images = [web_sets.image(i) for i in range(3)]
  (tmp_path / "in").mkdir()
  for i, image in enumerate(images):
    (tmp_path / "in" / f"{i}.jpg").write_bytes(image)
  rows = "".join(f"{i}.jpg,caption {i}\n" for i in range(3))
  (tmp_path / "in" / "annotations.csv").write_text(f"image,caption\n{rows}")
  shared = ["--workers=0", "--source"]
  assert not build.main([*shared, "folder", f"--input={tmp_path / 'in'}", f"--out={tmp_path}/a"])
  flags = ["tfds", f"--input={tmp_path}/a", f"--out={tmp_path}/b", "--id_key=key"]
  assert not build.main(shared + flags)
  from grain_jax.data import dataset

  found = web_sets.parsed(dataset.open_dataset(tmp_path / "b"))
  assert {key: (r.image, r.captions) for key, r in found.items()} == {
    f"{i}.jpg": (images[i], [f"caption {i}".encode()]) for i in range(3)
  }


def test_what_is_not_there_is_one_line(tmp_path):
  (tmp_path / "x" / "1.0.0").mkdir(parents=True)
  with pytest.raises(ValueError, match="holds no dataset_info.json: .* Give --dataset=NAME"):
    tfds.source(tmp_path)
  with pytest.raises(
    ValueError, match=r"is not prepared in .* \(nothing of it is there\).*tfds buil"
  ):
    tfds.source(tmp_path, dataset="y")
  with pytest.raises(ValueError, match="is no name of a dataset"):
    tfds.source(tmp_path, dataset="../x")
  for name in ("dataset_info.json", "features.json"):
    (tmp_path / "x" / "1.0.0" / name).write_text("{")
  with pytest.raises(ValueError, match="is no dataset that TFDS reads: "):
    tfds.source(tmp_path, dataset="x")
  with pytest.raises(ValueError, match="^--input: name TFDS"):
    list(base.iterate(tfds.source()))
  prepare(tmp_path / "t")
  for flags, words in (
    ({"split": "test"}, "--split = test: .* has train, validation"),
    ({"caption_key": ["text"]}, "has no feature 'text', but .*captions/text"),
    ({"boxes_key": "objects/bbox"}, "each needs the other"),
  ):
    with pytest.raises(ValueError, match=words):
      tfds.source(tmp_path / "t", dataset="toy_set/plain", **flags)
