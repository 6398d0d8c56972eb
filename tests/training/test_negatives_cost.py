"""What four false captions cost CE-CLIP's recipe: FLOPs of the step, and what does not fit."""

import json
import pathlib

import jax
import numpy as np
import pytest

from grain_jax import config as configs
from grain_jax import flops, tokenizing
from grain_jax.plan import program

SUGARCREPE = pathlib.Path(__file__).parents[3] / "shared" / "data" / "sugarcrepe"
_CAPTION_ROW = 32  # holds 999 of 1,000 of COCO's captions


def step_flops(**changes):
  """Of a sample of the recipe's train step."""
  config = configs.load("configs/ce_clip_coco.py")
  config.init.model = ""
  for key, value in changes.items():
    configs.set_key(config, key.replace("__", "."), value)
  config = configs.resolve(config)
  config.batch_size = 64
  traced = program.trace(config, jax.devices()[:1])
  return sum(flops.count(traced.traced.jaxpr.jaxpr).values()) / 64


def test_the_step_costs_at_most_half_as_much_again(capsys):
  """Beside a step whose row just holds the caption, not CLIP's row of 77 tokens."""
  row = configs.load("configs/ce_clip_coco.py").data.row_length
  with_negatives = step_flops()
  caption = step_flops(
    data__negatives=0, data__row_length=_CAPTION_ROW, model__text__context=_CAPTION_ROW,
    loss__rank=0.0, loss__intra=0.0,
  )  # fmt: skip
  with capsys.disabled():
    print(f"\nrows of {row} and {_CAPTION_ROW} tokens: {with_negatives / caption:.3f} times")
  assert 1.3 < with_negatives / caption <= 1.5


@pytest.mark.skipif(not SUGARCREPE.is_dir(), reason="no SugarCrepe beside this clone")
def test_under_a_hundredth_of_cocos_negatives_fall_out():
  """SugarCrepe's captions are COCO's; each with four of its false ones, or its own length."""
  config = configs.resolve(configs.load("configs/ce_clip_coco.py"))
  tokens = tokenizing.make(config)
  false = {}
  for path in sorted(SUGARCREPE.glob("*.json")):
    for item in json.loads(path.read_text()).values():
      false.setdefault(item["caption"], []).append(item["negative_caption"])
  rows = []
  for caption, negatives in false.items():
    same_words = [text for text in negatives if len(text.split()) == len(caption.split())]
    rows.append([caption, *(same_words + [caption] * 4)[:4]])
  packed = tokens.pack_batch(
    rows, row_length=config.data.row_length, scores=np.zeros((len(rows), 0)), region_negatives=0
  )
  dropped = 1 - packed.text_mask[:, 1:].mean()
  assert len(rows) > 4000 and 0.001 < dropped < 0.01
  lengths = np.array([len(tokens.encode_batch([caption])[0]) for caption in false])
  assert np.mean(lengths > _CAPTION_ROW) < 0.002
