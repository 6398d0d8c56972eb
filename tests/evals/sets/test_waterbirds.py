"""Waterbirds on a folder of the published layout, made by the test."""

import csv

import numpy as np
import pytest
from sklearn import metrics

from grain_jax.evals.inputs import images as images_lib
from grain_jax.evals.inputs.encoders import Encoders
from grain_jax.evals.inputs.options import Options
from grain_jax.evals.sets import waterbirds

SIDE = 8


def encoders(batch_size=2):
  """A world in which an image's red is the index of the text that it shows."""
  axes = np.eye(4, dtype=np.float32)

  def nothing(images):
    raise AssertionError("only images are needed")

  return Encoders(
    image=lambda images: axes[images[:, 0, 0, 0]],
    text=lambda asked: np.stack([axes[TEXTS.index(t)] for t in asked]),
    regions=nothing,
    size=SIDE,
    batch_size=batch_size,
  )


def make_waterbirds(root, rows, inside="waterbird_complete95_forest2water2"):
  """rows: (seen, y, place, split) with `seen` the class that the image shows."""
  base = root / "waterbirds" / inside
  base.mkdir(parents=True)
  with (base / "metadata.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
    for i, (seen, y, place, split) in enumerate(rows):
      writer.writerow([i, f"001.Bird/{i}.jpg", y, split, place, "/o/ocean/1.jpg"])
      path = base / "001.Bird" / f"{i}.jpg"
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(images_lib.png(np.full((SIDE, SIDE, 3), seen, np.uint8)))
  return base


ROWS = [
  *[(0, 0, 0, 2)] * 4,  # land birds on land: all right
  *[(0, 0, 1, 2), (1, 0, 1, 2), (0, 0, 1, 2), (0, 0, 1, 2)],  # on water: 3 of 4
  *[(1, 1, 0, 2), (0, 1, 0, 2), (0, 1, 0, 2)],  # water birds on land: 1 of 3
  *[(1, 1, 1, 2), (0, 1, 1, 2)],  # on water: 1 of 2
  *[(1, 0, 0, 0), (1, 0, 0, 1)],  # other splits
]
TEXTS = ["a photo of a landbird", "a photo of a waterbird"]


@pytest.mark.parametrize("inside", ["waterbird_complete95_forest2water2", "."])
def test_waterbirds_by_hand(tmp_path, options, inside):
  make_waterbirds(tmp_path, ROWS, inside)
  waterbirds.check("test", options)
  found = waterbirds.run(encoders(batch_size=4), "test", options)
  assert found == {
    "waterbirds/test/accuracy": pytest.approx(9 / 13),
    "waterbirds/test/landbird_on_land": 1.0,
    "waterbirds/test/landbird_on_water": pytest.approx(3 / 4),
    "waterbirds/test/waterbird_on_land": pytest.approx(1 / 3),
    "waterbirds/test/waterbird_on_water": pytest.approx(1 / 2),
    "waterbirds/test/worst_group": pytest.approx(1 / 3),
    "waterbirds/test/drop_landbird": pytest.approx(1 / 4),
    "waterbirds/test/drop_waterbird": pytest.approx(1 / 2 - 1 / 3),
    "waterbirds/test/landbird_on_land/examples": 4,
    "waterbirds/test/landbird_on_water/examples": 4,
    "waterbirds/test/waterbird_on_land/examples": 3,
    "waterbirds/test/waterbird_on_water/examples": 2,
    "waterbirds/test/examples": 13,
    "waterbirds/test/rows": 13,
  }
  assert waterbirds.run(encoders(), "val", options)["waterbirds/val/accuracy"] == 0


def test_groups_of_waterbirds_against_sklearn():
  rng = np.random.default_rng(0)
  birds, places, said = rng.integers(0, 2, (3, 200))
  found = waterbirds.group_results(said == birds, 2 * birds + places)
  assert found["accuracy"] == pytest.approx(metrics.accuracy_score(birds, said))
  for place, name in enumerate(waterbirds.PLACES):
    here = places == place
    recalls = metrics.recall_score(birds[here], said[here], labels=[0, 1], average=None)
    for bird, recall in zip(waterbirds.BIRDS, recalls, strict=True):
      assert found[f"{bird}_on_{name}"] == pytest.approx(recall, abs=1e-6)


def test_a_trial_of_waterbirds_leaves_out_groups_it_does_not_reach(tmp_path):
  make_waterbirds(tmp_path, ROWS)
  options = Options(root=tmp_path, limit=5)
  found = waterbirds.run(encoders(), "test", options)
  assert found["waterbirds/test/rows"] == 5 and found["waterbirds/test/drop_landbird"] == 0
  assert "waterbirds/test/drop_waterbird" not in found
  assert found["waterbirds/test/waterbird_on_land/examples"] == 0


def test_waterbirds_counts_what_cannot_be_read(tmp_path, options, warnings):
  base = make_waterbirds(tmp_path, ROWS)
  (base / "001.Bird" / "8.jpg").write_bytes(b"no picture")  # the water bird on land that was right
  found = waterbirds.run(encoders(), "test", options)
  assert found["waterbirds/test/examples"] == 12 and found["waterbirds/test/rows"] == 13
  assert found["waterbirds/test/accuracy"] == pytest.approx(8 / 12)
  assert found["waterbirds/test/waterbird_on_land"] == found["waterbirds/test/worst_group"] == 0
  assert found["waterbirds/test/waterbird_on_water"] == pytest.approx(1 / 2)
  assert "1 of 13" in warnings[0]


def _edit(base, old, new):
  path = base / "metadata.csv"
  path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
  ("damage", "match"),
  [
    (lambda base: (base / "metadata.csv").unlink(), "there is no .*metadata.csv"),
    (lambda base: (base / "001.Bird" / "3.jpg").unlink(), "1 of 13 pictures are missing.*3.jpg"),
    (lambda base: _edit(base, "place,", "where,"), "has no column place"),
    (lambda base: _edit(base, "2.jpg,0,2,0", "2.jpg,0,2,7"), "line 4: y = '0' and place = '7'"),
    (lambda base: _edit(base, "2.jpg,0,2,0,/o/ocean/1.jpg", "2.jpg,0"), "line 4 is cut short"),
    (lambda base: _edit(base, ",2,", ",1,"), "no row of split 2"),
  ],
)
def test_damaged_waterbirds(tmp_path, options, damage, match):
  damage(make_waterbirds(tmp_path, ROWS))
  with pytest.raises(ValueError, match=match) as error:
    waterbirds.check("test", options)
  assert "\n" not in str(error.value)


def test_missing_waterbirds_say_how_to_get_them(tmp_path):
  for root in (None, tmp_path):
    with pytest.raises(ValueError, match="Get waterbird_complete95_forest2water2.tar.gz"):
      waterbirds.check("test", Options(root=root))
