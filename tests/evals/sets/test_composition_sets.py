"""Readers of SugarCrepe, VALSE and VL-CheckList: real files, documented formats, averages."""

import pathlib

import numpy as np
import pytest
from toy_pairs import evaluate, picture, right, write

from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import composition as sets

SHARED = pathlib.Path(__file__).parents[4] / "shared" / "data"


def shared(folder):
  if not (SHARED / folder).is_dir():
    pytest.skip(f"no {SHARED / folder}: the real annotation files are not at hand")
  return SHARED / folder


def test_the_real_files_of_sugarcrepe():
  folder = shared("sugarcrepe")
  found = {n: sets.read_sugarcrepe(folder / f"{n}.json", folder) for n in sets.SUGARCREPE}
  assert {name: len(items) for name, items in found.items()} == {
    "add_att": 692,
    "add_obj": 2062,
    "replace_att": 788,
    "replace_obj": 1652,
    "replace_rel": 1406,
    "swap_att": 666,
    "swap_obj": 245,
  }
  assert sum(map(len, found.values())) == 7511
  first = found["swap_att"][0]
  assert first.image == folder / "000000565045.jpg" and first.kind == "swap_att"
  assert first.true == ("Blue bathroom with two white towels hanging by the shower.",)
  assert first.false == ("White bathroom with two blue towels hanging by the shower.",)


# Items that VALSE's paper counts as valid (table 1).
@pytest.mark.parametrize(
  ("piece", "valid", "folder"),
  [
    ("existence", 505, "visual7w/images"),
    ("counting-small-quant", 900, "visual7w/images"),
    ("relations", 535, "coco/val2017"),
  ],
)
def test_the_real_files_of_valse(piece, valid, folder):
  items = sets.read_valse(shared("valse") / f"{piece}.json", pathlib.Path("R"))
  assert len(items) == valid
  assert {item.image.parent for item in items} == {pathlib.Path("R") / folder}
  assert all(item.true != item.false for item in items)


@pytest.fixture
def sugarcrepe(tmp_path):
  """Files in the published format, 30 items each on 5 images."""
  for i in range(5):
    picture(tmp_path / "coco" / "val2017" / f"{i:012}.jpg", i)
  for name in sets.SUGARCREPE:
    entries = {
      str(i): {
        "filename": f"{i % 5:012}.jpg",
        "caption": f"{name} true {i}",
        "negative_caption": f"{name} false {i}",
      }
      for i in range(0, 60, 2)  # indices are not contiguous in the published files either
    }
    write(tmp_path / "sugarcrepe" / f"{name}.json", entries)
  return tmp_path


def test_sugarcrepe_and_its_averages(sugarcrepe):
  results, lines = evaluate("sugarcrepe", sugarcrepe)
  means = {
    name: np.mean([right(i % 5, f"{name} true {i}", f"{name} false {i}") for i in range(0, 60, 2)])
    for name in sets.SUGARCREPE
  }
  for name, mean in means.items():
    assert results[f"composition/sugarcrepe/{name}"] == pytest.approx(mean, abs=1e-6)
    assert results[f"composition/sugarcrepe/{name}/examples"] == 30
  for change, members in (
    ("add", ("add_att", "add_obj")),
    ("replace", ("replace_att", "replace_obj", "replace_rel")),
    ("swap", ("swap_att", "swap_obj")),
    ("average", sets.SUGARCREPE),
  ):
    expected = np.mean([means[name] for name in members])
    assert results[f"composition/sugarcrepe/{change}"] == pytest.approx(expected, abs=1e-6)
  assert results["composition/sugarcrepe/examples"] == 210
  assert results["composition/sugarcrepe/rows"] == 210
  assert lines == []


def test_a_limit_takes_the_first_of_each_file(sugarcrepe):
  results, _ = evaluate("sugarcrepe", sugarcrepe, limit=4)
  assert results["composition/sugarcrepe/rows"] == 28
  assert "composition/sugarcrepe/average" in results


def test_a_lost_picture_is_counted_and_said_once(sugarcrepe):
  (sugarcrepe / "coco" / "val2017" / f"{3:012}.jpg").write_bytes(b"no")
  results, lines = evaluate("sugarcrepe", sugarcrepe)
  assert results["composition/sugarcrepe/examples"] == 168
  assert results["composition/sugarcrepe/rows"] == 210
  assert len(lines) == 1 and "1 of 5 pictures cannot be read" in lines[0]


