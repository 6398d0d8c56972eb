"""Annotation files of one's own and those published with GRAIN, against hand-worked records."""

import functools
import json
import os

import pytest
import toy_data
from PIL import Image

from grain_jax.data import build, dataset, decoding, records
from grain_jax.data.building import flags as build_flags
from grain_jax.data.sources import base, folder_lines
from grain_jax.data.sources import folder as folder_source
from grain_jax.data.sources import published as published_source


def folder(tmp_path, *, count=3):
  for i in range(count):
    (tmp_path / f"{i}.jpg").write_bytes(toy_data.record(i)["image"])
  return tmp_path


def lines(*entries):
  return "".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries)


def build_quietly(source, out):
  build.build(source, out, allow_dropped=1, say=toy_data.quiet)
  return dataset.open_dataset(out)


def test_folder_with_jsonl(tmp_path):
  root = folder(tmp_path / "in") if (tmp_path / "in").mkdir() is None else None
  Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(root / "clear.png")
  region = {"description": "a red box", "box": [0.1, 0.2, 0.5, 0.6], "score": 0.25}
  (root / "annotations.jsonl").write_text(
    lines(
      {"image": "0.jpg", "captions": ["first", "second"], "regions": [region]},
      "",
      {"image": "1.jpg", "caption": "only", "split": "val"},
      {"image": "clear.png", "caption": "a png", "regions": [{**region, "score": None}, 3]},
      "{not json",
      {"caption": "no image"},
      {"image": "gone.jpg", "caption": "c"},
      {"image": "2.jpg", "caption": "c", "negatives": [{"caption": "n", "kind": "object"}, "x"]},
    )
  )
  opened = build_quietly(folder_source.source(root, licence="own"), tmp_path / "out")
  assert opened.num_records("train") == 3 and opened.num_records("val") == 1
  first = opened.parse("train", 0)
  assert first.key == b"0.jpg" and first.captions == [b"first", b"second"]
  assert first.boxes.tolist() == [pytest.approx([0.1, 0.2, 0.5, 0.6])]
  assert first.scores.tolist() == [0.25] and first.image == (root / "0.jpg").read_bytes()
  white = decoding.decode(opened.parse("train", 1).image)
  assert white.size == (20, 10) and min(white.getpixel((5, 5))) > 250
  assert opened.parse("train", 2).negatives == [(b"n", b"object")]
  assert opened.parse("val", 0).captions == [b"only"]
  dropped = opened.manifest["splits"]["train"]["dropped"]
  assert {k: v["count"] for k, v in dropped["records"].items()} == {
    "not_json": 1,
    "malformed": 1,
    "missing_image": 1,
  }
  assert dropped["records"]["not_json"]["first"] == ["line 5"]
  assert dropped["regions"]["malformed"]["count"] == 1
  assert opened.parse("train", 1).scores.tolist() == [1]  # a score that is null is none given
  assert opened.manifest["licence"] == "own"


@pytest.mark.parametrize(
  "given, captions",
  [
    ({"caption": "one", "captions": ["two", "three"]}, ["one", "two", "three"]),
    ({"caption": "one", "captions": ["two", "one"]}, ["one", "two"]),
    ({"caption": "one", "captions": []}, ["one"]),
    ({"caption": ["one"], "captions": "two"}, ["one", "two"]),
    ({"captions": ["two", "two"]}, ["two", "two"]),
    ({"caption": {"en": "one"}, "captions": ["two"]}, None),
    ({"caption": "one", "captions": 3}, None),
  ],
)
def test_a_caption_beside_captions_is_the_first(given, captions):
  found = folder_lines.parts({"image": "0.jpg", **given})
  assert (
    isinstance(found, records.Refused) if captions is None else found[0]["captions"] == captions
  )


def test_texts_that_cannot_be_written_cost_themselves_alone(tmp_path):
  """Halves of a character, other types, a byte that is no UTF-8: each is counted."""
  root = folder(tmp_path)
  half, region = "\ud83d", {"description": "a red box", "box": [0.1, 0.2, 0.5, 0.6]}
  entries = [
    {"image": "0.jpg", "captions": [half, "kept", 5, None], "negatives": [1, {"caption": "n"}]},
    {
      "image": "1.jpg",
      "captions": ["c"],
      "regions": [{**region, "negatives": [1, "n", half]}, {**region, "negatives": 5}]
      + [{**region, "description": half}],
    },
    {"image": half, "captions": ["c"]},
  ]
  text = b"\xef\xbb\xbf" + lines(*entries).encode() + b'{"image": "2.jpg", "caption": "caf\xe9"}\n'
  (root / "annotations.jsonl").write_bytes(text)
  opened = build_quietly(folder_source.source(root, val_fraction=0.01), tmp_path / "out")
  assert opened.num_records("train") == 2
  assert opened.parse("train", 0).captions == [b"kept"]
  assert opened.parse("train", 1).descriptions == [b"a red box"] * 2
  dropped = opened.manifest["splits"]["train"]["dropped"]
  assert {what: {why: n["count"] for why, n in of.items()} for what, of in dropped.items()} == {
    "records": {"malformed": 1, "not_json": 1},
    "captions": {"malformed": 3},
    "regions": {"malformed": 1},
    "negatives": {"malformed": 5},
  }
  assert dropped["records"]["not_json"]["first"] == ["line 4"]


