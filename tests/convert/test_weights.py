"""Starting a run from somebody's towers: what is carried over, stays fresh, is refused."""

import json
import os
import shutil
import subprocess
import sys

import drawn
import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import grain_jax
from bench import kills
from grain_jax import config as configs
from grain_jax import encoders as encoders_lib
from grain_jax import trees
from grain_jax.convert import native, run_folder, start, weights
from grain_jax.runtime import mesh as meshes
from grain_jax.training import loop as train
from grain_jax.training import steps


@pytest.fixture(scope="module")
def clip_folder(tiny_clip, tmp_path_factory):
  """A CLIP as `convert` leaves it, of other parameters than a fresh model of `tiny`; not to be
  written to."""
  folder = tmp_path_factory.mktemp("towers") / "clip"
  params = drawn.params(tiny_clip, seed=7)
  run_folder.write(folder, config=tiny_clip, params=params, source={})
  return folder, dict(trees.named_leaves(params))


def fresh(config):
  """Parameters on all eight devices, the token embedding cut in two."""
  config.mesh.update(fsdp=2, rules=(("token_embedding", ("fsdp",)),))
  params = drawn.params(config)
  state = steps.TrainState(np.int32(0), params, ())
  shardings = meshes.state_shardings(state, meshes.create(config), config.mesh.rules)
  return jax.device_put(params, shardings.params)


def test_towers_are_carried_over_and_the_decoder_stays_fresh(tiny, clip_folder):
  folder, theirs = clip_folder
  params = fresh(tiny)
  tiny.init.update(image=str(folder), text=str(folder))
  got = dict(trees.named_leaves(start.start_from(tiny, params)))
  carried = [n for n in got if n.startswith(("image_tower/", "text_tower/", "text_projection/"))]
  assert len(carried) > 20 and len(got) > len(carried) + 20
  for name, before in trees.named_leaves(params):
    assert_array_equal(got[name], theirs[name] if name in carried else before, err_msg=name)
    assert got[name].sharding == before.sharding
  kernels = [n for n in carried if n.endswith("kernel")]
  assert all(np.any(theirs[n] != dict(trees.named_leaves(params))[n]) for n in kernels)


def test_one_tower_alone(tiny, clip_folder):
  folder, theirs = clip_folder
  params = fresh(tiny)
  tiny.init.text = str(folder)
  got, before = (dict(trees.named_leaves(p)) for p in (start.start_from(tiny, params), params))
  assert_array_equal(got["text_projection/kernel"], theirs["text_projection/kernel"])
  kernel = "image_tower/blocks/mlp/fc1/kernel"
  assert_array_equal(got[kernel], before[kernel])


@pytest.mark.parametrize(
  ("key", "value", "line"),
  [
    ("model.image.activation", "quick_gelu", "config.model.image.activation is 'gelu' there and"),
    ("model.image.qk_norm", False, "config.model.image.qk_norm is True there and False here"),
    ("model.text.depth", 1, "config.model.text.depth is 2 there and 1 here"),
    ("model.embed_dim", 8, "config.model.embed_dim is 16 there and 8 here"),
  ],
)
def test_another_architecture_is_one_line(tiny, clip_folder, key, value, line):
  folder, _ = clip_folder
  configs.set_key(tiny, key, value)
  params = fresh(tiny)
  tiny.init.update(image=str(folder), text=str(folder))
  with pytest.raises(ValueError, match=line) as caught:
    start.start_from(tiny, params)
  assert "\n" not in str(caught.value) and str(caught.value).startswith("config.init.")


def test_a_folder_without_a_model_names_the_key(tiny, tmp_path):
  params = fresh(tiny)
  tiny.init.image = str(tmp_path)
  with pytest.raises(ValueError, match=r"config.init.image: .* holds no model"):
    start.start_from(tiny, params)


