"""What a run starts from: its shape adopted or every mismatch named, whole models, other sizes."""

import drawn
import jax
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from grain_jax import config as configs
from grain_jax import trees
from grain_jax.convert import run_folder, start
from grain_jax.models import grain


@pytest.fixture
def model_folder(tiny, tmp_path):
  """(folder of a GRAIN with learned memory positions, its parameters by name)."""
  theirs = configs.from_json(configs.to_json(tiny))
  theirs.model.decoder.memory_positions = True
  params = drawn.params(theirs, seed=5)
  run_folder.write(tmp_path / "model", config=theirs, params=params, source={})
  return tmp_path / "model", dict(trees.named_leaves(params))


def torch_resized(positions, side):
  """OpenCLIP's way: bicubic with antialiasing over the grid, the class token's apart."""
  old = round((len(positions) - 1) ** 0.5)
  grid = torch.tensor(positions[1:]).reshape(1, old, old, -1).permute(0, 3, 1, 2)
  grid = torch.nn.functional.interpolate(
    grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False
  )
  grid = grid.permute(0, 2, 3, 1).reshape(side * side, -1).numpy()
  return np.concatenate([positions[:1], grid])


def test_a_whole_model_is_carried_over_at_half_as_many_pixels_again(tiny, model_folder):
  folder, theirs = model_folder
  tiny.model.decoder.memory_positions = True
  tiny.model.image.size = 48
  tiny.init.model = str(folder)
  said = []
  got = dict(
    trees.named_leaves(start.start_from(tiny, jax.device_put(drawn.params(tiny)), say=said.append))
  )
  assert set(got) == set(theirs) and "logit_scale" in got and "box_head/fc2/kernel" in got
  resized = {"image_tower/position_embedding", "query_decoder/memory_positions"}
  for name, value in got.items():
    if name in resized:
      side = tiny.model.image.size // tiny.model.image.patch
      assert_allclose(value, torch_resized(theirs[name], side), atol=1e-5)
    else:
      assert_array_equal(value, theirs[name], err_msg=name)
  (line,) = said
  assert "step 0" in line and "positions resized from 32 to 48 pixels" in line


def test_every_mismatch_is_named_at_once_with_flags_to_paste(tiny, model_folder):
  folder, _ = model_folder
  tiny.model.update(embed_dim=8, num_queries=7)
  tiny.model.image.update(depth=1, mean=(0.5, 0.5, 0.5))
  tiny.init.model = str(folder)
  with pytest.raises(ValueError) as error:
    start.start_from(tiny, drawn.params(tiny))
  line = str(error.value)
  theirs = configs.read(folder / "config.json").model
  for flag in (
    f"--config.model.embed_dim={theirs.embed_dim} ",
    f"--config.model.num_queries={theirs.num_queries}",
    f"--config.model.image.depth={theirs.image.depth} ",
    f'--config.model.image.mean="{theirs.image.mean}" ',
    "--config.model.decoder.memory_positions=True",
    "--config.init.adopt",
  ):
    assert flag in line
  assert "\n" not in line and line.startswith("config.init.model = ")


def test_the_shape_is_adopted_and_the_run_keeps_it(tiny, model_folder, tmp_path):
  folder, _ = model_folder
  want = configs.resolve(configs.read(folder / "config.json"))
  config = configs.load("configs/cc12m.py")
  config.model.image.size = 0
  config.data.row_length = 8
  config.init.update(model=str(folder), adopt=True)
  said = []
  got = configs.resolve(start.adopt(config, tmp_path / "new", say=said.append))
  for part in ("image", "text", "decoder"):
    for key, value in want.model[part].items():
      if key not in ("variant", "dropout", "init", "init_std", "position_init"):
        assert got.model[part][key] == value, (part, key)
  assert got.model.embed_dim == want.model.embed_dim
  assert got.data.row_length >= got.model.text.context
  assert got.optimizer.lr == config.optimizer.lr and got.model.dtype == config.model.dtype
  (line,) = said
  assert f"image.width {want.model.image.width} (was 768)" in line and "image.size 32" in line
  # A run that has begun keeps its shape, though the folder is gone, and says nothing.
  (tmp_path / "new").mkdir()
  (tmp_path / "new" / "config.json").write_text(configs.to_json(configs.resolve(got)))
  (folder / "config.json").unlink()
  again = start.adopt(config, tmp_path / "new", say=said.append)
  assert configs.resolve(again).to_dict() == configs.resolve(got).to_dict() and len(said) == 1


def test_towers_of_one_shape_fit_what_was_adopted(tiny, tiny_clip, tmp_path):
  run_folder.write(tmp_path / "clip", config=tiny_clip, params=drawn.params(tiny_clip), source={})
  config = configs.load("configs/cc12m.py:runlocal")
  folder = str(tmp_path / "clip")
  config.init.update(image=folder, text=folder, adopt=True)
  config = configs.resolve(start.adopt(config, tmp_path / "run", say=print))
  configs.check(config)
  assert config.model.image.size == 96  # asked for by the recipe: positions are resized
  fresh = jax.device_put(drawn.params(config))
  got = dict(trees.named_leaves(start.start_from(config, fresh, say=print)))
  assert got["image_tower/position_embedding"].shape[0] == 1 + (96 // config.model.image.patch) ** 2
  assert grain.build(config).embed_dim == tiny_clip.model.embed_dim


def test_what_cannot_be_started_from_is_one_line(tiny, tiny_clip, tmp_path):
  run_folder.write(tmp_path / "clip", config=tiny_clip, params=drawn.params(tiny_clip), source={})
  tiny.init.model = str(tmp_path / "clip")
  with pytest.raises(ValueError, match="method 'clip', and this run is 'grain'.*its towers alone"):
    start.start_from(tiny, drawn.params(tiny))
  tiny.init.image = str(tmp_path / "clip")
  with pytest.raises(ValueError, match="is a whole model: leave config.init.image"):
    start.start_from(tiny, drawn.params(tiny))
  tiny.init.update(model="", image=str(tmp_path / "nothing"), adopt=True)
  with pytest.raises(ValueError, match="nothing holds no model"):
    start.adopt(tiny, tmp_path / "run", say=print)
