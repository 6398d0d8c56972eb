"""A tiny SentencePiece tokenizer as `transformers` saves T5's."""

import json

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

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
