"""CE-CLIP: CLIP ViT-B/32 on COCO captions with four false ones each (arXiv 2306.08832, sec. 4).

    python -m grain_jax.convert --from=hf_clip --input=CLIP_FOLDER --out=weights/clip-b32
    python -m grain_jax.main --config=ce_clip_coco --workdir=runs/ce_clip

Published: OpenAI's ViT-B/32 with QuickGELU, 378 images on each of 4 GPUs, 10 epochs, lr 5e-6.
"""

from configs import common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU, from nothing, on scenes built with --negatives=true."""
  c = common.get_config()
  c.method = "clip"
  c.init.update(model="weights/clip-b32", adopt=True)
  c.data.dir = "data/coco_negatives"
  c.data.max_regions = 0
  c.data.negatives = 4  # relation, attribute, object, action
  c.data.negatives_of = "caption"  # where a record has more than the published one
  c.data.row_length = 104  # 0.8 % of COCO's negatives, 14 tokens each, do not fit
  c.data.caption = "original"
  c.data.eval_resize = "center_crop"
  c.data.resize = "crop"
  c.data.crop_min_area = 0.9
  c.batch_size = 1512
  c.epochs = 10.0
  c.model.image.update(
    variant="B/32", pre_norm=True, patch_bias=False, qk_norm=False, activation="quick_gelu",
    norm_eps=1e-5,
  )  # fmt: skip
  c.model.image.mean = (0.48145466, 0.4578275, 0.40821073)
  c.model.image.std = (0.26862954, 0.26130258, 0.27577711)
  c.model.dtype = "bfloat16"
  c.loss.update(rank=0.2, intra=0.3)
  c.optimizer.update(lr=5e-6, lr_init=0.0, lr_end=0.0, warmup_steps=50, eps=1e-6)
  c.save_every = 250
  c.evals = ()
  return common.parse(c, arg)
