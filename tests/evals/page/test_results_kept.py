"""Which results may stand together in a folder, and what becomes of the others."""

import errno
import json

import numpy as np
import pytest

from grain_jax import places
from grain_jax.evals import built, segmentation
from grain_jax.evals.page import results as results_lib


@pytest.fixture
def write(tmp_path, capsys):
  """Writes results; (those that the folder has then, lines on what is kept)."""

  def call(results, *, step=4, facts=None, **outcome):
    results_lib.write(tmp_path, built.Outcome(results, **outcome), step=step, facts=facts)
    said = [line for line in capsys.readouterr().out.splitlines() if "kept as" in line]
    found = read(tmp_path / "results.json")
    assert found.pop("step") == step
    return found, said

  return call


def read(path):
  return json.loads(path.read_text())


def test_results_of_another_step_model_or_data_are_not_mixed(tmp_path, write):
  """They are kept beside, and that is said; outside sets alone go with any data."""

  def add(value, *, name="retrieval/image_to_text/r1", data="one", **more):
    found, said = write({name: value}, data=data, facts={"command": f"--x={value}"}, **more)
    return list(found.values()), said

  assert add(0.25, model="A") == ([0.25], [])
  assert add(0.5, name="composition/average", model="A") == ([0.25, 0.5], [])
  assert "<dt>last command</dt><dd>--x=0.5" in (tmp_path / "report.html").read_text()
  assert add(0.75, name="zero_shot/pets/top1", data="", model="A") == ([0.25, 0.5, 0.75], [])
  for what, value, changed in (("data", 0.125, {"data": "two"}), ("model", 0.625, {"model": "B"})):
    changed = {"data": "two", "model": "A", **changed}
    values, said = add(value, name="grounding/mean_iou", **changed)
    assert values == [value] and said == [
      f"the {tmp_path / 'results.json'} that was there is of "
      f"{'other data' if what == 'data' else 'another model'}: kept as results.before.json"
    ]
    assert "25.0 %" not in (tmp_path / "report.html").read_text()
  assert read(tmp_path / "results.before.json") == {"step": 4, "grounding/mean_iou": 0.125}
  values, said = add(0.375, step=2, data="two", model="B")
  assert values == [0.375] and "is of step 4: kept" in said[0]
  assert read(tmp_path / "results.before.json") == {"step": 4, "grounding/mean_iou": 0.625}


def test_an_export_has_no_step_and_adds_up_by_its_model(write):
  assert write({"a/b": 0.5}, step=None, model="A") == ({"a/b": 0.5}, [])
  assert write({"c/d": 0.5}, step=None, model="A") == ({"a/b": 0.5, "c/d": 0.5}, [])
  found, said = write({"c/d": 0.25}, step=None, model="B")
  assert found == {"c/d": 0.25} and "of another model: kept" in said[0]


def test_what_an_older_version_wrote_goes_with_its_data(tmp_path, write):
  (tmp_path / "results.json").write_text('{"step": 4, "retrieval/pairs": 3}')
  (tmp_path / "results.data").write_text("one")
  assert write({"a/b": 0.5}, data="one", model="A") == ({"retrieval/pairs": 3, "a/b": 0.5}, [])
  (tmp_path / "results.data").write_text("one")
  found, said = write({"a/b": 0.5}, data="two", model="A")
  assert found == {"a/b": 0.5} and "of other data" in said[0]


def test_a_figure_is_of_the_results_that_it_stands_beside(tmp_path, write):
  mask = np.zeros((8, 8), np.uint8)
  image = np.zeros((8, 8, 3), np.uint8)
  example = segmentation.Example("k", image, mask, mask, mask.astype(np.uint16), {0: "background"})

  def shown():
    return "<b>masks</b>" in (tmp_path / "report.html").read_text()

  write({"segmentation/miou": 0.5}, segmented=[example], step=100)
  write({"zero_shot/top1": 0.5}, step=100)
  assert shown()
  write({"zero_shot/top1": 0.5}, step=200)
  assert not shown()
  write({"retrieval/image_to_text/r1": 0.5}, step=200)  # the file is still there
  assert not shown() and (tmp_path / "figures" / "masks.png").exists()


def test_the_last_line_names_every_file_once(tmp_path, capsys):
  mask, image = np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)
  example = segmentation.Example("k", image, mask, mask, mask.astype(np.uint16), {0: "background"})
  outcome = built.Outcome({"segmentation/miou": 0.5}, segmented=[example])
  results_lib.write(tmp_path, outcome, step=1)
  names = ("results.json", "figures/masks.png", "report.html")
  last = capsys.readouterr().out.splitlines()[-1]
  assert last == "wrote " + ", ".join(str(tmp_path / name) for name in names)


