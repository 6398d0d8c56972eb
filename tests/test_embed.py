"""Embeddings in bulk: what is found, what is left out, what the file holds."""

import json
import os
import shutil
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from bench import kills
from grain_jax import embed, inference, trees
from grain_jax import encoders as encoders_lib
from grain_jax.convert import native, run_folder
from grain_jax.evals.inputs import files
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.models import grain, initial
from grain_jax.runtime import compile_cache


def draw(path, rng):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = rng.integers(0, 256, (int(rng.integers(20, 50)), 40, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path, rng):
  """Six images, one of which cannot be read, in two classes, among other files."""
  root = tmp_path / "pictures"
  for name in ("dog/2.png", "cat/b.JPG", "cat/a.webp", "dog/deep/1.bmp", "cat/c.jpeg"):
    draw(root / name, rng)
  (root / "cat" / "broken.jpg").write_bytes(b"no picture")
  (root / "dog" / "notes.txt").write_text("no picture either")
  draw(root / ".hidden" / "x.png", rng)
  draw(root / "dog" / ".x.png", rng)
  return root


PATHS = ["cat/a.webp", "cat/b.JPG", "cat/broken.jpg", "cat/c.jpeg", "dog/2.png", "dog/deep/1.bmp"]


def mean_color(images):
  values = images.reshape(len(images), -1, 3).mean(axis=1).astype(np.float32)
  return values / np.linalg.norm(values, axis=1, keepdims=True)


def fake(**changes):
  """Encoders in NumPy: the mean colour; two regions, one of which reaches over the edge."""
  boxes = np.array([[0.5, 0.25, 0.4, 0.2], [0.1, 0.5, 0.4, 1.0]], np.float32)

  def regions(images):
    whole = mean_color(images)
    return np.stack([whole, whole[:, ::-1]], 1), np.tile(boxes, (len(images), 1, 1))

  options = {"image": mean_color, "text": None, "regions": regions, "size": 8, "batch_size": 2}
  return Encoders(**options | changes)


def options(out, **changes):
  defaults = {
    "checkpoint": "", "step": None, "images": None, "texts": None, "out": str(out),
    "overwrite": False, "labels": "", "regions": False, "batch_size": None,
  }  # fmt: skip
  return types.SimpleNamespace(**defaults | changes)


def read(path):
  with np.load(path, allow_pickle=False) as arrays:
    found = dict(arrays)
  return found, json.loads(str(found.pop("metadata")))


def test_a_folder_is_its_pictures_by_path(folder):
  found = files.find(str(folder))
  assert found.paths == PATHS and found.labels is None
  assert found.files == [folder / path for path in PATHS]


def test_links_are_followed_but_not_in_circles(folder, tmp_path, rng):
  draw(tmp_path / "elsewhere" / "z.png", rng)
  (folder / "linked").symlink_to(tmp_path / "elsewhere")
  (folder / "dog" / "up").symlink_to(folder)
  (tmp_path / "elsewhere" / "round").symlink_to(folder / "cat")
  (folder / "cat" / "round").symlink_to(tmp_path / "elsewhere")
  names = files.find(str(folder)).paths
  assert "linked/z.png" in names and len(names) == len(set(names))
  assert sorted(p for p in names if p.endswith("z.png")) == ["cat/round/z.png", "linked/z.png"]


def test_classes_are_the_folders_of_the_first_level(folder, tmp_path, rng):
  found = files.find(str(folder), labels="folders")
  assert found.label_names == ["cat", "dog"]
  assert found.labels.dtype == np.int64 and found.labels.tolist() == [0, 0, 0, 0, 1, 1]
  draw(folder / "loose.png", rng)
  with pytest.raises(ValueError, match=r"1 pictures of .* lie in no class folder.* loose\.png"):
    files.find(str(folder), labels="folders")


@pytest.mark.parametrize(
  ("labels", "numbers", "names"),
  [
    (["pug", "ant", "pug"], [1, 0, 1], ["ant", "pug"]),
    (["10", "2", "2"], [10, 2, 2], None),
    (["010", f"{2**63 - 1}", "0" * 30], [10, 2**63 - 1, 0], None),
    (["10", f"{2**63}", "2"], [0, 2, 1], ["10", "2", f"{2**63}"]),  # no number of 64 bits: names
    (["1" * 20, "2", "2"], [0, 1, 1], ["1" * 20, "2"]),
  ],
)
def test_a_table_with_labels(folder, tmp_path, labels, numbers, names):
  rows = zip(PATHS, labels, strict=False)
  lines = "label,image\n" + "".join(f'{b},"{a}"\n' for a, b in rows)
  for text in (lines, lines.replace('"', "").replace(",", " , ")):
    (folder / "list.csv").write_text(text)
    found = files.find(str(folder / "list.csv"))
    assert found.paths == PATHS[:3] and found.files[0] == folder / PATHS[0]
    assert found.labels.tolist() == numbers and found.label_names == names


def test_lists_without_labels(folder):
  (folder / "list.csv").write_text("image,size\ndog/2.png,3\n")
  (folder / "list.txt").write_text("\ufeffdog/2.png\r\n\n  cat/a.webp \n")
  assert files.find(str(folder / "list.csv")).paths == ["dog/2.png"]
  found = files.find(str(folder / "list.txt"))
  assert found.paths == ["dog/2.png", "cat/a.webp"] and found.labels is None


@pytest.mark.parametrize(
  ("name", "content", "labels", "line"),
  [
    ("nowhere", None, "", "there is no such folder or file"),
    ("a.csv", "path,label\nx,1\n", "", "has the columns path, label: no column image"),
    ("a.csv", "image,label\nx,1\ny\n", "", "picture 'y' has the label None"),
    ("a.csv", "image,label\n", "", "names no picture"),
    ("a.csv", "", "", "has the columns : no column image"),
    ("a.txt", " \n", "", "names no picture"),
    ("a.txt", "x.png", "folders", "--labels=folders is for a folder of pictures"),
    ("a.png", "x", "", "is no folder, and no .txt"),
    ("a.txt", b"\xff\xfe\x00", "", "is not UTF-8"),
  ],
)
def test_inputs_that_are_none(tmp_path, name, content, labels, line):
  if content is not None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match=line) as caught:
    files.find(str(tmp_path / name), labels=labels)
  assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_folder(tmp_path):
  (tmp_path / "deep").mkdir()
  (tmp_path / "deep" / "a.dat").write_text("")
  with pytest.raises(ValueError, match=r"holds no picture \(\.jpg, .*, nor do its sub-folders"):
    files.find(str(tmp_path))


