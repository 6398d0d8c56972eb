"""GRAIN on the embedded scenes: 12 minutes on two CPU cores with data and evaluation."""

from configs import common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU; `:method=clip` trains the same towers without the decoder."""
  c = common.get_config()
  common.small(c)
  c.data.dir = "data/scenes"
  c.data.row_length = 56  # of 400 descriptions one does not fit
  c.data.threads = 1
  c.batch_size = 64
  c.steps = 1300
  c.loss.aux_box_loss = True  # boxes are the slowest to come
  c.loss.box = 0.5
  c.optimizer.name = "muon"  # learns per step what AdamW learns in two
  c.optimizer.muon_rms = 0.4
  c.optimizer.lr = 2e-3
  c.optimizer.warmup_steps = 100
  c.zero_shot.templates = ("a photo of a {}",)  # the scenes' captions have no full stop
  c.log_every = 25
  c.save_every = 250
  return common.parse(c, arg)
