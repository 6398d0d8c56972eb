"""One table of odd lines through every reader of JSON lines and CSV, against json and csv."""

import csv
import errno
import io
import json
import pathlib

import json_objects
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grain_jax import failures, textfiles
from grain_jax.convert import state_dicts
from grain_jax.data import records
from grain_jax.data.sources import base
from grain_jax.data.sources import folder as folder_source
from grain_jax.data.sources import published as published_source
from grain_jax.evals import zero_shot
from grain_jax.evals.inputs import annotations, files, instances
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import grounding, retrieval, waterbirds
from grain_jax.runtime import metrics

BOM = b"\xef\xbb\xbf"
ODD = "a\u2028b\u2029c\u0085d\u000be\u001cf"  # what str.splitlines takes for ends of lines


def entry(image="0.jpg", **fields):
  region = {"description": "r", "box": [0, 0, 1, 1]}
  return {"image": image, "captions": ["c"], "regions": [region], "step": 1} | fields


def dump(value):
  return json.dumps(value, ensure_ascii=False).encode()


def build_json(path):
  return [(r["key"], r["captions"]) for _, r in base.iterate(folder_source.source(path.parent))]


def grounding_json(path):
  rows = grounding.read_lines(path).rows
  assert all(region.description == "r" for _, regions in rows for region in regions)
  return [(image, None) for image, _ in rows]


def retrieval_json(path):
  root = path.parent.parent
  found = retrieval._json_lines(Options(root=root), path.parent.name)
  return [(c.image.relative_to(path.parent).as_posix(), list(c.captions)) for c in found]


def docci_json(path):
  lines = [entry for _, entry in annotations.read_json_lines(path)]
  return [(line["image"], line["captions"]) for line in lines]


def metrics_json(path):
  return [(line["image"], line["captions"]) for line in metrics.read_jsonl(path)]


JSON_LINES = {  # reader: (the file's name, what it reads: (image, captions or None) of each line)
  "build": ("annotations.jsonl", build_json),
  "grounding": ("annotations.jsonl", grounding_json),
  "retrieval": ("captions.jsonl", retrieval_json),
  "docci": ("docci_descriptions.jsonlines", docci_json),
  "metrics": ("metrics.jsonl", metrics_json),
}
GOOD_LINES = {
  "ends of lines of Unicode in a string": dump(entry(captions=[ODD])) + b"\n",
  "in a path": dump(entry(image=f"{ODD}.jpg")) + b"\n",
  "byte order mark": BOM + dump(entry()) + b"\n",
  "of each of two files put together": BOM + dump(entry()) + b"\n" + BOM + dump(entry("1")) + b"\n",
  "byte order mark on a line of its own": BOM + b"\n" + dump(entry()) + b"\n",
  "Windows": dump(entry()) + b"\r\n" + dump(entry("1.jpg")) + b"\r\n",
  "escaped carriage return": dump(entry(captions=["a\rb\r\nc"])) + b"\n",
  "empty lines": b"\n\r\n" + dump(entry()) + b"\n\n \t\n" + dump(entry("1.jpg")) + b"\n\n",
  "form feed between": dump(entry()) + b"\n\x0c\n" + dump(entry("1.jpg")) + b"\n",
  "no newline at the end": dump(entry()) + b"\n" + dump(entry("1.jpg")),
  "escaped NUL": dump(entry(captions=["a\0b"])) + b"\n",
  "a very long line": dump(entry(captions=["x" * 3_000_000])) + b"\n" + dump(entry("1.jpg")),
  "null fields": dump(entry(regions=None, negatives=None, score=None, split=None)) + b"\n",
}
BAD_LINES = {
  "cut short": b'{"image": "0.jpg", "capt',
  "a line break inside a string": b'{"image": "0.jpg", "captions": ["a\nb"]}',
  "a carriage return inside a string": b'{"image": "0.jpg", "captions": ["a\rb"]}',
  "NUL": b'{"image": "0.jpg", "captions": ["a\0b"]}',
  "NULs alone": b"\0" * 64,
  "Latin-1": '{"image": "0.jpg", "captions": ["café"]}'.encode("latin-1"),
  "UTF-16": '{"image": "0.jpg", "captions": ["c"]}'.encode("utf-16"),
  "nested too deeply": b"[" * 200_000,
}


