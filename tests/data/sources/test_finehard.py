"""FineHARD in its published layout, against hand-worked records."""

import json
import sys

import pytest
import web_sets

from grain_jax.data.sources import base, finehard, json_arrays, url2key

NEGATIVES = {f"neg_{i}": f"a dog {i}" for i in range(10)}
BOXES = [
  {
    "bbox": [0.125, 0.25, 0.5, 0.75, 0.875],
    "short_expr": "a cat",
    "long_expr": "a grey cat on a sofa",
    "flag_short_neg": 1,
    "short_expr_negs": NEGATIVES,
  },
  {
    "bbox": [0, 0.5, 1.02, 1],
    "short_expr": "a sofa",
    "long_expr": "a sofa",
    "flag_short_neg": 0,
    "short_expr_negs": NEGATIVES,
  },
  {"bbox": [0.5, 0.5, 0.25, 0.75], "short_expr": "inverted", "long_expr": None},
  {"bbox": [0.5, 0.5], "short_expr": "two numbers"},
  "no box",
]


def item(path, **values):
  return {
    "f_path": path,
    "caption": "A long text of a grey cat.",
    "short_caption": "cat",
    "bbox_info": BOXES,
    **values,
  }


def write(root, items, name="a.json"):
  (root / "jsonfiles").mkdir(parents=True, exist_ok=True)
  (root / "jsonfiles" / name).write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")


def test_records_at_their_paths(tmp_path):
  root = tmp_path / "in"
  path = "coyo_image_0/00000/000000007.jpg"
  web_sets.download((root / path).parent, "000000007", 7)
  write(
    root,
    [
      item(path),
      item("coyo_image_0/00000/gone.jpg"),
      item("../x.jpg"),
      {"caption": "no path"},
      5,
      item(path),
    ],
  )
  opened = web_sets.built(finehard.source(root), tmp_path / "out")
  ((key, record),) = web_sets.parsed(opened).items()
  assert key == path and record.image == web_sets.image(7)
  assert record.captions == [b"cat", b"A long text of a grey cat."]
  assert record.descriptions == [b"a cat", b"a grey cat on a sofa", b"a sofa"]
  assert record.boxes.tolist() == [[0.25, 0.125, 0.75, 0.5]] * 2 + [[0.5, 0, 1, 1]]
  assert record.scores.tolist() == [0.875, 0.875, 1]
  false = [text.encode() for text in NEGATIVES.values()]
  assert record.region_negatives == [false, [], []]
  losses = web_sets.dropped(opened)
  assert losses["records"] == {
    "missing_image": 1,
    "outside_the_folder": 1,
    "malformed": 2,
    "duplicate_key": 1,
  }
  assert losses["regions"] == {"malformed": 2, "box_without_area": 1}


@pytest.mark.parametrize(
  "expressions, texts",
  [("short", [b"a cat", b"a sofa"]), ("long", [b"a grey cat on a sofa", b"a sofa"])],
)
def test_one_kind_of_description(tmp_path, expressions, texts):
  web_sets.download(tmp_path / "in" / "i", "0", 0)
  write(tmp_path / "in", [item("i/0.jpg", bbox_info=BOXES[:2])])
  source = finehard.source(tmp_path / "in", expressions=expressions)
  (record,) = web_sets.parsed(web_sets.built(source, tmp_path / "out")).values()
  assert record.descriptions == texts


FORMS = {
  "object": lambda pairs: dict(pairs),
  "pairs": lambda pairs: [list(pair) for pair in pairs],
  "objects": lambda pairs: [{url: key} for url, key in pairs],
  "named": lambda pairs: [{"url": url, "key": key, "n": 1} for url, key in pairs],
}


@pytest.mark.parametrize("form", FORMS)
def test_images_by_url(tmp_path, form):
  """img2dataset numbers its files as f_path is numbered, otherwise: the URL decides."""
  root = tmp_path / "in"
  folder = root / "coyo_image_3" / "00000"
  web_sets.download(folder, "000000000", 10, url="http://x/1")
  web_sets.download(folder, "000000001", 11, url="http://x/0")
  web_sets.download(folder, "000000002", 12, url="http://x/other")
  web_sets.download(folder, "000000004", 14)
  pairs = [(f"http://x/{i}", f"{i:09d}") for i in range(5)]
  (root / "url2key_jsons").mkdir()
  file = root / "url2key_jsons" / "url2key_coyo_image_3.json"
  file.write_text(json.dumps(FORMS[form](pairs)))
  assert sorted(url2key.pairs(file)) == pairs
  write(root, [item(f"coyo_image_3/00000/{i:09d}.jpg", bbox_info=[]) for i in range(5)])
  opened = web_sets.built(finehard.source(root), tmp_path / "out")
  found = {key[-5]: record.image for key, record in web_sets.parsed(opened).items()}
  assert found == {"0": web_sets.image(11), "1": web_sets.image(10), "4": web_sets.image(14)}
  assert web_sets.dropped(opened) == {"records": {"missing_image": 2}}


