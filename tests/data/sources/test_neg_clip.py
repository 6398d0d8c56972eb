"""NegCLIP's TSV over COCO's images, against hand-worked records."""

import pytest
import web_sets

from grain_jax.data.sources import base, neg_clip, tables

HEADER = "\ttitle\tfilepath\tneg_caption\tneg_image\n"


def row(index, title, path, negatives, images="[1, 2]"):
  return f"{index}\t{title}\t{path}\t{negatives}\t{images}\n"


def test_rows_of_the_published_file(tmp_path):
  root = tmp_path / "in"
  folder = root / "coco" / "val2014"
  web_sets.download(folder, "COCO_val2014_000000000042", 0)
  path = "coco/val2014/COCO_val2014_000000000042.jpg"
  code = f"__import__('os').system('touch {tmp_path / 'ran'}')"
  (root / "train_neg_clip.tsv").write_text(
    HEADER
    + row(0, "a dog on a mat", path, "['a mat on a dog', \"it's a dog's mat\"]")
    + row(1, '"a ""red"" dog\tand a mat"', path, "['x']")
    + row(2, "code", path, code)
    + row(3, "numbers", path, "[1, 'y']")
    + row(4, "deep", path, "(" * 5000)
    + row(5, "gone", "coco/val2014/gone.jpg", "[]")
    + row(6, "", path, "['z']")
    + "7\tshort\n"
    + row(8, "out", "../x.jpg", "[]")
  )
  (root / "valid_neg_clip.tsv").write_text(HEADER + row(0, "of val", path, "['v']"))
  opened = web_sets.built(neg_clip.source(root), tmp_path / "out")
  found = web_sets.parsed(opened)
  prefix = f"train_neg_clip.tsv:{path}#"
  assert {key.removeprefix(prefix): (r.captions, r.negatives) for key, r in found.items()} == {
    "0": (
      [b"a dog on a mat"],
      [(b"a mat on a dog", b"relation"), (b"it's a dog's mat", b"relation")],
    ),
    "1": ([b'a "red" dog\tand a mat'], [(b"x", b"relation")]),
    "2": ([b"code"], []),
    "3": ([b"numbers"], [(b"y", b"relation")]),
    "4": ([b"deep"], []),
  }
  assert [r.captions for r in web_sets.parsed(opened, "val").values()] == [[b"of val"]]
  assert web_sets.dropped(opened) == {
    "records": {"missing_image": 1, "no_caption": 1, "malformed": 1, "outside_the_folder": 1},
    "captions": {"empty_caption": 1},
    "negatives": {"malformed": 3},
  }
  assert not (tmp_path / "ran").exists()


def test_captions_of_an_image_stay_in_one_split_and_blocks_change_nothing(tmp_path, monkeypatch):
  root = tmp_path / "in"
  for i in range(8):
    web_sets.download(root, str(i), i)
  lines = [row(i, f"c{i}", f"{i // 5}.jpg", f"['n{i}']") for i in range(40)]
  (root / "train.tsv").write_text(HEADER + "".join(lines))
  monkeypatch.setattr(tables, "BLOCK", 7)
  source = neg_clip.source(root, val_fraction=0.5)
  assert len(list(source.blocks(tmp_path))) == 6
  one = web_sets.built(source, tmp_path / "one")
  two = web_sets.built(source, tmp_path / "two", workers=2)
  sides = []
  for split in ("train", "val"):
    found = web_sets.parsed(two, split)
    assert list(found) == list(web_sets.parsed(one, split))
    sides.append({key.partition("#")[0] for key in found})
    for key, record in found.items():
      number = key.partition("#")[2]
      assert record.captions == [f"c{number}".encode()]
      assert record.negatives == [(f"n{number}".encode(), b"relation")]
  assert sides[0] and sides[1] and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 8


def test_a_file_of_other_columns_is_one_line(tmp_path):
  (tmp_path / "a.tsv").write_text("title\tfilepath\n")
  with pytest.raises(ValueError, match="'title', 'filepath': neg_caption is needed"):
    neg_clip.source(tmp_path)
  (tmp_path / "a.tsv").unlink()
  with pytest.raises(ValueError, match="holds no .tsv"):
    list(base.iterate(neg_clip.source(tmp_path)))
