"""Images of evaluation sets left out: by looks, against imagehash, and by ids."""

import io
import json

import box_layouts
import imagehash
import numpy as np
import pytest
import toy_data
from PIL import Image, ImageFilter

from grain_jax.data import build, sources
from grain_jax.data.sources import (
  base,
  coco_names,
  deliberate,
  exclusion,
  options,
  region_rules,
)


def photo(seed, size=(160, 120)):
  """Smooth blotches, whose hashes are far from one another's."""
  noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3)).astype(np.uint8)
  return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def opened(scratch, *args, **kwargs):
  made = exclusion.Exclusion.from_flags(*args, **kwargs)
  scratch.mkdir(exist_ok=True)
  made.prepare(scratch)
  return made.open(scratch)


def test_a_hash_is_imagehashs_of_the_image_as_it_is_shown():
  for seed in range(20):
    data = toy_data.jpeg(photo(seed))
    want = int(str(imagehash.phash(Image.open(io.BytesIO(data)))), 16)
    assert exclusion.perceptual_hash(data) == want


def test_images_near_those_of_a_folder_or_of_a_dataset_are_told(tmp_path):
  folder = tmp_path / "evaluation"
  (folder / "deeper").mkdir(parents=True)
  photo(0).save(folder / "0.jpg")
  (tmp_path / "disk").mkdir()
  photo(1).save(tmp_path / "disk" / "1.PNG")
  (folder / "deeper" / "link").symlink_to(tmp_path / "disk")
  (folder / "notes.txt").write_text("no image")
  told = opened(tmp_path / "scratch", folder)
  for seed in (0, 1):
    near = photo(seed).resize((400, 300)).filter(ImageFilter.GaussianBlur(1))
    assert told.is_excluded(toy_data.jpeg(near), "k") == "near_an_evaluation_image"
  for seed in range(2, 40):
    assert told.is_excluded(toy_data.jpeg(photo(seed)), "k") == ""
  assert told.is_excluded(b"no image", "k") == "" and told.is_excluded(None, "k") == ""
  dataset = toy_data.built(
    tmp_path / "set",
    [toy_data.record(0, image=toy_data.jpeg(photo(s)), key=str(s)) for s in (0, 1)],
  )
  assert opened(tmp_path / "other", dataset).hashes.tolist() == told.hashes.tolist()


def test_the_distance_counts_differing_bits():
  rng = np.random.default_rng(0)
  hashes = rng.integers(0, 2**64, 1000, np.uint64)
  told = exclusion.Opened(hashes, frozenset(), 4)
  for own in hashes[:50].tolist():
    for bits in (0, 4, 5):
      flipped = own
      for bit in rng.choice(64, bits, replace=False).tolist():
        flipped ^= 1 << bit
      want = min(bin(flipped ^ h).count("1") for h in hashes.tolist()) <= 4
      assert told.is_near(flipped) == want == (bits <= 4)


def test_ids_of_coco_style_files_and_lines_of_text(tmp_path):
  file = tmp_path / "val.json"
  images = [
    {"id": 7},
    {"id": 1, "file_name": "COCO_val2014_000000391895.jpg"},  # an id of its own: COCO's is 391895
    {"id": 2, "coco_url": "http://images.cocodataset.org/val2017/000000000139.jpg"},
    {"cocoid": 5, "split": "test"},
    {"cocoid": 6, "split": "restval"},  # trained on
    {"id": 3, "file_name": "1234.jpg", "caption": "one of its sentences"},
  ]
  file.write_text(json.dumps({"images": images, "annotations": [{"id": 99, "image_id": 7}]}))
  lines = tmp_path / "more.txt"
  lines.write_text("VG_100K/12.jpg\n\n 44 \n")
  told = opened(tmp_path / "scratch", None, f"{file},{lines}")
  assert sorted(told.listed) == sorted(
    ["7", "391895", "139", "5", "1234.jpg", "VG_100K/12.jpg", "44"]
  )
  lines.write_text("000000000009\nCOCO_val2014_000000000010.jpg\n00000000001\n")
  told_padded = opened(tmp_path / "scratch", None, str(lines))
  assert [told_padded.is_excluded(None, "k", [n]) != "" for n in ("9", "10", "1", "")] == [
    True, True, False, False,
  ]  # fmt: skip
  table = tmp_path / "images.jsonl"
  table.write_text("".join(json.dumps(image) + "\n" for image in images))
  again = opened(tmp_path / "scratch", None, str(table))
  assert again.listed == opened(tmp_path / "scratch", None, str(file)).listed
  assert told.is_excluded(None, "VG_100K/1.jpg", ["391895"]) == "evaluation_id"
  assert told.is_excluded(None, "VG_100K/12.jpg") == "evaluation_id"
  assert told.is_excluded(None, "VG_100K/3.jpg", ["1"]) == ""


