"""Every command of docs/data.md that is ours, on made-up files in the layouts it speaks of."""

import json
import pathlib
import re
import shlex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import web_sets

from grain_jax.data import build, dataset, decoding
from grain_jax.data import host_tensorflow as tf_lib
from grain_jax.data.sources import ce_clip

PAGE = (pathlib.Path(__file__).parents[3] / "docs" / "data.md").read_text()
PAGE = PAGE.split("\n## Sets with boxes\n")[0]
CODE = "\n".join(re.findall(r"^```console\n(.*?)^```", PAGE, re.M | re.S))
COMMANDS = [line for line in CODE.splitlines() if line.startswith("python -m grain_jax")]
PATH = "train2014/COCO_train2014_000000000009.jpg"


def tars(folder, *extra, **row):
  folder.mkdir(parents=True)
  members = web_sets.sample("000000000", 0, web_sets.GRIT_CAPTION, **row)
  (folder / "00000.tar").write_bytes(web_sets.tar_bytes(members))
  web_sets.sidecar(folder / "00000.parquet", [("000000000", "success", None, "u", 1), *extra])


def grit(sets):
  failed = ("000000001", "failed_to_download", "HTTP Error 404: x", "v", 2)
  lists = {name: web_sets.GRIT_ROW[name] for name in ("noun_chunks", "ref_exps")}
  tars(sets / "grit_tars", failed, **lists)
  (sets / "grit" / "grit-20m").mkdir(parents=True)
  row = {"key": "1", "id": 7, "url": "u", **web_sets.GRIT_ROW}
  pq.write_table(pa.Table.from_pylist([row]), sets / "grit" / "grit-20m" / "coyo_0_snappy.parquet")
  web_sets.download(sets / "grit_images" / "00000", "000000000", 0, id=7, url="u")


def finehard(sets):
  root = sets / "finehard"
  for name in ("jsonfiles", "url2key_jsons"):
    (root / name).mkdir(parents=True)
  item = {"f_path": "coyo_image_0/00000/000000005.jpg", "caption": "long", "short_caption": "s"}
  item["bbox_info"] = [{"bbox": [0, 0, 1, 1], "short_expr": "a", "long_expr": "a b"}]
  (root / "jsonfiles" / "a.json").write_text(json.dumps([item]))
  keys = root / "url2key_jsons" / "url2key_coyo_image_0.json"
  keys.write_text(json.dumps({"http://u": "000000005"}))
  pq.write_table(pa.table({"url": ["http://u"]}), _made(root / "coyo_image_0") / "00000.parquet")
  web_sets.download(root / "coyo_image_0" / "00000" / "00000", "000000000", 0, url="http://u")


def dreamlip(sets):
  file = _made(sets / "dreamlip") / "cc3m_3long_3short_1raw_captions_url.csv"
  file.write_text("Image Path,raw_caption,shortIB_captions,longIB_captions\nhttp://u,a,b,c\n")
  web_sets.download(sets / "dreamlip_images" / "00000", "000000000", 0, url="http://u")


def hub(sets):
  image = {"bytes": web_sets.image(0), "path": None}
  objects = {"bbox": [[0.0, 0.0, 24.0, 24.0]], "category": ["a dog"]}
  for name, row in (("hub", {"caption": "c"}), ("hub_boxes", {"title": "t", "objects": objects})):
    file = _made(sets / name / "data") / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": image, **row}]), file)


def coco_texts(sets):
  web_sets.download(sets / "coco" / "train2014", pathlib.Path(PATH).stem, 0)
  header = "\ttitle\tfilepath\tneg_caption\tneg_image\n"
  file = _made(sets / "neg_clip") / "train_neg_clip.tsv"
  file.write_text(f"{header}0\ta b\tcoco/{PATH}\t['b a']\t[1]\n")
  entry = json.loads(re.search(r"^```json\n(.*?)\n```", PAGE, re.M).group(1))
  entry |= {"adj_aug_caption": "a cat", "valid_caption": [1] * 5}  # else a quarter is dropped
  folder = _made(sets / "Enhance-FineGrained" / "data" / "generated_data" / "coco_train")
  np.save(folder / "processed_dataset0.npy", np.array([entry], dtype=object), allow_pickle=True)


def coco_tfds(sets):
  library = tf_lib.datasets()
  features = library.features
  objects = {"bbox": features.BBoxFeature(), "label": features.ClassLabel(names=["dog"])}
  spec = {
    "image": features.Image(),
    "captions": features.Sequence({"id": np.int64, "text": features.Text()}),
    "objects": features.Sequence(objects),
  }
  box = {"bbox": library.features.BBox(0.0, 0.0, 1.0, 1.0), "label": 0}
  row = {
    "image": np.asarray(decoding.decode(web_sets.image(0))),
    "captions": [{"id": 1, "text": "a dog"}],
    "objects": [box],
  }
  library.dataset_builders.store_as_tfds_dataset(
    name="coco_captions",
    version="1.1.0",
    features=features.FeaturesDict(spec),
    split_datasets={"train": [(0, row)]},
    data_dir=_made(sets / "tfds"),
    disable_shuffling=True,
  )


def _made(folder):
  folder.mkdir(parents=True, exist_ok=True)
  return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
  root = tmp_path_factory.mktemp("docs")
  tars(root / "sets" / "cc12m")
  for make in (grit, finehard, dreamlip, hub, coco_texts, coco_tfds):
    make(root / "sets")
  return root


@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: line.split("=", 1)[1][:60])
def test_the_command_builds(sets, command, monkeypatch, capsys):
  monkeypatch.chdir(sets)
  words = shlex.split(command)
  if words[2] == "grain_jax.data.sources.ce_clip":
    assert not ce_clip.main(words[3:])
    return
  assert words[2] == "grain_jax.data.build"
  words.append("--allow_dropped=1")  # of so few, the broken ones are more than a fifth
  code = build.main([*words[3:], "--workers=0"])
  assert not code, capsys.readouterr().err
  out = next(word.removeprefix("--out=") for word in words if word.startswith("--out="))
  (record,) = web_sets.parsed(dataset.open_dataset(out)).values()
  boxes = ("grit", "finehard", "hub_boxes", "coco_tfds")
  assert bool(len(record.boxes)) == out.startswith(tuple(f"data/{x}" for x in boxes))
  assert bool(record.negatives) == ("clip" in out)


def test_img2dataset_is_never_left_to_pad():
  downloads = [line for line in CODE.splitlines() if "img2dataset" in line]
  assert len(downloads) >= 4
  for line in downloads:
    assert "--resize_mode keep_ratio --resize_only_if_bigger True --image_size 512" in line
  assert len(COMMANDS) == 12