def test_what_cannot_be_read_is_left_out_of_every_array(folder):
  said = []
  inputs = files.find(str(folder), labels="folders")
  arrays, counts = embed.embed_images(fake(), inputs, regions=True, warn=said.append)
  kept = [0, 1, 3, 4, 5]
  assert counts == {"examples": 5, "rows": 6}
  assert arrays["paths"].tolist() == [PATHS[i] for i in kept]
  assert arrays["labels"].tolist() == [0, 0, 0, 1, 1]
  assert arrays["label_names"].tolist() == ["cat", "dog"]
  squashed = [Image.open(folder / PATHS[i]).convert("RGB") for i in kept]
  squashed = [np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)) for image in squashed]
  want = mean_color(np.stack(squashed))
  assert_allclose(arrays["embeddings"], want, atol=1e-6)
  assert_allclose(arrays["regions"], np.stack([want, want[:, ::-1]], 1), atol=1e-6)
  box = [[0.15, 0.3, 0.35, 0.7], [0.0, 0.0, 1.0, 0.3]]  # (ymin, xmin, ymax, xmax), cut at the edge
  assert_allclose(arrays["boxes"], [box] * 5, atol=1e-6)
  assert {arrays[name].dtype for name in ("embeddings", "regions", "boxes")} == {np.dtype("f4")}
  assert len(said) == 1 and "1 of 6 pictures cannot be read" in said[0] and "broken" in said[0]


def test_a_model_without_a_decoder_has_no_regions(folder):
  inputs = files.find(str(folder))
  with pytest.raises(ValueError, match="--regions needs region queries: this model has no decoder"):
    embed.embed_images(fake(has_regions=False), inputs, regions=True)
  assert set(embed.embed_images(fake(), inputs, warn=len)[0]) == {"embeddings", "paths"}


def test_diverged_embeddings_are_not_written(folder):
  broken = fake(image=lambda images: mean_color(images) * np.nan)
  with pytest.raises(ValueError, match="the image encoder: 5 of 5 embeddings are not finite"):
    embed.embed_images(broken, files.find(str(folder)), warn=len)


def test_output_is_whole_or_absent(tmp_path):
  out = tmp_path / "new" / "a.npz"
  with embed.output(str(out), overwrite=False) as write:
    assert not out.exists()
    write({"embeddings": np.ones((2, 3))}, {"a": 1})
  found, metadata = read(out)
  assert metadata == {"a": 1} and same(found["embeddings"], np.ones((2, 3)))
  with pytest.raises(ValueError, match=r"a\.npz exists already\. .*--overwrite"):
    embed.output(str(out), overwrite=False).__enter__()
  with pytest.raises(KeyError), embed.output(str(out), overwrite=True):
    raise KeyError("while encoding")
  assert same(read(out)[0]["embeddings"], np.ones((2, 3)))
  with embed.output(str(out), overwrite=True) as write:
    write({"embeddings": np.zeros(1)}, {})
  assert same(read(out)[0]["embeddings"], np.zeros(1))
  assert [p.name for p in out.parent.iterdir()] == ["a.npz"]


