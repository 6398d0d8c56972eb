"""Tars as img2dataset writes them, against hand-worked records; and tars with whatever is wrong."""

import io
import tarfile

import hypothesis
import numpy as np
import odd_pictures
import pytest
import web_sets
from hypothesis import strategies as st
from PIL import Image

from grain_jax.data import decoding, records
from grain_jax.data.sources import base, tar_files, texts, webdataset


def test_tars_of_img2dataset(tmp_path):
  root, disk = tmp_path / "in", tmp_path / "disk"
  for folder in (root, disk):
    folder.mkdir()
  (root / "cc3m-validation").symlink_to(disk)
  members = [
    *web_sets.sample("000000000", 0, "a cat"),
    *web_sets.sample("000000002", 1, None),
    ("000000003.png", web_sets.image(2)),
    ("000000003.json", "{no json"),
    *web_sets.sample("000000004", 3, "exif", exif='{"Image Orientation": "Horizontal"}'),
  ]
  (root / "00000.tar").write_bytes(web_sets.tar_bytes(members))
  web_sets.sidecar(
    root / "00000.parquet",
    [
      ("000000000", "success", None, "u0", 0),
      ("000000001", "failed_to_download", "HTTP Error 404: Not Found", "u1", 1),
      ("000000005", "failed_to_download", "<urlopen error timed out>", "u5", 5),
      ("000000006", "failed_to_resize", "image decoding error", "u6", 6),
    ],
  )
  val = web_sets.sample("000010000", 4, "of val")
  (root / "cc3m-validation" / "00001.tar").write_bytes(web_sets.tar_bytes(val))
  opened = web_sets.built(webdataset.source(root, licence="none"), tmp_path / "out")
  found = web_sets.parsed(opened)
  assert {key: record.captions for key, record in found.items()} == {
    "00000/000000000": [b"a cat"],
    "00000/000000004": [b"exif"],
  }
  assert found["00000/000000000"].image == web_sets.image(0)
  assert list(web_sets.parsed(opened, "val")) == ["cc3m-validation/00001/000010000"]
  assert web_sets.dropped(opened) == {
    "records": {
      "no_caption": 1,
      "not_json": 1,
      "failed_to_download_http_404": 1,
      "failed_to_download_timeout": 1,
      "failed_to_resize_no_image": 1,
    }
  }


def test_grit_in_the_json(tmp_path):
  sizes = {"width": 48, "height": 48, "original_width": 960, "original_height": 960}
  row = {name: web_sets.GRIT_ROW[name] for name in ("noun_chunks", "ref_exps")}
  members = web_sets.sample("0", 0, web_sets.GRIT_CAPTION, **row, **sizes)
  padded = {**sizes, "original_height": 480}
  members += web_sets.sample("1", 1, web_sets.GRIT_CAPTION, **row, **padded)
  (tmp_path / "coyo.tar").write_bytes(web_sets.tar_bytes(members))
  opened = web_sets.built(webdataset.source(tmp_path), tmp_path / "out")
  found = web_sets.parsed(opened)
  web_sets.check_grit(found["coyo/0"])
  assert found["coyo/1"].descriptions == []  # padded to a square: its boxes are wrong
  assert web_sets.dropped(opened) == {
    "regions": {**web_sets.GRIT_DROPPED, "boxes_of_another_shape": 5}
  }
  source = webdataset.source(tmp_path, expressions="ref_exps")
  record = next(record for _, record in base.iterate(source) if isinstance(record, dict))
  assert [r["description"] for r in record["regions"]] == ["a dog in a field", "a field"]


@pytest.mark.parametrize(
  "size, reshaped",
  [((256, 171), False), ((256, 170), False), ((256, 256), True), ((171, 171), True)],
)
def test_an_image_of_another_shape_is_told(size, reshaped):
  from grain_jax.data.sources import grit_lists

  names = ("width", "height", "original_width", "original_height")
  values = dict(zip(names, (*size, 600, 401), strict=True))
  assert grit_lists.was_reshaped(values) is reshaped
  assert not grit_lists.was_reshaped({**values, "original_width": None})


