"""What other trainers call our keys and flags: the nearest name by meaning, for error lines."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

# Our names, keys and --flags, and what others call them (transformers, open_clip, timm, big_vision,
# Lightning, ...). '=VALUE' is part of what to write.
_TABLE: tuple[tuple[tuple[str, ...], str], ...] = (
  (("optimizer.lr",), "lr learning_rate lr_rate base_lr max_lr peak_lr init_lr lrate blr"),
  (("optimizer.lr_end",), "lr_min min_lr end_lr final_lr lr_final eta_min lr_cooldown_end"),
  (("optimizer.lr_init",), "warmup_lr lr_start start_lr warmup_init_lr"),
  (
    ("optimizer.warmup_steps", "optimizer.warmup_epochs"),
    "warmup warm_up num_warmup_steps warmup_iters warmup_iterations warmup_ratio",
  ),
  (("optimizer.weight_decay",), "wd weight_decay decay l2"),
  (("optimizer.b1",), "beta1 adam_beta1 beta_1 momentum"),
  (("optimizer.b2",), "beta2 adam_beta2 beta_2"),
  (("optimizer.b1", "optimizer.b2"), "betas adam_betas"),
  (("optimizer.eps",), "epsilon adam_epsilon adam_eps opt_eps"),
  (("optimizer.name",), "optim opt optimizer_name optimizer_type optimiser"),
  (
    ("optimizer.clip_norm",),
    "clip grad_clip clip_grad max_grad_norm gradient_clip gradient_clip_val gradient_clip_norm "
    "grad_clip_norm clip_grad_norm grad_norm_clip",
  ),
  (("optimizer.ema_decay",), "ema ema_rate model_ema ema_momentum model_ema_decay"),
  (("optimizer.freeze",), "frozen lock lock_image lock_text freeze_towers freeze_backbone"),
  (("optimizer.lr_scale",), "layer_decay lr_mult lr_multiplier layerwise_lr_decay llrd"),
  (
    ("batch_size", "--batch_size", "--batch_per_chip"),
    "batchsize bs batch global_batch_size train_batch_size total_batch_size "
    "per_device_train_batch_size per_device_batch_size per_gpu_batch_size micro_batch_size",
  ),
  (("epochs",), "epoch num_epochs n_epochs max_epochs num_train_epochs nepochs"),
  (
    ("steps",),
    "max_steps num_steps total_steps train_steps num_train_steps max_iters iterations iters "
    "num_iterations max_iter total_iters n_steps",
  ),
  (
    ("model.image.size", "--image_size"),
    "image_size img_size resolution res input_size image_resolution crop_size force_image_size "
    "image_res",
  ),
  (("model.image.patch",), "patch_size patch"),
  (("model.image.variant",), "arch architecture backbone model_name vit model_type vision_model"),
  (
    ("model.image.width", "model.text.width", "model.decoder.width"),
    "hidden_size hidden_dim d_model model_dim embed_width",
  ),
  (
    ("model.image.depth", "model.text.depth", "model.decoder.depth"),
    "num_layers layers n_layers num_hidden_layers num_blocks",
  ),
  (
    ("model.image.heads", "model.text.heads", "model.decoder.heads"),
    "num_heads n_heads num_attention_heads attention_heads",
  ),
  (("model.decoder.dropout",), "drop dropout dropout_rate drop_rate dropout_prob"),
  (("model.dtype",), "precision dtype compute_dtype torch_dtype"),
  (("model.dtype=bfloat16",), "bf16 fp16 amp mixed_precision half half_precision float16"),
  (
    ("model.remat=block",),
    "gradient_checkpointing grad_checkpointing activation_checkpointing checkpointing "
    "rematerialization rematerialisation",
  ),
  (("model.attention",), "flash flash_attention attn attn_implementation use_flash_attention"),
  (
    ("accumulate",),
    "accum accum_freq accum_steps grad_accum grad_accum_steps accumulation_steps accumulate_steps "
    "gradient_accumulation gradient_accumulation_steps accumulate_grad_batches num_microbatches",
  ),
  (("model.logit_scale_init",), "temperature tau temp logit_scale init_temperature"),
  (("model.embed_dim",), "embedding_dim projection_dim embed_size embedding_size proj_dim"),
  (("model.num_queries", "data.max_regions"), "queries num_regions max_boxes num_boxes regions"),
  (
    ("model.text.context",),
    "context_length max_length max_seq_len max_seq_length sequence_length seq_len max_tokens",
  ),
  (("model.text.vocab_size",), "vocab vocabulary_size num_tokens"),
  (
    ("save_every",),
    "save_interval save_steps save_freq save_frequency checkpoint_every checkpoint_interval "
    "checkpoint_steps ckpt_every ckpt_steps ckpt_interval checkpoint_freq",
  ),
  (
    ("keep_checkpoints",),
    "max_checkpoints save_total_limit keep max_to_keep checkpoint_max_keep keep_ckpts",
  ),
  (
    ("log_every",),
    "log_interval logging_steps print_freq log_freq log_steps log_every_n_steps log_frequency",
  ),
  (
    ("eval_every",),
    "eval_interval eval_steps eval_freq val_frequency val_every evaluate_every eval_frequency "
    "validation_steps val_interval check_val_every_n_epoch",
  ),
  (
    ("eval_batch_size", "--batch_size"),
    "eval_batch val_batch_size test_batch_size per_device_eval_batch_size",
  ),
  (
    ("evals", "--evals"),
    "eval tasks task benchmark benchmarks evaluations metrics evaluation eval_tasks",
  ),
  (
    ("data.dir", "--data_dir", "--datasets", "--input"),
    "data data_path data_dir dataset dataset_dir dataset_path dataset_name train_data train_dir "
    "data_root root data_folder train_path train_file",
  ),
  (("data.split",), "train_split split"),
  (("data.flip",), "hflip random_flip horizontal_flip flip_prob augment augmentation aug"),
  (("data.resize",), "random_crop crop random_resized_crop"),
  (("data.workers", "--workers"), "num_workers workers dataloader_num_workers num_procs"),
  (("data.threads", "--workers"), "num_threads threads cpu_count"),
  (("data.prefetch",), "prefetch_factor prefetch_size dataloader_prefetch_factor"),
  (("seed",), "random_seed rng_seed rng random_state data_seed manual_seed"),
  (("method",), "loss_type algorithm objective loss_name"),
  (("mesh.fsdp",), "fsdp zero zero_stage"),
  (("mesh.tensor",), "tp tensor_parallel model_parallel tensor_parallelism"),
  (("mesh.data",), "dp data_parallel num_devices devices n_gpus num_gpus ngpu"),
  (("watchdog_seconds",), "timeout step_timeout"),
  (("init.image", "init.text"), "pretrained init_from pretrained_model load_from finetune_from"),
  (
    ("--checkpoint", "init.image", "init.text"),
    "ckpt checkpoint_path ckpt_path weights model model_path model_name_or_path weights_path",
  ),
  (("--workdir",), "resume resume_from resume_from_checkpoint restore auto_resume"),
  (
    ("--workdir", "--out"),
    "output_dir out_dir outdir output output_path output_folder save_dir save_path savedir logs "
    "log_dir logdir run_dir exp_dir experiment_dir checkpoint_dir ckpt_dir work_dir result_dir "
    "results",
  ),
  (("--config",), "cfg config_file recipe conf config_path config_name"),
  (("--limit",), "max_samples num_samples max_images n_samples num_examples max_examples subset"),
  (("--images", "--input"), "input image image_dir image_folder img_dir input_dir source_dir path"),
  (("--texts",), "text captions prompts text_file"),
  (("--format", "--from"), "to format from source type source_format from_format kind"),
  (("--topology",), "machine device devices gpu tpu hardware accelerator chip chips"),
  (("--overwrite",), "force f exist_ok clobber"),
  (("--traceback",), "debug verbose stacktrace trace"),
  (("--num_processes",), "num_nodes nnodes world_size num_hosts nproc"),
  (("--process_id",), "rank node_rank process_index"),
  (("--coordinator_address",), "master_addr coordinator master_address dist_url"),
)


def _plain(word: str) -> str:
  return word.lower().replace("_", "").replace("-", "")


_MEANT: dict[str, tuple[str, ...]] = {}
for _names, _words in _TABLE:
  for _word in map(_plain, _words.split()):
    _MEANT[_word] = tuple(dict.fromkeys([*_MEANT.get(_word, ()), *_names]))


def meant(word: str) -> tuple[str, ...]:
  """Our names, keys and --flags, of what others call `word`; misspelt a little too."""
  word = _plain(word)
  if word not in _MEANT and len(word) > 5:
    word = next(iter(difflib.get_close_matches(word, _MEANT, n=1, cutoff=0.88)), word)
  return _MEANT.get(word, ())


def nearest(name: str, known: Collection[str]) -> list[str]:
  """At most three of the names that there are, for one that there is not; [] where none is near.

  Args:
    name: key (`optimizer.learning_rate`) or flag (`--output_dir`) that does not exist.
    known: keys and flags that do; keys of a section may stand without the section's name.

  Returns:
    Those of the same last part, or of the same meaning; else those spelled alike.
  """
  leaf = _leaf(name)
  found = [k for k in known if _leaf(k) == leaf]
  if not (found := [*found, *by_meaning(name, known)]):
    near = difflib.get_close_matches(leaf, sorted(set(map(_leaf, known))), n=2, cutoff=0.75)
    found = _same_section_first(name, [k for k in known if _leaf(k) in near])
    found += difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
  return list(dict.fromkeys(found))[:3]


def by_meaning(name: str, known: Collection[str]) -> list[str]:
  """Those of the names that there are which others call `name`."""
  found = [k for target in meant(_leaf(name)) if (k := _among(target, known))]
  return _same_section_first(name, list(dict.fromkeys(found)))


def _same_section_first(name: str, found: list[str]) -> list[str]:
  """The text tower's layers before the image tower's, where the text tower's were asked for."""
  return sorted(found, key=lambda k: -len(set(k.split(".")) & set(name.split("."))))


def _among(target: str, known: Collection[str]) -> str:
  """A target as it stands among names that there are, whole or without its sections; '': not."""
  key, equals, value = target.partition("=")
  parts = key.split(".")
  names = (".".join(parts[i:]) for i in range(len(parts)))
  return next((f"{name}{equals}{value}" for name in names if name in known), "")


def _leaf(name: str) -> str:
  return name.rsplit(".", 1)[-1].removeprefix("--")


def did_you_mean(names: Sequence[str], otherwise: str) -> str:
  """'Did you mean A or B?', or `otherwise` where there are no names."""
  return f"Did you mean {' or '.join(names)}?" if names else otherwise
