"""CE-CLIP's false captions, as JSON lines and as published pickles, of which nothing runs."""

import io
import json
import os
import pickle

import hypothesis
import numpy as np
import pytest
import web_sets
from hypothesis import strategies as st

from grain_jax.data.sources import base, ce_clip, object_arrays


def entry(number, **values):
  return {
    "image_id": 9,
    "id": 100 + number,
    "caption": f"a dog on a mat {number}",
    "relation_aug_caption": "a mat on a dog",
    "adj_aug_caption": "brown",
    "noun_aug_caption": "a cat on a mat",
    "verb_aug_caption": "a dog jumps",
    "valid_caption": [1, 1, 1, 1, 1],
    **values,
  }


def npy(objects, *, protocol=3):
  """As `np.save` writes it, with the pickle protocol of other versions of NumPy."""
  array = np.empty(len(objects), object)
  array[:] = objects
  buffer = io.BytesIO()
  np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
  pickle.dump(array, buffer, protocol=protocol)
  return buffer.getvalue()


ENTRIES = [
  entry(0),
  entry(1, relation_aug_caption="###", valid_caption=[1, 0, 1, 1, 1]),
  entry(2, valid_caption=[0, 1, 0, 1, 0], noun_aug_caption="### "),
  entry(3, valid_caption=[1, 1]),
  entry(4, image_id="x"),
  entry(5, image_id=10),
  {"caption": "of cc3m", "image_path": "cc3m/1.jpg", "verb_aug_caption": "n"},
]
KEPT = {
  "train2014/COCO_train2014_000000000009.jpg#100": [
    (b"a mat on a dog", b"relation"),
    (b"brown", b"attribute"),
    (b"a cat on a mat", b"object"),
    (b"a dog jumps", b"action"),
  ],
  "train2014/COCO_train2014_000000000009.jpg#101": [
    (b"brown", b"attribute"),
    (b"a cat on a mat", b"object"),
    (b"a dog jumps", b"action"),
  ],
  "train2014/COCO_train2014_000000000009.jpg#102": [(b"a mat on a dog", b"relation")],
  "train2014/COCO_train2014_000000000009.jpg#103": [],
  "cc3m/1.jpg#processed_dataset0:6": [(b"n", b"action")],
}


def images(root):
  web_sets.download(root / "train2014", "COCO_train2014_000000000009", 9)
  web_sets.download(root / "cc3m", "1", 1)


@pytest.mark.parametrize("form", ["npy", "jsonl"])
def test_records_of_either_form(tmp_path, form):
  root = tmp_path / "in"
  images(root)
  folder = root / "data" / "generated_data" / "coco_train"
  folder.mkdir(parents=True)
  if form == "npy":
    np.save(folder / "processed_dataset0.npy", np.array(ENTRIES, dtype=object), allow_pickle=True)
  else:
    lines = "".join(json.dumps(e) + "\n" for e in ENTRIES)
    (folder / "processed_dataset0.jsonl").write_text(lines)
  opened = web_sets.built(ce_clip.source(root), tmp_path / "out")
  found = web_sets.parsed(opened)
  assert {key: record.negatives for key, record in found.items()} == KEPT
  first = next(iter(found.values()))
  assert first.captions == [b"a dog on a mat 0"] and first.image == web_sets.image(9)
  assert web_sets.dropped(opened) == {
    "records": {"malformed": 1, "missing_image": 1},
    "negatives": {"invalid_negative": 4, "malformed": 4},
  }


@pytest.mark.parametrize("form", ["npy", "jsonl"])
def test_changed_images_are_told(tmp_path, form):
  root = tmp_path / "in"
  images(root)
  lines = "".join(json.dumps(e) + "\n" for e in (*ENTRIES, "no record")) + "no json\n"
  content = npy([*ENTRIES, "no record"]) if form == "npy" else lines.encode()
  (root / f"processed_dataset0.{form}").write_bytes(content)
  source = ce_clip.source(root)
  names = [f"train2014/COCO_train2014_{number:012d}.jpg" for number in (9, 10)]
  assert list(source.images()) == [root / name for name in (*names, "cc3m/1.jpg")]
  web_sets.built(source, tmp_path / "out")
  web_sets.built(source, tmp_path / "out")
  web_sets.download(root / "cc3m", "1", 2)
  with pytest.raises(ValueError, match=r"other settings or inputs \(images: .*\)\. Choose"):
    web_sets.built(source, tmp_path / "out")


