"""Overrides, sizes by name, checks, and JSON there and back."""

import json
import pathlib
import re

import numpy as np
import pytest

from configs import common
from grain_jax import config as configs
from grain_jax import keys, recipes
from grain_jax.models import layers
from grain_jax.objectives import matching
from grain_jax.training import optim

RECIPES = sorted(p.stem for p in pathlib.Path("configs").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", [r for r in RECIPES if r != "common"])
@pytest.mark.parametrize("arg", ["", ":runlocal"])
def test_every_recipe_passes_its_own_check(name, arg):
  config = configs.resolve(configs.load(f"configs/{name}.py{arg}"))
  configs.check(config)
  assert {k for k, _ in configs.flatten(config)} == {
    k for k, _ in configs.flatten(common.get_config())
  }, "a recipe may only change keys that common.py lists"


def test_published_run_has_the_published_numbers():
  """GRAIN paper, section 4, and the tower sizes of ViT-B/16 (Dosovitskiy et al., table 1)."""
  c = configs.resolve(configs.load("configs/cc12m.py"))
  assert (c.batch_size, c.epochs, c.optimizer.lr, c.optimizer.b2) == (2048, 35, 1e-3, 0.98)
  tower = c.model.image
  assert (tower.width, tower.depth, tower.heads, tower.patch) == (768, 12, 12, 16)


def test_variant_fills_only_what_is_not_given():
  c = common.get_config()
  c.model.image.update(variant="L/14", depth=3)
  tower = configs.resolve(c).model.image
  assert (tower.width, tower.depth, tower.heads, tower.patch) == (1024, 3, 16, 14)


def test_argument_sets_literals_and_strings():
  c = configs.load("configs/cc12m.py:optimizer.lr=0.5,method=clip,data.flip=True")
  assert (c.optimizer.lr, c.method, c.data.flip) == (0.5, "clip", True)


def test_json_there_and_back_keeps_tuples():
  c = common.get_config()
  c.optimizer.lr_scale = (("^image_tower/", 0.1),)
  again = configs.from_json(configs.to_json(c))
  assert again.to_dict() == c.to_dict()
  assert json.loads(configs.to_json(c))["optimizer"]["lr_scale"] == [["^image_tower/", 0.1]]


def test_first_difference_names_what_touches_the_parameters_alone():
  old, new = common.get_config(), common.get_config()
  new.log_every, new.data.dir, new.mesh.data, new.evals = 7, "elsewhere", 4, ()
  assert configs.first_difference(old, new) is None
  new.optimizer.lr = 0.5
  assert configs.first_difference(old, new) == ("optimizer.lr", 1e-3, 0.5)
  old.unlock()
  del old.optimizer["lr"]
  assert configs.first_difference(old, new) == ("optimizer.lr", None, 0.5)


def test_an_old_config_json_reads_as_complete(tmp_path):
  """A key that came later means what runs before it did."""
  values, new = common.get_config().to_dict(), common.get_config()
  assert configs.ADDED.keys() <= dict(configs.flatten(new)).keys()
  for key in configs.ADDED:
    *sections, leaf = key.split(".")
    node = values
    for section in sections:
      node = node[section]
    del node[leaf]
  for section in ("retrieval", "grounding", "composition", "segmentation"):
    assert not values.pop(section)  # older runs lack it
  path = tmp_path / "config.json"
  path.write_text(json.dumps(values))
  old = configs.read(path)
  flat = dict(configs.flatten(old))
  assert flat.keys() == dict(configs.flatten(new)).keys()
  assert {key: flat[key] for key in configs.ADDED} == configs.ADDED
  new.data.reduced_decode = False
  new.model.decoder.init = "per_matrix"  # `continuation` keeps that of a run that has begun
  assert configs.first_difference(old, new) is None
  new.model.image.pre_norm = True
  assert configs.first_difference(old, new) == ("model.image.pre_norm", False, True)


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    ("model.num_queries", 3, ["config.model.num_queries = 3", "config.data.max_regions = 5"]),
    ("model.image.size", 100, ["config.model.image.size = 100", "16 pixels"]),
    ("model.image.variant", "H/14", ["config.model.image.variant = 'H/14'", "B/16"]),
    ("model.text.heads", 7, ["config.model.text.width = 512", "heads = 7"]),
    ("data.row_length", 40, ["config.data.row_length = 40", "config.model.text.context = 77"]),
    ("loss.matcher", "gpu", ["config.loss.matcher = 'gpu'", "host, device"]),
    ("batch_size", -1, ["config.batch_size = -1", "at least 0"]),
    ("save_every", 0, ["config.save_every = 0", "-1: a tenth of the run"]),
    ("accumulate", 0, ["config.accumulate = 0", "positive"]),
    ("profile.num_steps", 0, ["config.profile.num_steps = 0", "at least 1"]),
    ("watchdog_seconds", -1.0, ["config.watchdog_seconds = -1.0", "at least 0"]),
    ("compile_effort", -2.0, ["config.compile_effort = -2.0", "[-1, 1]"]),
    ("optimizer.ema_decay", 1.0, ["config.optimizer.ema_decay = 1.0", "[0, 1)"]),
    ("epochs", -1.0, ["config.epochs = -1.0", "at least 0"]),
    ("model.text.heads", 0, ["config.model.text.heads = 0", "positive"]),
    ("model.decoder.heads", 0, ["config.model.decoder.heads = 0", "positive"]),
    ("model.image.depth", -2, ["config.model.image.depth = -2", "positive"]),
    ("model.decoder.dropout", 1.0, ["config.model.decoder.dropout = 1.0", "[0, 1)"]),
    ("optimizer.clip_norm", -1.0, ["config.optimizer.clip_norm = -1.0", "at least 0. 0 turns it"]),
    ("optimizer.b1", 1.0, ["config.optimizer.b1 = 1.0", "[0, 1)"]),
    ("optimizer.lr_scale", (("^text", -0.1),), ["factor of '^text' is -0.1", "at least 0"]),
    ("model.image.std", (0.2, 0.0, 0.2), ["config.model.image.std = (0.2, 0.0, 0.2)", "positive"]),
    ("seed", -1, ["config.seed = -1", "at least 0"]),
    ("eval_every", -2, ["config.eval_every = -2", "at least -1"]),
    (
      "optimizer.lr_scale",
      ("text_tower", 0.5),
      ["config.optimizer.lr_scale[0] = 'text_tower'", "pair (REGEX, FACTOR)", "0.1),)"],
    ),
    ("optimizer.lr_scale", (("a",),), ["config.optimizer.lr_scale[0] = ('a',)", "pair"]),
    ("optimizer.lr_scale", ("ab",), ["config.optimizer.lr_scale[0] = 'ab'", "pair"]),
    ("optimizer.lr_scale", ((1, 0.5),), ["config.optimizer.lr_scale[0] = (1, 0.5)", "pair"]),
    ("optimizer.lr_scale", (("a", True),), ["factor of 'a' is True"]),
    ("mesh.rules", ("a", ("fsdp",)), ["config.mesh.rules[0] = 'a'", "(REGEX, (AXIS, ...))"]),
    ("mesh.rules", (("a", "fsdp"),), ["config.mesh.rules[0] = ('a', 'fsdp')", "pair"]),
    ("mesh.rules", (("a", (0,)),), ["config.mesh.rules[0] = ('a', (0,))", "pair"]),
    ("model.image.mean", (0.5,), ["config.model.image.mean = (0.5,)", "three numbers"]),
    ("model.image.std", (0.5,) * 4, ["config.model.image.std = (0.5,", "three numbers"]),
    ("model.image.mean", (0.5, None, 0.5), ["config.model.image.mean", "three numbers"]),
    ("optimizer.freeze", "text_tower", ["config.optimizer.freeze = 'text_tower'", "not a tuple"]),
    ("optimizer.freeze", (("a",),), ["config.optimizer.freeze[0] = ('a',)", "not a text"]),
    ("evals", (None,), ["config.evals[0] = None", "not a text"]),
    ("init.keep", (1,), ["config.init.keep[0] = 1", "not a text"]),
    ("zero_shot.templates", (1,), ["config.zero_shot.templates[0] = 1", "not a text"]),
    ("data.sources", ("data/a",), ["config.data.sources[0] = 'data/a'", "{'dir': FOLDER"]),
    ("data.sources", ({"weight": 1.0},), ["config.data.sources[0] = {'weight': 1.0}", "'dir'"]),
  ],
)
def test_what_cannot_work_is_one_line_with_key_and_value(key, value, words):
  c = common.get_config()
  with pytest.raises(ValueError) as caught:
    configs.set_key(c, key, value)
    configs.check(configs.resolve(c))
  line = str(caught.value)
  assert "\n" not in line
  for word in words:
    assert word in line


