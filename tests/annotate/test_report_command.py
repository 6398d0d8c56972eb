"""The report on annotations: its figures against lines that were counted by hand."""

import html.parser
import json
import re

import pytest
import toy_data

from grain_jax.annotate import report, report_counts
from grain_jax.data.sources import folder as folder_source

BOX = [0.1, 0.2, 0.6, 0.8]


def region(description, score):
  return {"description": description, "box": BOX, "score": score}


# Four images; of the 9 descriptions ("A cat" and "a cat" once) 4 have no box: "a unicorn" twice,
# "the sky on the left", and "grass", which was never looked for.
LINES = [
  {"key": "0.jpg", "captions": ["new"], "descriptions": ["a cat", "A cat", "a unicorn", "a dog"],
   "regions": [region("a cat", 0.9), region("a dog", 0.42)]},
  {"key": "1.jpg", "descriptions": ["a unicorn", "the sky on the left"], "regions": []},
  {"key": "2.jpg", "descriptions": ["a cat", "a dog", "a tree", "grass"],
   "regions": [region("its own", 1.0), region("a cat", 0.35), region("a dog", 0.8),
               region("a tree", 0.55)],
   "negatives": [{"caption": "no cat", "kind": "object"}]},
  {"key": "3.jpg"},
]  # fmt: skip
RAW = {
  "0.jpg": [("a cat", 0.9), ("a unicorn", 0.27), ("a dog", 0.42)],
  "1.jpg": [("a unicorn", 0.1), ("the sky on the left", None)],
  "2.jpg": [("a cat", 0.35), ("a dog", 0.8), ("a tree", 0.55)],
}


@pytest.fixture
def folders(tmp_path):
  root = tmp_path / "in"
  root.mkdir()
  lines = []
  for i in range(4):
    (root / f"{i}.jpg").write_bytes(toy_data.record(i)["image"])
    lines.append({"image": f"{i}.jpg"})
    if i < 3:  # the last has none, of nobody
      lines[-1]["captions"] = [f"caption <{i}>"]
  (root / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  source = folder_source.source(root)
  described, out = tmp_path / "described", tmp_path / "grounded"
  first = {"stage": "describe", "settings": {}, "source": source.settings, "seconds": 7200,
           "counts": {"pictures": 4, "read": 4, "failed": 1}, "totals": {"prompt_tokens": 1234},
           "losses": {"descriptions/refusal": {"count": 17, "first": ["0.jpg"]}}}  # fmt: skip
  write(described, first, [], [])
  annotated = {**source.settings, "annotated": {"path": str(described / "manifest.json")}}
  second = {"stage": "ground", "settings": {"threshold": 0.3}, "source": annotated, "seconds": 36.0,
            "counts": {"pictures": 4, "read": 4, "failed": 0}, "totals": {},
            "losses": {"regions/description_without_box": {"count": 3, "first": ["0.jpg"]}},
            }  # fmt: skip
  replies = [
    {
      "key": key,
      "raw": [{"description": d, **({} if s is None else {"score": s})} for d, s in said],
    }
    for key, said in RAW.items()
  ]
  write(out, second, LINES, replies)
  (out / "plan.json").write_text(
    json.dumps({"what": {"source": annotated}, "blocks": list(source.blocks(tmp_path))})
  )
  return tmp_path


def write(folder, manifest, lines, replies):
  for name, entries in (("annotations", lines), ("raw", replies)):
    (folder / name).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in entries)
    (folder / name / "000000.jsonl").write_text(text)
  (folder / "manifest.json").write_text(json.dumps(manifest))


def run(tmp_path, **changes):
  values = {"source": "folder", "input": tmp_path / "in", "annotated": tmp_path / "grounded",
            "out": tmp_path / "page" / "report.html", **changes}  # fmt: skip
  return report.main([f"--{name}={value}" for name, value in values.items()])


def rows(page, title):
  """Cells of the first table after a headline."""
  table = page.split(f">{title}</h", 1)[1].split("<table>", 1)[1].split("</table>", 1)[0]
  cells = (re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("</tr>")[:-1])
  return [[re.sub("<.*?>", "", cell) for cell in row] for row in cells]


def bars(page, title):
  svg = page.split(f'aria-label="{title}', 1)[1].split("</svg>", 1)[0]
  found = re.findall(r"<title>(.*?): (.*?)</title>", svg)
  return {label: int(value.replace(",", "")) for label, value in found if value != "0"}


