"""preview.html: read with an HTML parser; it changes nothing of the data."""

import base64
import html.parser
import io
import pathlib

import numpy as np
import pytest
import toy_data
from PIL import Image

from grain_jax.data import build, dataset, decoding
from grain_jax.data.building import preview

VOID = {"meta", "img", "rect", "br"}


class Page(html.parser.HTMLParser):
  """A page's elements and text; every element that is opened is closed in its order."""

  def __init__(self, path):
    super().__init__()
    self.elements, self.open, self.words = [], [], []
    self.feed(path.read_text(encoding="utf-8"))
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    self.open += [] if tag in VOID else [tag]

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)

  def all(self, tag):
    return [attrs for name, attrs in self.elements if name == tag]

  @property
  def text(self):
    return " ".join(self.words)


def records(count, **changes):
  return [toy_data.record(i, regions=2, **changes) for i in range(count)]


def test_two_dozen_images_with_their_boxes_and_texts(tmp_path):
  page = Page(toy_data.built(tmp_path / "mine", records(100)) / "preview.html")
  assert len(page.all("figure")) == len(page.all("img")) == len(page.all("svg")) == 24
  assert len(page.all("rect")) == 24 * 2 * 2  # in white and in colour
  assert "mine" in page.text and "a red box" in page.text and "Nothing was dropped" in page.text
  shown = [i for i in range(100) if f"r{i} (train)" in page.text]
  # Over the whole set, by chance: of 24 of 100, all in one half has a chance of 1e-7.
  assert len(shown) == 24 and min(shown) < 50 <= max(shown)
  assert all(f"picture {i}" in page.text for i in shown)


def test_it_needs_nothing_outside_itself(tmp_path):
  path = toy_data.built(tmp_path / "d", records(30)) / "preview.html"
  page = Page(path)
  assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
  assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
  for word in ("http:", "https:", "url(", str(tmp_path)):
    assert word not in path.read_text(), word
  assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_boxes_lie_where_the_picture_shows_them(tmp_path):
  pixels = np.full((80, 200, 3), 255, np.uint8)
  pixels[20:60, 50:150] = toy_data.COLORS["blue"]
  region = {"description": "blue", "box": (0.25, 0.25, 0.75, 0.75), "score": 1, "negatives": []}
  row = toy_data.record(0, image=toy_data.jpeg(pixels)) | {"regions": [region]}
  page = Page(toy_data.built(tmp_path / "d", [row]) / "preview.html")
  (image,), (drawing,) = page.all("img"), page.all("svg")
  assert drawing["viewbox"] == f"0 0 {image['width']} {image['height']}" == "0 0 360 144"
  picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
  assert picture.size == (200, 80)  # never made larger
  box = page.all("rect")[-1]
  assert [float(box[k]) for k in ("x", "y", "width", "height")] == [90, 36, 180, 72]


def test_large_images_are_made_small(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (1500, 900, 3))
  rows = [toy_data.record(i, image=toy_data.jpeg(noise)) for i in range(2)]
  path = toy_data.built(tmp_path / "d", rows) / "preview.html"
  picture = base64.b64decode(Page(path).all("img")[0]["src"].partition(",")[2])
  assert decoding.decode(picture).size == (216, 360)
  assert path.stat().st_size < 300_000 < len(rows[0]["image"])


def test_what_was_dropped_stands_below(tmp_path):
  outside = {"description": "far <off>", "box": (0, 0, 300, 7.5), "score": 1, "negatives": []}
  rows = records(5)
  rows[1]["regions"].append(outside)
  rows[2]["captions"].append("  ")
  rows.append(toy_data.record(9, image=pathlib.Path("/nowhere/9.jpg")))
  rows.append(toy_data.record(10, image=b"no picture", key="\ud83d half"))
  rows.append(toy_data.record(11, image=b"no picture"))
  page = Page(toy_data.built(tmp_path / "d", rows) / "preview.html")
  above, below = page.text.split("Dropped")
  assert "box outside image: 'far <off>' [0, 0, 300, 7.5]" in above
  assert "captions: empty caption" in above
  assert "box outside image, 1 r1: 'far <off>' [0, 0, 300, 7.5]" in " ".join(below.split())
  for words in ("missing image, 1 r9", "corrupt image, 1 r11", "malformed, 1 \\ud83d half"):
    assert words in " ".join(below.split())


def test_texts_are_texts(tmp_path):
  evil = "<script>alert(1)</script> & \"quoted\" 'once'"
  row = toy_data.record(0, key=evil, captions=[evil])
  row["regions"][0]["description"] = evil
  page = Page(toy_data.built(tmp_path / "d", [row]) / "preview.html")
  assert not page.all("script") and page.all("img")[0]["alt"] == evil
  assert page.text.count(evil) == 3


def test_it_takes_no_part_in_the_data(tmp_path, monkeypatch):
  out = toy_data.built(tmp_path / "a", records(30))
  monkeypatch.setattr(preview, "_SEED", 1)
  other = toy_data.built(tmp_path / "b", records(30))
  assert (out / "preview.html").read_bytes() != (other / "preview.html").read_bytes()
  one, two = dataset.open_dataset(out), dataset.open_dataset(other)
  assert one.fingerprint("train") == two.fingerprint("train")
  shards = [shard["file"] for shard in one.manifest["splits"]["train"]["shards"]]
  assert [(out / n).read_bytes() for n in shards] == [(other / n).read_bytes() for n in shards]
  (out / "preview.html").unlink()
  assert dataset.open_dataset(out).fingerprint("train") == two.fingerprint("train")


def test_the_same_records_show_the_same_images_whatever_their_order(tmp_path):
  def shown(name, rows):
    page = Page(toy_data.built(tmp_path / name, rows) / "preview.html")
    return [image["alt"] for image in page.all("img")]

  rows = records(60)
  assert shown("a", rows) == shown("b", rows[::-1])


def test_an_image_that_cannot_be_decoded_costs_its_picture_alone(tmp_path):
  rows = [*records(2), toy_data.record(2, image=b"no picture")]
  page = Page(toy_data.built(tmp_path / "d", rows, check_image=False) / "preview.html")
  assert len(page.all("figure")) == 3 and "corrupt image" in page.text


def test_the_page_of_a_build_that_is_repeated_stays(tmp_path):
  out = toy_data.built(tmp_path / "d", records(3))
  before = (out / "preview.html").stat().st_mtime_ns
  toy_data.built(out, records(3))
  assert (out / "preview.html").stat().st_mtime_ns == before
  said = []
  build.build(toy_data.source(records(3)), tmp_path / "e", say=said.append)
  assert said[-1].endswith(f"Look at {tmp_path / 'e' / 'preview.html'}.")
  with pytest.raises(AssertionError):
    (tmp_path / "broken.html").write_text("<div><p></div>")
    Page(tmp_path / "broken.html")
