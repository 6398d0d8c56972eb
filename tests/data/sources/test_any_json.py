"""Whatever JSON stands where texts, boxes and lists belong: it is kept or counted, never raised."""

import json

import hypothesis
import pytest
import web_sets
from hypothesis import strategies as st

from grain_jax.data import records
from grain_jax.data.sources import base, ce_clip, finehard, published, webdataset

SCALARS = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-(10**400), 10**400),
  st.floats(),
  st.text(max_size=5),
  st.sampled_from(["\ud800", "a\0b", "###", "../x", "a dog"]),
)
ANY = st.recursive(
  SCALARS,
  lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
  max_leaves=12,
)
SPANS = st.lists(st.lists(ANY | st.floats(-2, 60), min_size=6, max_size=8) | ANY, max_size=3)
BOX = st.fixed_dictionaries(
  {}, optional={name: ANY for name in ("bbox", "short_expr", "long_expr", "short_expr_negs")}
)
OBJECTS = {
  "webdataset": st.fixed_dictionaries(
    {},
    optional={
      **{name: ANY for name in ("caption", "raw_caption", "longIB_captions", "width", "height")},
      **{name: ANY for name in ("original_width", "original_height")},
      "noun_chunks": SPANS,
      "ref_exps": SPANS | ANY,
    },
  ),
  "finehard": st.fixed_dictionaries(
    {"f_path": st.just("0.jpg") | ANY},
    optional={"caption": ANY, "short_caption": ANY, "bbox_info": st.lists(BOX | ANY) | ANY},
  ),
  "ce_clip": st.fixed_dictionaries(
    {"image_path": st.just("0.jpg") | ANY},
    optional={name: ANY for name in (*ce_clip.COLUMNS.values(), "valid_caption", "id", "caption")},
  ),
  "published": st.fixed_dictionaries(
    {
      "captions_a_pooled": ANY,
      "bboxes_a_pooled": ANY | st.lists(st.dictionaries(st.just("bbox"), ANY) | ANY, max_size=3),
      "desc_a": ANY | st.lists(ANY, max_size=3),
    }
  ),
}


PUBLISHED = {"captions_a_pooled", "bboxes_a_pooled", "desc_a"}


def write(kind, root, found):
  if kind == "webdataset":
    members = [("0.jpg", web_sets.image(0)), ("0.json", json.dumps(found))]
    (root / "0.tar").write_bytes(web_sets.tar_bytes(members))
    return webdataset.source(root)
  (root / "0.jpg").write_bytes(web_sets.image(0))
  if kind == "published":
    (root / "captions_pooled.csv").write_text("0.jpg,zero\n")
    for name in found if isinstance(found, dict) and found.keys() == PUBLISHED else ():
      (root / f"{name}.json").write_text(json.dumps({"0.jpg": found[name]}))
    return published.source(input=root)
  if kind == "finehard":
    (root / "a.json").write_text(json.dumps([found]))
    return finehard.source(root)
  (root / "a.jsonl").write_text(json.dumps(found) + "\n")
  return ce_clip.source(root)


@pytest.mark.parametrize("kind", OBJECTS)
@hypothesis.settings(max_examples=150)
@hypothesis.given(data=st.data())
def test_any_json_is_kept_or_counted(kind, tmp_path_factory, data):
  root = tmp_path_factory.mktemp("any")
  source = write(kind, root, data.draw(OBJECTS[kind] | ANY))
  kept = refused = 0
  for split, item in base.iterate(source):
    assert isinstance(split, str)
    if isinstance(item, records.Refused):
      assert isinstance(item.key, str) and item.what in (
        "records",
        "captions",
        "regions",
        "negatives",
      )
      refused += item.what == "records"
      continue
    checked = records.check(item, tolerance=source.tolerance)
    refused += [what for what, _ in checked.dropped].count("records")
    if checked.record is not None:
      kept += 1
      records.parse(records.encode(checked.record))
  assert kept + refused == 1
