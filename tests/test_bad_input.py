"""What a user can get wrong: one line that says what, where and what to do; nothing is lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from bench import kills
from grain_jax.convert import weights
from grain_jax.training import loop as train


def command(module, *flags):
  """(exit code, stderr) of a real process."""
  environment = {**os.environ, "XLA_FLAGS": kills.XLA_FLAGS}
  arguments = [sys.executable, "-m", module, *flags]
  done = subprocess.run(arguments, cwd=kills.ROOT, env=environment, capture_output=True, text=True)
  return done.returncode, done.stderr


def assert_one_line(stderr, *words):
  assert stderr.count("\n") == 1 and "Traceback" not in stderr, stderr
  for word in words:
    assert str(word) in stderr, stderr


QUICKSTART = f"--config=configs/quickstart.py:{kills.TINY}"


@pytest.mark.slow
def test_unknown_key_in_a_real_process(tmp_path):
  code, stderr = command(
    "grain_jax.main", QUICKSTART, f"--workdir={tmp_path}", "--config.optimzer.lr=1"
  )
  assert code == 2
  assert_one_line(stderr, "config.optimzer.lr", "Did you mean config.optimizer.lr")


@pytest.mark.slow
def test_missing_data_in_a_real_process(tmp_path):
  data, workdir = tmp_path / "none", tmp_path / "run"
  code, stderr = command(
    "grain_jax.main", QUICKSTART, f"--workdir={workdir}", f"--config.data.dir={data}"
  )
  assert code == 1 and not workdir.exists()
  assert_one_line(stderr, data, "no such directory", "grain_jax.data.build")


def test_tensorflow_which_loads_for_seconds_does_not_stand_before_what_may_be_wrong():
  program = "import sys, grain_jax.training.loop; sys.exit('tensorflow' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", program], cwd=kills.ROOT).returncode == 0


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_the_last_good_checkpoint_stays(scenes_dir, tmp_path):
  """The rate is sane for the first steps of the warm-up and then beyond all bounds."""
  flags = (
    QUICKSTART, f"--workdir={tmp_path}", f"--config.data.dir={scenes_dir}", "--config.evals=()",
    "--config.save_every=1", "--config.optimizer.lr=1e30", "--config.optimizer.warmup_steps=1",
    "--config.optimizer.lr_init=1e-4", "--config.optimizer.name=adamw", "--config.method=clip",
  )  # fmt: skip
  code, stderr = command("grain_jax.main", *flags)
  assert code == 1
  kept = kills.saved_steps(tmp_path)
  assert kept and kept[-1] < kills.STEPS
  assert_one_line(stderr, "not finite", f"checkpoint {kept[-1]} is kept", "Lower config.optimizer")
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    assert json.loads(line)["train/nonfinite"] == 0


@pytest.mark.slow
def test_evaluate_without_a_run_in_a_real_process(tmp_path):
  code, stderr = command("grain_jax.evaluate", f"--workdir={tmp_path}")
  assert code == 1
  assert_one_line(stderr, tmp_path, "no config.json")


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model.num_queries": 2}, ["config.model.num_queries = 2", "config.data.max_regions = 3"]),
    ({"batch_size": 12}, ["config.batch_size = 12", "8 devices", "Try 8 or 16"]),
    ({"batch_size": 128}, ["batch_size = 128", "64 records"]),
    ({"data.split": "trian"}, ["'trian'", "train"]),
    ({"evals": ("zero_shoot",)}, ["'zero_shoot'", "zero_shot"]),
    ({"retrieval.split": "test"}, ["config.retrieval.split = 'test'", "train, val, objects"]),
    ({"data.dir": ""}, ["config.data.dir is empty"]),
    ({"optimizer.warmup_steps": 9}, ["warm-up takes 9 steps of a run of 4"]),
    ({"optimizer.freeze": ("imgae",)}, ["config.optimizer.freeze", "'imgae' matches no parameter"]),
    ({"mesh.data": 3}, ["config.mesh", "8 devices"]),
    ({"zero_shot.descriptors": "/nowhere.json"}, ["config.zero_shot: ", "/nowhere.json"]),
    ({"zero_shot.templates": ("a photo",)}, ["config.zero_shot: ", "'a photo'"]),
    ({"loss.matcher": "hots"}, ["config.loss.matcher = 'hots'", "host, device"]),
  ],
)
def test_what_cannot_work_is_said_before_the_workdir_is_made(
  tiny, scenes_dir, tmp_path, changes, words
):
  tiny.data.dir = str(scenes_dir)
  tiny.update_from_flattened_dict(changes)
  with pytest.raises(ValueError) as caught:
    train.train(tiny, str(tmp_path / "run"))
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
  for word in words:
    assert word in str(caught.value)


def test_half_built_data_and_a_truncated_shard(tiny, scenes_dir, tmp_path):
  data = shutil.copytree(scenes_dir, tmp_path / "scenes")
  tiny.data.dir = str(data)
  shard = max(data.glob("*train*"), key=lambda p: p.stat().st_size)
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-100])
  with pytest.raises(ValueError, match=rf"shard {shard} has {len(whole) - 100} bytes instead of"):
    train.train(tiny, str(tmp_path / "run"))
  (data / "manifest.json").unlink()
  with pytest.raises(ValueError, match="no manifest.json, so it is half-built.*data.build"):
    train.train(tiny, str(tmp_path / "run"))


@pytest.mark.slow
def test_a_workdir_of_another_run_is_left_as_it_is(finished_run, tmp_path):
  workdir = shutil.copytree(finished_run, tmp_path / "run")
  config = weights.load_run(str(workdir))[0]
  config.batch_size, before = 16, (workdir / "config.json").read_text()
  with pytest.raises(ValueError, match=r"another config: config\.batch_size was 8 and is 16"):
    train.train(config, str(workdir))
  assert (workdir / "config.json").read_text() == before
  (workdir / "config.json").write_text(before[:50])
  with pytest.raises(ValueError, match=r"config\.json is not JSON"):
    train.train(config, str(workdir))
  (workdir / "config.json").unlink()  # the checkpoints know it too
  with pytest.raises(ValueError, match=r"another config: config\.batch_size was 8 and is 16"):
    train.train(config, str(workdir))
  assert not (workdir / "config.json").exists()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_data(finished_run, scenes_dir, tmp_path):
  workdir = shutil.copytree(finished_run, tmp_path / "run")
  config, before = weights.load_run(str(workdir))[0], (workdir / "config.json").read_text()
  config.data.dir = str(shutil.copytree(scenes_dir, tmp_path / "scenes"))
  manifest = tmp_path / "scenes" / "manifest.json"
  other = json.loads(manifest.read_text())
  other["splits"]["train"]["shards"][0]["sha256"] = 64 * "0"
  manifest.write_text(json.dumps(other))
  with pytest.raises(ValueError, match=r"not trained with this data .*/scenes\)"):
    train.train(config, str(workdir))
  assert (workdir / "config.json").read_text() == before


@pytest.mark.slow
def test_evaluate_names_what_is_not_there(finished_run, tmp_path):
  with pytest.raises(ValueError, match=r"no checkpoint of step 5; it has \[21, 24\]"):
    weights.load_run(str(finished_run), step=5)
  shutil.copy(finished_run / "config.json", tmp_path)
  with pytest.raises(ValueError, match="holds no checkpoint"):
    weights.load_run(str(tmp_path))
