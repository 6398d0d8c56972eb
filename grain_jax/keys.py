"""What is known of the keys of a configuration: choices, limits, ages, which a run may change."""

from __future__ import annotations

from grain_jax import schema

DEFAULT_SIZE = 224  # pixels of model.image.size = 0 where no other model gives them
# Image towers by name: (width, depth, heads, patch size in pixels).
VARIANTS = {
  "Ti/16": (192, 12, 3, 16),
  "S/16": (384, 12, 12, 16),  # 12 heads, as in the published code
  "B/16": (768, 12, 12, 16),
  "B/32": (768, 12, 12, 32),
  "L/14": (1024, 24, 16, 14),
}

# What each of these keys may be; the one list of it, for the modules that read the key too.
CHOICES = {
  "method": ("grain", "clip"),
  "data.resize": ("squash", "crop"),
  "data.eval_resize": ("squash", "center_crop"),
  "data.caption": ("half", "original", "generated", "joined"),
  "data.negatives_by": ("kind", "drawn"),
  "data.negatives_of": ("any", "caption"),
  "data.on_bad_record": ("skip", "stop"),
  "model.dtype": ("float32", "bfloat16", "auto"),
  "model.remat": ("auto", "none", "elementwise", "attention", "block"),
  "model.attention": ("auto", "xla", "cudnn"),
  "model.norm": ("auto", "xla", "pallas"),
  "model.image.variant": tuple(VARIANTS),
  "model.pool": ("default", "query", "class", "max", "mean", "map"),
  "model.auxiliary_pool": ("none", "max", "mean"),
  "model.image.activation": ("gelu", "gelu_tanh", "quick_gelu"),
  "model.image.interpolation": ("bicubic", "bilinear"),
  "model.image.stem": ("linear", "hmlp"),
  "model.image.position_init": ("normal", "sincos"),
  "model.text.kind": ("clip", "t5", "siglip"),
  "model.text.activation": ("gelu", "gelu_tanh", "quick_gelu", "relu"),
  "model.decoder.init": ("torch", "per_matrix"),
  "loss.anchor_teacher": ("initial", "ema"),
  "loss.contrast": ("softmax", "sigmoid"),
  "loss.region_negatives": ("global", "local"),
  "loss.intra_form": ("image_text_positive", "text_only"),
  "loss.matcher": ("host", "device"),
  "loss.precision": ("auto", "float32", "bfloat16"),
  "loss.rank_threshold": ("mean", "max", "fixed"),
  "optimizer.name": ("adamw", "muon"),
  "optimizer.decay_mask": ("clean", "published"),
}

# Keys whose values are words, which a command line may give as a,b.
LISTS = frozenset({"evals", "init.keep", "optimizer.freeze"})

# Keys that name a place which may be in a bucket (gs://).
IN_BUCKETS = ("data.dir", "init.image", "init.text", "init.model", "model.text.tokenizer")

# Keys that name places on a run's own machine, with what says nothing.
OF_MACHINE = {
  "compile_cache": "",
  "data.dir": "",
  "data.local_copy": "",
  "data.sources": (),
  "datasets": "",
  "init.image": "",
  "init.model": "",
  "init.text": "",
  "zero_shot.descriptors": "",
}

# Keys that `init.keep` may name: another value is another view of images or texts, not a shape.
KEPT = (
  "model.image.mean",
  "model.image.std",
  "model.image.interpolation",
  "model.text.context",  # of a T5, whose positions are relative
)

