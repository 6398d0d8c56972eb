"""Annotation files that are not what they should be: what the build says of them."""

import json

import pytest
import toy_data

from grain_jax.data import build


@pytest.fixture
def root(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  for i in range(4):
    (folder / f"{i}.jpg").write_bytes(toy_data.record(i)["image"])
  return folder


def lines(*captions):
  told = [{"image": f"{i}.jpg", "captions": [text]} for i, text in enumerate(captions)]
  return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in told)


def run(root, capsys, *flags):
  code = build.main(
    ["--source=folder", f"--input={root}", f"--out={root.parent / 'out'}", "--workers=0", *flags]
  )
  told = capsys.readouterr()
  return code, told.out, told.err


def test_lines_of_another_encoding_are_told_as_such(root, capsys):
  (root / "annotations.jsonl").write_bytes(
    lines("a", "ein Hund f\u00fcr", "b", "\u00fc").encode("latin1")
  )
  code, said, errors = run(root, capsys, "--allow_dropped=0.5")
  hint = "a line is not UTF-8: save the file as UTF-8, 2 times (first: line 2)"
  assert code == 0 and not errors and f"hint: {hint}" in said
  (root / "annotations.jsonl").write_bytes(lines(*["\u00fc"] * 4).encode("latin1"))
  code, _, errors = run(root, capsys, "--overwrite")
  assert code == 2 and "a line is not UTF-8: save" in errors and "paths" not in errors


def test_a_line_that_is_no_json_is_found_by_its_number(root, capsys):
  (root / "annotations.jsonl").write_text(lines("a", "b", "c") + "{'image': '3.jpg'}\n[1]\n")
  _, said, _ = run(root, capsys, "--allow_dropped=0.5")
  assert "hint: a line is not JSON, 1 times (first: line 4)" in said
  assert "hint: a line is no JSON object, 1 times (first: line 5)" in said


def test_a_file_without_a_line_and_a_file_as_a_folder(root, capsys):
  file = root / "annotations.jsonl"
  file.touch()
  code, _, errors = run(root, capsys)
  assert code == 2 and "no usable record: it is empty, or its paths are wrong." in errors
  code = build.main(["--source=folder", f"--input={file}", f"--out={root.parent / 'out'}"])
  assert code == 2 and f"{file} is a file, not a folder: give its folder" in capsys.readouterr().err
