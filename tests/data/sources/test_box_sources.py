"""What holds for every source with boxes: processes, damaged files, missing images, EXIF."""

import itertools
import json
import pathlib
import shutil

import box_layouts
import odd_pictures
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from grain_jax.data import records, sources
from grain_jax.data.building import flags as build_flags
from grain_jax.data.sources import base, indexed

KINDS = sorted(box_layouts.ALL)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_build_what_one_builds(tmp_path, monkeypatch, kind):
  box_layouts.ALL[kind](tmp_path / "in")
  one = box_layouts.built(kind, tmp_path / "in", tmp_path / "one")
  monkeypatch.setattr(indexed, "BLOCK", 1)
  two = box_layouts.built(kind, tmp_path / "in", tmp_path / "two", workers=2)
  assert box_layouts.content(one) == box_layouts.content(two)
  assert box_layouts.dropped(one) == box_layouts.dropped(two)
  for split in one.manifest["splits"]:
    assert one.fingerprint(split) == two.fingerprint(split)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_made_again_from_its_recipe_is_the_same(tmp_path, kind):
  box_layouts.ALL[kind](tmp_path)
  source = sources.module(kind).source(tmp_path, val_fraction=0.5)
  again = sources.make(json.loads(json.dumps(source.recipe)))
  assert again.settings == source.settings
  assert repr(list(base.iterate(again))) == repr(list(base.iterate(source)))  # NaN is not NaN
  assert again.about == {"licence": ""} and again.tolerance == source.tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_help_says_what_a_source_reads(kind, capsys):
  with pytest.raises(SystemExit):
    build_flags.parse([f"--source={kind}", "--help"], description="")
  shown = capsys.readouterr().out
  assert f"(--source={kind} --input=FOLDER)" in shown and "--annotations" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_the_records(tmp_path, kind):
  box_layouts.ALL[kind](tmp_path)
  source = sources.module(kind).source(tmp_path)
  items = [item for _, item in base.iterate(source) if not isinstance(item, records.Refused)]
  assert sorted(set(source.images())) == sorted({item["image"] for item in items})
  assert all(path.is_file() for path in source.images())


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_image_is_counted(tmp_path, kind):
  box_layouts.ALL[kind](tmp_path / "in")
  before = sum(
    len(r)
    for r in box_layouts.content(box_layouts.built(kind, tmp_path / "in", tmp_path / "a")).values()
  )
  gone = next(iter(sorted((tmp_path / "in").rglob("*.jpg"))))
  gone.unlink()
  try:
    opened = box_layouts.built(kind, tmp_path / "in", tmp_path / "out")
  except ValueError as error:  # the only one
    assert before == 1 and "missing_image" in str(error)
    return
  assert box_layouts.dropped(opened)[("images", "missing_image")] == 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("odvg", "open_images")])
def test_damaged_json_is_one_line_with_the_files_name(tmp_path, kind):
  box_layouts.ALL[kind](tmp_path)
  for file in sorted(tmp_path.rglob("*.json")):
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"\xff" + whole, b"", whole + b"]"):
      file.write_bytes(damaged)
      with pytest.raises(ValueError, match=rf"{file} is not JSON: .*\.$") as raised:
        list(base.iterate(sources.module(kind).source(tmp_path)))
      assert "\n" not in str(raised.value)
    file.write_bytes(whole)


PIXELS = ("coco", "visual_genome", "lvis", "objects365", "mdetr", "odvg")


@pytest.mark.parametrize("kind", PIXELS)
def test_boxes_are_of_the_image_as_shown(tmp_path, kind):
  """An image on its side by EXIF; the annotations' size says of which form of it they are."""
  box_layouts.ALL[kind](tmp_path)
  for path in tmp_path.rglob("*.jpg"):
    image = Image.open(path)
    image.load()
    exif = image.getexif()
    exif[0x0112] = 6  # shown, it is turned clockwise
    image.save(path, exif=exif)
  items = [item for _, item in base.iterate(sources.module(kind).source(tmp_path))]
  boxes = itertools.chain(*(i["regions"] for i in items if isinstance(i, dict)))
  # x 10 to 30 of 40 and y 5 to 15 of 20, turned or not; the corner of 4 x 2 goes to the right.
  found = [r["box"] for r in boxes if r["box"] is not None]
  assert (0.25, 0.25, 0.75, 0.75) in found
  if kind in ("objects365", "odvg"):
    assert (0, 0.9, 0.1, 1) in found


@pytest.mark.parametrize("kind", KINDS)
def test_other_flags_or_files_are_other_settings(tmp_path, kind):
  box_layouts.ALL[kind](tmp_path)
  make = sources.module(kind).source
  before = make(tmp_path).settings
  assert json.loads(json.dumps(before)) == before == make(tmp_path).settings
  assert before != make(tmp_path, tolerance=0.2).settings
  assert before != make(tmp_path, max_pixels=7).settings
  assert before == make(tmp_path, licence="own").settings  # of the manifest alone


