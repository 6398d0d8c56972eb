"""Which results may stand together in a folder, and what becomes of the others."""

import json

import numpy as np
import pytest

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