def test_long_captions_as_text_or_as_sentences(tmp_path):
  dreamlip = {
    "raw_caption": "a dog",
    "shortIB_captions": "a brown dog",
    "longIB_captions": ["A brown dog runs", "It is fast!", "The end.</s>"],
    "shortSV_captions": "dog, running",
    "longSV_captions": "It runs. It barks.</s>",
    "shortLLA_captions": ["one"],
    "longLLA_captions": [],
  }
  members = web_sets.sample("0", 0, None, **dreamlip)
  (tmp_path / "0.tar").write_bytes(web_sets.tar_bytes(members))
  (record,) = web_sets.parsed(
    web_sets.built(webdataset.source(tmp_path), tmp_path / "out")
  ).values()
  assert record.captions == [
    b"a dog",
    b"a brown dog",
    b"A brown dog runs. It is fast! The end.",
    b"dog, running",
    b"It runs. It barks.",
    b"one",
  ]


def test_captions_by_flag(tmp_path):
  members = web_sets.sample("0", 0, "web", mine=["x.", "y"], five=["a", "b"])
  (tmp_path / "0.tar").write_bytes(web_sets.tar_bytes(members))
  source = webdataset.source(tmp_path, caption_keys=["five", "txt", "mine"], long_captions=["mine"])
  ((_, record),) = base.iterate(source)
  assert record["captions"] == ["a", "b", "web", "x. y"]


def test_odd_tars_cost_what_they_spoil(tmp_path):
  one, two = web_sets.sample("one", 1, "1"), web_sets.sample("two", 2, "2")
  whole = web_sets.tar_bytes(one + two)
  (tmp_path / "a.tar").write_bytes(
    web_sets.tar_bytes(
      [
        ("../evil.jpg", b"x"),
        ("../evil.txt", b"x"),
        ("/etc/evil.txt", b"x"),
        ("no_extension", b"x"),
        *one[:2],
        *two,
        one[2],  # not beside the others of its key
        ("three.jpg", web_sets.image(3)),
        ("three.jpg", web_sets.image(4)),
        ("three.txt", "3"),
        ("four.txt", "no image"),
      ]
    )
  )
  (tmp_path / "b.tar").write_bytes(whole[: whole.index(b"two.json") + 600])
  (tmp_path / "c.tar").write_bytes(b"<html>no tar</html>")
  (tmp_path / "d.tar").write_bytes(b"")
  (tmp_path / "e.tar").write_bytes(whole + whole)
  opened = web_sets.built(webdataset.source(tmp_path), tmp_path / "out")
  found = web_sets.parsed(opened)
  assert list(found) == ["a/two", "a/three", "b/one", "e/one", "e/two"]
  assert found["a/three"].image == web_sets.image(3)
  assert web_sets.dropped(opened) == {
    "records": {
      "outside_the_folder": 2,
      "name_without_extension": 1,
      "non_contiguous_key": 1,
      "duplicate_name": 1,
      "missing_image": 1,
      "truncated_tar": 2,
      "not_a_tar": 1,
      "data_after_the_end_of_the_tar": 1,
    }
  }


MEMBERS = [m for i in range(3) for m in web_sets.sample(f"k{i}", i, f"caption {i}")]
WHOLE = web_sets.tar_bytes(MEMBERS)


@hypothesis.given(st.integers(0, len(WHOLE)))
def test_a_tar_cut_anywhere_gives_whole_samples_up_to_there(tmp_path_factory, end):
  path = tmp_path_factory.mktemp("cut") / "x.tar"
  path.write_bytes(WHOLE[:end])
  found = [record for _, record in base.iterate(webdataset.source(path))]
  good = [r for r in found if isinstance(r, dict)]
  refused = [r for r in found if isinstance(r, records.Refused)]
  assert [r["captions"] for r in good] == [[f"caption {i}"] for i in range(len(good))]
  assert [r["image"] for r in good] == [web_sets.image(i) for i in range(len(good))]
  whole = len(WHOLE.rstrip(b"\0"))
  if end < whole:
    assert refused and refused[-1].why in ("truncated_tar", "not_a_tar")
    assert len(good) < 3
  if end == len(WHOLE):
    assert len(good) == 3 and not refused


@hypothesis.given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))))
def test_a_tar_with_any_bytes_changed_never_raises(tmp_path_factory, changes):
  data = bytearray(WHOLE)
  for at, value in changes:
    data[at - at % 512 + at % 160] = value  # in a header, or at the beginning of what is in it
  path = tmp_path_factory.mktemp("odd") / "x.tar"
  path.write_bytes(data)
  for sample in tar_files.samples(path, "x"):
    assert isinstance(sample, (tar_files.Sample, records.Refused))
  for _, record in base.iterate(webdataset.source(path)):
    if isinstance(record, dict):
      records.check(record)


