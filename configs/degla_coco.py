"""DeGLA: CE-CLIP's data, with a teacher to hold on to and local contrasts (arXiv 2504.16801).

CE-CLIP's recipe (see there for the commands) with other losses: no rank, no text against text;
images and captions against their own negatives, and the distance to a mean of the weights.
Published: 32 images on each of 8 GPUs, 5 epochs, lr 1e-6.
"""

from configs import ce_clip_coco, common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU, from nothing, on scenes built with --negatives=true."""
  c = ce_clip_coco.get_config()
  c.batch_size = 256
  c.epochs = 5.0
  c.loss.update(rank=0.0, intra=0.0, image_grounded=0.1, text_grounded=0.1)
  c.loss.anchor = 1.28  # 0.005 of a sum over 256 images
  c.loss.update(anchor_teacher="ema", anchor_decay=0.9996)
  c.optimizer.lr = 1e-6
  return common.parse(c, arg)
