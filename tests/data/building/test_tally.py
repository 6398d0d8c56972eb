"""How much of a build may be dropped, and the table of it."""

import pathlib
import signal

import hypothesis
import pytest
import toy_data
from hypothesis import strategies as st

from grain_jax.data import build, dataset, records
from grain_jax.data.building import flags as build_flags
from grain_jax.data.building import tally

REGION = {"description": "a red box", "box": (0.1, 0.2, 0.5, 0.6), "score": 0.5, "negatives": []}
OUTSIDE = {**REGION, "box": (0, 0, 2, 1)}
NEGATIVE = {"caption": "two dogs", "kind": "object"}
NOT_A_FILE = pathlib.Path("/nowhere/x.jpg")

# Records of which, by kind, 2 of 10 cannot be used; one more is more than a fifth.
LOSSES = {
  "images": lambda bad: [
    toy_data.record(i, regions=1, **({"image": NOT_A_FILE} if i < bad else {})) for i in range(10)
  ],
  "captions": lambda bad: [
    toy_data.record(0, regions=0, captions=["a caption"] * (10 - bad) + [" "] * bad)
  ],
  "regions": lambda bad: [
    toy_data.record(0) | {"regions": [REGION] * (10 - bad) + [OUTSIDE] * bad}
  ],
  "descriptions": lambda bad: [
    toy_data.record(0) | {"regions": [REGION] * (10 - bad) + [{**REGION, "description": ""}] * bad}
  ],
  "negatives": lambda bad: [
    toy_data.record(0, regions=0, negatives=[NEGATIVE] * (10 - bad) + ["x"] * bad)
  ],
}


@pytest.mark.parametrize("kind", LOSSES)
def test_more_than_a_fifth_of_a_kind_is_an_error(tmp_path, kind):
  out = tmp_path / "d"
  toy_data.built(out, LOSSES[kind](2), allow_dropped=tally.ALLOWED)
  with pytest.raises(ValueError) as error:
    toy_data.built(out, LOSSES[kind](3), allow_dropped=tally.ALLOWED, overwrite=True)
  title = {"descriptions": "regions"}.get(kind, kind)
  assert str(error.value).startswith(f"3 of 10 {title} (")
  assert "more than --allow_dropped=0.2" in str(error.value) and "\n" not in str(error.value)
  # What was there stays, nothing lies beside it.
  assert [path.name for path in tmp_path.iterdir()] == ["d"]
  assert dataset.open_dataset(out).manifest["kept_and_dropped"][title]["dropped"] == 2
  toy_data.built(out, LOSSES[kind](3), allow_dropped=0.3, overwrite=True)
  assert dataset.open_dataset(out).manifest["kept_and_dropped"][title]["dropped"] == 3


def test_the_limit_is_the_same_from_the_command_line(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  for i in range(7):
    (tmp_path / f"{i}.jpg").write_bytes(toy_data.record(i)["image"])
  rows = "".join(f"{i}.jpg,c\n" for i in range(10))
  (tmp_path / "annotations.csv").write_text("image,caption\n" + rows)
  flags = ["--source=folder", f"--input={tmp_path}", f"--out={tmp_path / 'out'}"]
  assert build.main(flags) == 2 and not (tmp_path / "out").exists()
  (line,) = capsys.readouterr().err.splitlines()
  assert "3 of 10 images (missing_image 3) cannot be used, more than --allow_dropped=0.2." in line
  assert build.main([*flags, "--allow_dropped=0.29"]) == 2
  assert build.main([*flags, "--allow_dropped=0.3"]) == 0
  assert build.main(flags) == 0  # the same data, whatever was allowed
  assert "already built" in capsys.readouterr().out
  for wrong in ("-0.1", "1.1", "nan"):
    assert build.main([*flags, f"--allow_dropped={wrong}"]) == 2
    assert f"--allow_dropped = {wrong}: not a part" in capsys.readouterr().err
  assert build_flags.parse(flags, description="").allow_dropped == tally.ALLOWED == 0.2


@hypothesis.given(st.integers(1, 10_000), st.integers(1, 10_000))
@hypothesis.example(29, 100)  # 0.29 * 100 is below 29
def test_what_is_just_allowed_is_allowed_and_one_more_is_not(lost, total):
  hypothesis.assume(lost <= total)
  images = {"missing": lost, "files": total - lost}
  tally.check_missing(images, lost / total, list)
  with pytest.raises(ValueError, match="cannot be used"):
    tally.check_missing(images, (lost - 1) / total, list)


def test_a_split_that_vanishes_is_an_error_however_small(tmp_path):
  rows = [toy_data.record(i) for i in range(10)]
  rows.append(("val", toy_data.record(10, image=b"no picture")))
  with pytest.raises(ValueError, match="^every image of the split val cannot be used"):
    toy_data.built(tmp_path / "d", rows, allow_dropped=0.2)
  toy_data.built(tmp_path / "d", rows, allow_dropped=1)


def test_published_descriptions_without_a_box_are_shown_and_not_limited(tmp_path):
  rows = [toy_data.record(0, regions=1)]
  rows += [("train", records.Refused("r0", "regions", "description_without_box"))] * 9
  toy_data.built(tmp_path / "d", rows, allow_dropped=0)
  entry = dataset.open_dataset(tmp_path / "d").manifest["kept_and_dropped"]["regions"]
  assert entry == {"kept": 1, "dropped": 9, "reasons": {"description_without_box": 9}}


def test_a_long_build_says_early_that_it_will_fail(tmp_path):
  rows = [toy_data.record(0, key=f"r{i}") | {"regions": [OUTSIDE] * 50} for i in range(30)]
  said = []
  with pytest.raises(ValueError, match="1,500 of 1,500 regions"):
    build.build(toy_data.source(rows), tmp_path / "d", workers=1, say=said.append)
  (early,) = [line for line in said if line.startswith("of the first")]
  assert early.startswith("of the first 1,500 regions 1,500 were dropped, more than")


def test_the_table(tmp_path):
  rows = [
    toy_data.record(0, captions=["one", " ", "two"]) | {"regions": [REGION, OUTSIDE, OUTSIDE]},
    toy_data.record(1, image=NOT_A_FILE),
    ("val", toy_data.record(2, captions=["one"], regions=0)),
    ("val", toy_data.record(3, captions=["one"], image=b"no picture")),
    ("val", toy_data.record(4, captions=["one"], regions=0, image=NOT_A_FILE)),
  ]
  said = []
  manifest = build.build(toy_data.source(rows), tmp_path / "d", allow_dropped=1, say=said.append)
  # Worked by hand from the records above.
  assert said[:-1] == [
    "            kept  dropped",
    "  images       2        3  60.0 %  missing_image 2, corrupt_image 1",
    "  captions     3        1  25.0 %  empty_caption 1",
    "  regions      1        2  66.7 %  box_outside_image 2",
    "  (good captions and regions of dropped images are not counted)",
  ]
  assert said[-1].startswith(f"{tmp_path / 'd'}: train 1, val 1 in ")
  assert manifest["kept_and_dropped"] == {
    "images": {
      "kept": 2, "dropped": 3, "reasons": {"missing_image": 2, "corrupt_image": 1}
    },
    "captions": {"kept": 3, "dropped": 1, "reasons": {"empty_caption": 1}},
    "regions": {"kept": 1, "dropped": 2, "reasons": {"box_outside_image": 2}},
    "negatives": {"kept": 0, "dropped": 0, "reasons": {}},
  }  # fmt: skip
