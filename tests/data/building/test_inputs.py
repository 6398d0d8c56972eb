"""A build repeated over the same --out: nothing is done, or one line says what has changed."""

import json
import os
import pathlib
import shutil
import signal

import pytest
import toy_data

from grain_jax.data import build, dataset
from grain_jax.data.building import inputs


@pytest.fixture(autouse=True)
def no_signals(monkeypatch):
  monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture(params=["folder", "published"])
def flags(request, tmp_path):
  """Flags of a build of three images, the third of which is not there."""
  root = tmp_path / "in"
  root.mkdir()
  for i in range(2):
    (root / f"{i}.jpg").write_bytes(toy_data.record(i)["image"])
  (root / "annotations.csv").write_text("image,caption\n0.jpg,a\n1.jpg,b\n2.jpg,c\n")
  if request.param == "folder":
    return ["--source=folder", f"--input={root}", "--allow_dropped=1"]
  (root / "boxes.json").write_text('{"0.jpg": []}')
  return [
    "--source=published", f"--images={root}", f"--captions={root / 'annotations.csv'}",
    f"--boxes={root / 'boxes.json'}", "--allow_dropped=1",
  ]  # fmt: skip


def rewrite(name, content):
  return lambda root: (root / name).write_bytes(content)


CHANGES = {
  "an image is another": (
    rewrite("0.jpg", toy_data.record(7)["image"] + b" " * 9), [], "images: bytes "),
  "an image is another of the same size": (
    lambda root: os.utime(root / "0.jpg", (1, 1)), [], "images: the time or name of some of 2 f"),
  "an image that was missing is there": (
    rewrite("2.jpg", toy_data.record(2)["image"]), [], "images: files 2 -> 3, missing 1 -> 0, b"),
  "an image is gone": (
    lambda root: (root / "1.jpg").unlink(), [], "images: files 2 -> 1, missing 1 -> 2, bytes"),
  "two images are exchanged": (
    lambda root: (shutil.move(root / "0.jpg", root / "x"), shutil.move(root / "1.jpg", root /
    "0.jpg"), shutil.move(root / "x", root / "1.jpg")), [], "images: the time or name of some of"),
  "a caption is another": (
    rewrite("annotations.csv", b"image,caption\n0.jpg,z\n1.jpg,b\n"), [], " bytes, had 38"),
  "the captions were written anew": (
    lambda root: os.utime(root / "annotations.csv", (1, 1)), [], "annotations.csv was written ane"),
  "a part goes to val": (lambda root: None, ["--val_fraction=0.5"], "val_fraction: 0.0 -> 0.5"),
  "other boxes are good enough": (lambda root: None, ["--tolerance=0.5"], "tolerance: 0.0"),
  "smaller pictures": (lambda root: None, ["--max_pixels=9999"], "max_pixels: not given -> 9999"),
  "shards of another size": (lambda root: None, ["--shard_size=1"], "shard_size: 16384 -> 1"),
  "a licence": (lambda root: None, ["--licence=CC0"], "licence: '' -> 'CC0'"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_said_in_one_line(flags, tmp_path, capsys, change):
  out = tmp_path / "out"
  assert build.main([*flags, f"--out={out}"]) == 0
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  assert build.main([*flags, f"--out={out}"]) == 0  # the same again: nothing is done
  assert "is already built with these settings" in capsys.readouterr().out
  act, more, words = CHANGES[change]
  act(tmp_path / "in")
  assert build.main([*flags, f"--out={out}", *more]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert words in line and line.endswith("or add --overwrite to replace it.")
  assert {path.name: path.read_bytes() for path in out.iterdir()} == before
  assert build.main([*flags, f"--out={out}", *more, "--overwrite"]) == 0
  assert build.main([*flags, f"--out={out}", *more]) == 0


def test_a_dataset_of_before_says_that_its_images_are_not_known(flags, tmp_path, capsys):
  out = tmp_path / "out"
  assert build.main([*flags, f"--out={out}"]) == 0
  manifest = json.loads((out / dataset.MANIFEST).read_text())
  del manifest["inputs"]
  (out / dataset.MANIFEST).write_text(json.dumps(manifest))
  assert build.main([*flags, f"--out={out}"]) == 0
  said = capsys.readouterr().out
  assert "does not say which images" in said and "is already built" in said


def test_the_sum_of_images_does_not_depend_on_their_order(tmp_path, monkeypatch):
  monkeypatch.setattr(inputs, "_CHUNK", 2)
  paths = [tmp_path / f"{i}.jpg" for i in range(40)] + [pathlib.Path("a\0b"), tmp_path / "\ud83d"]
  for path in paths[:30]:
    path.write_bytes(b"x" * len(path.name))
  found = inputs.images(paths)
  assert (
    found == inputs.images(paths[::-1]) and found["digest"] != inputs.images(paths[1:])["digest"]
  )
  assert (found["files"], found["missing"]) == (30, 12)
  assert found["bytes"] == 10 * len("0.jpg") + 20 * len("10.jpg")
