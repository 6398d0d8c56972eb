"""Every key of a configuration, with its default, unit and reason; recipes state what differs.

The defaults are the published GRAIN run (arXiv 2412.04429), ViT-B/16, 35 epochs, batch 2,048, but
for what README's table of recipes names.
"""

from __future__ import annotations

import ml_collections

from grain_jax import config as configs


def get_config() -> ml_collections.ConfigDict:
  """All keys. A recipe calls this, changes what differs and returns `parse(config, arg)`."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # of parameters, dropout and the order of the data
  c.method = "grain"  # grain | clip (class token, caption loss alone)
  c.batch_size = 2048  # images a step, over all devices; 0: by the number of images
  c.epochs = 35.0  # passes over the training split
  c.steps = 0  # if positive: length in steps, not epochs; both 0: by the number of images
  c.accumulate = 1  # microbatches in which a step encodes its batch, to save memory; same gradient
  c.compile_effort = 0.0  # -1..1; below 0 the program compiles sooner and runs slower (TPU)
  c.deterministic = False  # GPU only: same numbers every time, at some cost in speed
  c.compile_cache = ""  # folder of compiled programs to keep; JAX keeps none with the host matcher

  c.init = ml_collections.ConfigDict()  # what to start from; folders of `grain_jax.convert`, runs
  c.init.image = ""  # image tower to start from; empty: fresh
  c.init.text = ""  # text tower to start from, and its projection; empty: fresh
  c.init.model = ""  # a whole model to start from instead: towers, decoder, heads, scale
  c.init.lr_scale = 1.0  # of the learning rate of towers that init.image and init.text give
  c.init.adopt = False  # take the shape (depth, widths, heads, ...) of what is started from
  c.init.keep = ()  # of the keys in keys.KEPT those that stay as this run has them

  c.data = ml_collections.ConfigDict()
  c.data.dir = ""  # folder written by `python -m grain_jax.data.build`
  c.data.sources = ()  # to train on several: ({"dir": "data/a", "weight": 3.0}, ...), for `dir`
  c.data.local_copy = ""  # folder on this machine's disk to copy shards to while training
  c.data.split = "train"  # split to train on
  c.data.max_regions = 5  # regions an image, those of highest score (R)
  c.data.negatives = 0  # false captions an image (K)
  c.data.negatives_by = "kind"  # kind: slot k holds one of kind k | drawn: any of them
  c.data.negatives_of = "any"  # any caption of the image | caption: the one that is drawn, by words
  c.data.negatives_per_region = 0  # false descriptions a region (N), drawn
  c.data.allow_no_regions = False  # method grain also on data that has no region at all
  c.data.row_length = 128  # tokens in the packed row of an image's texts (L)
  c.data.resize = "squash"  # squash (published) | crop (random resized crop)
  c.data.eval_resize = "squash"  # where no place in it matters: squash (published) | center_crop
  c.data.crop_min_area = 0.5  # crop: least area kept, as a fraction of the image
  c.data.reduced_decode = True  # training JPEGs are decoded at 1/2, 1/4 or 1/8 where that is enough
  c.data.max_pixels = 89_478_485  # of the largest image to decode; a larger one is a bad record
  c.data.flip = False  # horizontal flip, never where a text says left or right
  c.data.caption = "half"  # half (original or LLM's with equal chance) | original | generated |
  # joined (half of the time all descriptions as one text, else as `half`; a control)
  c.data.on_bad_record = "skip"  # skip (masked and counted) | stop
  c.data.max_bad_in_a_row = 32  # bad records one after the other that end a run; 0: any number may
  c.data.max_bad_fraction = 0.01  # of the last records, above which bad ones end a run; 1: never
  c.data.bad_window = 10_000  # records that the fraction is of, of each process
  c.data.min_bad = 20  # bad records in the window below which the fraction does not count
  c.data.threads = 0  # of the input pipeline; 0 lets tf.data choose
  c.data.workers = 0  # processes that make training batches instead of threads, one a free core
  c.data.prefetch = 4  # batches prepared ahead

  c.model = ml_collections.ConfigDict()
  c.model.embed_dim = 512  # of the joint space (E)
  c.model.pool = "default"  # image embedding: query | class | max | mean | map (attention pooling,
  # SigLIP's) | default, by the method
  c.model.pool_includes_class = True  # max and mean see the class token too
  c.model.projects_images = True  # off: the pooled token itself, where widths agree (CLIPpy)
  c.model.auxiliary_pool = "none"  # a second image embedding for loss.auxiliary: none | max | mean
  c.model.num_queries = 5  # region queries (Q); the image query comes on top, as the last
  c.model.dtype = "float32"  # of the computation: float32 | bfloat16 | auto (float32 on CPUs)
  c.model.unroll = 0  # layers per iteration of the scan over layers; -1 writes all out; 0: by the
  # platform (written out on GPUs)
  c.model.remat = "auto"  # what the backward pass rematerialises: none | elementwise (all but the
  # matrix products) | attention (their products in attention too) | block (each block) | auto (by
  # the device's memory, chosen once, when the run begins)
  c.model.attention = "auto"  # auto (cuDNN's fused one where that is possible: NVIDIA's GPUs,
  # bfloat16, no dropout) | xla | cudnn (or an error); few queries take XLA's in any case
  c.model.norm = "auto"  # LayerNorm: auto (Pallas kernels on NVIDIA's GPUs, in half precision, if
  # they compile) | xla | pallas (unasked)
  c.model.logit_scale_init = 2.6592600369327783  # ln(1 / 0.07)
  c.model.logit_scale_max = 4.6052  # ln(100); clamped to [0, this] after each update
  c.model.logit_bias = False  # a learned bias of the logits, which the sigmoid contrast needs
  c.model.logit_bias_init = -10.0  # of that bias, as SigLIP's (whose logit_scale_init is ln(10))

  c.model.image = ml_collections.ConfigDict()
  c.model.image.variant = "B/16"  # Ti/16 | S/16 | B/16 | B/32 | L/14; sizes below override it
  c.model.image.size = 224  # pixels; 0: those of what is started from (init.adopt), else 224
  c.model.image.width = 0  # of a token; 0: the variant's
  c.model.image.depth = 0  # blocks; 0: the variant's
  c.model.image.heads = 0  # of attention; 0: the variant's
  c.model.image.patch = 0  # side of a patch in pixels; 0: the variant's
  c.model.image.mlp_ratio = 4.0  # hidden units of the MLP, in widths
  c.model.image.activation = "gelu"  # gelu (exact) | gelu_tanh (SigLIP's) | quick_gelu
  c.model.image.qk_norm = True  # LayerNorm on each head's queries and keys
  c.model.image.norm_eps = 1e-6  # of its LayerNorms
  c.model.image.pre_norm = False  # LayerNorm after the embeddings, as CLIP has it
  c.model.image.class_token = True  # before the patches; SigLIP has none
  c.model.image.patch_dropout = 0.0  # part of the patches that training does not see, below 1
  c.model.image.stem = "linear"  # patch embedding: linear (published) | hmlp (a small network)
  c.model.image.patch_bias = True  # bias of the patch embedding; CLIP has none
  c.model.image.init_std = 0.02  # of the weights (timm's, for a width of 768)
  c.model.image.position_init = "normal"  # normal (0.02) | sincos (2-D sine-cosine); both learned
  c.model.image.mean = (0.485, 0.456, 0.406)  # of ImageNet, in [0, 1]
  c.model.image.std = (0.229, 0.224, 0.225)  # the same
  c.model.image.interpolation = "bicubic"  # of images brought to that size: bicubic | bilinear

  c.model.text = ml_collections.ConfigDict()
  c.model.text.kind = "clip"  # clip (causal, last token) | t5 (T5 encoder, mean; Sentence-T5) |
  # siglip (sees both ways, last token of a text padded to the context: a text takes so many)
  c.model.text.tokenizer = ""  # folder of a SentencePiece tokenizer (T5's, SigLIP's); or CLIP's
  c.model.text.width = 512  # of a token
  c.model.text.depth = 12  # blocks
  c.model.text.heads = 8  # of attention
  c.model.text.mlp_ratio = 4.0  # hidden units of the MLP, in widths
  c.model.text.context = 77  # longest text in tokens; longer ones are cut
  c.model.text.vocab_size = 49408  # rows of the token embedding; CLIP's vocabulary has so many
  c.model.text.activation = "quick_gelu"  # quick_gelu (CLIP) | gelu (exact) | gelu_tanh | relu (T5)
  c.model.text.norm_eps = 1e-5  # of its LayerNorms or RMSNorms

  c.model.decoder = ml_collections.ConfigDict()
  c.model.decoder.width = 512  # of a query
  c.model.decoder.depth = 6  # layers
  c.model.decoder.heads = 8  # of attention, to itself and to the image
  c.model.decoder.mlp_dim = 2048  # hidden units of the MLP
  c.model.decoder.dropout = 0.1  # part of the activations left out while training
  c.model.decoder.norm_eps = 1e-5  # of its LayerNorms
  c.model.decoder.init = "torch"  # Xavier over q, k, v at once | per_matrix: sqrt(2) wider
  c.model.decoder.memory_positions = False  # learned ones, added to the memory; off as published

  c.loss = ml_collections.ConfigDict()
  c.loss.caption = 1.0  # weight of the caption loss
  c.loss.box = 1.0  # weight of the box loss
  c.loss.region = 1.0  # weight of the region-description loss
  c.loss.box_loss_scale = 1.5  # 1.5 in the published code, 1.0 in the paper
  c.loss.box_l1_cost = 5.0  # matching cost of |b - b'|_1
  c.loss.box_giou_cost = 2.0  # matching cost of -GIoU
  c.loss.aux_box_loss = False  # box losses of the earlier decoder layers too
  c.loss.contrast = "softmax"  # of captions and regions: softmax | sigmoid (SigLIP, pair by pair)
  c.loss.region_negatives = "global"  # global | local (this device's descriptions, as published)
  c.loss.rank = 0.0  # weight of the rank of captions over their negatives (CE-CLIP: 0.2)
  c.loss.intra = 0.0  # weight of captions against negatives as texts (CE-CLIP: 0.3)
  c.loss.intra_form = "image_text_positive"  # or text_only
  c.loss.rank_threshold = "mean"  # of the step before: mean | max | fixed
  c.loss.rank_threshold_start = 0.0  # in units of logits; fixed: throughout
  c.loss.rank_upper_bound = 10.0  # of the thresholds
  c.loss.rank_reset = True  # thresholds begin anew in each epoch
  c.loss.mask_invalid = True  # slots without a negative are none; off: each counts in contrast and
  # intra as a text (not as published, where invalid texts count: data.build leaves these out)
  c.loss.auxiliary = 1.0  # weight of captions against images' auxiliary embeddings, where there are
  c.loss.anchor = 0.0  # weight of the squared distance to a frozen copy's embeddings (DeGLA: 1.28)
  c.loss.anchor_teacher = "initial"  # that copy: initial (weights at the start) | ema (their mean)
  c.loss.anchor_decay = 0.9996  # of that mean
  c.loss.image_grounded = 0.0  # weight of images against their own false captions (DeGLA: 0.1)
  c.loss.text_grounded = 0.0  # weight of captions against theirs, by the copy's caption (0.1)
  c.loss.chunk = 8192  # columns of the contrastive logits in memory at a time; 0: all
  c.loss.precision = "auto"  # of contrastive products: bfloat16 | float32 | auto: f32 on CPUs
  c.loss.mask_duplicates = True  # equal texts in a batch are no negatives of each other
  c.loss.multi_positive = 0.0  # weight of descriptions as more positives of the image (a control)
  c.loss.permute_regions = False  # boxes and descriptions of another image (a control)
  c.loss.matcher = "host"  # host (SciPy in a callback) | device (exact search on the accelerator)

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.name = "adamw"  # adamw (published) | muon (for the layers' matrices; AdamW else)
  c.optimizer.muon_rms = 0.2  # root mean square of Muon's update, in units of the learning rate
  c.optimizer.lr = 1e-3  # peak of the learning rate
  c.optimizer.lr_init = 1e-6  # learning rate at the first step of the warm-up
  c.optimizer.lr_end = 1e-5  # learning rate at the end of the cosine
  c.optimizer.warmup_epochs = 1.0  # length of the linear warm-up; 0 here and below: none
  c.optimizer.warmup_steps = 0  # if positive: instead of warmup_epochs; -1: a tenth of the run
  c.optimizer.start_step = 0  # of the schedule; set by --continue_as
  c.optimizer.start_lr = 0.0  # the rate at start_step; set by --continue_as
  c.optimizer.start_skipped = 0  # steps before it that changed nothing; set by --continue_as
  c.optimizer.start_clip_norm = -1.0  # clip_norm of its beginning, -1: of now; by --continue_as
  c.optimizer.b1 = 0.9  # decay of AdamW's first moment
  c.optimizer.b2 = 0.98  # decay of its second moment
  c.optimizer.eps = 1e-8  # added to the root of the second moment
  c.optimizer.weight_decay = 0.1  # decoupled, times the learning rate
  c.optimizer.decay_mask = "clean"  # clean (no norm, bias, scale) | published (some of the decoder)
  c.optimizer.clip_norm = 0.0  # largest global gradient norm; 0: no clipping, as published
  c.optimizer.ema_decay = 0.0  # of a running mean of the parameters, to evaluate; 0: none is kept
  c.optimizer.freeze = ()  # regexes of parameter names that stay as they are
  c.optimizer.lr_scale = ()  # (regex, factor) pairs, first match wins

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1  # devices along each axis; -1: all that are left
  c.mesh.fsdp = 1  # cuts the batch and, by the rules, parameters and optimiser state
  c.mesh.tensor = 1  # cuts heads and hidden units by the rules; the batch is whole along it
  c.mesh.rules = (  # (regex of parameter names, partition of each dimension), the first that fits
    ("(blocks|layers)/.*(query|key|value|fc1)/kernel$", (None, "fsdp", "tensor")),
    ("(blocks|layers)/.*(query|key|value|fc1)/bias$", (None, "tensor")),
    ("(blocks|layers)/.*(out|fc2)/kernel$", (None, "tensor", "fsdp")),
    ("projection/kernel$", ("fsdp", None)),
    ("token_embedding$", (None, "fsdp")),
  )

  c.log_every = 50  # steps between lines of metrics
  c.save_every = 1000  # steps between checkpoints; -1: a tenth of the run
  c.keep_checkpoints = 3  # the newest so many
  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.best_metric = ""  # keep the best by this result too: 'retrieval/text_to_image/r1'
  c.checkpoint.keep_best = 1  # so many of the best
  c.watchdog_seconds = 600.0  # a step that takes longer ends the run and says who is late; 0: off
  c.peak_flops = 0.0  # of one device, for MFU, FLOP/s; 0: from the table of known devices
  c.profile = ml_collections.ConfigDict()
  c.profile.start_step = 0  # first step of a trace in WORKDIR/profile; 0: none
  c.profile.num_steps = 5  # length of the trace
  c.eval_every = 0  # steps between evaluations; 0: at the end alone; -1: a tenth of the run
  c.evals = ("zero_shot", "retrieval", "grounding")  # of evals.built, FAMILY:SET, 'available'
  c.datasets = ""  # folder of outside datasets, for evals FAMILY:SET
  c.eval_limit = 0  # the first so many pictures (items a file) of each outside set; 0: all
  c.eval_batch_size = 256  # images or rows of text at a time, over all devices

  c.validation = ml_collections.ConfigDict()  # the loss on images that are not trained on
  c.validation.split = "val"  # of the built data
  c.validation.batches = 0  # first batches of it at each evaluation; 0: none
  c.zero_shot = ml_collections.ConfigDict()
  c.zero_shot.split = "objects"  # of the built data, one label an image
  c.zero_shot.templates = ("a photo of a {}.",)  # prompts, {} for the class
  c.zero_shot.descriptors = ""  # JSON file {class: [descriptor]}; empty: the dataset's own, if any
  c.retrieval = ml_collections.ConfigDict()
  c.retrieval.split = "val"  # of the built data
  c.grounding = ml_collections.ConfigDict()
  c.grounding.split = "val"  # of detection and region_classification too
  c.composition = ml_collections.ConfigDict()
  c.composition.split = "val"  # with hard negatives
  c.segmentation = ml_collections.ConfigDict()
  c.segmentation.split = "val"  # with masks
  return c.lock()  # a recipe that sets another key ends in a line


def parse(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
  """Applies a recipe's argument: `:runlocal`, `:key=value,...`, or both.

  `runlocal` shrinks a recipe to about a minute on a CPU, on scenes built by `make scenes`.
  """
  for part in filter(None, arg.split(",")):
    if part == "runlocal":
      runlocal(config)
    elif "=" in part:
      configs.set_from_text(config, part)
    else:
      raise ValueError(f"config argument {part!r} is neither 'runlocal' nor key=value.")
  return config


def small(c: ml_collections.ConfigDict) -> None:
  """A model of 6.5 M parameters, most of them token embeddings, for 96-pixel images.

  Sine-cosine positions, wider initial weights and the stem are there to learn boxes and shapes in
  minutes.
  """
  c.model.embed_dim = 128
  c.model.unroll = -1
  c.model.image.update(size=96, patch=16, width=128, depth=4, heads=4)
  c.model.image.update(init_std=0.05, position_init="sincos", stem="hmlp")
  c.model.text.update(width=96, depth=2, heads=4, context=32)
  c.model.decoder.update(width=128, depth=2, heads=4, mlp_dim=512, memory_positions=True)


def runlocal(c: ml_collections.ConfigDict) -> None:
  """Shrinks any recipe: a small model, 40 steps of 32 images, the embedded scenes or other data.

  A recipe that starts from towers starts from those of the quickstart, one that starts from a whole
  model from nothing; so does one with a T5, which then reads CLIP's tokens.
  """
  small(c)
  c.init.model = ""
  if c.model.text.kind == "t5":
    c.init.update(image="", text="", adopt=False)
    c.model.text.update(tokenizer="", vocab_size=49408)
  elif c.init.image or c.init.text:
    c.init.update(image="runs/quickstart", text="runs/quickstart", adopt=True)
  if not (c.init.image or c.init.text):
    c.loss.anchor_teacher = "ema"  # random weights are nothing to hold on to
  c.data.update(dir="data/scenes", sources=())
  if c.data.negatives or c.data.negatives_per_region:
    c.data.dir = "data/scenes_negatives"
  c.model.update(dtype="float32", remat="none")
  c.evals = ("available",)
  c.data.caption = "half"
  c.data.row_length = 56 if c.data.max_regions else 32
  c.data.row_length += 20 * c.data.negatives + 8 * c.data.max_regions * c.data.negatives_per_region
  c.batch_size = min(c.batch_size, 32)  # 0, by the number of images, stays
  c.eval_batch_size = 64
  c.steps = 40
  c.optimizer.warmup_steps = 10
  c.mesh.update(data=-1, fsdp=1, tensor=1)
  c.log_every = 10
  c.save_every = 20
