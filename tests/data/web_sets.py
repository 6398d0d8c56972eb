"""Small sets in the layouts in which they are published, for the tests of their readers."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import toy_data

from grain_jax.data import build, dataset


def image(index, *, size=48):
  return toy_data.record(index, size=size)["image"]


def built(source, out, **options):
  """The dataset that a source gives, whatever part of it is dropped."""
  options = {"allow_dropped": 1, "workers": 0, "say": toy_data.quiet, **options}
  build.build(source, out, **options)
  return dataset.open_dataset(out)


def parsed(opened, split="train"):
  """{key: what training reads of the record}."""
  found = [opened.parse(split, i) for i in range(opened.num_records(split))]
  assert len({record.key for record in found}) == len(found)
  return {record.key.decode(): record for record in found}


def dropped(opened, split="train"):
  """{what: {why: count}}, of what was dropped at all."""
  losses = opened.manifest["splits"][split]["dropped"]
  return {
    what: {why: entry["count"] for why, entry in of.items()} for what, of in losses.items() if of
  }


def tar_bytes(members):
  """A tar of [(name, bytes, or str, or JSON)]."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as tar:
    for name, content in members:
      if isinstance(content, dict):
        content = json.dumps(content, indent=4)
      data = content.encode() if isinstance(content, str) else content
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return buffer.getvalue()


def sample(key, index, caption, **values):
  """The three members of an image, as img2dataset writes them."""
  told = {"url": f"http://x/{key}.jpg", "caption": caption, "key": key, "status": "success"}
  told |= {"error_message": None, "width": 48, "height": 48, **values}
  return [(f"{key}.jpg", image(index)), (f"{key}.json", told), (f"{key}.txt", caption or "")]


# Of an image of 480 x 240 as img2dataset stores it: padded to a square, its default, or not.
PADDED = {"width": 48, "height": 48, "original_width": 480, "original_height": 240}
KEPT = {**PADDED, "height": 24}


def sidecar(path, rows, *more):
  """img2dataset's table of all rows: [(key, status, error, url, id, and what `more` names)]."""
  names = ("key", "status", "error_message", "url", "id", *more)
  pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path)


def download(folder, key, index, **values):
  """An image as img2dataset's output "files" leaves it."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"{key}.jpg").write_bytes(image(index))
  if values:
    (folder / f"{key}.json").write_text(json.dumps({"key": key, "status": "success", **values}))


GRIT_CAPTION = "Ein Café 🐕: a dog in a field with a red ball"
GRIT_ROW = {
  "caption": GRIT_CAPTION,
  # Offsets in code points: "a dog" begins at 12, for the emoji is one.
  "noun_chunks": [
    [12.0, 17.0, 0.125, 0.25, 0.5, 0.75, 0.75],
    [21.0, 28.0, -0.01, 0.5, 1.02, 1.0, 0.5],
    [34.0, 44.0, 0.5, 0.5, 0.25, 0.75, 0.65],
    [12.0, 99.0, 0.125, 0.25, 0.5, 0.75, 0.75],
  ],
  "ref_exps": [
    [12.0, 28.0, 0.125, 0.25, 0.5, 0.75, 0.75],
    [21.0, 28.0, -0.01, 0.5, 1.02, 1.0, 0.5],
  ],
}


def check_grit(record):
  """The regions of `GRIT_ROW` within the tolerance of 0.05: three are kept, two are not."""
  assert record.captions == [GRIT_CAPTION.encode()]
  assert record.descriptions == [b"a dog", b"a field", b"a dog in a field"]
  assert record.boxes.tolist() == [
    [0.25, 0.125, 0.75, 0.5],
    [0.5, 0, 1, 1],
    [0.25, 0.125, 0.75, 0.5],
  ]
  assert record.scores.tolist() == [0.75, 0.5, 0.75]


GRIT_DROPPED = {"box_without_area": 1, "span_outside_caption": 1}
