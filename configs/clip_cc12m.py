"""CLIP ViT-B/16 on CC12M, GRAIN's control: same towers, data and schedule, caption loss alone."""

from configs import cc12m, common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU."""
  c = cc12m.get_config()
  c.method = "clip"
  c.data.max_regions = 0
  c.data.row_length = 77  # the caption alone
  return common.parse(c, arg)