ODD = (None, True, -1, 0, 2.5, float("nan"), float("inf"), 10**400, "", "x", "\ud83d", "../../x")
ODD += ("a\0b", [], [[]], {}, {"a": 1}, [1, 2, 3, 4], ["x"], [None], "9" * 100_000)


def places(value, path=()):
  """The paths to everything in a JSON value."""
  yield path
  if isinstance(value, (dict, list)):
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
      yield from places(part, (*path, key))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "open_images"])
@settings(
  max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(data=st.data())
def test_any_value_in_any_place_is_counted_or_told_in_one_line(tmp_path, kind, data):
  root = tmp_path / "in"
  shutil.rmtree(root, ignore_errors=True)
  box_layouts.ALL[kind](root)
  file = data.draw(st.sampled_from(sorted(root.rglob("*.json"))))
  text = file.read_text("utf-8")
  is_lines = kind == "odvg" and file.name != "labels.json"
  good = [x for x in text.splitlines() if x.startswith('{"')] if is_lines else [text]
  content = [json.loads(x) for x in good]
  *path, last = data.draw(st.sampled_from([p for p in places(content) if p]))
  odd = data.draw(st.sampled_from(ODD))
  inside = content
  for key in path:
    inside = inside[key]
  if data.draw(st.booleans()) and isinstance(inside, dict):
    del inside[last]
  else:
    inside[last] = odd
  dumped = [json.dumps(x) for x in content]
  file.write_text("".join(x + "\n" for x in dumped) if is_lines else dumped[0])
  flags = {"label_map": root / "labels.json"} if kind == "odvg" else {}
  try:
    source = sources.module(kind).source(root, **flags)
    images = list(source.images())
    items = [item for _, item in base.iterate(source)]
  except ValueError as error:
    assert "\n" not in str(error) and str(root) in str(error)
    return
  assert all(isinstance(path, pathlib.Path) for path in images)
  for item in items:
    if isinstance(item, records.Refused):
      assert item.what in ("records", "captions", "regions", "negatives")
      assert isinstance(item.key, str) and item.why.isidentifier()
    else:
      assert isinstance(item["key"], str) and all(isinstance(i, str) for i in item["ids"])
      records.check(item, tolerance=source.tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_any_kind_are_read_or_counted(tmp_path, kind):
  """CMYK, animated, of one pixel; cut short, of no byte, too large."""
  box_layouts.ALL[kind](tmp_path / "in")
  good = [file for file, *_ in odd_pictures.PICTURES.values()]
  path = sorted((tmp_path / "in").rglob("*.jpg"))[-1]
  source = sources.module(kind).source(tmp_path / "in")

  def checked(data):
    path.write_bytes(data)
    items = [i for _, i in base.iterate(source) if isinstance(i, dict) and i["image"] == path]
    return [records.check(i, tolerance=source.tolerance) for i in items]

  for data in good:
    assert all(found.record for found in checked(data))
  for data in odd_pictures.REFUSED.values():
    found = checked(data)
    assert found and all(f.record is None and f.dropped[-1][0] == "records" for f in found)


DERIVED = {
  "coco": ["annotations/instances_train2017_norefval.json", "annotations/lvis_v1_train_od.json"],
  "lvis": ["lvis_v1_train_od.json", "lvis_v1_minival_inserted_image_name.json"],
  "mdetr": ["final_flickr_separateGT_val_vg.json", "lvis_v1_train.json"],
  "objects365": ["annotations/zhiyuan_objv2_train_fixname_od.json"],
}


@pytest.mark.parametrize("kind", sorted(DERIVED))
def test_files_that_others_derive_and_put_beside_are_not_read(tmp_path, kind):
  box_layouts.ALL[kind](tmp_path)
  files = sources.module(kind).source(tmp_path).settings["files"]
  for name in DERIVED[kind]:
    box_layouts.write(tmp_path, name, "lines of another format")
  assert sources.module(kind).source(tmp_path).settings["files"] == files


def test_mended_names_of_objects365_are_read_in_place_of_its_own(tmp_path):
  box_layouts.objects365(tmp_path)
  file = tmp_path / "annotations/zhiyuan_objv2_train.json"
  mended = file.with_name("zhiyuan_objv2_train_fixname.json")
  mended.write_text(file.read_text().replace("Sneakers", "Sneakers (pair)"))
  items = [i for _, i in base.iterate(sources.module("objects365").source(tmp_path))]
  records_found = [i for i in items if isinstance(i, dict)]
  assert [r["regions"][0]["description"] for r in records_found] == ["Sneakers (pair)"]