def same(a, b):
  return a.shape == b.shape and bool((a == b).all())


def test_places_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  for place, line in (
    (tmp_path, "is a folder. Name a file in it"),
    (tmp_path / "file" / "a.npz", "cannot be written"),
    (tmp_path / ("x" * 300 + ".npz"), "cannot be written"),
  ):
    with pytest.raises(ValueError, match=line) as caught:
      embed.output(str(place), overwrite=True).__enter__()
    assert "\n" not in str(caught.value)
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_known_before(tiny, tmp_path, monkeypatch):
  out = str(tmp_path / "a.npz")
  embed.check_space(out, tiny, ["a"] * 1000, regions=True)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
  with pytest.raises(ValueError, match=r"--out=.*a\.npz: 0\.0 GB are needed"):
    embed.check_space(out, tiny, ["a"] * 20, regions=False)


def test_flags_in_the_users_folder(model, folder, tmp_path, monkeypatch):
  _, _, run = model
  (tmp_path / "t.txt").write_text("a dog\n")
  monkeypatch.setenv("HOME", str(tmp_path))
  for flags in ({"images": f"~/{folder.name}"}, {"texts": "~/t.txt"}):
    embed._main(options("~/e/a.npz", checkpoint=f"~/{run.name}", overwrite=True, **flags))
    whole = {name: str(tmp_path / value[2:]) for name, value in flags.items()}
    embed._main(options(tmp_path / "b.npz", checkpoint=str(run), overwrite=True, **whole))
    found, want = read(tmp_path / "e" / "a.npz")[0], read(tmp_path / "b.npz")[0]
    assert found.keys() == want.keys()
    assert_array_equal(found["embeddings"], want["embeddings"])


def test_one_text_that_makes_the_array_too_wide_is_refused(tiny, tmp_path):
  texts = ["a caption"] * 499_999 + ["x" * 10**6]
  with pytest.raises(
    ValueError, match=r"number 500,000 of 500,000 inputs is 1,000,000 char.* 2000"
  ):
    embed.check_space(str(tmp_path / "a.npz"), tiny, texts, regions=False)


@pytest.fixture
def model(tiny, tmp_path, rng):
  """(config, parameters, folder) of a GRAIN of one layer a tower."""
  tiny.model.image.depth = tiny.model.text.depth = tiny.model.decoder.depth = 1
  params = trees.map_with_name(
    lambda name, leaf: np.asarray(0.2 * rng.normal(size=leaf.shape), np.float32),
    jax.eval_shape(lambda: initial.init_params(grain.build(tiny), tiny)),
  )
  run_folder.write(tmp_path / "run", config=tiny, params=params, source={})
  return tiny, params, tmp_path / "run"


def test_the_file_holds_what_the_model_says_of_pictures_one_by_one(
  model, folder, tmp_path, capsys, monkeypatch
):
  config, params, run = model
  asked = []
  monkeypatch.setattr(compile_cache, "use", lambda: asked.append(True))
  out = tmp_path / "out.npz"
  flags = {"images": str(folder), "regions": True, "labels": "folders", "batch_size": 3}
  embed._main(options(out, checkpoint=str(run), **flags))
  said = capsys.readouterr().out
  assert asked  # that compiled programs be kept
  assert "warning: embed: 1 of 6 pictures cannot be read" in said
  assert f"{out}: 5 of 6 images, 16 numbers each" in said
  found, metadata = read(out)
  assert set(found) == {"embeddings", "paths", "labels", "label_names", "regions", "boxes"}
  alone = inference.Model(config, params)  # on one device
  files = [folder / path for path in found["paths"]]
  assert_allclose(found["embeddings"], [alone.encode_image(f)[0] for f in files], atol=1e-5)
  for i, file in enumerate(files):
    boxes, scores = alone.describe_regions(file, "a red apple")
    similarity = found["regions"][i] @ alone.encode_text("a red apple")[0]
    assert_allclose(similarity.max(), scores[0], atol=1e-5)
    assert_allclose(found["boxes"][i, similarity.argmax()], boxes[0], atol=1e-5)
  assert metadata == {
    "kind": "images", "source": str(folder), "checkpoint": str(run), "step": 0, "examples": 5,
    "rows": 6, "resize": "squash", "size": 32,
    "fingerprint": encoders_lib.model_fingerprint(config, params),
  }  # fmt: skip

  # The same from an export, and texts of the same model.
  native.save(tmp_path / "export", config=config, params=params, step=0)
  embed._main(options(tmp_path / "2.npz", checkpoint=str(tmp_path / "export"), images=str(folder)))
  again, facts = read(tmp_path / "2.npz")
  assert_allclose(again["embeddings"], found["embeddings"], atol=1e-6)
  assert facts["fingerprint"] == metadata["fingerprint"] and facts["step"] is None
  texts = tmp_path / "texts.txt"
  texts.write_text("a red apple\n\n  two dogs\na red apple\n")
  embed._main(options(tmp_path / "3.npz", checkpoint=str(run), texts=str(texts)))
  found, facts = read(tmp_path / "3.npz")
  assert found["texts"].tolist() == ["a red apple", "two dogs", "a red apple"]
  assert_allclose(found["embeddings"], alone.encode_text(found["texts"].tolist()), atol=1e-5)
  assert_array_equal(found["embeddings"][0], found["embeddings"][2])
  assert facts["kind"] == "texts" and facts["fingerprint"] == metadata["fingerprint"]


