"""A tagger of spaCy and a masked language model of transformers, small, made here, as folders."""

import spacy
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

# Words by (POS, TAG); "word/lemma" where they differ.
LEXICON = {
  ("ADJ", "JJ"): "red orange yellow green blue purple pink gray brown black white small big large "
  "huge tiny wooden metal old young wet happy fluffy striped hungry",
  ("NOUN", "NN"): "dog cat man woman sofa table bench horse cow pig star drum boot house car bus "
  "tree apple pear cactus owl elephant cup coffee hat photo picture object left right crab dish "
  "animal",
  (
    "NOUN",
    "NNS",
  ): "dogs/dog cats/cat men/man horses/horse puppies/puppy objects/object tables/table",
  ("VERB", "VBZ"): "sleeps/sleep sits/sit runs/run eats/eat jumps/jump holds/hold shows/show",
  ("VERB", "VBG"): "sleeping/sleep sitting/sit running/run eating/eat jumping/jump holding/hold",
  ("AUX", "VBZ"): "is/be are/be",
  ("DET", "DT"): "a an the",
  ("ADP", "IN"): "on in under above below of with near by at next to",
  ("CCONJ", "CC"): "and or",
  ("PRON", "EX"): "there",
  ("PRON", "PRP$"): "his her",
  ("PART", "POS"): "'s",
  ("NUM", "CD"): "one two three four five six",
  ("ADV", "RB"): "also quickly",
  ("PUNCT", "."): ". , : !",
}


def words():
  """(word, POS, TAG, lemma) of all."""
  return [
    (entry.split("/")[0], *tags, entry.split("/")[-1])
    for tags, text in LEXICON.items()
    for entry in text.split()
  ]


def make_tagger(folder=None):
  """A pipeline whose attribute ruler tags the lexicon; all else is X."""
  nlp = spacy.blank("en")
  ruler = nlp.add_pipe("attribute_ruler")
  for word, pos, tag, lemma in words():
    ruler.add([[{"LOWER": word}]], {"POS": pos, "TAG": tag, "LEMMA": lemma})
  if folder is not None:
    nlp.to_disk(folder)
  return nlp


def make_masked(folder, *, seed=0):
  """A random RobertaForMaskedLM whose byte-level tokens are the lexicon's words and all bytes."""
  vocab = {t: i for i, t in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}
  merges = []
  for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
    vocab[byte] = len(vocab)
  for word, *_ in words():
    if not word.isalpha():
      continue
    for start in ("Ġ", ""):
      built = start or word[0]
      for letter in word if start else word[1:]:
        if built + letter not in vocab:
          merges.append((built, letter))
          vocab[built + letter] = len(vocab)
        built += letter
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.RobertaProcessing(
    ("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]), add_prefix_space=False
  )
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    pad_token="<pad>", cls_token="<s>", sep_token="</s>", model_max_length=64,
    mask_token=tokenizers.AddedToken("<mask>", lstrip=True, special=True),
  )  # fmt: skip
  torch.manual_seed(seed)
  config = transformers.RobertaConfig(
    vocab_size=len(fast), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=66, pad_token_id=1, bos_token_id=0,
    eos_token_id=2, type_vocab_size=1,
  )  # fmt: skip
  model = transformers.RobertaForMaskedLM(config)
  model.save_pretrained(folder)
  fast.save_pretrained(folder)
  return folder