def test_a_val_file_reads_val2014_and_files_are_read_by_number(tmp_path):
  root = tmp_path / "in"
  web_sets.download(root / "val2014", "COCO_val2014_000000000009", 3)
  (root / "coco_val").mkdir()
  for i in (10, 9):
    (root / "coco_val" / f"processed_dataset{i}.npy").write_bytes(npy([entry(i)]))
  opened = web_sets.built(ce_clip.source(root), tmp_path / "out")
  assert list(web_sets.parsed(opened, "val")) == [
    f"val2014/COCO_val2014_000000000009.jpg#{100 + i}" for i in (9, 10)
  ]


@pytest.mark.parametrize("protocol", range(6))
def test_the_reader_gives_what_unpickling_would(tmp_path, protocol):
  """Against pickle itself, here in the test."""
  objects = [*ENTRIES, {"é": [1.5, None, True, -3, 2**40, ("t",), {"a": []}]}, "text", 5]
  path = tmp_path / "x.npy"
  path.write_bytes(npy(objects, protocol=protocol))
  expected = np.load(path, allow_pickle=True).tolist()
  assert object_arrays.read(path) == expected == objects


class Evil:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (os.system, (f"touch {self.path}",))


class Built:
  """Of a class of its own, whose state would be set."""


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_in_a_file_runs(tmp_path, protocol):
  path, trace = tmp_path / "processed_dataset0.npy", tmp_path / "ran"
  path.write_bytes(npy([entry(0), Evil(trace)], protocol=protocol))
  with pytest.raises(
    ValueError, match=r"^\S*npy cannot be read: it asks for \S*\.system, which is"
  ):
    list(base.iterate(ce_clip.source(tmp_path)))
  assert not trace.exists()
  np.load(path, allow_pickle=True)
  assert trace.exists()  # it would have run


@pytest.mark.parametrize(
  "content, words",
  [
    (b"no npy", "does not begin as a .npy file does"),
    (npy([Built()]), "asks for .*Built"),
    (npy([np.float64(1)]), "asks for numpy.*scalar"),
    (npy([entry(0)])[:-30], "damaged"),
  ],
)
def test_what_is_no_data_is_one_line(tmp_path, content, words):
  (tmp_path / "processed_dataset0.npy").write_bytes(content)
  with pytest.raises(ValueError, match=rf"^\S*npy cannot be read: .*{words}"):
    list(base.iterate(ce_clip.source(tmp_path)))


@hypothesis.given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4))
def test_any_bytes_give_data_or_one_line(tmp_path_factory, changes):
  data = bytearray(npy([entry(0), entry(1)]))
  for at, value in changes:
    data[128 + at % (len(data) - 128)] = value
  path = tmp_path_factory.mktemp("odd") / "x.npy"
  path.write_bytes(data)
  try:
    items = object_arrays.read(path)
  except ValueError as error:
    assert str(error).startswith(str(path)) and "\n" not in str(error)
  else:
    assert len(items) == 2


def test_the_conversion_writes_json_lines(tmp_path, capsys):
  nested = []
  for _ in range(16):  # as JSON it would have 2^16 items, and 2^60 as easily
    nested = [nested, nested]
  file = tmp_path / "processed_dataset0.npy"
  file.write_bytes(npy([entry(0), {"caption": nested}, entry(1, caption="é")], protocol=4))
  assert not ce_clip.main([f"--input={file}", f"--out={tmp_path / 'lines'}"])
  lines = (tmp_path / "lines" / "processed_dataset0.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [entry(0), None, entry(1, caption="é")]
  assert "3 records" in capsys.readouterr().out
  assert ce_clip.main([f"--input={tmp_path / 'none.npy'}", f"--out={tmp_path}"]) == 2
  assert "none.npy: there is no such file" in capsys.readouterr().err


def test_blocks_in_two_processes_give_what_one_gives(tmp_path, monkeypatch):
  root = tmp_path / "in"
  images(root)
  for i in range(2):
    (root / f"processed_dataset{i}.npy").write_bytes(npy([entry(10 * i + n) for n in range(10)]))
  monkeypatch.setattr(ce_clip, "BLOCK", 4)
  source = ce_clip.source(root)
  one = web_sets.built(source, tmp_path / "one")
  two = web_sets.built(source, tmp_path / "two", workers=2)
  keys = [f"train2014/COCO_train2014_000000000009.jpg#{100 + i}" for i in range(20)]
  assert list(web_sets.parsed(one)) == list(web_sets.parsed(two)) == keys
