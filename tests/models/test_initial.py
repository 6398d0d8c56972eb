"""How parameters start, against the modules of torch that the published code is made of."""

import jax
import numpy as np
import pytest
import torch

from grain_jax import config as configs
from grain_jax import trees
from grain_jax.models import grain, initial

WIDTH, HIDDEN, PATCH, TEXT = 128, 512, 16, 64


def tiny(init="torch"):
  """The published recipe, narrow, but wide enough to measure a standard deviation."""
  config = configs.load("configs/cc12m.py")
  with config.unlocked():
    config.model.update(embed_dim=WIDTH)
    config.model.image.update(variant="", size=64, width=WIDTH, depth=4, heads=4, patch=PATCH)
    config.model.text.update(width=TEXT, depth=4, heads=4, vocab_size=2000)
    config.model.decoder.update(width=WIDTH, depth=4, heads=4, mlp_dim=HIDDEN, init=init)
  return config


def start(config):
  model = grain.build(config)
  flat = {}
  params = jax.jit(lambda: initial.init_params(model, config))()
  trees.map_with_name(lambda name, x: flat.update({name: np.asarray(x)}), params)
  return flat


def spread(values):
  """(standard deviation, largest absolute value) of arrays or torch parameters."""
  values = np.concatenate(
    [np.asarray(getattr(v, "detach", lambda v=v: v)()).ravel() for v in values]
  )
  return values.std(), np.abs(values).max()


def torch_decoder():
  """Four of torch's decoder layers as DETR and GRAIN reset them: Xavier for all matrices."""
  layers = [torch.nn.TransformerDecoderLayer(WIDTH, 4, HIDDEN) for _ in range(4)]
  for layer in layers:
    for p in layer.parameters():
      if p.dim() > 1:
        torch.nn.init.xavier_uniform_(p)
  return layers


def torch_text():
  """OpenAI's `CLIP.initialize_parameters` on torch's modules; what it leaves out is torch's own."""
  blocks = []
  for _ in range(4):
    attention = torch.nn.MultiheadAttention(TEXT, 4)
    fc1, fc2 = torch.nn.Linear(TEXT, 4 * TEXT), torch.nn.Linear(4 * TEXT, TEXT)
    torch.nn.init.normal_(attention.in_proj_weight, std=TEXT**-0.5)
    torch.nn.init.normal_(attention.out_proj.weight, std=TEXT**-0.5 * 8**-0.5)
    torch.nn.init.normal_(fc1.weight, std=(2 * TEXT) ** -0.5)
    torch.nn.init.normal_(fc2.weight, std=TEXT**-0.5 * 8**-0.5)
    blocks.append((attention, fc1, fc2))
  return blocks


