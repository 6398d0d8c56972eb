"""describe, ground, negatives, report, build, train: the commands of docs/annotating.md."""

import os
import pathlib
import shlex
import subprocess
import sys

import chat_server
import pytest
import tiny_detectors
import tiny_language
import toy_data

from grain_jax.data import dataset

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = [
  line
  for line in (ROOT / "docs" / "annotating.md").read_text().splitlines()
  if line.startswith("python -m grain_jax.")
]
SCENES = "--source=scenes --train=24 --val=4 --objects_per_class=1 --concepts=16"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  root = tmp_path_factory.mktemp("chain")
  tiny_detectors.owlv2(root / "owlv2")
  tiny_language.make_tagger(root / "tagger")
  tiny_language.make_masked(root / "distilroberta")
  (root / "pets").mkdir()
  with (root / "pets" / "annotations.jsonl").open("w") as lines:
    for i in range(40):  # no captions: describe writes them
      (root / "pets" / f"{i}.jpg").write_bytes(toy_data.record(i)["image"])
      lines.write(f'{{"image": "{i}.jpg"}}\n')
  return root


def words(command, url, source):
  """The command as it is printed, with small models' bounds and the test's server."""
  command = command.replace("http://localhost:8000/v1", url)
  command = command.replace("--source=folder --input=pets", source)
  if "scenes" in source:  # they have a validation split of their own
    command = command.replace("--val_fraction=0.1", "")
  command = command.replace("--config=mine", "--config=mine:runlocal")
  more = {
    "describe": "--ray_address=none --backoff=0.01",
    "ground": "--ray_address=none --threshold=0",
    "negatives": "--ray_address=none --spacy=tagger --min_probability=0 --max_similarity=1",
    "grain_jax.data.build": "--workers=0",
    "grain_jax.main": "--config.steps=2 --config.log_every=1 --config.optimizer.warmup_steps=1",
  }
  split = shlex.split(command)
  name = split[3] if split[2] == "grain_jax.annotate" else split[2]
  return [*split, *shlex.split(more.get(name, ""))]


@pytest.mark.slow
@pytest.mark.parametrize(
  "source",
  ("--source=folder --input=pets", pytest.param(SCENES, marks=pytest.mark.long)),
  ids=("folder", "scenes"),
)
def test_from_pictures_to_a_run(place, tmp_path, source):
  assert len(COMMANDS) == 6
  for name in ("owlv2", "tagger", "distilroberta", "pets"):
    (tmp_path / name).symlink_to(place / name)
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
  environment.pop("XLA_FLAGS", None)  # one device, as most have
  with chat_server.serve(chat_server.sensible) as server:
    # What a run reads of such shards is the same: one of the two trains.
    for command in COMMANDS[:-1] if "scenes" in source else COMMANDS:
      split = words(command, server.url, source)
      done = subprocess.run(
        [sys.executable, *split[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
      )
      assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
  opened = dataset.open_dataset(tmp_path / "data" / "pets")
  records = [opened.parse("train", i) for i in range(opened.num_records("train"))]
  assert len(records) == (24 if "scenes" in source else 40 - opened.num_records("val"))
  caption = b"A brown dog sleeps on a green sofa."
  assert all(caption in record.captions for record in records)
  assert any(b"a brown dog" in record.descriptions for record in records)
  assert all(record.negatives for record in records)
  assert any(any(texts) for record in records for texts in record.region_negatives)
  page = (tmp_path / "report.html").read_text()
  assert "a brown dog" in page and "<svg" in page
  assert "scenes" in source or (tmp_path / "runs" / "pets" / "metrics.jsonl").is_file()
