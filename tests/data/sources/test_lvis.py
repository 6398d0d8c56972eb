"""LVIS, whose images have no file names and whose categories have definitions."""

import box_layouts
import pytest
from box_layouts import box

from grain_jax.data.sources import base
from grain_jax.data.sources import lvis as lvis_source

BOXES = (box(0.25, 0.25, 0.75, 0.75), box(0.0125, 0.0125, 0.1125, 0.1125))
DEFINED = (
  "a dispenser that holds a substance under pressure",
  "a weapon for shooting arrows",
)
NAMED = ("aerosol can", "bow (weapon)")


@pytest.mark.parametrize(("flags", "texts"), [([], DEFINED), (["--descriptions=names"], NAMED)])
def test_definitions_or_names(tmp_path, flags, texts):
  box_layouts.lvis(tmp_path / "in")
  opened = box_layouts.built("lvis", tmp_path / "in", tmp_path / "out", *flags)
  said = (["aerosol can, bow (weapon)"], list(zip(texts, BOXES, strict=True)))
  assert box_layouts.content(opened) == {
    "train": {"000000000009": said},
    "val": {"000000000025": said},
  }
  assert box_layouts.dropped(opened) == {}


def test_captions_are_cocos_where_they_are_there(tmp_path):
  root = tmp_path / "in"
  box_layouts.coco(root)
  box_layouts.lvis(root)
  said_again = (root / "annotations/captions_train2017.json").read_text()
  box_layouts.write(root, "annotations/captions_train2014.json", said_again)
  opened = box_layouts.built("lvis", root, tmp_path / "out")
  texts = {
    key: said[0] for part in box_layouts.content(opened).values() for key, said in part.items()
  }
  assert texts == {"000000000009": ["A meal.", "Lunch"], "000000000025": ["A giraffe"]}
  assert box_layouts.dropped(opened) == {}


def test_coco_ids_are_handed_over(tmp_path):
  box_layouts.lvis(tmp_path)
  items = [item for _, item in base.iterate(lvis_source.source(tmp_path)) if isinstance(item, dict)]
  assert [item["ids"] for item in items] == [["9"], ["25"]]


def test_descriptions_of_another_kind_are_one_line(tmp_path):
  box_layouts.lvis(tmp_path)
  with pytest.raises(
    ValueError, match="^--descriptions = 'synonyms' is none of definitions, names"
  ):
    lvis_source.source(tmp_path, descriptions="synonyms")
