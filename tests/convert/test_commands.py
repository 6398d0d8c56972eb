"""The command lines, our own safetensors, and outputs that are whole or absent."""

import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import stock_models as stock
from numpy.testing import assert_array_equal

from grain_jax import config as configs
from grain_jax import export, keys, trees
from grain_jax.convert import convert, run_folder, staging, weights


@pytest.fixture
def run(tiny, tmp_path, rng):
  params = stock.random_run(tmp_path / "run", tiny, rng)
  return tmp_path / "run", params


def command(module, *flags):
  environment = {**os.environ, "XLA_FLAGS": ""}
  call = [sys.executable, "-m", f"grain_jax.{module}", *flags]
  return subprocess.run(call, env=environment, capture_output=True, text=True)


def test_out_and_in_by_command_line(run, tiny, tmp_path):
  folder, params = run
  out, again = tmp_path / "weights", tmp_path / "again"
  done = command("export", f"--workdir={folder}", "--format=safetensors", f"--out={out}")
  assert done.returncode == 0, done.stderr
  assert "checkpoint 0" in done.stdout
  flat = safetensors.numpy.load_file(out / "model.safetensors")
  assert_array_equal(
    flat["image_tower/blocks/mlp/fc1/kernel"],
    params["image_tower"]["blocks"]["mlp"]["fc1"]["kernel"],
  )
  assert set(flat) == {name for name, _ in trees.named_leaves(params)}
  done = command("convert", "--from=safetensors", f"--input={out}", f"--out={again}")
  assert done.returncode == 0, done.stderr
  config, got, step = stock.run_of(again)
  stock.assert_equal_trees(got, params)
  assert (step, config.to_dict()) == (0, stock.run_of(folder)[0].to_dict())


def test_wrong_flags_end_in_one_line(tmp_path):
  done = command("convert", "--from=hf_clip", f"--out={tmp_path / 'x'}")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--input" in done.stderr
  flags = (f"--input={tmp_path / 'none'}", f"--out={tmp_path / 'x'}")
  done = command("convert", "--from=grain_torch", *flags)
  assert done.returncode == 1 and done.stderr.count("\n") == 1 and "none" in done.stderr


def test_folders_in_the_users_folder(run, tmp_path, monkeypatch):
  _, params = run
  monkeypatch.setenv("HOME", str(tmp_path))
  export.export("~/run", format="safetensors", out="~/weights")
  convert.convert("safetensors", "~/weights", out="~/again")
  stock.assert_equal_trees(stock.run_of(tmp_path / "again")[1], params)


@pytest.mark.parametrize(
  "name",
  [
    "openai/clip-vit-base-patch16",
    "hf://openai/clip-vit-base-patch16",
    "https://huggingface.co/openai/clip-vit-base-patch16/tree/main",
  ],
)
def test_a_name_of_the_hub_is_told_how_to_be_fetched(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  call = lambda: convert.convert("hf_clip", name, out="x")  # noqa: E731
  words = "hf download openai/clip-vit-base-patch16 --local-dir weights/clip-vit-base-patch16"
  stock.fails_in_one_line(call, tmp_path / "x", words)


@pytest.mark.parametrize(
  "name", ["weights/clip.pt", "weights/clip", "./clip", "../clip", "a/b/c", "/openai/clip", "clip"]
)
def test_a_path_is_no_name_of_the_hub(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "weights").mkdir()
  call = lambda: convert.convert("hf_clip", name, out="x")  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "x", f"--input={name} does not exist.")


