"""docs/own_data.md: every command as printed, from a folder of pictures to a larger model."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import transformers
from PIL import Image

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "own_data.md"
# What a test can wait for; the page's own sizes beside it.
SMALL = (
  "--config.steps=12", "--config.batch_size=8", "--config.eval_batch_size=8",
  "--config.eval_every=8", "--config.validation.batches=1", "--config.optimizer.warmup_steps=2",
  "--config.log_every=2", "--config.loss.matcher=device",
  "--config.model.decoder.depth=1", "--config.model.decoder.width=16",
  "--config.model.decoder.heads=2", "--config.model.decoder.mlp_dim=16",
)  # fmt: skip
SIZES = {"--config.model.image.size=336": "--config.model.image.size=48"}
LONGER = {"--config.steps=1400": "--config.steps=20"}


def make_pets(folder):
  """60 pictures of many sizes, most of them with boxes in pixels (x, y, x, y)."""
  rng = np.random.default_rng(0)
  (folder / "images").mkdir(parents=True)
  lines = []
  for i in range(60):
    width, height = rng.integers(40, 90, 2).tolist()
    picture = rng.integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(picture).save(folder / "images" / f"{i:04}.jpg")
    box = [2, 3, width // 2, height // 2]
    lines.append(
      {
        "image": f"images/{i:04}.jpg",
        "captions": [f"picture {i} of a dog and a ball"],
        "regions": [{"description": f"a dog of kind {i % 7}", "box": box}] if i % 3 else [],
      }
    )
  (folder / "annotations.jsonl").write_text("\n".join(map(json.dumps, lines)))


def make_clip(folder):
  text = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 77, "eos_token_id": 49407,
  }  # fmt: skip
  image = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
  }  # fmt: skip
  config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=12)
  transformers.CLIPModel(config).save_pretrained(folder)


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)


@pytest.mark.slow
def test_every_command_of_the_page(tmp_path):
  make_pets(tmp_path / "pets")
  make_clip(tmp_path / "clip-vit-base-patch16")
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
  environment["PYTHONPATH"] = str(PAGE.parent.parent)
  # Programs that are compiled in a hurry, and those of the encoders once for all commands.
  environment["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  )
  environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "cache")
  environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  said = {}
  commands = [line for block in blocks("console") for line in block.strip().splitlines()]
  assert len(commands) == 7
  for number, command in enumerate(commands):
    name, *arguments = command.split()
    assert name == "python"
    arguments = [LONGER.get(a, SIZES.get(a, a)) for a in arguments]
    if "grain_jax.main" in arguments and "--config=mine" in arguments:
      keys = {a.partition("=")[0] for a in arguments}
      arguments += [a for a in SMALL if a.partition("=")[0] not in keys]
    elif "grain_jax.main" in arguments:
      arguments += [a for a in SMALL if "steps" in a or "decoder" in a or "every" in a]
    done = subprocess.run(
      [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, (command, done.stderr[-3000:])
    said[number] = done.stdout
  assert (tmp_path / "data" / "pets" / "preview.html").is_file()
  assert "not evaluated: zero_shot" in said[1] and "images: batch_size 8; " in said[1], said[1]
  assert "config.init.image = weights/clip-b16 is adopted: " in said[3]
  assert "image.width 16 (was 384)" in said[3]
  results = json.loads((tmp_path / "runs" / "pets" / "results.json").read_text())
  assert results["step"] == 20 and results["validation/examples"] == 8  # after it was made longer
  assert "detection" in said[4]
  assert "goes on at step 12 with config.steps 12 -> 20" in said[5]
  assert "positions resized from 32 to 48 pixels" in said[6]

  (program,) = blocks("python")
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.count("[") == 3  # cosines, 2 x 2