@pytest.mark.parametrize(
  ("data", "fsdp", "parts"), [(-1, 2, 2), (-1, 3, 1), (4, -1, 2), (3, -1, 1), (16, 2, 2)]
)
def test_a_run_is_read_as_it_is_cut_where_the_devices_allow_it(tiny, tmp_path, data, fsdp, parts):
  tiny.mesh.update(data=data, fsdp=fsdp, rules=(("token_embedding$", ("fsdp",)),))
  params = drawn.params(tiny)
  run_folder.write(tmp_path / "run", config=tiny, params=params, source={})
  config, got = weights.load(tmp_path / "run")
  embedding = got["text_tower"]["token_embedding"]
  assert {s.data.shape[0] for s in embedding.addressable_shards} == {49408 // parts}
  assert meshes.fits(config, 8)
  assert_array_equal(embedding, params["text_tower"]["token_embedding"])


def test_a_damaged_config_of_a_run_is_one_line(clip_folder, tmp_path):
  folder = shutil.copytree(clip_folder[0], tmp_path / "run")
  (folder / "config.json").write_text('{"seed": ')
  with pytest.raises(ValueError, match=rf"{folder}/config.json is not JSON of a configuration"):
    weights.load(folder)


TWO = """
import json, sys
import jax
import numpy as np
from absl import flags
import grain_jax
from grain_jax import config as configs
from grain_jax import encoders as encoders_lib
from grain_jax import embed, trees
from grain_jax.convert import start, weights
from grain_jax.models import grain, initial
from grain_jax.runtime import addresses, distributed
from grain_jax.runtime import mesh as meshes

run, address, index, out = sys.argv[1:]
flags.FLAGS(sys.argv[:1])
with distributed.session(addresses.Address("flags", address, 2, int(index))):
  config, params = weights.load(run)
  name, cut = "text_tower/token_embedding", params["text_tower"]["token_embedding"]
  assert not cut.is_fully_addressable and not cut.is_fully_replicated
  said = {"fingerprint": encoders_lib.model_fingerprint(config, params)}
  encoders, mesh = embed.open_encoders(config, params, batch_size=2)
  with jax.set_mesh(mesh):
    said["embed"] = encoders.text(["a red apple"]).tolist()
  said["load"] = grain_jax.load(run).encode_text("a red apple").tolist()

  new = configs.from_json(configs.to_json(config))
  new.mesh.update(data=2, fsdp=1)
  new.init.update(image=run, text=run)
  mesh = meshes.create(new, batches=())
  with jax.set_mesh(mesh):
    fresh = jax.jit(
      lambda: initial.init_params(grain.build(new), new), out_shardings=meshes.replicated(mesh)
    )()
    started = dict(trees.named_leaves(start.start_from(new, fresh)))
  names = (name, "text_projection/kernel")
  said["start"] = {n: np.asarray(started[n], np.float64).sum() for n in names}
  if index == "0":
    open(out, "w").write(json.dumps(said))
"""


def test_a_run_with_fsdp_over_two_processes_is_read_whole(tiny, tmp_path):
  """By `config.init`, `embed` and `load`: each process holds half of the token embedding."""
  tiny.mesh.update(data=-1, fsdp=2, rules=(("token_embedding$", ("fsdp",)),))
  tiny.model.update(dtype="float32")
  params = drawn.params(tiny)
  run_folder.write(tmp_path / "run", config=tiny, params=params, source={})
  address, out = f"127.0.0.1:{kills.free_port()}", tmp_path / "said.json"
  xla = f"{kills.XLA_FLAGS} --xla_force_host_platform_device_count=1"
  env = os.environ | {"XLA_FLAGS": xla, "PYTHONPATH": str(kills.ROOT)}
  pair = [
    subprocess.Popen([sys.executable, "-c", TWO, tmp_path / "run", address, str(i), out], env=env)
    for i in range(2)
  ]
  assert [process.wait(200) for process in pair] == [0, 0]
  said = json.loads(out.read_text())
  assert said["fingerprint"] == encoders_lib.model_fingerprint(tiny, params)
  alone = grain_jax.load(tmp_path / "run").encode_text("a red apple")
  assert_allclose(said["load"], alone, atol=1e-6)
  assert_allclose(said["embed"], alone, atol=1e-6)
  theirs = dict(trees.named_leaves(params))
  for name, total in said["start"].items():
    assert_allclose(total, np.asarray(theirs[name], np.float64).sum())


@pytest.mark.slow
def test_a_run_starts_from_frozen_towers_and_leaves_them(
  tiny, clip_folder, scenes_dir, tmp_path, monkeypatch
):
  """And no step waits for the metrics of the one before it: those are read behind its back."""
  folder, theirs = clip_folder
  tiny.data.dir, tiny.evals, tiny.method = str(scenes_dir), (), "clip"
  tiny.init.update(image=str(folder), text=str(folder))
  tiny.optimizer.update(freeze=("^image_tower/",), lr=0.1, warmup_steps=0, warmup_epochs=0.0)
  tiny.log_every, tiny.steps, tiny.save_every = 1, 3, 3
  calls, make, summarize = [], steps.make_train_step, train.metrics.summarize

  def make_train_step(*args, **options):
    step = make(*args, **options)
    return lambda state, batch: calls.append("step") or step(state, batch)

  monkeypatch.setattr(train.steps, "make_train_step", make_train_step)
  monkeypatch.setattr(
    train.metrics, "summarize", lambda pairs: calls.append("read") or summarize(pairs)
  )
  train.train(tiny, str(tmp_path / "run"))
  assert calls == ["step", "step", "read", "step", "read", "read"]  # the last is saved
  assert [line["step"] for line in train.metrics.read_jsonl(tmp_path / "run/metrics.jsonl")] == [
    1, 2, 3,
  ]  # fmt: skip
  _, params = weights.load(tmp_path / "run")
  got = dict(trees.named_leaves(jax.tree.map(np.asarray, params)))
  for name in theirs:
    if name.startswith("image_tower/"):
      assert_array_equal(got[name], theirs[name], err_msg=name)
  name = "text_tower/blocks/mlp/fc1/kernel"
  assert np.any(got[name] != theirs[name])


def test_attention_asked_for_by_name_is_the_runs_own_matter(tiny, tmp_path):
  """A run on a GPU may ask for cuDNN; its model is read anywhere, and by a single patch."""
  tiny.model.update(attention="cudnn", dtype="bfloat16")
  native.save(
    tmp_path / "export", config=tiny, params=jax.tree.map(np.asarray, drawn.params(tiny)), step=1
  )
  model = grain_jax.load(tmp_path / "export")
  assert model.encode_text(["a red apple"]).shape == (1, 16)
  assert model.encode_patches(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 2, 2, 16)