def write(folder, name, data):
  path = folder / "mine" / name
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(data)
  return path


@pytest.mark.parametrize("case", GOOD_LINES)
@pytest.mark.parametrize("reader", JSON_LINES)
def test_every_reader_of_json_lines_reads_what_json_reads(tmp_path, reader, case):
  name, read = JSON_LINES[reader]
  data = GOOD_LINES[case]
  lines = [
    json.loads(x.removeprefix(BOM)) for x in data.split(b"\n") if x.removeprefix(BOM).strip()
  ]
  expected = [(x["image"], x["captions"]) for x in lines]
  found = read(write(tmp_path, name, data))
  if reader == "grounding":  # which reads no captions
    expected = [(image, None) for image, _ in expected]
  assert found == expected


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("reader", JSON_LINES)
def test_every_reader_of_json_lines_names_the_line_that_is_wrong(tmp_path, caplog, reader, case):
  name, read = JSON_LINES[reader]
  path = write(tmp_path, name, dump(entry()) + b"\n\n" + BAD_LINES[case] + b"\n")
  if reader == "build":  # counted
    refused = [
      r
      for _, r in base.iterate(folder_source.source(path.parent))
      if isinstance(r, records.Refused)
    ]
    assert refused[0] == ("line 3", "records", "not_json")
  elif reader == "metrics":  # a killed run leaves half a line: counted
    assert len(read(path)) == 1 and "first 3." in caplog.text
  else:
    with pytest.raises(ValueError, match=r"line 3 is not JSON: ") as error:
      read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def build_csv(path):
  return [(r["key"], r["captions"]) for _, r in base.iterate(folder_source.source(path.parent))]


def published_csv(path):
  found = base.iterate(published_source.source(path.parent, captions=path))
  return [(r["key"], r["captions"]) for _, r in found]


def embed_csv(path):
  found = files.find(str(path))
  return [
    (image, [found.label_names[i]]) for image, i in zip(found.paths, found.labels, strict=True)
  ]


def waterbirds_csv(path):
  rows = waterbirds._rows("test", Options(root=path.parent.parent))
  return [(row.path.relative_to(path.parent).as_posix(), None) for row in rows]


CSV = {  # reader: (name, folder, header, a row as a template, what it reads)
  "build": ("annotations.csv", "mine", "image,caption", "{0},{1}", build_csv),
  "published": ("captions.csv", "mine", "path,title", "{0},{1}", published_csv),
  "embed": ("list.csv", "mine", "image,label", "{0},{1}", embed_csv),
  "waterbirds": (
    "metadata.csv",
    "waterbirds",
    "img_id,img_filename,y,split,place,place_filename",
    "{1},{0},0,2,0,p",
    waterbirds_csv,
  ),
}
GOOD_FIELDS = {  # of two rows: (image, text) as they stand in the file
  "plain": (("0.jpg", "a"), ("1.jpg", "b")),
  "ends of lines of Unicode": (("0.jpg", f'"{ODD}"'), (f"1{ODD}.jpg", ODD)),
  "newlines inside quotes": (("0.jpg", '"a\nb\r\nc\n\nd"'), ("1.jpg", "b")),
  "carriage return inside quotes": (("0.jpg", '"a\rb"'), ("1.jpg", "b")),
  "commas and quotes inside quotes": (('"0,0.jpg"', '"a ""b"", c"'), ("1.jpg", '""""')),
  "bare quotes inside": (("0.jpg", '5" wide, 6" high'.replace(",", ";")), ("1.jpg", "it's")),
  "form feed and NUL": (("0.jpg", "a\x0cb"), ("1.jpg", "a\0b")),
  "long": (("0.jpg", '"' + "x\n" * 60_000 + '"'), ("1.jpg", "b")),
}
ENDS = {"unix": "\n", "windows": "\r\n", "old mac": "\r", "empty lines": "\n\n", "none": "\n"}