def test_no_average_where_a_part_of_it_has_no_example(sugarcrepe):
  path = sugarcrepe / "sugarcrepe" / "swap_obj.json"
  write(path, {"0": {"filename": "lost.jpg", "caption": "a", "negative_caption": "b"}})
  results, _ = evaluate("sugarcrepe", sugarcrepe)
  assert results["composition/sugarcrepe/swap_obj/examples"] == 0
  absent = ("swap_obj", "swap", "average")
  assert not any(f"composition/sugarcrepe/{name}" in results for name in absent)
  assert "composition/sugarcrepe/add" in results


def test_missing_and_malformed_files_end_in_one_line(sugarcrepe, tmp_path):
  def error(name, root=tmp_path):
    with pytest.raises(ValueError) as caught:
      sets.check(name, Options(root=root))
    assert "\n" not in str(caught.value)
    return str(caught.value)

  for name in sets.SETS:
    assert "--datasets" in error(name, root=None)
  assert "github.com/Heidelberg-NLP/VALSE" in error("valse")
  assert "github.com/om-ai-lab/VL-CheckList" in error("vl_checklist")
  assert "vgr_vga_images.zip" in error("aro_relation")
  assert "caption_datasets.zip" in error("aro_coco_order")
  path = sugarcrepe / "sugarcrepe" / "add_obj.json"
  path.write_text("{")
  assert "is not JSON" in error("sugarcrepe")
  write(path, {"7": {"filename": "a.jpg", "caption": "a"}})
  assert "entry '7': negative_caption = None is no str" in error("sugarcrepe")
  write(path, [])
  for file in (sugarcrepe / "coco" / "val2017").iterdir():
    file.unlink()
  assert "val2017 holds none of its 5 pictures. Get val2014.zip" in error("sugarcrepe")
  path.unlink()
  assert "add_obj.json. Get the seven files" in error("sugarcrepe")


# One entry of each of VALSE's datasets, by the names that its files give them.
VALSE_PICTURES = [
  ("visual7w", "v7w_1.jpg", "visual7w/images"),
  ("coco2017", "000000459634.jpg", "coco/val2017"),
  ("coco_2017", "000000462576.jpg", "coco/val2017"),
  ("SWiG", "pedaling_260.jpg", "swig"),
  ("VisDial_v1.0", "COCO_train2014_000000577126.jpg", "coco/train2014"),
  ("VisDial_v1.0", "COCO_val2014_000000356125.jpg", "coco/val2014"),
  ("VisDial_v1.0", "VisualDialog_val2018_000000146314.jpg", "visdial/VisualDialog_val2018"),
  ("FOIL dataset", "COCO_val2014_000000513724.jpg", "coco/val2014"),
]


def test_valse_pieces_votes_and_average(tmp_path):
  expected = {}
  for k, piece in enumerate(sets.VALSE):
    entries, outcomes = {}, []
    for i in range(24):
      dataset, name, folder = VALSE_PICTURES[(i + k) % len(VALSE_PICTURES)]
      red = (i + k) % len(VALSE_PICTURES)
      picture(tmp_path / folder / name, red)
      votes = i % 4
      true, false = f"{piece} {i}", f"{piece} foil {i}"
      entries[f"id{i}"] = {
        "dataset": dataset,
        "image_file": name,
        "caption": true,
        "foil": false,
        "mturk": {"foil": 0, "caption": votes, "other": 3 - votes},
      }
      if votes >= 2:
        outcomes.append(right(red, true, false))
    write(tmp_path / "valse" / f"{piece}.json", entries)
    expected[piece] = np.mean(outcomes)
  results, _ = evaluate("valse", tmp_path)
  for piece, value in expected.items():
    assert results[f"composition/valse/{piece}"] == pytest.approx(value, abs=1e-6)
  average = np.mean(list(expected.values()))
  assert results["composition/valse/average"] == pytest.approx(average, abs=1e-6)
  assert results["composition/valse/examples"] == results["composition/valse/rows"] == 132


def test_an_unknown_dataset_of_valse_is_named(tmp_path):
  entry = {"dataset": "flickr", "image_file": "a.jpg", "caption": "a", "foil": "b"}
  write(tmp_path / "p.json", {"x": entry | {"mturk": {"caption": 3}}})
  with pytest.raises(ValueError, match="'x': dataset = 'flickr' is none of visual7w"):
    sets.read_valse(tmp_path / "p.json", tmp_path)


