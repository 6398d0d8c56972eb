"""What a batch has lost is counted beside its loss."""

import functools

import drawn
import jax
import numpy as np

from grain_jax import schema, tokenizer
from grain_jax.models import grain
from grain_jax.training import steps


def test_texts_cut_to_the_context_are_counted(tiny):
  """A context beyond 77, captions of 3, 120 and 400 words; descriptions that fit."""
  tiny.model.text.context, tiny.data.row_length, tiny.data.max_regions = 128, 160, 1
  texts = [["dog " * n, "a dog"] for n in (3, 120, 400, 125)]
  rows = tokenizer.Tokenizer(128).pack_batch(texts, row_length=160, scores=np.ones((4, 1)))
  shapes = schema.batch_shapes(batch=4, image_size=32, row_length=160, regions=1)
  batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
  batch |= {k: v for k, v in rows._asdict().items() if k in batch}
  batch["example_mask"][:] = True
  assert batch["text_mask"].all() and batch["positions"].max() == 127
  model = grain.build(tiny)
  loss = functools.partial(steps.loss_function, model=model, config=tiny)
  _, (parts, _) = jax.jit(loss)(drawn.params(tiny), batch, jax.random.key(0))
  assert float(parts["truncated_texts"][0]) == 1  # 402 tokens; 122 and 127 fit
