"""Addresses on the net where a path belongs: refused at once, in one line, in all places."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

import grain_jax
from bench import kills
from grain_jax import config as configs
from grain_jax import embed, export, places
from grain_jax.convert import convert, weights
from grain_jax.data import build, dataset
from grain_jax.data.sources import folder as folder_source
from grain_jax.data.sources import published as published_source
from grain_jax.evals import linear_probe, zero_shot
from grain_jax.evals.inputs import files, options
from grain_jax.training import loop

BUCKET = "gs://bucket/folder"


@pytest.mark.parametrize(
  "path",
  [
    BUCKET, "s3://b/x", "http://host/x", "https://host/x", "GS://B/X", "hdfs://h/x", "az://c/x",
    pathlib.Path(BUCKET), pathlib.Path("s3://b/x"),
  ],
)  # fmt: skip
def test_an_address_is_refused(path):
  with pytest.raises(ValueError, match=r"^--out=\S+ is an address \(\w+://\).* mount it") as caught:
    places.check(path, "--out")
  assert "\n" not in str(caught.value)


def test_a_file_url_names_its_path():
  with pytest.raises(ValueError, match=r"^config\.x = file:///a/b is .*the path alone: /a/b\.$"):
    places.check("file:///a/b", "config.x")
  with pytest.raises(ValueError, match=r"the path alone: /a/b\.$"):
    places.check(pathlib.Path("file:///a/b"), "config.x")


@pytest.mark.parametrize(
  "path",
  [
    "", "runs/x", "/a:b/c", "a:b/c", "./gs://b", "C:/x", "C:\\x", "~/x", "10.0.0.1:55527",
    "configs/cc12m.py:runlocal", "zero_shot:food101", pathlib.Path("/gs:/b"), b"/x",
  ],
)  # fmt: skip
def test_a_path_is_none(path):
  places.check(path, "--out")


def listed(folder):
  (folder / "list.txt").write_text(f"a.jpg\n{BUCKET}.jpg\n")
  return str(folder / "list.txt")


@pytest.mark.parametrize(
  ("name", "call"),
  [
    ("path", lambda c, d: grain_jax.load(BUCKET)),
    ("path", lambda c, d: weights.open_checkpoint(BUCKET)),
    ("--workdir", lambda c, d: weights.load_run(BUCKET)),
    ("--workdir", lambda c, d: loop.train(c, BUCKET)),
    ("data directory", lambda c, d: dataset.open_dataset(BUCKET)),
    ("--workdir", lambda c, d: export.export(BUCKET, format="hf_clip", out=str(d / "x"))),
    ("--out", lambda c, d: export.export(str(d), format="hf_clip", out=BUCKET)),
    ("--input", lambda c, d: convert.convert("hf_clip", BUCKET, out=str(d / "x"))),
    ("--out", lambda c, d: convert.convert("hf_clip", str(d), out=BUCKET)),
    ("--out", lambda c, d: build.build(None, BUCKET)),
    ("--input", lambda c, d: folder_source.source(BUCKET)),
    ("--annotations", lambda c, d: folder_source.source(str(d), annotations=BUCKET)),
    ("--images", lambda c, d: published_source.source(BUCKET, captions="x")),
    ("--images", lambda c, d: files.find(BUCKET)),
    ("--images=", lambda c, d: files.find(listed(d))),
    ("--out", lambda c, d: embed.output(BUCKET, overwrite=False).__enter__()),
    ("--datasets", lambda c, d: options.Options(root=pathlib.Path(BUCKET))),
    ("--tfds_dir", lambda c, d: options.Options(tfds_dir=BUCKET)),
    ("--descriptors", lambda c, d: options.Options(descriptors=pathlib.Path(BUCKET))),
    ("descriptors", lambda c, d: zero_shot.read_descriptors(BUCKET)),
    ("--train", lambda c, d: linear_probe.load(BUCKET, "--train")),
    ("--config", lambda c, d: configs.load(f"{BUCKET}.py:runlocal")),
  ],
)
def test_functions_refuse_it_and_leave_nothing(tiny, tmp_path, monkeypatch, name, call):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"is an address \(gs://\)") as caught:
    call(tiny, tmp_path)
  assert str(caught.value).startswith(name) and "\n" not in str(caught.value)
  assert not (tmp_path / "gs:").exists()


def test_so_do_the_keys_of_a_configuration(tiny):
  keys = [key for key, value in configs.flatten(tiny) if isinstance(value, str)]
  paths = ("data.dir", "init.image", "init.text", "compile_cache", "zero_shot.descriptors")
  assert set(paths) <= set(keys)
  for key in paths:
    before = dict(configs.flatten(tiny))[key]
    configs.set_key(tiny, key, BUCKET)
    with pytest.raises(ValueError, match=rf"^config\.{key} = {BUCKET} is an address"):
      configs.check(tiny)
    configs.set_key(tiny, key, before)
  configs.check(tiny)


def test_a_picture_at_an_address(monkeypatch):
  from grain_jax.evals.inputs import given_images

  with pytest.raises(ValueError, match=r"^images\[1\] = https://host/a\.jpg is an address"):
    given_images.to_pil("https://host/a.jpg", 1)
  assert given_images.to_pil(np.zeros((2, 2, 3), np.uint8), 0).size == (2, 2)


QUICKSTART = "--config=configs/quickstart.py"
SLOW = pytest.mark.slow  # they load JAX before their flags


@pytest.mark.parametrize(
  ("module", "flags"),
  [
    ("main", (QUICKSTART, f"--workdir={BUCKET}")),
    ("main", (QUICKSTART, "--workdir=x", f"--config.compile_cache={BUCKET}")),
    ("convert", ("--from=hf_clip", f"--input={BUCKET}", "--out=x")),
    ("data.build", ("--source=published", "--images=x", "--captions=x", "--boxes", "x", BUCKET)),
    ("plan", (QUICKSTART, "--topology=v5e:4x4", f"--config.data.dir={BUCKET}")),
    ("evals.linear_probe", (f"--train={BUCKET}", "--test=x")),
    pytest.param("evaluate", ("--workdir=x", f"--datasets={BUCKET}"), marks=SLOW),
    pytest.param("embed", ("--checkpoint=x", f"--texts={BUCKET}", "--out=x"), marks=SLOW),
    pytest.param("export", ("--workdir=x", "--format=hf_clip", f"--out={BUCKET}"), marks=SLOW),
  ],
)
def test_commands_end_with_one_line(module, flags):
  more = ("--out=x",) if module == "data.build" else ()
  command = [sys.executable, "-m", f"grain_jax.{module}", *flags, *more]
  done = subprocess.run(command, cwd=kills.ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  assert f"{BUCKET} is an address (gs://)" in done.stderr
