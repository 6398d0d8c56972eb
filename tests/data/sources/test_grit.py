"""GRIT's Parquet files over images on the disk, against hand-worked records."""

import pyarrow as pa
import pyarrow.parquet as pq
import web_sets

from grain_jax.data.sources import base, grit, parquet_files


def write(path, rows, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  whole = [
    {
      "key": f"{i:09d}",
      "clip_similarity_vitb32": 0.3,
      "id": 1000 + i,
      "url": f"http://x/{i}",
      "width": 48,
      "height": 48,
      **web_sets.GRIT_ROW,
      **row,
    }
    for i, row in enumerate(rows)
  ]
  pq.write_table(pa.Table.from_pylist(whole), path, **options)


def test_images_are_found_by_what_the_download_says(tmp_path):
  root = tmp_path / "in"
  write(root / "grit-20m" / "coyo_0_snappy.parquet", [{}, {}, {"caption": None}, {}, {}, {}])
  # img2dataset numbers them otherwise than the published keys do.
  web_sets.download(root / "images" / "00000", "000000001", 10, id=1000, url="http://x/0")
  web_sets.download(root / "images" / "00000", "000000000", 11, url="http://x/1")
  web_sets.download(root / "images" / "00000", "000000005", 12, id=1002)
  web_sets.download(root / "images" / "00001", "000010000", 13)
  web_sets.sidecar(
    root / "images" / "00001.parquet",
    [
      ("000010000", "success", None, "http://x/3", 1003),
      ("000010001", "failed_to_download", "HTTP Error 404: Not Found", "http://x/4", 1004),
    ],
  )
  opened = web_sets.built(grit.source(root), tmp_path / "out")
  found = web_sets.parsed(opened)
  assert {key: record.image for key, record in found.items()} == {
    "1000": web_sets.image(10),
    "1001": web_sets.image(11),
    "1003": web_sets.image(13),
  }
  for record in found.values():
    web_sets.check_grit(record)
  losses = web_sets.dropped(opened)
  assert losses["records"] == {
    "failed_to_download_http_404": 1,
    "no_caption": 1,
    "missing_image": 1,
  }


def test_folders_that_are_links_to_other_disks(tmp_path):
  root, disk = tmp_path / "in", tmp_path / "disk"
  write(disk / "tables" / "x.parquet", [{}] * 2)
  web_sets.download(disk / "told" / "0", "0", 0, url="http://x/0")
  web_sets.download(disk / "told" / "1", "1", 1)
  rows = [("1", "success", None, "http://x/1", 1001)]
  web_sets.sidecar(disk / "told" / "1.parquet", rows)
  root.mkdir()
  for name in ("tables", "told"):
    (root / name).symlink_to(disk / name)
  source = grit.source(root)
  assert list(web_sets.parsed(web_sets.built(source, tmp_path / "out"))) == ["1000", "1001"]
  assert len(list(source.images())) == 2


def test_images_are_found_by_name_where_nothing_else_tells(tmp_path):
  write(tmp_path / "a" / "x.parquet", [{}, {}, {}])
  web_sets.download(tmp_path / "b", "1000", 0)
  web_sets.download(tmp_path / "b" / "sub", "000000001", 1)
  web_sets.download(tmp_path / "b", "000000002", 2, url="http://another")
  source = grit.source(tmp_path, annotations=tmp_path / "a", images=tmp_path / "b")
  found = web_sets.parsed(web_sets.built(source, tmp_path / "out"))
  assert {key: record.image for key, record in found.items()} == {
    "1000": web_sets.image(0),
    "1001": web_sets.image(1),
  }
  web_sets.download(tmp_path / "b" / "other", "000000001", 3)
  found = [record for _, record in base.iterate(source)]
  assert (("1001", "records", "several_images_of_that_name")) in found


def test_boxes_of_an_image_that_was_padded_are_left_out_and_counted(tmp_path):
  """Whether the JSON beside it, by any of its names, or the Parquet beside its folder says so."""
  root = tmp_path / "in"
  write(root / "a" / "x.parquet", [{}] * 6)
  told = (web_sets.PADDED, web_sets.KEPT)
  web_sets.download(root / "b", "0", 0, url="http://x/0", **told[0])
  web_sets.download(root / "b", "1", 1, url="http://x/1", **told[1])
  web_sets.download(root / "b", "1002", 2, **told[0])
  web_sets.download(root / "b", "1003", 3, **told[1])
  rows = []
  for i in (4, 5):
    web_sets.download(root / "c", str(i), i)
    rows.append((str(i), "success", None, f"http://x/{i}", 1000 + i, *told[i - 4].values()))
  web_sets.sidecar(root / "c.parquet", rows, *web_sets.PADDED)
  opened = web_sets.built(grit.source(root, annotations=root / "a"), tmp_path / "out")
  found = web_sets.parsed(opened)
  assert [len(found[str(1000 + i)].descriptions) for i in range(6)] == [0, 3] * 3
  assert web_sets.dropped(opened)["regions"]["boxes_of_another_shape"] == 3 * 5


def test_large_row_groups_are_read_in_blocks_by_two_processes(tmp_path, monkeypatch):
  root = tmp_path / "in"
  rows = [{"caption": f"{i}", "noun_chunks": [], "ref_exps": None} for i in range(40)]
  write(root / "x.parquet", rows)
  for i in range(40):
    web_sets.download(root / "b", f"{1000 + i}", i)
  monkeypatch.setattr(parquet_files, "BLOCK", 8)
  source = grit.source(root)
  scratch = tmp_path / "scratch"
  scratch.mkdir()
  source.prepare(scratch)
  blocks = list(source.blocks(scratch))
  assert [block["row"] for block in blocks] == [0, 8, 16, 24, 32]
  captions = [r["captions"] for b in blocks for _, r in source.read(b, scratch)]
  assert captions == [[f"{i}"] for i in range(40)]
  one = web_sets.built(source, tmp_path / "one")
  two = web_sets.built(source, tmp_path / "two", workers=2)
  assert list(web_sets.parsed(one)) == list(web_sets.parsed(two))
  assert one.num_records("train") == 40


def test_odd_lists_are_counted(tmp_path):
  from grain_jax.data.sources import grit_lists

  values = {"caption": "a dog", "noun_chunks": [
    [0, 5, 0, 0, 1, 1, 0.5],
    [0.5, 5.0, 0, 0, 1, 1, 0.5],
    [float("nan"), 5.0, 0, 0, 1, 1, 0.5],
    [-1.0, 5.0, 0, 0, 1, 1, 0.5],
    [0.0, 6.0, 0, 0, 1, 1, 0.5],
    [0, 5, 0, 0, 1, 1],
    [0, 5, 0, 0, 1, "1", 0.5],
    None,
  ], "ref_exps": "none"}  # fmt: skip
  regions, lost = grit_lists.regions("k", values)
  assert [r["description"] for r in regions] == ["a dog"]
  assert sorted(r.why for r in lost) == sorted(
    ["bad_span"] * 2 + ["span_outside_caption"] * 2 + ["malformed"] * 4
  )
  values = {"caption": "né", "ref_exps": [[1, 2, 0, 0, 1, 1, 0.5], [0, 3, 0, 0, 1, 1, 0.5]]}
  regions, lost = grit_lists.regions("k", values)  # three bytes, two characters
  assert [r["description"] for r in regions] == ["é"] and [r.why for r in lost] == [
    "span_outside_caption"
  ]
