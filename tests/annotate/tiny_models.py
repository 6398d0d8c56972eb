"""Small random models of the real `transformers` classes that see and write, saved to a folder."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;{}[]\"'-\n?!()/"
_TEMPLATE = (
  "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
  "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
  "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_TEXT = {
  "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
  "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _tokenizer(*special):
  names = ["<pad>", "<s>", "</s>", "<unk>", *special, *LETTERS]
  vocabulary = {name: number for number, name in enumerate(names)}
  letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
  letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    unk_token="<unk>", additional_special_tokens=list(special),
  )  # fmt: skip
  return tokenizer, len(vocabulary)


def llava(folder):
  tokenizer, size = _tokenizer("<image>")
  image_token = tokenizer.convert_tokens_to_ids("<image>")
  config = transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(
      hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
      image_size=28, patch_size=14,
    ),
    text_config=transformers.LlamaConfig(vocab_size=size, max_position_embeddings=4096, **_TEXT),
    image_token_index=image_token, image_token_id=image_token,
  )  # fmt: skip
  processor = transformers.LlavaProcessor(
    transformers.LlavaImageProcessorPil(
      size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ),
    tokenizer, patch_size=14, vision_feature_select_strategy="default",
    num_additional_image_tokens=1, chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
  )  # fmt: skip
  _save(transformers.LlavaForConditionalGeneration(config), processor, folder)


def _qwen(folder, config_of, model_of, processor_of, *, patch_size, text, vision):
  special = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
  tokenizer, size = _tokenizer(*special)
  ids = tokenizer.convert_tokens_to_ids(list(special))
  names = "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"
  config = config_of(
    text_config={**_TEXT, "vocab_size": size, **text},
    vision_config={
      "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16,
      "patch_size": patch_size, **vision,
    },
    **dict(zip(names, ids, strict=True)),
  )  # fmt: skip
  images = transformers.Qwen2VLImageProcessorPil(
    min_pixels=56 * 56, max_pixels=64 * 64, patch_size=patch_size
  )

  class Still(processor_of):  # the part for films needs torchvision, to be saved too
    @classmethod
    def get_attributes(cls):
      return ["image_processor", "tokenizer"]

  Still.__name__ = processor_of.__name__
  template = _TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
  _save(model_of(config), Still(images, tokenizer, chat_template=template), folder)


def qwen2_5_vl(folder):
  rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
  _qwen(
    folder, transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration,
    transformers.Qwen2_5_VLProcessor, patch_size=14, text={"rope_parameters": rope},
    vision={"depth": 1, "window_size": 56, "fullatt_block_indexes": [0]},
  )  # fmt: skip


def qwen3_vl(folder):
  rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True,
          "rope_theta": 1e4}  # fmt: skip
  _qwen(
    folder, transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration,
    transformers.Qwen3VLProcessor, patch_size=16, text={"rope_parameters": rope, "head_dim": 8},
    vision={"depth": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
  )  # fmt: skip


def _save(model, processor, folder):
  for parameter in model.parameters():  # larger than usual, so that a picture changes the text
    torch.nn.init.normal_(parameter, std=0.6)
  model.save_pretrained(folder)
  processor.save_pretrained(folder)


KINDS = {"llava": llava, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