def test_a_path_that_leads_out_of_the_folder_is_refused_and_counted(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "other").mkdir()
  root, other = folder(tmp_path / "in"), folder(tmp_path / "other")
  (root / "link").symlink_to(other)
  (root / "sub").mkdir()
  inside = ["0.jpg", "./sub/../1.jpg", "link/0.jpg", str(root / "2.jpg"), "in..side.jpg"]
  outside = [
    "../other/0.jpg",
    str(other / "0.jpg"),
    "link/../other/0.jpg",  # the parent of what the link leads to, not the folder
    "sub/../../other/1.jpg",
    "../in-other/0.jpg",
    f"{root}/../other/2.jpg",
  ]
  lost = ["..\0.jpg", "\ud83d/../.."]  # no paths: `records.check` counts them
  jsonl = root / "annotations.jsonl"
  jsonl.write_text(lines(*({"image": x, "caption": "c"} for x in inside + outside + lost)))
  table = tmp_path / "captions.csv"
  table.write_text("path,title\n" + "".join(f"{x},c\n" for x in inside + outside))
  for source in (folder_source.source, functools.partial(published_source.source, captions=table)):
    read = [record for _, record in base.iterate(source(root))]
    refused = [record for record in read if isinstance(record, records.Refused)]
    assert refused == [(x, "records", "outside_the_folder") for x in outside]
    read = [record for _, record in base.iterate(source(root, allow_outside=True))]
    assert not any(isinstance(record, records.Refused) for record in read)
    assert source(root).settings != source(root, allow_outside=True).settings
  flags = ["--source=folder", f"--input={root}", f"--out={tmp_path / 'out'}", "--allow_outside"]
  source = build_flags.source(build_flags.parse(flags, description=""))
  assert build_quietly(source, tmp_path / "out").num_records("train") == 4 + 5


def test_csv_that_is_none_is_one_line_with_its_name(tmp_path):
  root = folder(tmp_path)
  file = root / "annotations.csv"
  file.write_bytes(b"image,caption\n0.jpg,caf\xe9\n")
  with pytest.raises(ValueError, match=rf"^{file} is not CSV in UTF-8: .*0xe9"):
    list(base.iterate(folder_source.source(root)))
  file.write_text("image,caption\n0.jpg," + 140_000 * "x" + "\n")
  with pytest.raises(ValueError, match=rf"^{file} is not CSV in UTF-8: field larger"):
    list(base.iterate(folder_source.source(root)))


def test_a_row_without_a_caption_is_counted(tmp_path):
  root = folder(tmp_path)
  (root / "captions_pooled.csv").write_text("filepath,title\n0.jpg,zero\n1.jpg\n2.jpg,two\n")
  read = list(base.iterate(published_source.source(root, captions=root / "captions_pooled.csv")))
  refused = [record for _, record in read if isinstance(record, records.Refused)]
  assert refused == [("row 3", "records", "malformed")] and len(read) == 3


def test_folder_with_csv_and_a_part_for_val(tmp_path):
  root = folder(tmp_path)
  (root / "annotations.csv").write_text('image,caption\n0.jpg,a\n0.jpg,"b, c"\n1.jpg,d\n2.jpg,e\n')
  got = [r for _, r in base.iterate(folder_source.source(root))]
  assert [(r["key"], r["captions"]) for r in got] == [
    ("0.jpg", ["a", "b, c"]),
    ("1.jpg", ["d"]),
    ("2.jpg", ["e"]),
  ]
  (root / "annotations.csv").write_text(
    "image,caption\n" + "".join(f"{i}.jpg,c\n" for i in range(2000))
  )
  split = {r["key"]: s for s, r in base.iterate(folder_source.source(root, val_fraction=0.25))}
  assert 400 < sum(s == "val" for s in split.values()) < 600
  again = base.iterate(folder_source.source(root, val_fraction=0.25))
  assert split == {r["key"]: s for s, r in again}
  (root / "annotations.csv").write_text("file,text\n")
  with pytest.raises(ValueError, match="has the columns .*image and caption are needed"):
    list(base.iterate(folder_source.source(root)))