def write_csv(folder, reader, rows, end="\n", last=True, bom=True):
  name, within, header, template, _ = CSV[reader]
  lines = [header, *(template.format(*row) for row in rows)]
  path = folder / within / name
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(BOM * bom + (end.join(lines) + end * last).encode())
  return path


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("case", GOOD_FIELDS)
@pytest.mark.parametrize("reader", CSV)
def test_every_reader_of_csv_reads_what_csv_reads(tmp_path, reader, case, end):
  path = write_csv(tmp_path, reader, GOOD_FIELDS[case], ENDS[end], end != "none", end != "unix")
  text = path.read_bytes().decode("utf-8-sig")
  _, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
  found = CSV[reader][-1](path)
  if reader == "waterbirds":
    assert found == [(row[1], None) for row in rows]
  elif reader == "embed":  # labels are names: without space around them
    assert found == [(row[0], [row[1].strip()]) for row in rows]
  else:
    assert found == [(row[0], [row[1]]) for row in rows]


BAD_FIELDS = {  # of the second of three rows
  "unclosed": '"a dog',
  "unclosed, quotes after it": '"a dog\n9.jpg,"quoted"\n8.jpg,c',
  "closed in the middle": '"a" dog',
  "too long": "x" * 140_000,
  "unclosed before much": '"' + "x\n" * 80_000,
}


@pytest.mark.parametrize("case", BAD_FIELDS)
@pytest.mark.parametrize("reader", CSV)
def test_every_reader_of_csv_names_the_row_whose_quotes_are_wrong(tmp_path, reader, case):
  rows = (("0.jpg", '"a\nb"'), ("1.jpg", BAD_FIELDS[case]), ("2.jpg", "c"))
  path = write_csv(tmp_path, reader, rows)
  with pytest.raises(ValueError, match="in row 3, which begins in line 4") as error:
    CSV[reader][-1](path)
  assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("reader", CSV)
def test_every_reader_of_csv_says_where_a_byte_is_not_utf_8(tmp_path, reader):
  path = write_csv(tmp_path, reader, (("0.jpg", "a"), ("1.jpg", "caf!")), bom=False)
  data = path.read_bytes()
  path.write_bytes(data.replace(b"!", b"\xe9"))
  with pytest.raises(ValueError, match=rf"byte 0xe9 at byte {data.index(b'!')} \(line 3\)"):
    CSV[reader][-1](path)


def test_a_field_in_no_column_is_counted_or_refused(tmp_path):
  """A comma outside quotes: the caption would end there."""
  rows = (("0.jpg", "a dog, brown"), ("1.jpg", "b,"))
  path = write_csv(tmp_path, "build", rows)
  refused, good = [record for _, record in base.iterate(folder_source.source(path.parent))]
  assert refused == ("row 2", "records", "malformed") and good["captions"] == ["b"]
  with pytest.raises(ValueError, match="row 2: ' brown' is in no column"):
    embed_csv(write_csv(tmp_path, "embed", rows))
  with pytest.raises(ValueError, match="line 2 has more fields than columns"):
    waterbirds_csv(write_csv(tmp_path, "waterbirds", (("0.jpg,0", "1"),)))


DOCUMENTS = {
  "annotations": annotations.read_json,
  "descriptors": zero_shot.read_descriptors,
  "convert": state_dicts.read_json,
  "published": json_objects.read,
}


