"""Lines of grounding and detection."""

import box_layouts
from box_layouts import box

HALF = box(0.25, 0.25, 0.75, 0.75)


def test_grounding_and_detection(tmp_path):
  root = tmp_path / "in"
  box_layouts.odvg(root)
  opened = box_layouts.built("odvg", root, tmp_path / "out", f"--label_map={root / 'labels.json'}")
  assert box_layouts.content(opened) == {
    "train": {
      "a.jpg": (
        ["a dog and two cats", "pets"],
        [
          ("a dog", HALF),
          ("two cats", box(0, 0, 0.1, 0.1)),
          ("two cats", box(0.1, 0.1, 0.2, 0.2)),
          ("dog two", box(0, 0, 1, 1)),
        ],
      ),
      "b.jpg": (
        ["person, traffic light"],
        [("person", HALF), ("traffic light", box(0, 0, 1, 1))],
      ),
    }
  }
  assert box_layouts.dropped(opened) == {
    ("images", "not_json"): 1,
    ("images", "malformed"): 1,
    ("regions", "span_outside_caption"): 1,
    ("regions", "no_span"): 1,
    ("regions", "box_without_area"): 1,
    ("regions", "malformed"): 1,
    ("regions", "unknown_category"): 1,
  }


def test_a_label_without_a_name_is_counted(tmp_path):
  box_layouts.odvg(tmp_path / "in")
  opened = box_layouts.built("odvg", tmp_path / "in", tmp_path / "out")
  assert box_layouts.content(opened)["train"]["b.jpg"] == (["person"], [("person", HALF)])
  assert box_layouts.dropped(opened)[("regions", "unknown_category")] == 2
  (tmp_path / "in/labels.json").rename(tmp_path / "in/o365_label_map.json")  # mmdetection's name
  opened = box_layouts.built("odvg", tmp_path / "in", tmp_path / "named")
  assert box_layouts.content(opened)["train"]["b.jpg"][0] == ["person, traffic light"]
  box_layouts.write(tmp_path / "in", "other_label_map.json", {"1": "which of the two?"})
  opened = box_layouts.built("odvg", tmp_path / "in", tmp_path / "unclear")
  assert box_layouts.dropped(opened)[("regions", "unknown_category")] == 2


def test_lines_of_any_bytes_cost_themselves_alone(tmp_path):
  root = tmp_path / "in"
  box_layouts.image(root, "a.jpg")
  good = box_layouts.size(filename="a.jpg", grounding={"caption": "ok", "regions": 7})
  listed = box_layouts.size(filename="a.jpg", grounding={"caption": ["no text"]})
  bad = ["[]", "3", "null", '{"filename": 5}', "\x00", "NaN", "[" * 100_000]
  (root / "x.jsonl").write_bytes(
    box_layouts.lines(*bad, listed, good).encode() + b'{"filename": "caf\xe9.jpg"}\n'
  )
  opened = box_layouts.built("odvg", root, tmp_path / "out")
  assert box_layouts.content(opened) == {"train": {"a.jpg": (["ok"], [])}}
  assert box_layouts.dropped(opened) == {
    ("images", "not_json"): 7,
    ("images", "malformed"): 1,
    ("captions", "malformed"): 1,
    ("regions", "malformed"): 1,
  }