def test_a_header_that_is_none_ends_the_tar_and_is_counted(tmp_path):
  at = WHOLE.index(b"k2.jpg")
  (tmp_path / "a.tar").write_bytes(WHOLE[:at] + b"\xff" * 512 + WHOLE[at + 512 :])
  long = tarfile.TarInfo("k" * 150).create_gnu_header(
    dict(tarfile.TarInfo("k" * 150).get_info()), "utf-8", "strict"
  )
  (tmp_path / "b.tar").write_bytes(WHOLE[:at] + long[:1024] + b"\xff" * 2048)
  opened = web_sets.built(webdataset.source(tmp_path), tmp_path / "out")
  assert list(web_sets.parsed(opened)) == ["a/k0", "a/k1", "b/k0", "b/k1"]
  assert web_sets.dropped(opened) == {"records": {"damaged_tar": 2}}


def test_blocks_in_two_processes_give_what_one_gives(tmp_path, monkeypatch):
  root = tmp_path / "in"
  root.mkdir()
  for shard in range(3):
    members = [m for i in range(4) for m in web_sets.sample(f"{shard}{i}", i, f"c{shard}{i}")]
    (root / f"{shard:05d}.tar").write_bytes(web_sets.tar_bytes(members))
  source = webdataset.source(root, val_fraction=0.3)
  assert len(list(source.blocks(tmp_path))) == 1
  monkeypatch.setattr(webdataset, "BLOCK", 1)
  assert len(list(source.blocks(tmp_path))) == 3
  one = web_sets.built(source, tmp_path / "one")
  two = web_sets.built(source, tmp_path / "two", workers=2)
  assert one.num_records("train") + one.num_records("val") == 12
  for split in ("train", "val"):
    a, b = web_sets.parsed(one, split), web_sets.parsed(two, split)
    assert list(a) == list(b) and [x.image for x in a.values()] == [x.image for x in b.values()]


def test_what_is_no_folder_of_tars_is_one_line(tmp_path):
  with pytest.raises(ValueError, match=r"^--input = .* holds no \.tar\. Give the folder"):
    webdataset.source(tmp_path)


@pytest.mark.parametrize(
  "sentences, joined",
  [
    (["a dog", "it runs"], "a dog. it runs"),
    (["A dog.", "", "It runs!", "Yes"], "A dog. It runs! Yes"),
    (['He said "no."', "一只狗。", "x"], 'He said "no." 一只狗。 x'),
    ([], ""),
  ],
)
def test_sentences_are_joined(sentences, joined):
  assert texts.join_sentences(sentences) == joined


def test_odd_pictures_are_kept_as_shown_or_counted(tmp_path):
  grey = Image.fromarray(np.full((8, 6), 128, np.uint8))
  frames = [Image.new("P", (6, 8), color) for color in (1, 2)]
  animated = io.BytesIO()
  frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
  pictures = {
    "cmyk.jpg": odd_pictures.save(grey.convert("CMYK"), "JPEG"),
    "moving.gif": animated.getvalue(),
    "dot.png": odd_pictures.save(Image.new("RGB", (1, 1)), "PNG"),
    "empty.jpg": b"",
    "html.jpg": b"<html>",
    "cut.jpg": web_sets.image(0)[:200],
    "large.png": odd_pictures.save(Image.new("L", (40, 30)), "PNG"),
  }
  members = []
  for name, data in pictures.items():
    members += [(name, data), (f"{name.partition('.')[0]}.txt", "一只狗 🐕 " * 5000)]
  (tmp_path / "0.tar").write_bytes(web_sets.tar_bytes(members))
  opened = web_sets.built(webdataset.source(tmp_path, max_pixels=1000), tmp_path / "out")
  found = web_sets.parsed(opened)
  assert list(found) == ["0/cmyk", "0/moving", "0/dot"]
  sizes = [decoding.decode(record.image).size for record in found.values()]
  assert sizes == [(6, 8), (6, 8), (1, 1)]
  assert found["0/dot"].captions == [("一只狗 🐕 " * 5000).strip().encode()]
  assert web_sets.dropped(opened) == {"records": {"corrupt_image": 3, "image_too_large": 1}}
