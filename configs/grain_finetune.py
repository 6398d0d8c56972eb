"""GRAIN on top of an imported CLIP: few can pretrain. Towers start from OpenAI's ViT-B/16.

    python -m grain_jax.convert --from=hf_clip --input=CLIP_FOLDER --out=weights/clip-b16
    python -m grain_jax.main --config=configs/grain_finetune.py --workdir=runs/finetune \\
      --config.data.dir=data/mine
"""

from configs import common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU, from the towers that `make quickstart` has trained."""
  c = common.get_config()
  c.init.update(image="weights/clip-b16", text="weights/clip-b16", adopt=True)
  c.data.dir = "data/cc3m_grain"
  c.batch_size = 512
  c.epochs = 5.0
  # The towers of OpenAI's CLIP (Radford et al., 2021). They know crops; images are squashed here
  # for boxes to hold, and the start of a run says so.
  c.model.image.update(
    pre_norm=True, patch_bias=False, qk_norm=False, activation="quick_gelu", norm_eps=1e-5
  )
  c.model.image.mean = (0.48145466, 0.4578275, 0.40821073)
  c.model.image.std = (0.26862954, 0.26130258, 0.27577711)
  c.model.dtype = "bfloat16"
  c.optimizer.warmup_epochs = 0.2
  c.optimizer.lr_scale = (("^(image|text)_tower/|^text_projection/", 0.02),)  # decoder: 1
  c.save_every = 1000
  c.evals = ()
  return common.parse(c, arg)
