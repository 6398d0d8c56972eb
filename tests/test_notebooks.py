"""Each notebook from top to bottom on a tiny checkpoint and tiny scenes, in a kernel of its own."""

import json
import re

import nbclient
import nbformat
import pytest

from bench import kills

FOLDER = kills.ROOT / "notebooks"
NAMES = ("zero_shot", "grounding", "segmentation", "compare", "evaluate")
# What the outputs must hold: words of the text, and at least so many pictures.
SHOWN = {
  "zero_shot": ([" -> ", "box (ymin, xmin, ymax, xmax)"], 2),
  "grounding": (["somewhere else", "in the image"], 2),
  "segmentation": (["objects:", "lowest cosine"], 4),
  "compare": (["retrieval/image_to_text/r1", "zero_shot/top1", "B-A"], 2),
  "evaluate": (["zero_shot:food101", "recall@0.5", "report.html", "composition:sugarcrepe"], 2),
}


def read(name):
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_all_notebooks_are_here_and_stored_without_output():
  assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == sorted(NAMES)
  for name in NAMES:
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert "google" not in json.dumps(notebook.metadata) and "SOURCE" in code[0].source
    changed = [c for c in code if re.search(r"^CHECKPOINT =", c.source, re.M)]
    assert len(changed) == 1 and changed[0].source.startswith("# The one cell to change")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, finished_run, scenes_dir, monkeypatch):
  monkeypatch.setenv("GRAIN_JAX_CHECKPOINT", str(finished_run))
  monkeypatch.setenv("GRAIN_JAX_DATA", str(scenes_dir))
  monkeypatch.setenv("XLA_FLAGS", kills.XLA_FLAGS)
  monkeypatch.delenv("TF_USE_LEGACY_KERAS")  # a kernel is not one of our commands
  notebook = read(name)
  client = nbclient.NotebookClient(
    notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
  )
  client.execute()
  outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
  text = "".join(o.get("text", "") for o in outputs)
  pictures = [o for o in outputs if "image/png" in o.get("data", {})]
  words, least = SHOWN[name]
  assert [word for word in words if word not in text] == []
  assert len(pictures) >= least