@pytest.mark.parametrize("key", ["steps", "optimizer.lr", "data.flip", "data.sources", "evals"])
def test_no_key_may_be_none(key):
  """ml_collections lets each be: by a recipe's argument, or where a recipe assigns it."""
  with pytest.raises(ValueError, match=rf"^config\.{key} = None is no value\. Give one"):
    configs.load(f"configs/cc12m.py:{key}=None")
  c = common.get_config()
  section, _, leaf = key.rpartition(".")
  (c[section] if section else c)[leaf] = None
  for look in (configs.check_places, configs.resolve, configs.check):
    with pytest.raises(ValueError, match=rf"^config\.{key} = None is no value"):
      look(c)


@pytest.mark.parametrize("value", [None, {}, {"size": 32}, 5])
def test_a_section_is_set_key_by_key(value):
  with pytest.raises(ValueError, match=r"^config\.model\.image is a section\. .* such as config\."):
    configs.set_key(common.get_config(), "model.image", value)
  c = common.get_config()
  c.model.image = None
  with pytest.raises(ValueError, match=r"^config\.model\.image = None is no value"):
    configs.resolve(c)


NUMBERS = {
  key: value
  for key, value in configs.flatten(common.get_config())
  if isinstance(value if not isinstance(value, tuple) else (value or ("",))[0], (int, float))
  and not isinstance(value, bool)
}


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_limits_and_none_may_be_nan(key):
  """A gradient's sign, a decay, a weight: what is negative or NaN trains without a word."""
  many = isinstance(NUMBERS[key], tuple)
  wrong = [] if key in keys.FREE_NUMBERS else [-7]
  if many or isinstance(NUMBERS[key], float):
    wrong = [float(number) for number in wrong] + [float("nan"), float("inf")]
  for number in wrong:
    c = common.get_config()
    configs.set_key(c, key, (number,) * 3 if many else number)
    with pytest.raises(ValueError, match=re.escape(f"config.{key} = ")):
      configs.check(configs.resolve(c))


