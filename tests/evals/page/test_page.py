"""The page of a report: every figure in its row, published ones beside, nothing from elsewhere."""

import html.parser
import json

import numpy as np
import pytest
from PIL import Image

from grain_jax.evals.page import page


class Tables(html.parser.HTMLParser):
  """Cells of all tables, row by row, and the addresses that the page loads."""

  def __init__(self):
    super().__init__()
    self.rows, self.addresses, self.stack, self.text = [], [], [], ""

  def handle_starttag(self, tag, attrs):
    self.addresses += [value for name, value in attrs if name in ("src", "href")]
    if tag not in ("img", "meta"):
      self.stack.append(tag)
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.text = ""

  def handle_data(self, data):
    self.text += data

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag  # well formed
    if tag in ("td", "th"):
      self.rows[-1].append(self.text)


def render(path, results, **kwargs):
  page.write(path, results, title="a <b> run", facts={"model": "x & y"}, **kwargs)
  parser = Tables()
  text = path.read_text()
  parser.feed(text)
  return parser, text


def test_each_result_stands_in_its_row_and_column(tmp_path):
  results = {
    "zero_shot/top1": 0.402, "zero_shot/rows": 1234,
    "zero_shot/imagenet/top1": 0.45, "zero_shot/imagenet/top5": 0.7,
    "zero_shot/imagenet/rows": 50000, "composition/swap_att": 0.5,
    "composition/swap_att/examples": 12, "composition/average": 0.75,
  }  # fmt: skip
  tables, text = render(tmp_path / "report.html", results)
  assert ["", "top-1, %", "top-5, %", "rows", "published, %"] in tables.rows
  assert ["the built data", "40.2", "", "1,234", ""] in tables.rows  # nobody said which
  (row,) = [r for r in tables.rows if r and r[0] == "imagenet"]
  assert row[1:4] == ["45.0", "70.0", "50,000"] and "CLIPpy ViT-B/16, CC-12M 45.3" in row[4]
  assert ["", "accuracy, %", "average, %", "examples", "chance, %", "to be said"] in tables.rows
  # By hand: (1/2 + z^2/24 -+ z sqrt(1/48 + z^2/576)) / (1 + z^2/12) with z = 1.96.
  said = "only 12 pairs; not above chance: accuracy (50 %)"
  assert ["swap attribute", "50.0 25.4 to 74.6", "", "12", "50", said] in tables.rows
  assert ["the built data", "", "75.0", "", "", ""] in tables.rows
  assert "a &lt;b&gt; run" in text and "x &amp; y" in text


def test_rows_of_built_data_have_the_name_of_their_split_and_chance(tmp_path):
  """Chance by hand: k of 800 classes; k of 500 captions or images, one right."""
  results = {
    "zero_shot/seen/top1": 0.4, "zero_shot/seen/top5": 0.6, "zero_shot/seen/examples": 900,
    "zero_shot/top1": 0.4, "zero_shot/top5": 0.6, "zero_shot/mean_per_class": 0.4,
    "zero_shot/classes": 800, "zero_shot/examples": 1000, "zero_shot/rows": 1000,
    "zero_shot/dtd/top1": 0.3, "zero_shot/dtd/examples": 500, "zero_shot/dtd/classes": 47,
    "zero_shot/dtd/rows": 500, "zero_shot/average11/top1": 0.3,
    "retrieval/image_to_text/r1": 0.9, "retrieval/image_to_text/r10": 0.99,
    "retrieval/images": 500, "retrieval/pairs": 500, "retrieval/rows": 500,
  }  # fmt: skip
  sets = {"zero_shot": "scenes/objects", "retrieval": "scenes/val"}
  tables, text = render(tmp_path / "report.html", results, sets=sets)
  assert [row[0] for row in tables.rows] == [
    "", "scenes/objects", "scenes/objects · seen", "dtd", "average11", "",
    "scenes/val", "scenes/val · image to text",
  ]  # fmt: skip
  chance = [row[h.index("chance, %")] for h, row in with_heads(tables.rows)]
  top = "0.125 (top-1), 0.625 (top-5)"
  assert chance == [top, top, "2.13", "", "", "0.2 (R@1), 2 (R@10)"]
  assert "built data" not in text.partition("Shares are per cent")[0]