def want():
  """{name of ours: parameters of torch}."""
  torch.manual_seed(0)
  found = {}
  layers = torch_decoder()
  for ours, theirs in (("self_attention", "self_attn"), ("cross_attention", "multihead_attn")):
    attentions = [getattr(layer, theirs) for layer in layers]
    for name in ("query", "key", "value"):
      found[f"query_decoder/layers/{ours}/{name}/kernel"] = [a.in_proj_weight for a in attentions]
      found[f"query_decoder/layers/{ours}/{name}/bias"] = [a.in_proj_bias for a in attentions]
    found[f"query_decoder/layers/{ours}/out/kernel"] = [a.out_proj.weight for a in attentions]
    found[f"query_decoder/layers/{ours}/out/bias"] = [a.out_proj.bias for a in attentions]
  for ours, theirs in (("fc1", "linear1"), ("fc2", "linear2")):
    for kind, theirs_kind in (("kernel", "weight"), ("bias", "bias")):
      values = [getattr(getattr(layer, theirs), theirs_kind) for layer in layers]
      found[f"query_decoder/layers/mlp/{ours}/{kind}"] = values
  found["query_decoder/query_embedding"] = [torch.nn.Embedding(600, WIDTH).weight]
  found["query_decoder/input/kernel"] = [torch.nn.Linear(WIDTH, WIDTH, bias=False).weight]
  heads = [torch.nn.Linear(WIDTH, n) for n in (WIDTH, WIDTH, 4)]
  for i, head in enumerate(heads):
    found |= {f"box_head/fc{i}/kernel": [head.weight], f"box_head/fc{i}/bias": [head.bias]}

  texts = torch_text()
  for name in ("query", "key", "value"):
    found[f"text_tower/blocks/attention/{name}/kernel"] = [a.in_proj_weight for a, _, _ in texts]
    found[f"text_tower/blocks/attention/{name}/bias"] = [a.in_proj_bias for a, _, _ in texts]
  found["text_tower/blocks/attention/out/kernel"] = [a.out_proj.weight for a, _, _ in texts]
  found["text_tower/blocks/attention/out/bias"] = [a.out_proj.bias for a, _, _ in texts]
  for i, name in ((1, "fc1"), (2, "fc2")):
    found[f"text_tower/blocks/mlp/{name}/kernel"] = [t[i].weight for t in texts]
    found[f"text_tower/blocks/mlp/{name}/bias"] = [t[i].bias for t in texts]
  found["text_tower/token_embedding"] = [torch.nn.init.normal_(torch.empty(2000, TEXT), std=0.02)]
  found["text_tower/position_embedding"] = [torch.nn.init.normal_(torch.empty(77, TEXT), std=0.01)]
  found["text_projection/kernel"] = [
    torch.nn.init.normal_(torch.empty(TEXT, WIDTH), std=TEXT**-0.5)
  ]

  def timm():  # timm's trunc_normal_ is torch's: the limits are at -2 and 2, whatever the deviation
    return [torch.nn.init.trunc_normal_(torch.empty(WIDTH, 16 * WIDTH), std=0.02)]

  for name in (
    "attention/query",
    "attention/key",
    "attention/value",
    "attention/out",
    "mlp/fc1",
    "mlp/fc2",
  ):
    found[f"image_tower/blocks/{name}/kernel"] = timm()
    found[f"image_tower/blocks/{name}/bias"] = [torch.zeros(9)]
  found["image_tower/position_embedding"] = timm()
  found["image_tower/class_token"] = [torch.nn.init.normal_(torch.empty(9, WIDTH), std=1e-6)]
  patches = torch.nn.Conv2d(3, WIDTH, PATCH, PATCH)
  found["image_tower/patch_embedding/kernel"] = [patches.weight]
  found["image_tower/patch_embedding/bias"] = [patches.bias]
  for name in ("image_projection", "region_projection"):
    found[f"{name}/kernel"] = [torch.nn.init.normal_(torch.empty(WIDTH, WIDTH), std=WIDTH**-0.5)]
  return found


def test_every_parameter_starts_as_in_torch():
  got, theirs = start(tiny()), want()
  norms = {name for name in got if "norm" in name}
  assert set(got) - norms - {"logit_scale"} == set(theirs)
  for name, values in theirs.items():
    std, top = spread([got[name]])
    want_std, want_top = spread(values)
    # The relative error of a measured deviation is about 1 / sqrt(2 n), of both sides.
    error = 5 * (0.5 / got[name].size + 0.5 / sum(v.numel() for v in values)) ** 0.5
    assert abs(std - want_std) <= error * want_std, (name, std, want_std)
    if "decoder/layers" in name or "patch" in name or "box_head" in name:  # uniform: a sharp end
      assert abs(top - want_top) <= 2 * error * want_top, (name, top, want_top)
  for name in norms:
    assert (got[name] == (1.0 if name.endswith("scale") else 0.0)).all(), name
  assert got["logit_scale"] == pytest.approx(np.log(1 / 0.07))


def test_per_matrix_is_the_start_of_earlier_runs():
  torch_start, ours = start(tiny()), start(tiny("per_matrix"))
  wider = [n for n in ours if "attention" in n and n.startswith("query") and "kernel" in n]
  wider = [n for n in wider if "out" not in n]
  assert len(wider) == 6
  for name in wider:
    np.testing.assert_allclose(ours[name], torch_start[name] * 2**0.5, rtol=1e-6, err_msg=name)
  zeros = {n for n in ours if n.endswith("bias") and n.startswith(("query_decoder", "box_head"))}
  assert all((ours[n] == 0).all() for n in zeros)
  for name in set(ours) - set(wider) - zeros:
    np.testing.assert_array_equal(ours[name], torch_start[name], err_msg=name)
