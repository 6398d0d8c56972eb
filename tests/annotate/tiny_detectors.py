"""Small random detectors of the real classes of `transformers`, saved to folders."""

import torch
import transformers

WORDS = ["a", "the", "on", "of", "red", "green", "blue", "pink", "box", "dog", "sofa", "brown"]
WORDS += ["sleeps", "left", "right", "and", "cat", "very", "long"]


def owlv2(folder, *, seed=0):
  """OWLv2 of 32 pixels in patches of 8; texts of 16 tokens, each letter one."""
  torch.manual_seed(seed)
  config = transformers.Owlv2Config(
    text_config={
      "vocab_size": 600, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
      "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
      "bos_token_id": 598, "eos_token_id": 599,
    },
    vision_config={
      "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
      "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    },
    projection_dim=16,
  )  # fmt: skip
  model = transformers.Owlv2ForObjectDetection(config)
  with torch.no_grad():
    model.box_head.dense2.weight *= 0.01  # boxes near those of the patches, in the image
  model.save_pretrained(folder)
  size = {"height": 32, "width": 32}
  transformers.Owlv2ImageProcessorPil(size=size).save_pretrained(folder)
  letters = [chr(c) for c in range(33, 127)]
  vocabulary = ["!", *letters[1:], *[f"{letter}</w>" for letter in letters]]
  merges = []
  for word in WORDS:  # each of the words is one token
    for i in range(1, len(word)):
      end = "</w>" if i == len(word) - 1 else ""
      merges.append((word[:i], f"{word[i]}{end}"))
      vocabulary.append(f"{word[: i + 1]}{end}")
  vocabulary = list(dict.fromkeys(vocabulary))
  vocabulary += [f"<unused{i}>" for i in range(598 - len(vocabulary))]
  ids = {token: i for i, token in enumerate(vocabulary)}
  ids |= {"<|startoftext|>": 598, "<|endoftext|>": 599}
  made = transformers.CLIPTokenizer(vocab=ids, merges=list(dict.fromkeys(merges)), pad_token="!")
  made.save_pretrained(folder)
  return folder


def grounding_dino(folder, *, mm=True, seed=0, max_text_len=256):
  """(MM-)Grounding DINO with a BERT of two layers and a Swin of 8 channels."""
  torch.manual_seed(seed)
  name = "MMGroundingDino" if mm else "GroundingDino"
  config = getattr(transformers, f"{name}Config")(
    backbone_config=transformers.SwinConfig(
      image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
      out_indices=[2, 3, 4],
    ),
    text_config=transformers.BertConfig(
      vocab_size=1100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
      intermediate_size=32, max_position_embeddings=512,
    ),
    d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=20,
    max_text_len=max_text_len,
  )  # fmt: skip
  getattr(transformers, f"{name}ForObjectDetection")(config).save_pretrained(folder)
  size = {"shortest_edge": 64, "longest_edge": 96}
  transformers.GroundingDinoImageProcessorPil(size=size).save_pretrained(folder)
  # The model knows [CLS], [SEP], "." and "?" by BERT's numbers.
  vocabulary = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
  vocabulary |= {".": 1012, "?": 1029, ",": 1010, "-": 1011}
  tokens = [*WORDS, *"bcdefghijklmnopqrstuvwxyz", *[f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]]
  vocabulary |= {token: 200 + i for i, token in enumerate(tokens)}
  missing = sorted(set(range(1100)) - set(vocabulary.values()))
  vocabulary |= {f"[unused{i}]": i for i in missing}
  transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
  return folder


KINDS = {
  "owlv2": owlv2,
  "grounding-dino": lambda folder: grounding_dino(folder, mm=False),
  "mm-grounding-dino": grounding_dino,
}