def test_a_fingerprint_is_of_the_whole_model(model):
  config, params, _ = model
  before = encoders_lib.model_fingerprint(config, params)
  changed = jax.tree.map(np.copy, params)
  changed["image_tower"]["class_token"].flat[0] += 1e-6
  assert encoders_lib.model_fingerprint(config, changed) != before
  config.model.image.mean = (0.5, 0.5, 0.5)
  assert encoders_lib.model_fingerprint(config, params) != before


@pytest.mark.parametrize(
  ("flags", "line"),
  [
    ({}, "give either --images=DIR or --texts=FILE.txt"),
    ({"images": "a", "texts": "b"}, "give either --images=DIR or --texts=FILE.txt"),
    ({"texts": "b", "regions": True}, "--regions and --labels are for --images"),
    ({"texts": "b"}, "--texts=b: No such file"),
    ({"texts": "empty.txt"}, "--texts=empty.txt holds no text"),
    ({"texts": "one.txt"}, "holds no model: there is no config.json"),
    ({"texts": "one.txt", "out": "one.txt"}, "--out=one.txt exists already"),
  ],
)
def test_wrong_flags_are_one_line(tmp_path, monkeypatch, flags, line):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty.txt").write_text("\n")
  (tmp_path / "one.txt").write_text("a\n")
  flags = {"out": "a.npz", "checkpoint": str(tmp_path), **flags}
  with pytest.raises(ValueError, match=line) as caught:
    embed._main(options(**flags))
  assert "\n" not in str(caught.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "one.txt"]


def command(*flags):
  return subprocess.Popen(
    [sys.executable, "-m", "grain_jax.embed", *flags],
    cwd=kills.ROOT, env={**os.environ, "XLA_FLAGS": kills.XLA_FLAGS}, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


@pytest.mark.slow
def test_two_processes_write_what_one_does(model, folder, tmp_path):
  config, params, run = model
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}"
  flags = (f"--checkpoint={run}", "--regions", "--batch_size=3")
  # Of the four images a batch the first two are the first process's. Each has only its own.
  partial = [shutil.copytree(folder, tmp_path / f"partial{i}") for i in range(2)]
  for row, path in enumerate(PATHS):
    (partial[row % 4 < 2] / path).write_bytes(b"another's")
  pair = [
    command(
      *flags, f"--images={partial[i]}", address, "--num_processes=2", f"--process_id={i}",
      f"--out={tmp_path / str(i)}.npz",
    )
    for i in range(2)
  ]  # fmt: skip
  said = [process.communicate(timeout=300) for process in pair]
  assert [process.returncode for process in pair] == [0, 0], said
  assert "5 of 6 images" in said[0][0] and "1 of 6 pictures" in said[0][0]
  assert "images" not in said[1][0] and "pictures" not in said[1][0]
  assert not (tmp_path / "1.npz").exists()
  found, _ = read(tmp_path / "0.npz")
  encoders, mesh = embed.open_encoders(config, params, batch_size=8)
  with jax.set_mesh(mesh):
    want, _ = embed.embed_images(encoders, files.find(str(folder)), regions=True, warn=len)
  assert_array_equal(found["paths"], want["paths"])
  for name in ("embeddings", "regions", "boxes"):
    assert_allclose(found[name], want[name], atol=1e-5)


def test_the_command_ends_in_one_line(tmp_path):
  (tmp_path / "t.txt").write_text("a")
  flags = (f"--texts={tmp_path / 't.txt'}", f"--out={tmp_path / 'a.npz'}")
  process = command("--checkpoint=/nowhere", *flags)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 1 and out == ""
  assert err.startswith("ValueError: /nowhere holds no model") and err.count("\n") == 1