def with_heads(rows):
  """(head, row) of every row that is no head."""
  head = rows[0]
  for row in rows:
    if row[0]:
      yield head, row
    head = head if row[0] else row


def test_a_fact_can_be_a_link_and_says_what_it_is(tmp_path):
  page.write(
    tmp_path / "report.html", {}, title="t", facts={"configuration": "runs/a <b>/config.json"},
    links={"configuration": "../a%20b/config.json"},
  )  # fmt: skip
  text = (tmp_path / "report.html").read_text()
  link = '<a href="../a%20b/config.json">runs/a &lt;b&gt;/config.json</a>'
  assert f"<dt>configuration</dt><dd>{link}</dd>" in text


class Labels(html.parser.HTMLParser):
  """(class of the row, labels of its cells), and the texts of the heads."""

  def __init__(self):
    super().__init__()
    self.rows, self.heads, self.inside = [], [], ""

  def handle_starttag(self, tag, attrs):
    self.inside = tag
    if tag == "tr":
      self.rows.append((dict(attrs).get("class"), []))
    if tag == "td":
      self.rows[-1][1].append(dict(attrs).get("data-label"))

  def handle_data(self, data):
    if self.inside == "th":
      self.heads.append(data)


def test_on_a_phone_every_cell_says_its_column_and_nothing_is_wide(tmp_path):
  """There the head is not shown and a row is a block; a figure scrolls in its own frame."""
  results = {"zero_shot/a/top1": 0.5, "zero_shot/a/top5": 0.7, "zero_shot/a/rows": 9}
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "masks.png")
  _, text = render(tmp_path / "report.html", results, figures=[tmp_path / "masks.png"])
  labels = Labels()
  labels.feed(text)
  assert labels.rows == [("head", []), (None, [None, *labels.heads])]
  assert labels.heads == ["top-1, %", "top-5, %", "rows"]
  phone = text.partition("@media (max-width: 640px) {")[2]
  assert "tr.head { display: none; }" in phone and "content: attr(data-label)" in phone
  assert 'name="viewport" content="width=device-width' in text
  assert '<div class="wide"><img alt="masks"' in text and "few prompts describe" in text


def test_pictures_are_in_the_page_and_nothing_is_fetched(tmp_path):
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "masks.png")
  tables, text = render(
    tmp_path / "report.html", {"zero_shot/top1": 0.5}, figures=[tmp_path / "masks.png"],
    warnings=["3 of 9 pictures cannot be read"],
  )  # fmt: skip
  assert len(tables.addresses) == 1 and tables.addresses[0].startswith("data:image/png;base64,")
  assert "3 of 9 pictures cannot be read" in text
  assert sorted(p.name for p in tmp_path.iterdir()) == ["masks.png", "report.html"]


def test_published_figures_are_those_of_the_papers():
  """A hand-picked part: CE-CLIP's table 1 and its price, CLIPpy's table 1."""
  found = {(f.key, f.system): f.value for f in page.published()}
  assert found["composition/aro_relation/macro", "CE-CLIP ViT-B/32"] == 0.830
  assert found["composition/sugarcrepe/swap", "CLIP ViT-B/32"] == 0.627
  assert found["zero_shot/average11/top1", "CE-CLIP ViT-B/32"] == 0.457
  assert found["segmentation/voc2012/miou", "CLIPpy ViT-B/16, CC-12M"] == 0.508
  assert all(0 < f.value < 1 and f.source for f in page.published())
  assert len(json.loads(page._PUBLISHED.read_text())["figures"]) == len(found)


def test_published_figures_name_results_that_exist():
  """A figure whose name no evaluation gives would never be shown."""
  from grain_jax.evals.sets import suite

  for figure in page.published():
    family, name = figure.key.split("/")[:2]
    assert name in suite.FAMILIES[family].SETS or name == "average11", figure.key


@pytest.mark.parametrize("family", ["zero_shot", "own_family"])
def test_a_family_without_published_figures_has_no_column_for_them(tmp_path, family):
  tables, _ = render(tmp_path / "report.html", {f"{family}/x/top1": 0.5})
  assert tables.rows == [["", "top-1, %"], ["x", "50.0"]]