@pytest.mark.parametrize("renamed", [True, False])
@pytest.mark.parametrize("by_url", [True, False])
def test_boxes_of_an_image_that_was_padded_are_left_out_and_counted(tmp_path, by_url, renamed):
  root = tmp_path / "in"
  if by_url:
    (root / "url2key_jsons").mkdir(parents=True)
    pairs = {f"http://x/{i}": str(i) for i in range(2)}
    (root / "url2key_jsons" / "url2key_coyo_image_0.json").write_text(json.dumps(pairs))
  for i, told in enumerate((web_sets.PADDED, web_sets.KEPT)):
    name = str(i) if renamed or not by_url else f"other{i}"
    url = {} if renamed else {"url": f"http://x/{i}"}
    web_sets.download(root / "coyo_image_0" / "00000", name, i, **told, **url)
  boxes = BOXES[:2]
  write(root, [item(f"coyo_image_0/00000/{i}.jpg", bbox_info=boxes) for i in range(2)])
  opened = web_sets.built(finehard.source(root), tmp_path / "out")
  assert [len(r.descriptions) for r in web_sets.parsed(opened).values()] == [0, 3]
  assert web_sets.dropped(opened) == {"regions": {"boxes_of_another_shape": 3}}


def test_json_that_is_none_is_one_line(tmp_path):
  write(tmp_path, [])
  (tmp_path / "jsonfiles" / "a.json").write_text('[{"f_path": "x"}, {')
  with pytest.raises(ValueError, match=r"^\S*a\.json is not JSON: .*line 1 column"):
    list(base.iterate(finehard.source(tmp_path)))
  (tmp_path / "jsonfiles" / "a.json").write_text('{"f_path": "x"}')
  with pytest.raises(ValueError, match=r"a\.json holds a dict, not an array"):
    list(base.iterate(finehard.source(tmp_path)))
  write(tmp_path, [])
  (tmp_path / "url2key_jsons").mkdir()
  (tmp_path / "url2key_jsons" / "u.json").write_text('{"a": "b"')
  with pytest.raises(ValueError, match=r"^\S*u\.json is not JSON: "):
    list(base.iterate(finehard.source(tmp_path)))


def test_blocks_in_two_processes_give_what_one_gives(tmp_path, monkeypatch):
  root = tmp_path / "in"
  for i in range(12):
    web_sets.download(root / "i", str(i), i)
  paths = [f"i/{i}.jpg" for i in range(12)]
  write(root, [item(path, caption=f"é {path}") for path in paths[:7]], "a.json")
  write(root, [item(path, caption=f"é {path}") for path in paths[7:]], "b.json")
  monkeypatch.setattr(json_arrays, "BLOCK", 3)
  source = finehard.source(root)
  blocks = list(source.blocks(tmp_path))
  assert [(block["file"], block["first"]) for block in blocks] == [
    (0, 0),
    (0, 3),
    (0, 6),
    (1, 0),
    (1, 3),
  ]
  one = web_sets.built(source, tmp_path / "one")
  two = web_sets.built(source, tmp_path / "two", workers=2)
  assert list(web_sets.parsed(one)) == list(web_sets.parsed(two)) == paths
  assert [r.captions[1].decode() for r in web_sets.parsed(two).values()] == [
    f"é {path}" for path in paths
  ]


@pytest.mark.parametrize("library", ["pyarrow.parquet", "ijson"])
def test_a_library_that_is_not_installed_is_one_line(tmp_path, library, monkeypatch):
  (tmp_path / "url2key_jsons").mkdir()
  (tmp_path / "url2key_jsons" / "u.json").write_text("{}")
  (tmp_path / "00000").mkdir()
  web_sets.sidecar(tmp_path / "00000.parquet", [("0", "success", None, "u", 1)])
  write(tmp_path, [item("x")])
  monkeypatch.setitem(sys.modules, library, None)
  with pytest.raises(ValueError, match=r"not installed: pip install -r requirements\.txt\.$"):
    list(base.iterate(finehard.source(tmp_path)))