def test_figures_are_those_counted_by_hand(folders, capsys):
  assert run(folders) == 0
  assert "4 images, 6 boxes" in capsys.readouterr().out
  page = (folders / "page" / "report.html").read_text()
  key = dict(re.findall(r"<div><b>(.*?)</b>(.*?)</div>", page))
  assert {name: value for value, name in key.items()} == {
    "images": "4", "descriptions an image": "2.50", "boxes an image": "1.50",
    "descriptions without a box": "44.4 %", "images with text only": "50.0 %",
    "false captions": "1",
  }  # fmt: skip
  assert bars(page, "Descriptions an image") == {"0": 1, "2": 1, "4": 2}
  assert bars(page, "Boxes an image") == {"0": 2, "2": 1, "4": 1}
  assert bars(page, "Boxes by score") == {
    "0.35": 1, "0.4": 1, "0.55": 1, "0.8": 1, "0.9": 1, "0.95": 1,
  }  # fmt: skip
  assert bars(page, "Descriptions by the score") == {
    "0.1": 1, "0.25": 1, "0.35": 1, "0.4": 1, "0.55": 1, "0.8": 1, "0.9": 1,
  }  # fmt: skip
  assert rows(page, "What another threshold would leave")[1:] == [
    ["0.1", "75.0 %", "25.0 %"], ["0.2", "75.0 %", "25.0 %"], ["0.3", "62.5 %", "37.5 %"],
    ["0.4", "50.0 %", "50.0 %"], ["0.5", "37.5 %", "62.5 %"], ["0.6", "25.0 %", "75.0 %"],
  ]  # fmt: skip
  assert "4 of 9 descriptions (44.4 %) have no box" in page
  assert [row[1:] for row in rows(page, "Where the two stages disagree")] == [
    ["8", ""], ["5", "62.5 %"], ["2", "25.0 %"], ["1", "12.5 %"], ["1", "12.5 %"],
    ["1", "33.3 % of images"], ["1", ""],
  ]  # fmt: skip
  assert rows(page, "By length")[1:] == [
    ["1-2 words", "8", "37.5 %"], ["5-8 words", "1", "100.0 %"],
  ]  # fmt: skip
  assert rows(page, "Dropped")[1:] == [
    ["describe", "descriptions", "refusal0.jpg", "17"],
    ["ground", "regions", "description without box0.jpg", "3"],
  ]
  assert rows(page, "Most frequent descriptions")[1:] == [
    ["a cat", "2", "0.0 %"], ["a dog", "2", "0.0 %"], ["a unicorn", "2", "100.0 %"],
    ["a tree", "1", "0.0 %"], ["grass", "1", "100.0 %"], ["the sky on the left", "1", "100.0 %"],
  ]  # fmt: skip
  assert "2 of 4 images (50.0 %) have no box" in page and "First: 1.jpg, 3.jpg" in page
  assert rows(page, "Time and cost") == [
    ["", "describe", "ground"], ["images", "4", "4"], ["failed", "1", "0"],
    ["hours of work", "2.00", "0.01"], ["seconds an image", "1,800", "9"],
    ["hours a million images", "500,000", "2,500"], ["prompt tokens", "1,234", ""],
  ]  # fmt: skip


def test_images_are_shown_with_boxes_and_what_has_none(folders):
  run(folders)
  page = (folders / "page" / "report.html").read_text()
  figures = re.findall("<figure>.*?</figure>", page)
  by_key = {re.search(r'quiet">(\d.jpg)', figure)[1]: figure for figure in figures}
  assert sorted(by_key) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
  assert by_key["0.jpg"].count("<rect") == 2 * 2 and "caption &lt;0&gt;" in by_key["0.jpg"]
  assert "<li>new</li>" in by_key["0.jpg"] and "no box: <ul><li>a unicorn</li>" in by_key["0.jpg"]
  width = 360  # of the small image: a box of 0.2 to 0.8 and 0.1 to 0.6
  place = 'x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"'
  assert place.format(0.2 * width, 0.1 * width, 0.6 * width, 0.5 * width) in by_key["0.jpg"]
  assert "<rect" not in by_key["3.jpg"] and "no box" not in by_key["3.jpg"]
  sources = re.findall(r'(?:src|href)="?([^"> ]*)', page)
  images = [source for source in sources if not source.startswith("#")]
  assert len(images) == 4 and all(s.startswith("data:image/jpeg;base64,") for s in images)
  assert all(f"id={source[1:]}>" in page for source in sources if source.startswith("#"))
  html.parser.HTMLParser().feed(page)
  run(folders, out=folders / "again.html")
  assert (folders / "again.html").read_text() == page


def test_images_of_the_sheet_are_chosen_by_their_keys():
  """Whatever the order of their lines."""
  keys = [f"{i}.jpg" for i in range(100)]
  chosen = []
  for order in (keys, keys[::-1]):
    counts = report_counts.Counts(5)
    for key in order:
      counts.add(0, {"key": key})
    chosen.append([one.key for one in counts.chosen()])
  assert chosen[0] == chosen[1] and len(set(chosen[0])) == 5 and chosen[0] != keys[:5]


def test_before_the_detector_it_says_so(folders):
  write(folders / "described", json.loads((folders / "described" / "manifest.json").read_text()),
        [{"key": "0.jpg", "descriptions": ["a cat"]}], [])  # fmt: skip
  plan = json.loads((folders / "grounded" / "plan.json").read_text())
  plan["what"]["source"].pop("annotated")
  (folders / "described" / "plan.json").write_text(json.dumps(plan))
  assert run(folders, annotated=folders / "described") == 0
  page = (folders / "page" / "report.html").read_text()
  assert "No detector has looked for them yet" in page and "no detector yet" in page


def test_a_stage_whose_folder_is_gone_is_named(folders):
  (folders / "described").rename(folders / "elsewhere")
  assert run(folders) == 0
  page = (folders / "page" / "report.html").read_text()
  assert "described, which the first of these stages was given, has no manifest" in page
  assert rows(page, "Time and cost")[0] == ["", "ground"]


def test_what_cannot_be_is_told_in_one_line(folders, capsys):
  def told(**changes):
    try:
      code = run(folders, **changes)
    except SystemExit as end:
      code = end.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    return error

  assert "--annotated: give the folder" in told(annotated="")
  assert "no such file or folder" in told(annotated=folders / "none")
  assert "is a folder. Give the file" in told(out=folders)
  assert "is of another source" in told(val_fraction=0.5)
  (folders / "grounded" / "manifest.json").write_text("{}")
  assert "is not that of a stage" in told()
  (folders / "grounded" / "manifest.json").unlink()
  assert "not finished" in told()


def test_a_region_of_a_long_description_has_the_short_one_still():
  line = {"key": "a", "descriptions": ["a dog", "a sofa"],
          "regions": [{**region("A brown dog sleeps.", 0.8), "of": "A dog"}]}  # fmt: skip
  assert report_counts.without_box(line) == {"a sofa"}
