"""What a build says where annotations are written otherwise than it reads them."""

import json
import signal

import hypothesis
import numpy as np
import pytest
import toy_data
from hypothesis import strategies as st
from PIL import Image

from grain_jax.data import build, dataset, records
from grain_jax.data.building import block, hints, preview, tally
from grain_jax.data.sources import base, folder_lines

COUNT = 20
SIZES = ((64, 40), (40, 64), (80, 48))  # (width, height)


@pytest.fixture(autouse=True)
def no_signals(monkeypatch):
  monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture
def root(tmp_path):
  folder = tmp_path / "in"
  (folder / "images").mkdir(parents=True)
  for i in range(COUNT):
    width, height = SIZES[i % 3]
    Image.fromarray(np.full((height, width, 3), i, np.uint8)).save(folder / f"images/{i}.jpg")
  return folder


def entries(change=lambda entry, i: None):
  """Lines of good annotations, two boxes each as (xmin, ymin, xmax, ymax) in pixels; changed."""
  made = []
  for i in range(COUNT):
    width, height = SIZES[i % 3]
    boxes = [(width - 14, 2, width - 2, height - 20), (1 + i % 5, 18, 15 + i % 5, height - 1)]
    regions = [{"description": f"thing {k}", "box": list(box)} for k, box in enumerate(boxes)]
    made.append({"image": f"images/{i}.jpg", "captions": [f"picture {i}"], "regions": regions})
    change(made[-1], i)
  return made


def boxes_as(write):
  """A change of every box (xmin, ymin, xmax, ymax, width and height of its image)."""

  def change(entry, i):
    for region in entry["regions"]:
      region["box"] = write(*region["box"], *SIZES[i % 3])

  return change


def rename(old, new, *, inside=lambda entry: [entry]):
  def change(entry, i):
    for part in inside(entry):
      part[new] = part.pop(old)

  return change


def run(root, made, capsys, *flags):
  """(exit code, lines of stdout, lines of stderr) of a build."""
  if not isinstance(made, (str, bytes)):
    made = "".join(json.dumps(entry) + "\n" for entry in made)
  made = made.encode() if isinstance(made, str) else made
  (root / "annotations.jsonl").write_bytes(made)
  code = build.main(["--source=folder", f"--input={root}", f"--out={root.parent / 'out'}", *flags])
  said = capsys.readouterr()
  return code, said.out.splitlines(), said.err.splitlines()


