"""Parquet files with images in them, against hand-worked records; and damaged ones."""

import json

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import web_sets
from hypothesis import strategies as st

from grain_jax.data import records
from grain_jax.data.building import flags as build_flags
from grain_jax.data.sources import base, parquet, parquet_files


def write(path, columns, *, rows=2, metadata=None, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pa.table(columns)
  if metadata:
    table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
  pq.write_table(table, path, row_group_size=rows, **options)
  return path


def test_a_hub_s_images_and_texts(tmp_path):
  root = tmp_path / "in"
  (root / "files").mkdir(parents=True)
  (root / "files" / "4.jpg").write_bytes(web_sets.image(4))
  images = [
    {"bytes": web_sets.image(0), "path": "0.jpg"},
    {"bytes": None, "path": "files/4.jpg"},
    {"bytes": None, "path": "../4.jpg"},
    {"bytes": b"no image", "path": None},
    None,
    {"bytes": web_sets.image(5), "path": None},
  ]
  write(
    root / "data" / "train-00000-of-00001.parquet",
    {
      "image": images,
      "caption": [["one", "two"], ["three"], ["x"], ["x"], ["x"], []],
      "url": ["u"] * 6,
    },
  )
  write(root / "data" / "validation-00000.parquet", {"image": images[:1], "caption": [["v"]]})
  opened = web_sets.built(parquet.source(root), tmp_path / "out")
  found = web_sets.parsed(opened)
  name = "data/train-00000-of-00001"
  assert {key: record.captions for key, record in found.items()} == {
    f"{name}/0": [b"one", b"two"],
    f"{name}/1": [b"three"],
  }
  assert found[f"{name}/0"].image == web_sets.image(0)
  assert found[f"{name}/1"].image == web_sets.image(4)
  assert web_sets.parsed(opened, "val")["data/validation-00000/0"].captions == [b"v"]
  assert web_sets.dropped(opened) == {
    "records": {
      "outside_the_folder": 1,
      "corrupt_image": 1,
      "missing_image": 1,
      "no_caption": 1,
    }
  }


def test_img2dataset_s_parquet_with_grit_s_lists(tmp_path):
  row = web_sets.GRIT_ROW
  write(
    tmp_path / "in" / "00000.parquet",
    {
      "key": ["000000000", "000000001"],
      "jpg": [web_sets.image(0), None],
      "status": ["success", "failed_to_download"],
      "error_message": [None, "HTTP Error 403: Forbidden"],
      **{name: [value, value] for name, value in row.items()},
    },
  )
  opened = web_sets.built(parquet.source(tmp_path / "in", key_column="key"), tmp_path / "out")
  (record,) = web_sets.parsed(opened).values()
  assert record.key == b"000000000"
  web_sets.check_grit(record)
  assert web_sets.dropped(opened) == {
    "records": {"failed_to_download_http_403": 1},
    "regions": web_sets.GRIT_DROPPED,
  }


def test_boxes_and_classes_by_flag(tmp_path):
  classes = {"feature": {"names": ["fire_truck", "dog"], "_type": "ClassLabel"}}
  features = {
    "objects": {"feature": {"category": classes["feature"], "bbox": {}}},
    "label": classes["feature"],
  }
  objects = [
    {
      "bbox": [[12.0, 24.0, 24.0, 12.0], [0.0, 0.0, 48.0, 48.0], [0.0, 0.0, 9.0, 9.0]],
      "category": [1, 0, 0],
      "iscrowd": [0, 0, 1],
    },
    {"bbox": [[0.0, 0.0, 4.0, 4.0]], "category": [], "iscrowd": [0]},
  ]
  write(
    tmp_path / "x.parquet",
    {"picture": [web_sets.image(0), web_sets.image(1)], "objects": objects, "label": [0, 1]},
    metadata={"info": {"features": features}},
  )
  flags = ["--source=parquet", f"--input={tmp_path}", "--out=o", "--caption_columns", "label"]
  flags += ["--boxes_column=objects.bbox", "--labels_column=objects.category"]
  flags += ["--box_format=xywh", "--box_units=pixels"]
  source = build_flags.source(build_flags.parse(flags, description=""))
  opened = web_sets.built(source, tmp_path / "out")
  found = web_sets.parsed(opened)
  assert found["x/0"].captions == [b"fire truck"] and found["x/1"].captions == [b"dog"]
  assert found["x/0"].descriptions == [b"dog", b"fire truck"]
  assert found["x/0"].boxes.tolist() == [[0.5, 0.25, 0.75, 0.75], [0, 0, 1, 1]]
  assert web_sets.dropped(opened) == {"regions": {"malformed": 1, "crowd": 1}}


def test_a_damaged_file_or_row_group_is_counted_row_by_row(tmp_path):
  columns = {"image": [web_sets.image(i) for i in range(6)], "text": [f"t{i}" for i in range(6)]}
  good = write(tmp_path / "a.parquet", columns, compression="none", use_dictionary=False)
  data = bytearray(good.read_bytes())
  second = pq.ParquetFile(good).metadata.row_group(1).column(0)
  at = second.data_page_offset
  data[at : at + 40] = b"\xff" * 40
  (tmp_path / "b.parquet").write_bytes(data)
  (tmp_path / "c.parquet").write_bytes(good.read_bytes()[:-50])
  (tmp_path / "d.parquet").write_bytes(b"")
  opened = web_sets.built(parquet.source(tmp_path), tmp_path / "out")
  keys = [f"a/{i}" for i in range(6)] + [f"b/{i}" for i in (0, 1, 4, 5)]
  assert list(web_sets.parsed(opened)) == keys
  assert web_sets.dropped(opened) == {"records": {"damaged_parquet": 4}}


def test_a_text_that_is_no_utf8_costs_its_row(tmp_path):
  texts = pa.array([b"good", b"caf\xe9", b"too"], pa.binary()).view(pa.string())
  write(tmp_path / "a.parquet", {"image": [web_sets.image(i) for i in range(3)], "text": texts})
  found = [record for _, record in base.iterate(parquet.source(tmp_path))]
  assert found[1] == records.Refused("a/1", "records", "malformed")
  assert [r["captions"] for r in (found[0], found[2])] == [["good"], ["too"]]


@hypothesis.given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 9))
def test_blocks_are_all_rows_once(tmp_path_factory, groups, size):
  path = tmp_path_factory.mktemp("rows") / "x.parquet"
  number = 0
  with pq.ParquetWriter(path, pa.schema([("n", pa.int64())])) as writer:
    for rows in groups:
      writer.write_table(pa.table({"n": list(range(number, number + rows))}))
      number += rows
  blocks = list(parquet_files.blocks(path, size))
  rows = [row for block in blocks for row in parquet_files.read(path, block)]
  assert [(row.number, row.values["n"]) for row in rows] == [(i, i) for i in range(number)]
  for block in blocks:
    first, past = block["groups"]
    assert past - first == 1 or sum(groups[first:past]) <= size