def test_flags_are_what_from_flags_takes():
  flags = {flag.name: flag.default for flag in exclusion.FLAGS}
  assert exclusion.Exclusion.from_flags(**flags) is None
  assert flags["exclude_distance"] == 4


def test_images_of_coco_in_other_sets_are_left_out(tmp_path):
  box_layouts.visual_genome(tmp_path / "vg")
  box_layouts.coco(tmp_path / "coco")
  file = tmp_path / "coco/annotations/instances_train2017.json"
  told = opened(tmp_path / "scratch", None, str(file))
  read = base.iterate(sources.module("visual_genome").source(tmp_path / "vg"))
  items = [item for _, item in read if isinstance(item, dict)]
  why = {item["key"]: told.is_excluded(None, item["key"], item["ids"]) for item in items}
  assert why == {"VG_100K_2/1.jpg": "", "VG_100K/2.jpg": "evaluation_id"}
  assert exclusion.REASONS | region_rules.REASONS < deliberate.REASONS


@pytest.mark.parametrize("listed, left_out", [("000000000009\n8\n", 1), ("8\n7\n", 0)])
def test_a_build_says_how_many_images_the_ids_left_out(tmp_path, listed, left_out):
  box_layouts.coco(tmp_path / "in")
  (tmp_path / "ids.txt").write_text(listed)
  source = options.apply(
    sources.module("coco").source(tmp_path / "in"), {"exclude_ids": str(tmp_path / "ids.txt")}
  )
  said = []
  manifest = build.build(source, tmp_path / "out", workers=0, allow_dropped=1, say=said.append)
  assert any(f"names: {left_out} images are left out" in line for line in said)
  assert [hint.startswith("none of the 2 names") for hint in manifest["hints"]] == (
    [] if left_out else [True]
  )


def test_ids_in_names():
  assert coco_names.id_in_name("COCO_train2014_000000000009.jpg") == "9"
  assert coco_names.id_in_name("train2017/000000000009.jpg") == "9"
  assert coco_names.id_in_name("VG_100K/2407890.jpg") == coco_names.id_in_name(None) == ""


def test_what_cannot_be_excluded_is_one_line(tmp_path):
  make = exclusion.Exclusion.from_flags
  assert make(None) is None and make("", "") is None
  with pytest.raises(ValueError, match=r"^--exclude_distance = 64: .*\.$"):
    make(tmp_path, "", 64)
  with pytest.raises(ValueError, match="^--exclude = .*gone: there is no such"):
    make(tmp_path / "gone")
  with pytest.raises(ValueError, match=r"^--exclude = .* holds no image"):
    opened(tmp_path / "scratch", tmp_path)
  (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
  with pytest.raises(ValueError, match=r"^--exclude = .*: .*a.jpg cannot be compared with \("):
    opened(tmp_path / "scratch", tmp_path)
  file = tmp_path / "a.json"
  for text in ("[]", '{"images": 3}', '{"images": [{"x": 1}]}', "[", "3"):
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"{file}.*\.$") as raised:
      opened(tmp_path / "scratch", None, str(file))
    assert "\n" not in str(raised.value)


def test_settings_tell_changed_images_and_flags(tmp_path):
  photo(0).save(tmp_path / "0.jpg")
  before = exclusion.Exclusion.from_flags(tmp_path).settings()
  again = json.loads(json.dumps(exclusion.Exclusion.from_flags(tmp_path).arguments()))
  assert before == exclusion.Exclusion.from_flags(**again).settings()
  assert before != exclusion.Exclusion.from_flags(tmp_path, "", 3).settings()
  photo(1).save(tmp_path / "1.jpg")
  assert before != exclusion.Exclusion.from_flags(tmp_path).settings()
