"""GRAIN ViT-B/16 on CC3M: the published run's settings on its smaller set (GRAIN paper, sec. 4)."""

from configs import cc12m, common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU."""
  c = cc12m.get_config()
  c.data.dir = "data/cc3m_grain"
  c.save_every = 1000
  return common.parse(c, arg)
