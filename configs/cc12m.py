"""GRAIN ViT-B/16 on CC12M, 16 H100s: 35 epochs, global batch 2,048 (GRAIN paper, sec. 4)."""

from configs import common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU."""
  c = common.get_config()
  c.data.dir = "data/cc12m_grain"
  c.model.dtype = "bfloat16"
  c.log_every = 100
  c.save_every = 2000
  c.evals = ()  # CC12M has no evaluation splits of its own; `grain_jax.evaluate` reads others
  return common.parse(c, arg)
