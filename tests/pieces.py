"""Tiny SentencePiece tokenizers as `transformers` has T5's and SigLIP's, a tiny Sentence-T5."""

import json

import safetensors.torch
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers

MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
TEXTS = (
  "a photo of a dog", "A red Cat on the mat", "two apples in the Garden", "the end of the story",
  "a dog and a cat", "Red apples, blue cars", "the garden of a photo",
)  # fmt: skip


def save(folder, *, size=80, texts=TEXTS):
  """Writes tokenizer.json and tokenizer_config.json; gives T5Tokenizer of transformers."""
  trained = tokenizers.Tokenizer(models.Unigram())
  trained.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
  )
  trainer = trainers.UnigramTrainer(
    vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
    show_progress=False,
  )  # fmt: skip
  trained.train_from_iterator([*texts] * 5, trainer)
  vocabulary = json.loads(trained.to_str())["model"]["vocab"]
  t5 = transformers.T5Tokenizer(vocab=[tuple(piece) for piece in vocabulary], extra_ids=2)
  t5.save_pretrained(folder)
  return t5


def save_siglip(folder, **settings):
  """SigLIP's: tokenizer.json of a small vocabulary, and the class in tokenizer_config.json."""
  save(folder, texts=[text.lower().replace(",", "") for text in TEXTS])
  values = {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": "</s>"}
  write_json(folder / "tokenizer_config.json", {**values, **settings})


def write_json(path, values):
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(values))


def save_sentence_t5(folder, *, context, outputs=20):
  """Writes what sentence-transformers does, without the empty 3_Normalize.

  Returns the modules with random weights: T5EncoderModel and the projection, torch's Linear.
  """
  config = transformers.T5Config(
    vocab_size=96, d_model=32, d_kv=8, d_ff=80, num_layers=3, num_heads=4,
    feed_forward_proj="relu",
  )  # fmt: skip
  encoder, dense = transformers.T5EncoderModel(config), torch.nn.Linear(32, outputs, bias=False)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in [*encoder.parameters(), *dense.parameters()]:
      p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (1.0 if p.ndim == 1 else 0.0))
  encoder.eval().save_pretrained(folder)
  save(folder)
  listed = [
    {"idx": i, "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
    for i, name in enumerate(MODULES)
  ]
  write_json(folder / "modules.json", listed)
  modes = {"mean_tokens": True, "cls_token": False, "max_tokens": False}
  pooling = {f"pooling_mode_{name}": value for name, value in modes.items()}
  write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": 32, **pooling})
  features = {"in_features": 32, "out_features": outputs, "bias": False}
  identity = {"activation_function": "torch.nn.modules.linear.Identity"}
  write_json(folder / "2_Dense/config.json", {**features, **identity})
  weight = {"linear.weight": dense.weight.detach()}
  safetensors.torch.save_file(weight, folder / "2_Dense/model.safetensors")
  limits = {"max_seq_length": context, "do_lower_case": False}
  write_json(folder / "sentence_bert_config.json", limits)
  return encoder, dense
