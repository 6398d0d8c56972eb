"""Addresses on the net: gs:// where a bucket serves; all else is refused at once, in one line."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import grain_jax
from bench import kills
from grain_jax import config as configs
from grain_jax import embed, export, local_files, places
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


def test_what_a_killed_process_left_goes_with_the_next_and_a_live_one_s_stays(tmp_path):
  """Copies of weights, which would fill the disk start by start."""
  (tmp_path / "grain_jax-data").mkdir()  # a user's
  program = (
    "import os, sys\nfrom grain_jax import local_files\n"
    "print(local_files.temporary_folder(), flush=True)\n"
    "sys.stdin.read() if sys.argv[1] == 'live' else os._exit(9)"
  )

  def start(how):
    process = subprocess.Popen(
      [sys.executable, "-c", program, how], env={**os.environ, "TMPDIR": str(tmp_path)},
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, pathlib.Path(process.stdout.readline().strip())

  live, living = start("live")
  killed, left = start("killed")
  assert killed.wait() == 9 and left.is_dir()
  killed, again = start("killed")
  killed.wait()
  assert living.is_dir() and not left.parent.exists() and again.is_dir()
  live.communicate()
  assert live.returncode == 0 and not living.parent.exists()
  assert (tmp_path / "grain_jax-data").is_dir()


def test_a_folder_that_another_process_took_for_a_left_one_is_not_used(tmp_path, monkeypatch):
  monkeypatch.setattr(local_files.tempfile, "tempdir", str(tmp_path))
  lock, taken = local_files._lock, []

  def once_taken(folder):
    if taken:
      return lock(folder)
    taken.append(folder)
    return None  # the other has it, and has not removed it yet

  monkeypatch.setattr(local_files, "_lock", once_taken)
  folder = local_files._scratch.__wrapped__()
  assert folder.is_dir() and folder != taken[0] and not taken[0].exists()
  monkeypatch.setattr(local_files, "_lock", lambda folder: None)
  assert local_files._scratch.__wrapped__().is_dir()  # without locks


def test_the_user_s_folder_is_meant_by_a_tilde(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  named = places.open_place("~/runs/x", "--workdir"), places.at("~"), places.at("a/~/b")
  assert [*map(str, named)] == ["/home/me/runs/x", "/home/me", "a/~/b"]


@pytest.mark.parametrize(
  "read",
  [
    local_files.fetch,
    lambda path: files.find(path).files,
    lambda path: files.find(f"{path}/list.txt").files,
    lambda path: files.find(path, labels="folders").labels.tolist(),
    lambda path: zero_shot.read_descriptors(f"{path}/d.json"),
    lambda path: folder_source.source(path).settings["input"],
  ],
)
def test_functions_take_a_tilde_for_the_users_folder(tmp_path, monkeypatch, read):
  (tmp_path / "in" / "a").mkdir(parents=True)
  (tmp_path / "in" / "a" / "b.jpg").touch()
  (tmp_path / "in" / "list.txt").write_text("a/b.jpg\n")
  (tmp_path / "in" / "annotations.jsonl").write_text('{"image": "a/b.jpg", "caption": "c"}\n')
  (tmp_path / "in" / "d.json").write_text('{"hen": ["two legs"]}')
  monkeypatch.setenv("HOME", str(tmp_path))
  assert read("~/in") == read(str(tmp_path / "in"))


def test_files_of_a_folder_are_found_through_links_each_once(tmp_path):
  root, disk = tmp_path / "root", tmp_path / "disk"
  for name in ("root/a/0", "root/z/1", "disk/b/2", "disk/b/c/3"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  (root / "a" / "disk").symlink_to(disk)
  (root / "again").symlink_to(root / "z")  # its files have their own names
  (disk / "b" / "circle").symlink_to(root)
  (disk / "up").symlink_to(tmp_path)
  (root / "4").symlink_to(root / "z" / "1")
  (root / "gone").symlink_to(tmp_path / "nothing")
  found = [str(path.relative_to(root)) for path in places.files_below(root)]
  assert found == ["4", "gone", "a/0", "z/1", "a/disk/b/2", "a/disk/b/c/3"]
  with pytest.raises(FileNotFoundError):
    list(places.files_below(root / "nothing"))


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


ELSEWHERE = "s3://bucket/folder"


@pytest.mark.parametrize(
  ("address", "name", "call"),
  [
    (ELSEWHERE, "path", lambda c, d, a: grain_jax.load(a)),
    (ELSEWHERE, "path", lambda c, d, a: weights.open_checkpoint(a)),
    (ELSEWHERE, "--workdir", lambda c, d, a: weights.load_run(a)),
    (ELSEWHERE, "--workdir", lambda c, d, a: loop.train(c, a)),
    (ELSEWHERE, "data directory", lambda c, d, a: dataset.open_dataset(a)),
    (ELSEWHERE, "--workdir", lambda c, d, a: export.export(a, format="hf_clip", out=str(d / "x"))),
    (ELSEWHERE, "--out", lambda c, d, a: export.export(str(d), format="hf_clip", out=a)),
    (ELSEWHERE, "--input", lambda c, d, a: convert.convert("hf_clip", a, out=str(d / "x"))),
    (ELSEWHERE, "--out", lambda c, d, a: convert.convert("hf_clip", str(d), out=a)),
    (ELSEWHERE, "--out", lambda c, d, a: build.build(None, a)),
    (ELSEWHERE, "--out", lambda c, d, a: embed.output(a, overwrite=False).__enter__()),
    (BUCKET, "--input", lambda c, d, a: folder_source.source(a)),
    (BUCKET, "--annotations", lambda c, d, a: folder_source.source(str(d), annotations=a)),
    (BUCKET, "--images", lambda c, d, a: published_source.source(a, captions="x")),
    (BUCKET, "--images", lambda c, d, a: files.find(a)),
    (BUCKET, "--images=", lambda c, d, a: files.find(listed(d))),
    (BUCKET, "--datasets", lambda c, d, a: options.Options(root=pathlib.Path(a))),
    (BUCKET, "--tfds_dir", lambda c, d, a: options.Options(tfds_dir=a)),
    (BUCKET, "--descriptors", lambda c, d, a: options.Options(descriptors=pathlib.Path(a))),
    (BUCKET, "descriptors", lambda c, d, a: zero_shot.read_descriptors(a)),
    (BUCKET, "--train", lambda c, d, a: linear_probe.load(a, "--train")),
    (BUCKET, "--config", lambda c, d, a: configs.load(f"{a}.py:runlocal")),
  ],
)
def test_functions_refuse_it_and_leave_nothing(tiny, tmp_path, monkeypatch, address, name, call):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"is an address \((gs|s3)://\)") as caught:
    call(tiny, tmp_path, address)
  assert str(caught.value).startswith(name) and "\n" not in str(caught.value)
  assert ("gs://BUCKET/FOLDER is taken" in str(caught.value)) == (address == ELSEWHERE)
  assert not any((tmp_path / name).exists() for name in ("gs:", "s3:"))


def test_without_the_client_of_buckets_a_line_says_what_to_install(monkeypatch):
  monkeypatch.setattr(places, "_has_storage_client", lambda: False)
  with pytest.raises(ValueError, match=r"^--workdir=gs://b-1/x: .*requirements-gcs\.txt") as caught:
    places.open_place("gs://b-1/x", "--workdir")
  assert "\n" not in str(caught.value)
  places.check("s-3/x", "--workdir", bucket=True)


@pytest.mark.parametrize("path", ["gs://", "gs:///x", "gs://B/x", "gs://b/x", "gs:/b"])
def test_what_names_no_bucket_is_told_so(monkeypatch, path):
  monkeypatch.setattr(places, "_has_storage_client", lambda: True)
  with pytest.raises(ValueError, match=r"is no place in a bucket\. Write gs://BUCKET/FOLDER"):
    places.check(path, "--out", bucket=True)


def test_so_do_the_keys_of_a_configuration(tiny):
  keys = [key for key, value in configs.flatten(tiny) if isinstance(value, str)]
  local = ("compile_cache", "zero_shot.descriptors")
  anywhere = ("data.dir", "init.image", "init.text", "init.model", "model.text.tokenizer")
  assert set(local + anywhere) <= set(keys)
  for key, address in [*((k, BUCKET) for k in local), *((k, ELSEWHERE) for k in anywhere)]:
    before = dict(configs.flatten(tiny))[key]
    configs.set_key(tiny, key, address)
    with pytest.raises(ValueError, match=rf"^config\.{key} = {address} is an address"):
      configs.check(tiny)
    configs.set_key(tiny, key, before)
  tiny.data.sources = ({"dir": "data/a"}, {"dir": ELSEWHERE})
  with pytest.raises(ValueError, match=r"^config\.data\.sources\[1\]\.dir = s3://"):
    configs.check(tiny)
  tiny.data.sources = ()
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
    ("main", (QUICKSTART, f"--workdir={ELSEWHERE}")),
    ("main", (QUICKSTART, "--workdir=x", f"--config.compile_cache={BUCKET}")),
    ("convert", ("--from=hf_clip", f"--input={ELSEWHERE}", "--out=x")),
    ("data.build", ("--source=published", "--images=x", "--captions=x", "--boxes", "x", BUCKET)),
    ("plan", (QUICKSTART, "--topology=v5e:4x4", f"--config.data.dir={ELSEWHERE}")),
    ("evals.linear_probe", (f"--train={BUCKET}", "--test=x")),
    pytest.param("evaluate", ("--workdir=x", f"--datasets={BUCKET}"), marks=SLOW),
    pytest.param("embed", ("--checkpoint=x", f"--texts={BUCKET}", "--out=x"), marks=SLOW),
    pytest.param("export", ("--workdir=x", "--format=hf_clip", f"--out={ELSEWHERE}"), marks=SLOW),
  ],
)
def test_commands_end_with_one_line(module, flags):
  more = ("--out=x",) if module == "data.build" else ()
  command = [sys.executable, "-m", f"grain_jax.{module}", *flags, *more]
  done = subprocess.run(command, cwd=kills.ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  assert re.search(r"(gs|s3)://bucket/folder is an address \(\1://\)", done.stderr)
