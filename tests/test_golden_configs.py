"""Every recipe as it was when last reviewed: a changed default shows as a changed file.

`PYTHONPATH=. python tests/test_golden_configs.py` writes tests/golden/configs/*.json anew.
"""

import json
import pathlib

import pytest

from grain_jax import config as configs

FOLDER = pathlib.Path(__file__).parent / "golden" / "configs"
RECIPES = pathlib.Path(__file__).parent.parent / "configs"
NAMES = sorted(p.stem for p in RECIPES.glob("*.py") if p.stem not in ("__init__", "common"))


def dump(name: str) -> str:
  """The resolved recipe, a dotted key a line."""
  config = configs.resolve(configs.load(str(RECIPES / f"{name}.py")))
  return json.dumps(dict(configs.flatten(config)), indent=1) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_the_reviewed_one(name):
  want = json.loads((FOLDER / f"{name}.json").read_text())
  got = json.loads(dump(name))
  changed = {k: (want.get(k), got.get(k)) for k in want | got if want.get(k) != got.get(k)}
  assert not changed, "if meant, write them anew: see the top of this file"


def test_no_golden_file_is_of_a_recipe_that_is_gone():
  assert sorted(p.stem for p in FOLDER.glob("*.json")) == NAMES


# FACTS as numbers: GRAIN paper sec. 4 and the published code.
PUBLISHED = {
  "batch_size": 2048,
  "epochs": 35.0,
  "data.resize": "squash",
  "data.caption": "half",
  "data.flip": False,
  "data.max_regions": 5,
  "model.embed_dim": 512,
  "model.num_queries": 5,
  "model.image.size": 224,
  "model.image.width": 768,
  "model.image.depth": 12,
  "model.image.heads": 12,
  "model.image.patch": 16,
  "model.image.activation": "gelu",
  "model.image.qk_norm": True,
  "model.image.norm_eps": 1e-6,
  "model.image.mean": [0.485, 0.456, 0.406],
  "model.image.std": [0.229, 0.224, 0.225],
  "model.text.width": 512,
  "model.text.depth": 12,
  "model.text.heads": 8,
  "model.text.context": 77,
  "model.text.activation": "quick_gelu",
  "model.decoder.width": 512,
  "model.decoder.depth": 6,
  "model.decoder.heads": 8,
  "model.decoder.mlp_dim": 2048,
  "model.decoder.dropout": 0.1,
  "model.decoder.memory_positions": False,
  "loss.caption": 1.0,
  "loss.box": 1.0,
  "loss.region": 1.0,
  "loss.box_loss_scale": 1.5,
  "loss.box_l1_cost": 5.0,
  "loss.box_giou_cost": 2.0,
  "loss.aux_box_loss": False,
  "loss.region_negatives": "global",
  "optimizer.name": "adamw",
  "optimizer.lr": 1e-3,
  "optimizer.lr_init": 1e-6,
  "optimizer.lr_end": 1e-5,
  "optimizer.warmup_epochs": 1.0,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.98,
  "optimizer.eps": 1e-8,
  "optimizer.weight_decay": 0.1,
  "optimizer.clip_norm": 0.0,
}


@pytest.mark.parametrize("name", ["cc12m", "cc3m"])
def test_full_size_recipes_have_the_published_numbers(name):
  got = json.loads(dump(name))
  assert {k: got[k] for k in PUBLISHED} == PUBLISHED


if __name__ == "__main__":
  FOLDER.mkdir(parents=True, exist_ok=True)
  for recipe in NAMES:
    (FOLDER / f"{recipe}.json").write_text(dump(recipe))
