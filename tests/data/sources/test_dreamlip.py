"""DreamLIP's CSV over downloaded images, against hand-worked records."""

import csv

import pytest
import web_sets

from grain_jax.data.sources import base, dreamlip, tables

HEADER = ["Image Path", "raw_caption", "shortIB_captions", "longIB_captions"]
HEADER += ["shortSV_captions", "longSV_captions", "shortLLA_captions", "longLLA_captions"]


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([HEADER, *rows])
  return path


def test_captions_in_their_published_order(tmp_path):
  root = tmp_path / "in"
  long = 'A dog, brown.\nIt says "wau".</s>'
  texts = ["a dog", "dog", long, "brown dog", "x" * 100_000, "", "  犬がいる。 "]
  write(
    root / "cc3m_3long_3short_1raw_captions_url.csv",
    [
      ["http://x/a,b", *texts],
      ["http://x/gone", *texts],
      ["http://x/failed", *texts],
      ["", *texts],
      ["http://x/short", "a"],
      ["http://x/none", *[""] * 7],
    ],
  )
  web_sets.download(root / "00000", "000000000", 1, url="http://x/a,b")
  web_sets.download(root / "00001", "000010001", 2)
  web_sets.sidecar(
    root / "00001.parquet",
    [
      ("000010000", "failed_to_download", "HTTP Error 500: x", "http://x/failed", 1),
      ("000010001", "success", None, "http://x/none", 1),
    ],
  )
  opened = web_sets.built(dreamlip.source(root), tmp_path / "out")
  ((key, record),) = web_sets.parsed(opened).items()
  assert key == "http://x/a,b" and record.image == web_sets.image(1)
  assert [text.decode() for text in record.captions] == [
    "a dog",
    "dog",
    'A dog, brown.\nIt says "wau".',
    "brown dog",
    "x" * 100_000,
    "犬がいる。",
  ]
  assert web_sets.dropped(opened) == {
    "records": {
      "missing_image": 1,
      "failed_to_download_http_500": 1,
      "malformed": 2,
      "no_caption": 1,
    },
    "captions": {"empty_caption": 1 + 7},
  }


def test_blocks_in_two_processes_give_what_one_gives(tmp_path, monkeypatch):
  root = tmp_path / "in"
  rows = [[f"http://x/{i}", f"line\n{i}", *["t"] * 6] for i in range(10)]
  write(root / "a.csv", rows)
  for i in range(10):
    web_sets.download(root / "0", str(i), i, url=f"http://x/{i}")
  monkeypatch.setattr(tables, "BLOCK", 3)
  source = dreamlip.source(root)
  blocks = list(source.blocks(tmp_path))
  assert len(blocks) == 4
  one = web_sets.built(source, tmp_path / "one")
  two = web_sets.built(source, tmp_path / "two", workers=2)
  found = web_sets.parsed(two)
  assert list(web_sets.parsed(one)) == list(found) == [row[0] for row in rows]
  assert [record.captions[0] for record in found.values()] == [row[1].encode() for row in rows]


def test_a_file_of_other_columns_is_one_line(tmp_path):
  (tmp_path / "a.csv").write_text("url,caption\n")
  with pytest.raises(ValueError, match="a.csv has the columns 'url', 'caption': Image Path is nee"):
    dreamlip.source(tmp_path)
  (tmp_path / "a.csv").write_text('Image Path,raw_caption\nx,"never closed\n')
  with pytest.raises(ValueError, match=r"a\.csv is not CSV in UTF-8"):
    list(base.iterate(dreamlip.source(tmp_path)))