def test_hierarchical_stem_needs_patches_that_it_can_build():
  c = configs.load("configs/cc12m.py:model.image.variant=L/14,model.image.stem=hmlp")
  with pytest.raises(ValueError, match=r"model.image.stem = 'hmlp' .* 8, 16, 32, .* not of 14"):
    configs.check(configs.resolve(c))


def test_modules_take_the_choices_of_a_key_from_one_list(monkeypatch):
  for key, values in configs.CHOICES.items():
    with pytest.raises(ValueError, match=rf"config\.{key} = 'x' is unknown.*{values[-1]}"):
      configs.check_choice(key, "x")
    configs.check_choice(key, values[-1])
  monkeypatch.setitem(configs.CHOICES, "optimizer.decay_mask", ())
  monkeypatch.setitem(configs.CHOICES, "loss.matcher", ())
  monkeypatch.setitem(configs.CHOICES, "model.remat", ())
  for call in (
    lambda: optim.decay_mask({}, "clean"),
    lambda: matching.solve(np.zeros((1, 1)), np.ones(1, bool), solver="device"),
    lambda: layers.rematerialize(layers.Block, "block"),
  ):
    with pytest.raises(ValueError, match="is unknown"):
      call()


@pytest.mark.parametrize(
  ("key", "nearest"),
  [
    ("optimzer.lr", "config.optimizer.lr"),
    ("optimizer.learning_rate", "Did you mean config.optimizer.lr?"),
    ("max_regions", "config.data.max_regions"),
    ("model.image.widht", "config.model.image.width"),
    ("seed.of", "Did you mean config.seed?"),
  ],
)
def test_unknown_key_names_the_nearest(key, nearest):
  with pytest.raises(ValueError) as caught:
    configs.set_key(common.get_config(), key, 1)
  assert f"config.{key} is not a key" in str(caught.value) and nearest in str(caught.value)