PIXELS = ("--box_units=pixels", "--box_format=xyxy")
# name -> (flags, change, words of the hint)
BOXES = {
  "pixels": (
    (), boxes_as(lambda x, y, a, b, w, h: [x, y, a, b]),
    "all of 40 boxes lie outside the image: pixels? As xyxy in pixels 40 of 40 fit: "
    "--box_format=xyxy --box_units=pixels"),
  "x and y exchanged": (
    PIXELS, boxes_as(lambda x, y, a, b, w, h: [y, x, b, a]),
    "x and y exchanged? As yxyx in pixels 40 of 40 fit: --box_format=yxyx"),
  "width and height": (
    PIXELS, boxes_as(lambda x, y, a, b, w, h: [x, y, a - x, b - y]),
    "width and height, not a second corner? As xywh in pixels 40 of 40 fit: --box_format=xywh"),
  "a centre": (
    PIXELS, boxes_as(lambda x, y, a, b, w, h: [(x + a) / 2, (y + b) / 2, a - x, b - y]),
    "a centre, not a corner? As cxcywh in pixels 40 of 40 fit: --box_format=cxcywh"),
  "width and height as fractions": (
    (), boxes_as(lambda x, y, a, b, w, h: [x / w, y / h, (a - x) / w, (b - y) / h]),
    "As xywh in fractions 40 of 40 fit: --box_format=xywh"),
  "fractions": (
    PIXELS, boxes_as(lambda x, y, a, b, w, h: [x / w, y / h, a / w, b / h]),
    "all of 40 boxes lie within one pixel: fractions? As xyxy in fractions 40 of 40 fit: "
    "--box_units=fractions"),
  "over the edge": (
    PIXELS, boxes_as(lambda x, y, a, b, w, h: [x, y, a + 3, b]),
    "20 of 40 boxes lie outside the image, 20 of them by less than 5%: --tolerance=0.05 clips"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOXES)
def test_the_format_in_which_all_boxes_fit_is_named(root, capsys, name):
  flags, change, words = BOXES[name]
  code, said, (line,) = run(root, entries(change), capsys, *flags)
  assert code == 2 and words in line and "more than --allow_dropped=0.2" in line
  assert any(x.startswith("hint: ") and words in x for x in said)
  assert [path.name for path in root.parent.iterdir()] == ["in"]


@pytest.mark.parametrize("name", [name for name in BOXES if name != "over the edge"])
def test_the_flags_that_the_hint_names_build_the_data(root, capsys, name):
  flags, change, words = BOXES[name]
  named = [word for word in words.split() if word.startswith("--")]
  code, said, errors = run(root, entries(change), capsys, *flags, *named)
  assert code == 0 and not errors and not any(x.startswith("hint: ") for x in said)
  opened = dataset.open_dataset(root.parent / "out")
  for i in range(COUNT):
    width, height = SIZES[i % 3]
    want = [np.array(r["box"])[[1, 0, 3, 2]] for r in entries()[i]["regions"]]
    got = opened.parse("train", i).boxes * np.array([height, width, height, width])
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize(
  "scale, words",
  [
    (1000, "all of 40 boxes lie outside the image: thousandths? No number is above 1000: divide"),
    (100, "all of 40 boxes lie outside the image: percent? No number is above 100: divide them"),
  ],
)
def test_parts_of_a_hundred_or_a_thousand_are_told_from_pixels(root, capsys, scale, words):
  def write(x, y, a, b, w, h):
    return [round(scale * v, 1) for v in (y / h, x / w, b / h, a / w)]

  for i in range(COUNT):  # one box over the whole image ends at the scale
    if scale == 100:
      Image.fromarray(np.full((30, 45, 3), i, np.uint8)).save(root / f"images/{i}.jpg")
  made = entries(boxes_as(write))
  made[0]["regions"][0]["box"] = [0, 0, scale, scale]
  code, _, (line,) = run(root, made, capsys)
  assert code == 2 and words in line


def test_percent_of_large_images_could_be_pixels_and_both_are_said(root, capsys):
  for i in range(COUNT):
    Image.fromarray(np.full((300, 300, 3), i, np.uint8)).save(root / f"images/{i}.jpg")
  made = entries(boxes_as(lambda *box: [0, 0, 97 + box[0] % 3, 98]))
  code, _, (line,) = run(root, made, capsys)
  assert code == 2 and "pixels? As yxyx in pixels 40 of 40 fit: --box_units=pixels" in line
  assert "percent, for no number is above 100: look at them)" in line


def test_nothing_is_guessed_of_boxes_that_have_no_pattern(root, capsys):
  def change(entry, i):
    for region in entry["regions"][: i < 5]:
      region["box"] = [5, 5, 5, 5]

  code, said, errors = run(root, entries(change), capsys, *PIXELS)
  assert code == 0 and not errors and not any(x.startswith("hint: ") for x in said)
  assert "  regions     35        5  12.5 %  box_without_area 5" in said


# name -> (change, what is dropped, words of the hint)
KEYS = {
  "region": (
    rename("regions", "region"), "40 of 40 regions (misspelt_key 40)",
    "unknown key region in 20 lines: regions? (first: images/0.jpg)"),
  "regoins": (
    rename("regions", "regoins"), "40 of 40 regions (misspelt_key 40)",
    "unknown key regoins in 20 lines: regions?"),
  "objects": (
    rename("regions", "objects"), "40 of 40 regions (misspelt_key 40)",
    "unknown key objects in 20 lines: regions?"),
  "bbox": (
    rename("box", "bbox", inside=lambda entry: entry["regions"]),
    "40 of 40 regions (malformed 40)", "unknown key bbox in 40 regions: box?"),
  "phrase": (
    rename("description", "phrase", inside=lambda entry: entry["regions"]),
    "40 of 40 regions (empty_description 40)", "unknown key phrase in 40 regions: description?"),
  "file_name": (
    rename("image", "file_name"), "no usable record (dropped: malformed 20)",
    "unknown key file_name in 20 lines: image?"),
  "Captions": (
    rename("captions", "Captions"), "", "unknown key Captions in 20 lines: captions?"),
  "an object for a list": (
    lambda entry, i: entry.update(regions=entry["regions"][0]), "",
    "regions is an object (description, box), not a list, 20 times"),
  "a box with names": (
    boxes_as(lambda x, y, a, b, w, h: {"x": x, "y": y, "w": a - x, "h": b - y}),
    "40 of 40 regions (malformed 40)",
    "box is an object (x, y, w, h), not a list of four numbers, 40 times"),
  "a box as a text": (
    boxes_as(lambda x, y, a, b, w, h: f"{x},{y},{a},{b}"), "40 of 40 regions (malformed 40)",
    "box is a text, not a list of four numbers, 40 times (first: images/0.jpg)"),
  "a polygon": (
    boxes_as(lambda x, y, a, b, w, h: [x, y, a, y, a, b, x, b]), "40 of 40 regions",
    "box is a list of 8, not of four numbers, 40 times"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_keys_and_values_of_another_kind_are_named_and_counted(root, capsys, name):
  change, dropped, words = KEYS[name]
  code, said, (line,) = run(root, entries(change), capsys, *PIXELS)
  assert code == 2 and dropped in line and words in line
  assert any(x.startswith("hint: ") and words in x for x in said)


def test_a_key_that_is_merely_unknown_costs_nothing_and_is_said(root, capsys):
  made = entries(lambda entry, i: entry.update(image_id=i, licence="CC0"))
  code, said, errors = run(root, made, capsys, *PIXELS)
  assert code == 0 and not errors
  assert "hint: keys that are not read: image_id (20 lines), licence (20 lines)" in said
  manifest = dataset.open_dataset(root.parent / "out").manifest
  assert manifest["hints"] == ["keys that are not read: image_id (20 lines), licence (20 lines)"]


def test_a_misspelt_split_is_said_though_nothing_is_dropped(root, capsys):
  made = entries(lambda entry, i: entry.update(splits="val") if i < 5 else None)
  code, said, _ = run(root, made, capsys, *PIXELS)
  assert code == 0
  assert "hint: unknown key splits in 5 lines: split? (first: images/0.jpg)" in said
  made = entries(lambda entry, i: entry.update(split="Train"))
  _, said, _ = run(root, made, capsys, *PIXELS, "--overwrite")
  assert "hint: split is 'Train' in 20 lines, which training does not read: 'train'?" in said


PATHS = {
  "backslashes": lambda path: path.replace("/", "\\"),
  "another ending": lambda path: path.replace(".jpg", ".png"),
  "capitals": lambda path: "images/" + path[7:].upper().replace(".JPG", ".Jpg"),
  "capitals ": lambda path: path.upper(),  # of the folder too
  "a folder named twice": lambda path: f"images/{path}",
  "a folder left out": lambda path: path[7:],
}


@pytest.mark.parametrize("name", PATHS)
def test_missing_images_are_looked_for_before_any_is_read(root, capsys, name, monkeypatch):
  def read_nothing(*_, **__):
    raise AssertionError("a record was checked")

  monkeypatch.setattr(block.records, "check", read_nothing)
  made = entries(lambda entry, i: entry.update(image=PATHS[name](entry["image"])))
  code, _, (line,) = run(root, made, capsys, *PIXELS)
  assert code == 2 and "20 of 20 images (missing_image 20) cannot be used" in line
  if name == "capitals":
    name = "another ending"  # which is tried first, and fits as well
  assert f"Perhaps: {name.strip()}? 20 missing images are there otherwise: " in line
  assert f"-> {root}/images/0.jpg" in line


def test_a_few_missing_images_are_looked_for_too(root, capsys):
  made = entries(lambda entry, i: entry.update(image=f"images\\{i}.jpg") if i < 3 else None)
  code, said, errors = run(root, made, capsys, *PIXELS)
  assert code == 0 and not errors
  (hint,) = [x for x in said if x.startswith("hint: ")]
  assert hint.startswith("hint: backslashes? 3 missing images are there otherwise: ")


FILES = {
  "a JSON array, not lines": lambda made: json.dumps(made),
  "a JSON array, not lines.": lambda made: "\n[\n" + json.dumps(made, indent=1)[1:],
  "a JSON object over several lines": lambda made: "\n".join(json.dumps(x, indent=1) for x in made),
  "a COCO file": lambda made: json.dumps({"info": {}, "images": made, "annotations": []}),
  "UTF-16": lambda made: "".join(json.dumps(x) + "\n" for x in made).encode("utf-16"),
  "looks like CSV": lambda made: "image,caption\n" + "".join(x["image"] + ",c\n" for x in made),
}


@pytest.mark.parametrize("words", FILES)
def test_a_file_that_holds_no_lines_of_json_is_said_at_once(root, capsys, words):
  code, said, (line,) = run(root, FILES[words](entries()), capsys, *PIXELS)
  assert code == 2 and not said and str(root / "annotations.jsonl") in line
  assert words.rstrip(".") in line and "Perhaps" not in line
  assert "> annotations.jsonl" not in line  # which the shell would empty before it is read


def test_a_line_for_each_caption_is_said(root, capsys):
  made = [{**entry, "captions": [text]} for entry in entries() for text in ("one", "two")]
  code, _, (line,) = run(root, made, capsys, *PIXELS)
  assert code == 2 and "20 of 40 images (duplicate_key 20)" in line
  assert "20 lines repeat an image of an earlier line: one line holds all captions" in line


@pytest.mark.parametrize(
  "header, words",
  [
    ("path,text", "image and caption are needed (path: image? text: caption?)"),
    ("image;caption", "(its fields stand between ';': put commas between them)"),
  ],
)
def test_columns_of_csv_that_are_near_are_named(root, capsys, header, words):
  (root / "annotations.csv").write_text(header + "\n")
  flags = ["--source=folder", f"--input={root}", f"--out={root.parent / 'out'}"]
  assert build.main(flags) == 2
  assert words in capsys.readouterr().err


def test_a_column_of_csv_that_is_not_read_is_said(root, capsys):
  rows = "".join(f"images/{i}.jpg,c,[]\n" for i in range(COUNT))
  (root / "annotations.csv").write_text("image,caption,boxes\n" + rows)
  assert build.main(["--source=folder", f"--input={root}", f"--out={root.parent / 'out'}"]) == 0
  assert "hint: keys that are not read: boxes (20 lines)" in capsys.readouterr().out


def test_annotations_of_another_name_are_named(root, capsys):
  (root / "annotations.json").write_text("[]")
  assert build.main(["--source=folder", f"--input={root}", f"--out={root.parent / 'out'}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "neither annotations.jsonl nor annotations.csv (there is annotations.json)" in line


@pytest.mark.parametrize("source", ["scenes", "published"])
@pytest.mark.parametrize("flag", ["--box_format=xyxy", "--box_units=pixels"])
def test_a_source_that_knows_its_boxes_takes_no_format(capsys, tmp_path, source, flag):
  flags = [f"--source={source}", f"--out={tmp_path / 'out'}", "--images=.", "--captions=c", flag]
  with pytest.raises(SystemExit) as error:
    build.main(flags[:2] + flags[-1:] if source == "scenes" else flags)
  (line,) = capsys.readouterr().err.splitlines()
  assert error.value.code == 2 and f"--source={source} has boxes of one format" in line


SCALARS = st.one_of(
  st.none(), st.booleans(), st.floats(), st.sampled_from([10**400, 1e300, 0, 7]),
  st.text(max_size=5), st.sampled_from(["a dog", "\ud83d", "1,2,3,4"]),
)  # fmt: skip
NUMBERS = st.lists(st.one_of(st.floats(), st.floats(0, 100), st.just(10**400)), max_size=5)
NAMES = st.sampled_from(
  [
    "image",
    "a\nb",
    "captions",
    "caption",
    "regions",
    "Regions",
    "split",
    "negatives",
    "box",
    "bbox",
  ]
  + ["description", "desc", "score", "kind", "", "\ud83d"]
)
JSON = st.recursive(
  st.one_of(SCALARS, NUMBERS),
  lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
  max_leaves=12,
)
REGIONS = st.lists(
  st.fixed_dictionaries(
    {"description": SCALARS, "box": st.one_of(NUMBERS, st.just([5, 6, 40, 30])), "score": SCALARS}
  )
)


@hypothesis.given(
  st.fixed_dictionaries({"image": st.just("0.jpg")}, optional={"x": JSON}),
  st.one_of(REGIONS, JSON),
  JSON,
  st.sampled_from(["yxyx", "xyxy", "xywh", "cxcywh"]),
  st.sampled_from(["fractions", "pixels"]),
)
def test_whatever_json_a_line_holds_is_kept_or_counted(line, regions, captions, way, units):
  """No line ends a build: what of it is kept can be written, what is not is counted and shown."""
  line |= {"regions": regions, "captions": captions or ["c"]}
  oddities = folder_lines.Oddities()
  source = base.Source(
    "toy", {}, iter, {}, box_format=way, box_units=units, flags_for_boxes=True,
    oddities=oddities,
  )  # fmt: skip
  found = folder_lines.parts(line, oddities)
  if isinstance(found, records.Refused):
    given, checked = found, records.Checked(None, [(found.what, found.why)])
  else:
    given = {**found[0], "key": "k", "image": toy_data.record(0)["image"]}
    checked = records.check(given, box_format=way, box_units=units)
  guesses, page, counts = hints.Hints(source), preview.Preview(), tally.Tally(1.0)
  for _ in range(3):
    guesses.add("train", given, checked)
    page.add("train", given, checked, checked.dropped)
  for what, why in checked.dropped:
    counts.drop("train", what, why, "k")
  if checked.record is not None:
    kinds = ("captions", "regions", "negatives")
    counts.keep("train", {"records": 1} | {kind: len(checked.record[kind]) for kind in kinds})
    assert np.isfinite(records.parse(records.encode(checked.record)).scores).all()
    assert len(found[0]["regions"]) == len(checked.record["regions"]) + sum(
      what == "regions" for what, _ in checked.dropped
    )
  hints_of_all = hints.Hints(source)  # as the parent process has them
  hints_of_all.merge(json.loads(json.dumps(guesses.take())))
  lines = [*hints_of_all.lines(), *tally.table(counts.summary())]
  assert all("\n" not in text and text.encode() for text in lines)
