"""Sentence-T5 and CLIPpy's text against `encode` of sentence-transformers."""

import numpy as np
import pieces
import sentence_transformers
import stock_models as stock
import torch
from numpy.testing import assert_allclose
from sentence_transformers.sentence_transformer import modules as parts
from test_clippy import published
from test_sentence_t5 import our_encode

import grain_jax
from grain_jax.convert import convert

TEXTS = [*pieces.TEXTS, "the cat " * 30, "", "Garden"]


def build(folder, *, width, outputs, context, t5=None):
  """SentenceTransformer of random weights, as the library itself puts it together."""
  transformer = parts.Transformer(str(folder), max_seq_length=context)
  dense = parts.Dense(width, outputs, bias=False, activation_function=torch.nn.Identity())
  layers = [transformer, parts.Pooling(width, pooling_mode="mean"), dense, parts.Normalize()]
  model = sentence_transformers.SentenceTransformer(modules=layers, device="cpu")
  if t5 is not None:
    (tower,) = [m for m in transformer.modules() if type(m) is type(t5)]
    tower.load_state_dict(t5.state_dict())
  return stock.randomize(model) if t5 is None else model


def test_encode_gives_the_same_embeddings(tmp_path):
  pieces.save_sentence_t5(tmp_path / "st5", context=24)
  model = build(tmp_path / "st5", width=32, outputs=20, context=24)
  model.save(str(tmp_path / "saved"))
  convert.convert("sentence_t5", str(tmp_path / "saved"), out=str(tmp_path / "tower"))
  got, want = our_encode(tmp_path / "tower", TEXTS), model.encode(TEXTS)
  assert np.ptp(want, axis=0).min() > 0.01
  assert_allclose(got, want, atol=1e-5)


def test_clippys_text_is_what_the_library_encodes_under_its_own_names(tmp_path):
  """The keys 'text.*' are those that a SentenceTransformer has in this version."""
  clip = published("old")
  (tower,) = clip.text[0].values()
  tower.save_pretrained(tmp_path / "t5")
  pieces.save(tmp_path / "t5")
  model = build(tmp_path / "t5", width=128, outputs=128, context=256, t5=tower)
  state = {k: v for k, v in clip.state_dict().items() if not k.startswith("text.")}
  state |= {f"text.{k}": v for k, v in model.state_dict().items()}
  torch.save(state, tmp_path / "clippy.pt")
  out = tmp_path / "run"
  convert.convert(
    "clippy", str(tmp_path / "clippy.pt"), out=str(out), tokenizer=str(tmp_path / "t5")
  )
  assert_allclose(grain_jax.load(out).encode_text(TEXTS), model.encode(TEXTS), atol=1e-5)