def test_value_of_another_type_is_refused():
  with pytest.raises(ValueError, match=r"config\.batch_size = 'many' is not a int"):
    configs.load("configs/cc12m.py:batch_size=many")


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("c.optimizer.learning_rate = 5.0", "'learning_rate' is not a key there. Did you mean lr?"),
    ("c.learning_rate = 5.0", "'learning_rate' is not a key there. Did you mean optimizer.lr?"),
    ("c.optimizer.bs = 5", "'bs' is not a key there. Did you mean config.batch_size?"),
    ("c.model.text.num_layers = 5", "'num_layers' is not a key there. Did you mean depth?"),
    ("c.mesh.xyzzy = 5", "'xyzzy' is not a key there. There are data, fsdp, rules, tensor."),
    ("c.model.update(bf16=True)", "'bf16' is not a key there. Did you mean dtype=bfloat16?"),
    ("c.batchsize = 3", "'batchsize' is not a key there. Did you mean batch_size"),
    ("c.model.image.update(widht=3)", "'widht' is not a key there. Did you mean width"),
    ("c.optimzer.lr = 1.0", "'optimzer' is not a key there. Did you mean optimizer"),
    ("c.optimizer.lr = 'high'", "high is of original type"),
  ],
)
def test_a_recipe_that_sets_no_key_ends_in_one_line(tmp_path, line, words):
  recipe = tmp_path / "recipe.py"
  recipe.write_text(
    "from configs import common\n\n\ndef get_config(arg=''):\n  c = common.get_config()\n"
    f"  {line}\n  return common.parse(c, arg)\n"
  )
  with pytest.raises(ValueError) as error:
    configs.load(str(recipe))
  said = str(error.value)
  assert said.startswith(f"--config={recipe}: line 6: ") and words in said
  assert "\n" not in said


def test_a_recipe_in_the_users_folder(tmp_path, monkeypatch):
  (tmp_path / "own.py").write_text(
    "from configs import common\n\n\ndef get_config(arg=''):\n"
    "  return common.parse(common.get_config(), arg)\n"
  )
  monkeypatch.setenv("HOME", str(tmp_path))
  assert recipes.find("~/own.py:seed=3") == f"{tmp_path}/own.py:seed=3"
  found, want = (configs.load(f"{folder}/own.py:seed=3") for folder in ("~", tmp_path))
  assert found.to_dict() == want.to_dict() and found.seed == 3


def test_a_defect_of_a_recipe_itself_keeps_its_traceback(tmp_path):
  recipe = tmp_path / "recipe.py"
  recipe.write_text("def get_config(arg=''):\n  return None.x\n")
  with pytest.raises(AttributeError):
    configs.load(str(recipe))


def test_every_key_has_a_comment():
  lines = pathlib.Path("configs/common.py").read_text().split("def parse")[0].splitlines()
  keys = [line for line in lines if re.match(r"  c\.[\w.]+ = ", line)]
  assert len(keys) > 100
  assert [line for line in keys if "  # " not in line and "ConfigDict()" not in line] == []