def test_nothing_is_left_where_writing_fails(run, tiny, tmp_path, monkeypatch):
  folder, params = run
  call = lambda: export.export(str(tmp_path), format="safetensors", out=str(tmp_path / "x"))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "x", "config.json")
  call = lambda: export.export(str(folder), format="safetensors", out=str(tmp_path / "x"), step=5)  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "x", "step 5")
  call = lambda: export.export(str(folder), format="safetensors", out=str(folder))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "x", "exists already")
  call = lambda: export.export(str(folder), format="onnx", out=str(tmp_path / "x"))  # noqa: E731
  stock.fails_in_one_line(call, tmp_path / "x", "--format=onnx", "hf_clip")

  def fail(config):
    raise ValueError("disk full")

  before = sorted(tmp_path.iterdir())
  monkeypatch.setattr(configs, "to_json", fail)
  with pytest.raises(ValueError, match="disk full"):
    run_folder.write(tmp_path / "x", config=tiny, params=params, source={})
  assert sorted(tmp_path.iterdir()) == before
  with pytest.raises(ValueError, match="exists"), staging.staged(tmp_path / "y") as path:
    path.write_text("ours")
    (tmp_path / "y").write_text("someone else's, meanwhile")
  assert (tmp_path / "y").read_text() == "someone else's, meanwhile"
  assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "y"])


def test_no_folder_of_another_machine_goes_out_or_comes_in(tiny, tmp_path, rng):
  for key, value in keys.OF_MACHINE.items():
    place = ({"dir": "/home/me/a", "weight": 1.0},) if value == () else f"/home/me/{key}"
    configs.set_key(tiny, key, place)
  stock.random_run(tmp_path / "run", tiny, rng)
  out = tmp_path / "weights"
  export.export(str(tmp_path / "run"), format="safetensors", out=str(out))
  assert "/home/me" not in (out / "config.json").read_text()
  (out / "config.json").write_text(configs.to_json(tiny))
  config = convert.convert("safetensors", str(out), out=str(tmp_path / "again"))
  assert "/home/me" not in configs.to_json(config)


def test_safetensors_of_another_model_are_refused(run, tmp_path):
  folder, _ = run
  out = tmp_path / "weights"
  export.export(str(folder), format="safetensors", out=str(out))
  flat = safetensors.numpy.load_file(out / "model.safetensors")
  call = lambda: convert.convert("safetensors", str(out), out=str(tmp_path / "x"))  # noqa: E731
  text = (out / "config.json").read_text()

  bad = {**flat, "text_projection/kernel": np.ones((3, 4), np.float32)}
  safetensors.numpy.save_file(bad, out / "model.safetensors")
  stock.fails_in_one_line(call, tmp_path / "x", "text_projection/kernel", "(3, 4)", "(32, 16)")
  bad = {key: value for key, value in flat.items() if "query_norm" not in key} | {
    "a/b": flat["logit_scale"]
  }
  safetensors.numpy.save_file(bad, out / "model.safetensors")
  stock.fails_in_one_line(call, tmp_path / "x", "lacks image_tower", "query_norm", "unknown a/b")
  safetensors.numpy.save_file(flat, out / "model.safetensors")
  for old, new, word in (
    ('"seed"', '"sede"', "config.sede"),
    ('"num_queries": 5', '"num_queries": "many"', "config.model.num_queries"),
    ('"method": "grain"', '"method": "dino"', "no known method"),
    ('"method"', '"methods"', "no known method"),
    ("{", "", "not JSON"),
  ):
    (out / "config.json").write_text(text.replace(old, new, 1))
    stock.fails_in_one_line(call, tmp_path / "x", word)


def test_positions_of_the_decoder_are_resized_with_those_of_the_tower(tiny, tmp_path, rng):
  tiny.model.decoder.memory_positions = True
  stock.random_run(tmp_path / "run", tiny, rng)
  out = tmp_path / "weights"
  export.export(str(tmp_path / "run"), format="safetensors", out=str(out))
  convert.convert("safetensors", str(out), out=str(tmp_path / "large"), image_size=64)
  params = weights.load(tmp_path / "large")[1]
  patches = (64 // tiny.model.image.patch) ** 2
  assert params["query_decoder"]["memory_positions"].shape[0] in (patches, patches + 1)


def test_default_configuration_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
  from configs import common

  monkeypatch.chdir(tmp_path)
  assert run_folder.default_config() == configs.resolve(common.get_config())
