"""Every reader of files: lost storage is tried again and said, and not taken for a bad file."""

import errno
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from grain_jax import embed, failures
from grain_jax.data import build, records, token_ids
from grain_jax.evals import zero_shot
from grain_jax.evals.inputs import annotations, files, given_images
from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.sets import grounding, segmentation

READS = ("read_bytes", "read_text", "open")  # of pathlib.Path
METHODS = {name: getattr(pathlib.Path, name) for name in READS}


def _check(path):
  return records.check({"key": "k", "image": path, "captions": ["a picture"]})


READERS = {
  "pictures": images_lib.open_image,
  "load": lambda path: given_images.to_pil(path, 0),
  "json": lambda path: annotations.read_json(path.with_suffix(".json")),
  "json lines": lambda path: list(annotations.read_json_lines(path.with_suffix(".json"))),
  "lines of one's own": lambda path: grounding.read_lines(path.with_suffix(".jsonl")),
  "csv": lambda path: files.find(str(path.with_suffix(".csv"))),
  "descriptors": lambda path: zero_shot.read_descriptors(path.with_suffix(".json")),
  "embed": lambda path: files.read_lines(path.with_suffix(".json"), "--texts"),
  "build": _check,
  "mask": lambda path: segmentation.read_png(path, (4, 6)),
  "sizes": lambda path: segmentation.check_files([segmentation.Item(path, path)], "x", "mask"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(failures, "RETRY_DELAYS", (0.0, 0.0))


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "a.png"
  Image.fromarray(np.zeros((4, 6), np.uint8)).save(path)
  path.with_suffix(".json").write_text('{"a": ["b"]}\n')
  path.with_suffix(".jsonl").write_text('{"image": "a.png"}\n')
  path.with_suffix(".csv").write_text("image\na.png\n")
  return path


@pytest.fixture
def broken(monkeypatch):
  """`broken(number, times)`: reads of files fail so often, with that errno."""

  def set_up(number, times, reads=READS):
    left = [times]

    def failing(read):
      def try_to_read(path, *arguments, **options):
        left[0] -= 1
        if left[0] >= 0:
          raise OSError(number, os.strerror(number), str(path))
        return read(path, *arguments, **options)

      return try_to_read

    for name in reads:
      monkeypatch.setattr(pathlib.Path, name, failing(METHODS[name]))

  return set_up


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
@pytest.mark.parametrize("reader", READERS)
def test_lost_storage_is_said_and_not_taken_for_a_bad_file(file, broken, reader, number):
  broken(number, times=10**6)
  with pytest.raises(failures.TransientError) as error:
    READERS[reader](file)
  line = str(error.value)
  assert "\n" not in line and os.strerror(number) in line and str(file.parent) in line


@pytest.mark.parametrize("reader", READERS)
def test_storage_that_comes_back_costs_nothing(file, broken, reader):
  READERS[reader](file)
  broken(errno.ESTALE, times=2)
  READERS[reader](file)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
def test_a_picture_that_is_not_there_or_not_ours_is_left_out_and_counted(file, broken, number):
  broken(number, times=1)
  unreadable = images_lib.Unreadable()
  (batch,) = images_lib.batches(
    [file, file], size=8, resize="squash", batch_size=4, unreadable=unreadable, threads=1
  )
  assert batch.index.tolist() == [1] and os.strerror(number) in unreadable.reasons[0]
  broken(number, times=1)
  assert _check(file).dropped == [("records", records.MISSING_IMAGE)]


def test_embeddings_are_not_written_for_the_pictures_that_storage_still_gives(file, broken):
  encoders = Encoders(
    image=lambda x: np.ones((len(x), 1), np.float32),
    text=lambda texts: np.ones((len(texts), 1), np.float32),
    regions=lambda x: x,
    size=4,
    batch_size=2,
  )
  inputs, lines = files.Inputs([file] * 6, ["a"] * 6), []
  embed.embed_images(encoders, inputs, regions=False, warn=lines.append)
  broken(errno.EIO, times=10**6)
  with pytest.raises(failures.TransientError):
    embed.embed_images(encoders, inputs, regions=False, warn=lines.append)
  assert lines == []


@pytest.mark.parametrize("number, code", [(errno.EIO, 75), (errno.ESTALE, 75), (errno.ENOENT, 2)])
@pytest.mark.parametrize("what", ["read_bytes", "open"])  # of images, of the annotations
def test_a_build_says_whether_to_try_again(tmp_path, broken, capsys, number, code, what):
  Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "a.png")
  (tmp_path / "annotations.jsonl").write_text('{"image": "a.png", "captions": ["a picture"]}\n')
  token_ids.make_writer(folder="", context=token_ids.CONTEXT)  # the program's own files are whole
  broken(number, times=10**6, reads=(what,))
  out = tmp_path / "out"
  flags = ["--source=folder", f"--input={tmp_path}", f"--out={out}"]
  assert build.main([*flags, f"--annotations={tmp_path / 'annotations.jsonl'}"]) == code
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and not out.exists()
  # What storage has failed goes on; what is wrong is begun anew.
  assert (tmp_path / "out.part").exists() == (code == 75 and what == "read_bytes")
