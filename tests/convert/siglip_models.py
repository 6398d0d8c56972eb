"""A tiny SigLIP of transformers with random weights, its tokenizer, and big_vision's form of it."""

import json

import numpy as np
import pieces
import stock_models as stock
import transformers

CONTEXT, WIDTH, HEADS = 12, 48, 3
TEXT_WIDTH, TEXT_HEADS = 32, 4


def make(*, vocabulary=100, activation="gelu_pytorch_tanh", **vision):
  """SiglipModel of two blocks a tower."""
  config = transformers.SiglipConfig(
    text_config={
      "vocab_size": vocabulary, "hidden_size": TEXT_WIDTH, "intermediate_size": 80,
      "num_hidden_layers": 2, "num_attention_heads": TEXT_HEADS, "projection_size": WIDTH,
      "max_position_embeddings": CONTEXT, "hidden_act": activation,
    },
    vision_config={
      "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2,
      "num_attention_heads": HEADS, "image_size": 24, "patch_size": 8, "hidden_act": activation,
      **vision,
    },
  )  # fmt: skip
  model = stock.randomize(transformers.SiglipModel(config))
  model.logit_scale.data.fill_(np.log(117.0))
  model.logit_bias.data.fill_(-12.9)
  return model


def save(folder, model=None, **settings):
  """A folder as the hub has it; its model."""
  model = make() if model is None else model
  model.save_pretrained(folder)
  pieces.save_siglip(folder, **settings)
  processor = {
    "image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
    "rescale_factor": 1 / 255, "size": {"height": 24, "width": 24},
    "processor_class": "SiglipProcessor",
  }  # fmt: skip
  (folder / "preprocessor_config.json").write_text(json.dumps(processor))
  return model


def _block(state, prefix, heads):
  def weight(name):
    return state[f"{prefix}.{name}"]

  attention = {}
  for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
    kernel, bias = weight(f"self_attn.{short}_proj.weight"), weight(f"self_attn.{short}_proj.bias")
    attention[f"{name}/kernel"] = kernel.T.reshape(len(bias), heads, -1)
    attention[f"{name}/bias"] = bias.reshape(heads, -1)
  kernel = weight("self_attn.out_proj.weight")
  attention["out/kernel"] = kernel.T.reshape(heads, -1, len(kernel))
  attention["out/bias"] = weight("self_attn.out_proj.bias")
  found = {f"MultiHeadDotProductAttention_0/{name}": value for name, value in attention.items()}
  for i in (0, 1):
    found[f"LayerNorm_{i}/scale"] = weight(f"layer_norm{i + 1}.weight")
    found[f"LayerNorm_{i}/bias"] = weight(f"layer_norm{i + 1}.bias")
    found[f"MlpBlock_0/Dense_{i}/kernel"] = weight(f"mlp.fc{i + 1}.weight").T
    found[f"MlpBlock_0/Dense_{i}/bias"] = weight(f"mlp.fc{i + 1}.bias")
  return found


def big_vision(model, *, scanned):
  """{key: array} as big_vision saves the weights of a SiglipModel."""
  state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
  image, text, head = "vision_model.embeddings", "text_model.embeddings", "vision_model.head"
  in_weight, in_bias = (state[f"{head}.attention.in_proj_{kind}"] for kind in ("weight", "bias"))
  found = {
    "img/embedding/kernel": state[f"{image}.patch_embedding.weight"].transpose(2, 3, 1, 0),
    "img/embedding/bias": state[f"{image}.patch_embedding.bias"],
    "img/pos_embedding": state[f"{image}.position_embedding.weight"][None],
    "img/MAPHead_0/probe": state[f"{head}.probe"],
    "img/MAPHead_0/LayerNorm_0/scale": state[f"{head}.layernorm.weight"],
    "img/MAPHead_0/LayerNorm_0/bias": state[f"{head}.layernorm.bias"],
    "txt/Embed_0/embedding": state[f"{text}.token_embedding.weight"],
    "txt/pos_embedding": state[f"{text}.position_embedding.weight"][None],
    "txt/head/kernel": state["text_model.head.weight"].T,
    "txt/head/bias": state["text_model.head.bias"],
    "t": state["logit_scale"],
    "b": state["logit_bias"],
  }
  attention = "img/MAPHead_0/MultiHeadDotProductAttention_0"
  for i, name in enumerate(("query", "key", "value")):
    rows = slice(i * WIDTH, (i + 1) * WIDTH)
    found[f"{attention}/{name}/kernel"] = in_weight[rows].T.reshape(WIDTH, HEADS, -1)
    found[f"{attention}/{name}/bias"] = in_bias[rows].reshape(HEADS, -1)
  out = state[f"{head}.attention.out_proj.weight"]
  found[f"{attention}/out/kernel"] = out.T.reshape(HEADS, -1, WIDTH)
  found[f"{attention}/out/bias"] = state[f"{head}.attention.out_proj.bias"]
  for i in (0, 1):
    dense = f"img/MAPHead_0/MlpBlock_0/Dense_{i}"
    found[f"{dense}/kernel"] = state[f"{head}.mlp.fc{i + 1}.weight"].T
    found[f"{dense}/bias"] = state[f"{head}.mlp.fc{i + 1}.bias"]
  for theirs, prefix, norm, heads in (
    ("img/Transformer", "vision_model", "post_layernorm", HEADS),
    ("txt/Encoder_0", "text_model", "final_layer_norm", TEXT_HEADS),
  ):
    found[f"{theirs}/encoder_norm/scale"] = state[f"{prefix}.{norm}.weight"]
    found[f"{theirs}/encoder_norm/bias"] = state[f"{prefix}.{norm}.bias"]
    blocks = [_block(state, f"{prefix}.encoder.layers.{i}", heads) for i in (0, 1)]
    for name in blocks[0]:
      if scanned:
        found[f"{theirs}/encoderblock/{name}"] = np.stack([block[name] for block in blocks])
      else:
        for i, block in enumerate(blocks):
          found[f"{theirs}/encoderblock_{i}/{name}"] = block[name]
  return {f"params/{name}": np.ascontiguousarray(value) for name, value in found.items()}
