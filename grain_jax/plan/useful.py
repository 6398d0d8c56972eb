"""FLOPs that a train step needs however it is written: no padding, nothing rematerialised."""

from __future__ import annotations

from collections.abc import Mapping

import ml_collections

from grain_jax import objectives
from grain_jax.models import attention

_TEXT = ("text_tower", "text_projection")  # modules that see tokens


def text_tower_flops(
  config: ml_collections.ConfigDict, *, caption: float, description: float
) -> float:
  """FLOPs a sample of the text tower and its gradient without padding.

  A layer of width D and hidden width H costs a text of n tokens n (8 D^2 + 4 D H) + 4 n^2 D. Of the
  last layer only the token at the end of each text is computed, from keys and values of all or from
  all tokens as they are (`attention.attend_memory`), whichever is less; of T5 all of them, for
  their mean. SigLIP's texts have as many tokens as the context, of which the pads are part. The
  gradient costs as much again twice.

  Args:
    config: a resolved configuration.
    caption: mean tokens of a caption, false ones too.
    description: mean tokens of a description, false ones too.
  """
  t, d = config.model.text, config.data
  hidden = round(t.width * t.mlp_ratio)
  regions = d.max_regions if config.method == "grain" else 0
  lengths = [caption] * (1 + d.negatives)
  lengths += [description] * (regions * (1 + d.negatives_per_region))
  if t.kind == "siglip":
    lengths = [t.context] * len(lengths)
  per_token = 8 * t.width**2 + 4 * t.width * hidden
  layer = sum(n * per_token + 4 * n**2 * t.width for n in lengths)
  if t.kind == "t5":
    return 3.0 * (t.depth * layer + 2 * t.width * config.model.embed_dim * len(lengths))
  # Keys and values of all tokens, or one query for each head through their kernels.
  last = sum(
    per_token + min(4 * (n - 1) * t.width**2 + 4 * n * t.width, 4 * n * t.heads * t.width)
    for n in lengths
  )
  projection = 2 * t.width * config.model.embed_dim * len(lengths)
  return 3.0 * ((t.depth - 1) * layer + last + projection)


def useful_flops(
  counts: Mapping[str, int],
  config: ml_collections.ConfigDict,
  *,
  batch: int,
  caption: float,
  description: float,
) -> float:
  """FLOPs of a step that any implementation needs: nothing rematerialised, no padded token.

  Args:
    counts: `flops.count` of the step without rematerialisation.
    config: its configuration.
    batch: images of a step.
    caption: mean tokens of a caption.
    description: mean tokens of a description.
  """
  once = {path: n for path, n in counts.items() if attention.RECOMPUTED_SCOPE not in path}
  rest = sum(n for path, n in once.items() if not any(m in path.split("/") for m in _TEXT))
  padded = sum(once.values()) - rest
  text = batch * text_tower_flops(config, caption=caption, description=description)
  if objectives.needs_teacher(config):  # a forward pass beside the model's three
    text *= 4 / 3
  return rest + min(text, padded)