def test_blocks_in_two_processes_give_what_one_gives(tmp_path, monkeypatch):
  for i in range(3):
    columns = {"image": [web_sets.image(n) for n in range(4)], "text": [f"{i}{n}" for n in "abcd"]}
    write(tmp_path / "in" / f"{i}.parquet", columns)
  source = parquet.source(tmp_path / "in")
  one = web_sets.built(source, tmp_path / "one")
  two = web_sets.built(source, tmp_path / "two", workers=2)
  assert list(web_sets.parsed(one)) == list(web_sets.parsed(two)) and one.num_records("train") == 12
  assert [r.captions for r in web_sets.parsed(two).values()] == [
    [f"{i}{n}".encode()] for i in range(3) for n in "abcd"
  ]


def test_columns_that_are_not_there_are_one_line(tmp_path):
  write(tmp_path / "x.parquet", {"url": ["u"], "caption": ["c"]})
  with pytest.raises(ValueError, match="has the columns url, caption: which holds the images"):
    parquet.source(tmp_path)
  write(tmp_path / "x.parquet", {"image": [b"u"], "tag": ["c"]})
  with pytest.raises(ValueError, match="has the columns image, tag: which holds captions"):
    parquet.source(tmp_path)
  with pytest.raises(ValueError, match="has no column 'texts', but image, tag. Name those"):
    parquet.source(tmp_path, caption_columns=["texts"])