def test_an_image_in_two_spellings_or_splits_is_said(tmp_path):
  root = folder(tmp_path)
  rows = ["./0.jpg,a,", "./0.jpg,b,train", "0.jpg,c,", "./1.jpg,d,val", "./1.jpg,e,test"]
  (root / "annotations.csv").write_text("\n".join(["image,caption,split", *rows]))
  opened = build_quietly(folder_source.source(root), tmp_path / "out")
  split, twice = opened.manifest["hints"]
  assert split.startswith("split is another one than in the first row") and "1 times" in split
  assert twice.startswith("1 images are there twice, their paths spelled in two ways")
  assert opened.num_records("train") == 2


def test_changed_annotations_are_other_settings(tmp_path):
  (tmp_path / "annotations.csv").write_text("image,caption\n")
  before = folder_source.source(tmp_path).settings
  assert before == folder_source.source(tmp_path).settings
  os.utime(tmp_path / "annotations.csv", (1, 1))
  assert before != folder_source.source(tmp_path).settings
  (tmp_path / "annotations.csv").write_text("image,caption\n0.jpg,a\n")
  assert before != folder_source.source(tmp_path).settings


def test_published_files(tmp_path):
  root = folder(tmp_path)
  (root / "captions_pooled.csv").write_text("filepath,title\n0.jpg,zero\n1.jpg,one\n2.jpg,two\n")
  (root / "captions_a_pooled.json").write_text(json.dumps({"0.jpg": "a zero", "1.jpg": "a one"}))
  boxes = [
    {"description": "left half", "bbox": [0, 0, 480, 960], "score": 0.9},
    {"description": "over the edge", "bbox": [-19.2, 96, 960, 979.2], "score": 0.4},
    {"description": "no box", "bbox": None, "score": 0.4},
  ]
  (root / "bboxes_a_pooled.json").write_text(json.dumps({"0.jpg": boxes, "2.jpg": []}))
  (root / "desc_a.json").write_text(json.dumps({"0.jpg": ["left half", "unseen"], "1.jpg": ["x"]}))
  source = published_source.source(
    root,
    captions=root / "captions_pooled.csv",
    generated=[root / "captions_a_pooled.json"],
    boxes=[root / "bboxes_a_pooled.json"],
    descriptions=[root / "desc_a.json"],
  )
  opened = build_quietly(source, tmp_path / "out")
  zero, one, two = (opened.parse("train", i) for i in range(3))
  assert zero.captions == [b"zero", b"a zero"] and two.captions == [b"two"]
  assert zero.descriptions == [b"left half", b"over the edge"]
  # (x1, y1, x2, y2) of 960 pixels -> (ymin, xmin, ymax, xmax); 2 % over the edge is clipped.
  assert zero.boxes.tolist() == [
    pytest.approx([0, 0, 1, 0.5]),
    pytest.approx([0.1, 0, 1, 1]),
  ]
  assert one.descriptions == [] and two.descriptions == []
  dropped = opened.manifest["splits"]["train"]["dropped"]["regions"]
  assert dropped["description_without_box"] == {"count": 2, "first": ["0.jpg", "1.jpg"]}
  assert dropped["malformed"]["count"] == 1


@pytest.mark.parametrize(
  "text, keys, refused",
  [
    ("filepath,title\n0.jpg,a\n", ["0.jpg"], []),
    ("img/000001,a dog\nimg/000002,a cat\n", ["img/000001", "img/000002"], []),
    ("key\tcaption\nimg/1\ta, b\n", ["img/1"], []),
    ("path,title,id\n0.jpg,a,7\n1.jpg,b,c,8\n", ["0.jpg"], ["row 3"]),
    ('0.jpg,"a dog, a cat",\n1.jpg,a dog, a cat\n', ["0.jpg"], ["row 2"]),
  ],
)
def test_no_row_of_the_captions_is_lost_in_silence(tmp_path, text, keys, refused):
  (tmp_path / "captions_pooled.csv").write_text(text)
  found = [item for _, item in base.iterate(published_source.source(input=tmp_path))]
  lost = [item for item in found if isinstance(item, records.Refused)]
  assert [item["key"] for item in found if item not in lost] == keys
  assert lost == [(row, "records", "malformed") for row in refused]


def test_published_files_of_different_datasets(tmp_path):
  (tmp_path / "c.csv").write_text("0.jpg,zero\n")
  (tmp_path / "b.json").write_text(json.dumps({"cc3m/0.jpg": []}))
  source = published_source.source(
    tmp_path, captions=tmp_path / "c.csv", boxes=[tmp_path / "b.json"]
  )
  with pytest.raises(ValueError, match="no path of .* stands in the box files.*'cc3m/0.jpg'"):
    list(base.iterate(source))
  (tmp_path / "b.json").write_text("[")
  with pytest.raises(ValueError, match="b.json is not JSON"):
    list(base.iterate(source))