# Keys that a run may change when it goes on: they do not touch the parameters, or only by the order
# of sums (and accumulate by dropout's draws). A run that moves to fewer devices needs some to fit.
FREE_KEYS = frozenset(
  {
    "accumulate",
    "compile_cache",
    "compile_effort",
    "deterministic",
    "loss.chunk",
    "loss.matcher",
    "loss.precision",
    "model.attention",
    "model.norm",
    "model.remat",
    "model.text.tokenizer",  # its content is part of what a checkpoint is checked by
    "model.unroll",
    "data.allow_no_regions",
    "data.bad_window",
    "data.dir",
    "data.local_copy",
    "data.max_bad_fraction",
    "data.max_bad_in_a_row",
    "data.max_pixels",
    "data.min_bad",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "data.eval_resize",
    "datasets",
    "eval_limit",
    "eval_batch_size",
    "eval_every",
    "evals",
    "init.adopt",
    "init.image",
    "init.keep",
    "init.lr_scale",  # optimizer.lr_scale has it
    "init.model",
    "init.text",
    "keep_checkpoints",
    "log_every",
    "peak_flops",
    "save_every",
    "watchdog_seconds",
  }
)
LEAST = {
  "seed": 0,
  "data.bad_window": 1,
  "data.max_bad_in_a_row": 0,
  "data.min_bad": 1,
  "batch_size": 0,
  "epochs": 0,
  "eval_every": -1,
  "steps": 0,
  "model.num_queries": 0,
  "model.decoder.dropout": 0,
  "checkpoint.keep_best": 1,
  "loss.anchor": 0,
  "loss.chunk": 0,
  "peak_flops": 0,
  "profile.num_steps": 1,
  "profile.start_step": 0,
  "data.negatives": 0,
  "data.negatives_per_region": 0,
  "data.workers": 0,
  "eval_limit": 0,
  "validation.batches": 0,
  "watchdog_seconds": 0,
}

# Keys that came later, and what a config.json without them means: `from_json` fills them in.
ADDED = {
  "accumulate": 1,
  "compile_effort": 0.0,
  "composition.split": "val",
  "datasets": "",
  "eval_limit": 0,
  "data.allow_no_regions": True,
  "data.bad_window": 10_000,
  "data.eval_resize": "squash",
  "data.max_bad_fraction": 1.0,
  "data.max_bad_in_a_row": 0,
  "data.max_pixels": schema.MAX_PIXELS,
  "data.min_bad": 20,
  "data.negatives": 0,
  "data.negatives_by": "kind",
  "data.negatives_of": "any",
  "data.negatives_per_region": 0,
  "data.reduced_decode": False,
  "data.local_copy": "",
  "data.sources": (),
  "data.workers": 0,
  "grounding.split": "val",
  "init.adopt": False,
  "init.keep": (),
  "init.lr_scale": 1.0,
  "init.model": "",
  "loss.anchor": 0.0,
  "loss.anchor_decay": 0.9996,
  "loss.anchor_teacher": "initial",
  "loss.auxiliary": 1.0,
  "loss.chunk": 8192,
  "loss.contrast": "softmax",
  "loss.image_grounded": 0.0,
  "loss.intra": 0.0,
  "loss.intra_form": "image_text_positive",
  "loss.mask_invalid": True,
  "loss.precision": "float32",
  "loss.rank": 0.0,
  "loss.rank_reset": True,
  "loss.rank_threshold": "mean",
  "loss.rank_threshold_start": 0.0,
  "loss.rank_upper_bound": 10.0,
  "loss.text_grounded": 0.0,
  "model.attention": "auto",
  "model.auxiliary_pool": "none",
  "model.decoder.init": "per_matrix",
  "model.image.class_token": True,
  "model.image.interpolation": "bicubic",
  "model.image.patch_bias": True,
  "model.image.patch_dropout": 0.0,
  "model.image.pre_norm": False,
  "model.image.stem": "linear",
  "model.logit_bias": False,
  "model.logit_bias_init": -10.0,
  "model.norm": "auto",
  "model.pool": "default",
  "model.pool_includes_class": True,
  "model.projects_images": True,
  "model.text.kind": "clip",
  "model.text.tokenizer": "",
  "optimizer.ema_decay": 0.0,
  "optimizer.muon_rms": 0.2,
  "optimizer.name": "adamw",
  "optimizer.start_lr": 0.0,
  "optimizer.start_step": 0,
  "retrieval.split": "val",
  "segmentation.split": "val",
  "validation.batches": 0,
  "validation.split": "val",
}
FREE_PREFIXES = (
  "zero_shot.",
  "retrieval.",
  "grounding.",
  "composition.",
  "segmentation.",
  "validation.",
  "mesh.",
  "checkpoint.",
  "profile.",
)