@pytest.mark.parametrize("reader", DOCUMENTS)
def test_every_reader_of_json_documents(tmp_path, reader):
  path, read = tmp_path / "a.json", DOCUMENTS[reader]
  content = {"a": [ODD]}
  path.write_bytes(BOM + dump(content).replace(b"{", b"{\r\n"))
  assert read(path) == content
  for data, message in (
    (b"{", "is not JSON: Expecting property"),
    (b'{"a":\n"caf\xe9"}', r"is not JSON: not UTF-8: byte 0xe9 at byte 10 \(line 2\)"),
    (b"[" * 200_000, "is not JSON: it is nested too deeply"),
  ):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
      read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_null_is_missing_in_coco(tmp_path):
  box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}
  null = {"area": None, "iscrowd": None, "neg_category_ids": None}
  image = {"id": 1, "width": 4, "height": 4, "file_name": "a.jpg"}
  nulls = {"caption": None, "neg_category_ids": None, "not_exhaustive_category_ids": None}
  found = []
  for name, more, of_image in (("without", {}, {}), ("null", null, nulls)):
    path = tmp_path / f"{name}.json"
    content = {
      "images": [image | of_image],
      "annotations": [box | more],
      "categories": [{"id": 1, "name": "cat"} | ({"frequency": None} if more else {})],
    }
    path.write_text(json.dumps(content))
    found.append(repr(instances.read(path)))
  assert found[0] == found[1] and "nan" not in found[0]


def test_null_is_missing_in_a_region(tmp_path):
  box = {"box": [0, 0, 1, 1]}
  lines = [entry(regions=[box]), entry(regions=[box | {"description": None, "negatives": None}])]
  path = write(tmp_path, "annotations.jsonl", b"\n".join(map(dump, lines)))
  assert grounding.read_lines(path).rows == [("0.jpg", []), ("0.jpg", [])]


@pytest.mark.parametrize("reader", ["build", "retrieval"])
def test_captions_that_are_null_leave_the_caption(tmp_path, reader):
  name, read = JSON_LINES[reader]
  path = write(tmp_path, name, dump(entry(captions=None, caption="one")))
  assert read(path) == [("0.jpg", ["one"])]


def test_storage_that_fails_within_a_file_costs_nothing(tmp_path, monkeypatch):
  """Every other read fails, some after a part of it: the file is opened again at the same place."""
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"".join(dump(entry(f"{i}.jpg")) + b"\n" for i in range(40)))
  expected = list(textfiles.read_json_lines(path))
  opened = []

  class Failing(io.FileIO):
    def readinto(self, buffer):
      opened.append(self)
      if len(opened) % 2:
        super().readinto(memoryview(buffer)[: len(opened)])
        raise OSError(errno.ESTALE, "Stale file handle")
      return super().readinto(buffer)

  monkeypatch.setattr(failures, "RETRY_DELAYS", (0.0,))
  monkeypatch.setattr(textfiles, "BUFFER", 50)
  monkeypatch.setattr(pathlib.Path, "open", lambda path, mode, buffering: Failing(path, mode))
  assert list(textfiles.read_json_lines(path)) == expected and len(opened) > 100
  assert all(file.closed for file in opened)


FIELDS = st.text(st.characters(codec="utf-8"), max_size=8)
QUICK = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@example(rows=[["\n\ufeff", "a"], ["\ufeff", "\r\ufeff"]])
@given(rows=st.lists(st.lists(FIELDS, min_size=2, max_size=3), max_size=4))
def test_what_csv_writes_is_read(tmp_path, rows):
  path = pathlib.Path(tmp_path / "a.csv")
  with path.open("w", encoding="utf-8", newline="") as file:
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
  assert [fields for _, fields in textfiles.read_csv(path)] == rows


@QUICK
@given(values=st.lists(st.dictionaries(FIELDS, FIELDS | st.none() | st.integers()), max_size=4))
def test_what_json_writes_is_read(tmp_path, values):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"\r\n".join(map(dump, values)))
  assert [value for _, value in textfiles.read_json_lines(path)] == values
