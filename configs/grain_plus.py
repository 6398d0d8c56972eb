"""GRAIN+: GRAIN on CC12M with false captions and descriptions and a second, max-pooled embedding.

Each line is a switch: without a line it is an ablation, without all of them GRAIN (cc12m.py). The
data need negatives of both kinds, of captions and of regions.
"""

from configs import cc12m, common


def get_config(arg: str = ""):
  """`:runlocal` is a minute on a CPU, on scenes built with --negatives=true."""
  c = cc12m.get_config()
  c.data.dir = "data/cc12m_grain_negatives"
  c.data.row_length = 320  # 26 and 50 tokens of true texts, 104 and 50 of false ones, with room
  c.data.negatives = 4  # false captions, CE-CLIP's kinds
  c.data.negatives_of = "caption"  # LLaVA's has its own: other words are no false ones
  c.data.negatives_per_region = 1  # a false description of each region
  c.loss.rank = 0.2  # CE-CLIP's rank of a caption over its negatives
  c.loss.intra = 0.3  # CE-CLIP's contrast of captions and negatives
  # GRAIN's image query binds less: 81.9 against 89.7 % of compositions on the scenes (seed 0).
  c.model.pool = "class"  # what is aligned with the caption
  # CLIPpy's pooling, as a second embedding aligned with captions; on the scenes, from random
  # weights, it cost some six points of zero-shot (docs/ablation.md).
  c.model.auxiliary_pool = "max"
  return common.parse(c, arg)