def pets(value, count, **more):
  counts = {"zero_shot/pets/examples": count, "zero_shot/pets/rows": 100}
  return {"zero_shot/pets/top1": value, **counts, **more}


def test_a_trial_leaves_the_results_of_the_whole_set_beside(tmp_path, write):
  whole = pets(0.75, 100)
  write({**whole, "zero_shot/pets/name/top1": 0.5})
  found, said = write(pets(0.5, 10, **{"zero_shot/pets/limit": 10}) | {"retrieval/pairs": 3})
  assert found["zero_shot/pets/top1"] == 0.5 and "zero_shot/pets/name/top1" not in found
  assert len(said) == 1 and "is of other pictures of zero_shot:pets (--limit" in said[0]
  assert whole.items() < read(tmp_path / "results.before.json").items()
  found, said = write(pets(0.5, 10, **{"zero_shot/pets/limit": 10}))
  assert not said and found["retrieval/pairs"] == 3


def test_what_was_left_out_stays_in_the_report_until_it_is_evaluated_anew(tmp_path, write):
  lines = [
    "zero_shot:pets: 10 of 100 pictures cannot be read and are left out; the first, number 3: x",
    "zero_shot:pets by descriptors: d.json: 1 of 8 keys are no class: 'x'",
    "evaluation retrieval failed: ValueError: no caption",
    "evaluation grounding failed: ValueError: no region",
  ]
  write(pets(0.5, 90), left_out=lines)
  write({"retrieval/pairs": 3, "retrieval/rows": 3, "zero_shot/rows": 3}, left_out=["not here: a"])

  def shown():
    page = (tmp_path / "report.html").read_text()
    return [line for line in [*lines, "not here: a"] if line.split("'")[0] in page]

  assert shown() == [*lines[:2], lines[3], "not here: a"]
  write(pets(0.5, 90), left_out=[lines[3]])
  assert shown() == [lines[3], "not here: a"]
  write({}, step=5)
  assert shown() == []


@pytest.mark.parametrize(
  ("below", "why"), [("file", "File exists"), ("file/x", "Not a directory")], ids=["file", "below"]
)
def test_a_place_that_cannot_be_a_folder_is_one_line(tmp_path, below, why):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError) as caught:
    results_lib.prepare(tmp_path / below, name="--out")
  line = f"--out={tmp_path / below} cannot take the results: {why}. Name a folder that can be"
  assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, monkeypatch):
  def write_bytes(path, data):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))

  monkeypatch.setattr(places, "write_bytes", write_bytes)
  with pytest.raises(ValueError, match=r"^--workdir=\S+ cannot take the results: Permission"):
    results_lib.prepare(tmp_path, name="--workdir")


def test_a_folder_that_is_made_ready_holds_nothing_more(tmp_path, write):
  results_lib.prepare(tmp_path / "a" / "b", name="--out")
  assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
  write({"a/b": 0.5})
  before = sorted(tmp_path.rglob("*"))
  results_lib.prepare(tmp_path, name="--out")
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
  ("name", "text", "words"),
  [
    ("results.json", '{"step": 4,', "is not JSON: Expecting property name"),
    ("results.json", "[1]", "holds a list, not an object of results. Restore or remove it."),
    ("results.json", '{"a/b": [1]}', ": a/b is [1], not a number. Restore or remove"),
    ("results.data", '{"data": ', "is not JSON: Expecting value: line 1 column 10"),
    ("results.data", '{"left_out": 5}', ": left_out is 5, not a list of texts. Restore it"),
    ("results.data", '{"figures": [1]}', ": figures is [1], not a list of texts."),
    ("results.data", '{"model": 5}', ": model is 5, not a text."),
    ("results.data", "\xe9", "is not UTF-8: byte 0xe9"),
  ],
)
def test_damaged_results_are_one_line_at_the_beginning_and_the_table_is_shown_at_the_end(
  tmp_path, capsys, write, name, text, words
):
  write({"a/b": 0.5})
  (tmp_path / name).write_bytes(text.encode("latin-1"))
  for act in (
    lambda: results_lib.prepare(tmp_path, name="--out"),
    lambda: results_lib.write(tmp_path, built.Outcome({"c/d": 0.25}), step=4),
  ):
    with pytest.raises(ValueError) as caught:
      act()
    assert f"{tmp_path / name}" in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)
  assert "25.0 %" in capsys.readouterr().out
  assert (tmp_path / name).read_bytes() == text.encode("latin-1")  # it stays for the user