# path below data/, kind, folder of the images: as om-ai-lab/VL-CheckList lays them out
VL_FILES = [
  ("Attribute/vaw/action.json", "attribute/action", "vg/VG_100K"),
  ("Attribute/vg/action.json", "attribute/action", "vg/VG_100K_2"),
  *[(f"Attribute/vg/{p}.json", f"attribute/{p}", "vg/VG_100K") for p in ("color", "material")],
  *[(f"Attribute/vg/{p}.json", f"attribute/{p}", "vg/VG_100K") for p in ("size", "state")],
  *[
    (f"Object/Size/vg_size/vg_obj_{p}.json", f"object/{p}", "vg/VG_100K")
    for p in ("small", "medium", "large")
  ],
  ("Object/Location/hake_location/hake_obj_margin.json", "object/margin", "hake/openimages"),
  ("Object/Location/swig_location/swig_agent/swig_agent_mid.json", "object/mid", "swig"),
  ("Object/Location/swig_location/swig_tool/swig_tool_mid.json", "object/mid", "swig"),
  ("Object/Location/vg_location/vg_subj_mid.json", "object/mid", "vg/VG_100K"),
  ("Object/Location/vg_location/vg_subj_center.json", "object/center", "vg/VG_100K"),
  ("Relation/swig_action.json", "relation/action", "swig"),
  ("Relation/vg/action.json", "relation/action", "vg/VG_100K"),
  ("Relation/vg/spatial.json", "relation/spatial", "vg/VG_100K"),
]


def test_vl_checklist_by_property_type_and_average(tmp_path):
  accuracy = {}
  for k, (file, _, folder) in enumerate(VL_FILES):
    entries, outcomes = [], []
    for i in range(7 + k):
      picture(tmp_path / folder / f"{i % 3}.jpg", i % 3)
      where = "/".join([*folder.split("/")[1:], f"{i % 3}.jpg"])
      texts = {"POS": [f"{file} pos {i}", "unused"], "NEG": [f"{file} neg {i}"]}
      entries.append([where, texts])
      outcomes.append(right(i % 3, f"{file} pos {i}", f"{file} neg {i}"))
    write(tmp_path / "vl_checklist" / "data" / file, entries)
    accuracy[file] = np.mean(outcomes)
  results, lines = evaluate("vl_checklist", tmp_path)
  prefix = "composition/vl_checklist/"
  expected = {}
  for file, kind, _ in VL_FILES:
    if kind not in ("attribute/action", "object/mid", "relation/action"):
      expected[kind] = accuracy[file]
  a = {file: value for file, value in accuracy.items() if "action" in file}
  expected["attribute/action"] = (
    a["Attribute/vaw/action.json"] + a["Attribute/vg/action.json"]
  ) / 2
  expected["relation/action"] = (a["Relation/swig_action.json"] + a["Relation/vg/action.json"]) / 2
  agent, tool, subject = (accuracy[file] for file, kind, _ in VL_FILES if kind == "object/mid")
  expected["object/mid"] = ((agent + tool) / 2 + subject) / 2  # files of a source first
  types = {
    t: np.mean([v for kind, v in expected.items() if kind.startswith(t)]) for t in sets.VL_CHECKLIST
  }
  for name, value in {**expected, **types}.items():
    assert results[prefix + name] == pytest.approx(value, abs=1e-6), name
  assert results[prefix + "average"] == pytest.approx(np.mean(list(types.values())), abs=1e-6)
  assert results[prefix + "files"] == 17
  assert results[prefix + "rows"] == sum(7 + k for k in range(17))
  assert len(lines) == 1 and "17 of its 56 files" in lines[0]


def test_vl_checklist_without_a_property_or_with_a_strange_file(tmp_path):
  for file, _, _ in VL_FILES[:-1]:
    write(tmp_path / "vl_checklist" / "data" / file, [["a.jpg", {"POS": ["a"], "NEG": ["b"]}]])
  with pytest.raises(ValueError, match="has nothing of relation/spatial"):
    sets.check("vl_checklist", Options(root=tmp_path))
  strange = tmp_path / "vl_checklist" / "data" / "Relation" / "vg" / "other.json"
  write(strange, [])
  with pytest.raises(ValueError, match="is no file of VL-CheckList"):
    sets.check("vl_checklist", Options(root=tmp_path))
  strange.unlink()
  spatial = strange.with_name("spatial.json")
  write(spatial, [["a.jpg", {"POS": [], "NEG": ["b"]}]])
  with pytest.raises(ValueError, match=r"entry 0: POS = \[\]"):
    sets.check("vl_checklist", Options(root=tmp_path))
  write(spatial, [{"POS": []}])
  with pytest.raises(ValueError, match="entry 0 is no"):
    sets.check("vl_checklist", Options(root=tmp_path))
