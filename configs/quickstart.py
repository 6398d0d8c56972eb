"""GRAIN on the embedded scenes: ten minutes on two CPU cores."""

from configs import common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU; `:method=clip` is the control."""
  c = common.get_config()
  common.small(c)
  c.data.dir = "data/scenes"
  c.data.row_length = 80
  c.batch_size = 128
  c.steps = 700
  c.loss.aux_box_loss = True
  c.optimizer.lr = 2e-3
  c.optimizer.warmup_steps = 50
  c.log_every = 25
  c.save_every = 200
  return common.parse(c, arg)
