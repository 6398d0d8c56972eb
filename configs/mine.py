"""GRAIN on one's own pictures: sizes by their number, towers from CLIP where given.

python -m grain_jax.data.build --source=folder --input=FOLDER --out=data/mine --val_fraction=0.1
python -m grain_jax.main --config=mine --workdir=runs/mine [--config.init.image=weights/clip-b16
  --config.init.text=weights/clip-b16]
"""

from configs import common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU; docs/own_data.md goes through it."""
  c = common.get_config()
  c.data.dir = "data/mine"
  c.batch_size, c.epochs, c.save_every, c.eval_every = 0, 0.0, -1, -1
  c.log_every = 10
  c.init.update(adopt=True, lr_scale=0.05)
  # Without towers to start from, ones that tens of thousands of pictures can teach.
  c.model.image.update(variant="S/16", size=0)
  c.model.text.update(width=384, heads=6)
  c.model.dtype = "auto"
  c.optimizer.update(lr=5e-4, lr_end=5e-6, warmup_epochs=0.0, warmup_steps=-1)
  c.evals = ("available",)
  c.validation.batches = 8
  c.eval_batch_size = 64
  return common.parse(c, arg)
