"""A folder of labelled images: its classes, their names, what is left out."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_labelled import folder, load

from grain_jax.evals.inputs import files
from grain_jax.evals.sets import labelled


def test_a_folder_gives_every_picture_once_a_class_after_another(tmp_path):
  path = folder(tmp_path, "mine", {"b_two": ["1.jpg", "2.PNG", "x.bmp"], "a": ["1.webp"]})
  for stray in ("b_two/notes.txt", "b_two/.hidden.png", "a.png", "a/noise"):
    (path / stray).write_bytes(b"x")
  (path / ".cache").mkdir()
  data = load("mine", root=tmp_path)
  assert data.classes == ("a", "b two") and data.labels == ("a", "b_two")
  assert data.templates == ()
  rows = [(picture.relative_to(path).as_posix(), label) for picture, label in data.read()]
  assert rows == [("a/1.webp", 0), ("b_two/1.jpg", 1), ("b_two/2.PNG", 1), ("b_two/x.bmp", 1)]


def test_class_list_and_templates_of_a_folder(tmp_path):
  path = folder(tmp_path, "mine", {"p1": ["1.png"], "p2": ["1.png"]})
  (path / "templates.json").write_text('["a {} on a shelf"]')
  for content in ('["phone", "a watch"]', '{"p2": "a watch", "p1": "phone"}'):
    (path / "classes.json").write_text(content)
    data = load("mine", root=tmp_path)
    assert data.classes == ("phone", "a watch") and data.templates == ("a {} on a shelf",)


@pytest.mark.parametrize(
  ("file", "content", "says"),
  [
    ("classes.json", '["a"]', "names 1 classes, and there are 2 sub-folders"),
    ("classes.json", '["a", " "]', "holds ' ': non-empty strings"),
    ("classes.json", '["a", 3]', "holds 3: non-empty strings"),
    ("classes.json", "{", "is not JSON"),
    ("classes.json", "7", "holds a int. Give"),
    ("classes.json", '{"p1": "a"}', r"classes.json lacks 'p2' \(1 classes in .*, 2 sub-folders"),
    ("classes.json", '{"p1": "a", "p2": "b", "p3": "c"}', "the folder lacks 'p3'"),
    ("classes.json", '{"p1": "a", "p2": ["b"]}', r"holds \['b'\]: non-empty"),
    ("classes.json", b"\xff\xfe", "is not JSON"),
    ("templates.json", "[]", "holds no list"),
    ("templates.json", '"a {}"', "holds no list"),
  ],
)
def test_malformed_lists_of_a_folder_are_one_line(file, content, says, tmp_path):
  path = folder(tmp_path, "mine", {"p1": ["1.png"], "p2": ["1.png"]})
  (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match=says) as error:
    load("mine", root=tmp_path)
  assert "\n" not in str(error.value) and file in str(error.value)


def test_missing_and_empty_folders_are_one_line(tmp_path):
  with pytest.raises(ValueError, match="needs DIR/mine: give --datasets=DIR"):
    load("mine")
  with pytest.raises(ValueError, match="there is no .*mine. Make it a folder with one sub-folder"):
    load("mine", root=tmp_path)
  (tmp_path / "mine").write_text("")
  with pytest.raises(ValueError, match="mine is a file"):
    load("mine", root=tmp_path)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="has no sub-folder"):
    load("empty", root=tmp_path)
  (tmp_path / "empty" / "a").mkdir()
  with pytest.raises(ValueError, match="no picture .* in the 1 sub-folders"):
    load("empty", root=tmp_path)


@pytest.mark.parametrize("suffix", ["gif", "TIFF", "jfif", "heic", "", "orig", "jpg.1"])
def test_no_picture_vanishes_by_its_suffix(suffix, tmp_path):
  """What no decoder knows is handed on too: it is counted where it is read."""
  path = folder(tmp_path, "mine", {"a": ["1.png"], "b": ["1.png"]})
  (path / "b" / "1.png").rename(path / "b" / f"1.{suffix}".rstrip("."))
  data = load("mine", root=tmp_path)
  assert data.classes == ("a", "b") and [label for _, label in data.read()] == [0, 1]
  assert len(files.find(str(path), labels="folders").files) == 2


def test_folders_of_the_system_and_without_pictures_are_no_classes(tmp_path):
  path = folder(tmp_path, "mine", {"a": ["1.png"], "b": ["1.png"]})
  folder(tmp_path, "mine", {n: ["1.png"] for n in ("__MACOSX", ".git", "@eaDir", "$RECYCLE.BIN")})
  (path / "empty").mkdir()
  (path / "notes").mkdir()
  (path / "notes" / "readme.txt").write_text("x")
  (path / "a" / "._1.png").write_bytes(b"x")
  (path / "classes.json").write_text('["first", "second"]')
  assert load("mine", root=tmp_path).classes == ("first", "second")
  assert files.find(str(path), labels="folders").label_names == ["a", "b"]


@pytest.mark.parametrize("start", [0, 1])
def test_a_list_of_names_follows_the_numbers_of_folders(start, tmp_path):
  numbers = range(start, start + 12)
  path = folder(tmp_path, "mine", {str(i): ["1.png"] for i in numbers})
  (path / "classes.json").write_text(json.dumps([f"name {i}" for i in numbers]))
  data = load("mine", root=tmp_path)
  for picture, label in data.read():
    assert data.classes[label] == f"name {picture.parent.name}"


@pytest.mark.parametrize(
  ("subs", "says"),
  [
    (("0", "2", "10"), "not numbered from 0 or 1 without a gap"),
    (("1", "01", "2"), "not numbered from 0 or 1"),
    (("class2", "class10"), "is not that of their numbers .from 'class10'"),
  ],
)
def test_a_list_of_names_is_refused_where_the_order_is_open(subs, says, tmp_path):
  path = folder(tmp_path, "mine", {sub: ["1.png"] for sub in subs})
  (path / "classes.json").write_text(json.dumps([f"name {sub}" for sub in subs]))
  with pytest.raises(ValueError, match=says) as error:
    load("mine", root=tmp_path)
  assert "\n" not in str(error.value) and "classes.json" in str(error.value)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_one_name_in_two_forms_of_unicode_is_one_name(form, tmp_path):
  other = {"NFC": "NFD", "NFD": "NFC"}[form]
  subs = [unicodedata.normalize(form, sub) for sub in ("café", "naïve")]
  path = folder(tmp_path, "mine", {sub: ["1.png"] for sub in subs})
  assert load("mine", root=tmp_path).classes == ("caf\u00e9", "na\u00efve")
  assert files.find(str(path), labels="folders").label_names == ["caf\u00e9", "na\u00efve"]
  names = {unicodedata.normalize(other, sub): f"a {i}" for i, sub in enumerate(subs)}
  (path / "classes.json").write_text(json.dumps(names))
  assert load("mine", root=tmp_path).classes == ("a 0", "a 1")
  assert labelled.spell(subs[0]) == labelled.spell(unicodedata.normalize(other, subs[0]))


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 5), min_size=1))
def test_the_first_pictures_of_a_folder_are_spread_over_its_classes(tmp_path_factory, counts):
  root = tmp_path_factory.mktemp("spread")
  for sub, count in counts.items():
    (root / "mine" / sub).mkdir(parents=True)
    for i in range(count):
      (root / "mine" / sub / f"{i}.png").write_bytes(b"")
  if not any(counts.values()):
    with pytest.raises(ValueError, match="no picture"):
      load("mine", root=root)
    return
  labels = [label for _, label in load("mine", root=root).read()]
  sizes = [counts[sub] for sub in sorted(counts) if counts[sub]]
  assert np.bincount(labels, minlength=len(sizes)).tolist() == sizes
  for n in range(len(labels)):
    seen = np.bincount(labels[: n + 1], minlength=len(sizes))
    # no class is two images behind another unless it has no more
    assert all(s == size or s >= seen.max() - 1 for s, size in zip(seen, sizes, strict=True))
