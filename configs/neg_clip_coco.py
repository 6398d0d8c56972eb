"""NegCLIP: CLIP ViT-B/32 on COCO captions with one false caption each (Yuksekgonul et al., 2023).

CE-CLIP's recipe without rank and text against text; one negative of any kind is drawn a visit.
Published: 256 images and as many of near neighbours, which are not drawn here, lr 1e-6, 5 epochs.
"""

from configs import ce_clip_coco, common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU, from nothing, on scenes built with --negatives=true."""
  c = ce_clip_coco.get_config()
  c.data.update(negatives=1, negatives_by="drawn", row_length=80)
  c.batch_size = 256
  c.epochs = 5.0
  c.loss.update(rank=0.0, intra=0.0)
  c.optimizer.lr = 1e-6
  return common.parse(c, arg)
