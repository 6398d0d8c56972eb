"""Names of other trainers lead to ours, whether written as a key, in a recipe or as a flag."""

import dataclasses

import pytest
import transformers

from grain_jax import config as configs
from grain_jax import recipes, synonyms
from grain_jax.__main__ import main as grain_jax_main

# By hand, from the arguments of transformers' Trainer and of open_clip's training program: every
# one that has something like it here.
TRAINER = {
  "learning_rate": "optimizer.lr", "weight_decay": "optimizer.weight_decay",
  "adam_beta1": "optimizer.b1", "adam_beta2": "optimizer.b2", "adam_epsilon": "optimizer.eps",
  "max_grad_norm": "optimizer.clip_norm", "num_train_epochs": "epochs", "max_steps": "steps",
  "warmup_steps": "optimizer.warmup_steps", "optim": "optimizer.name", "seed": "seed",
  "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "accumulate",
  "bf16": "model.dtype=bfloat16", "fp16": "model.dtype=bfloat16", "save_steps": "save_every",
  "logging_steps": "log_every", "eval_steps": "eval_every", "save_total_limit": "keep_checkpoints",
  "gradient_checkpointing": "model.remat=block", "dataloader_num_workers": "data.workers",
  "per_device_eval_batch_size": "eval_batch_size", "output_dir": "--workdir",
  "resume_from_checkpoint": "--workdir",
}  # fmt: skip
OPEN_CLIP = {
  "train-data": "data.dir", "lr": "optimizer.lr", "wd": "optimizer.weight_decay",
  "beta1": "optimizer.b1", "eps": "optimizer.eps", "epochs": "epochs", "accum-freq": "accumulate",
  "grad-clip-norm": "optimizer.clip_norm", "precision": "model.dtype", "workers": "data.workers",
  "warmup": "optimizer.warmup_steps", "batch-size": "batch_size", "save-frequency": "save_every",
  "val-frequency": "eval_every", "log-every-n-steps": "log_every", "logs": "--workdir",
  "force-image-size": "model.image.size", "grad-checkpointing": "model.remat=block",
  "pretrained": "init.image", "lock-image": "optimizer.freeze", "resume": "--workdir",
}  # fmt: skip


@pytest.mark.parametrize(("word", "ours"), [*TRAINER.items(), *OPEN_CLIP.items()])
def test_arguments_of_other_trainers_lead_to_ours(word, ours):
  config = configs.load("quickstart")
  line = configs.unknown_key(config, word)
  hint = line.partition("Did you mean ")[2].removesuffix("?").split(" or ")
  assert ("--workdir" if ours == "--workdir" else f"config.{ours}") in hint and len(hint) <= 3


def test_the_trainer_has_these_arguments():
  fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
  assert set(TRAINER) - fields == set()


def test_every_name_in_the_table_is_a_key_or_a_flag_of_some_command():
  keys = recipes.keys()
  package = recipes.FOLDER.parent / "grain_jax"
  source = "".join(path.read_text() for path in package.rglob("*.py"))
  for names, _ in synonyms._TABLE:
    for name in names:
      if name.startswith("--"):
        assert f'"{name[2:]}"' in source or f'"{name}"' in source, name
      else:
        assert name.partition("=")[0] in keys, name


@pytest.mark.parametrize(
  ("name", "first"),
  [
    ("model.text.num_layers", "model.text.depth"),  # of the same section first
    ("model.num_layers", "model.image.depth"),
    ("learning_rte", "optimizer.lr"),  # misspelt
    ("Learning-Rate", "optimizer.lr"),
    ("optimzer.lr", "optimizer.lr"),
    ("widht", "model.image.width"),
  ],
)
def test_the_nearest_comes_first(name, first):
  assert synonyms.nearest(name, recipes.keys())[0] == first


@pytest.mark.parametrize("name", ["xyzzy", "colour"])
def test_what_is_near_to_nothing_has_no_hint(name):
  assert synonyms.nearest(name, recipes.keys()) == []


@pytest.mark.parametrize(
  ("command", "ours"),
  [("import", "convert"), ("finetune", "train"), ("eval", "evaluate"), ("trian", "train")],
)
def test_commands_by_meaning(command, ours, monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", ["grain-jax", command])
  with pytest.raises(SystemExit) as end:
    grain_jax_main()
  assert end.value.code == 2 and f"Did you mean {ours}?" in capsys.readouterr().err
