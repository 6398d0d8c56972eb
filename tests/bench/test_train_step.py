"""The step beside its peer: both FLOP counters on hand-counted models, the batch, the command."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from bench import train_step as bench
from bench import train_step_costs as costs
from bench import train_step_sides as sides
from grain_jax import flops as counter

# A model of a few thousand parameters beside the token embedding.
SMALL = (
  "configs/cc12m.py:model.embed_dim=16,model.image.size=32,model.image.width=32,"
  "model.image.depth=1,model.image.heads=2,model.text.width=32,model.text.depth=1,"
  "model.text.heads=2,model.text.vocab_size=500,model.decoder.width=32,model.decoder.depth=1,"
  "model.decoder.heads=2,model.decoder.mlp_dim=32,loss.matcher=device"
)


def small(arg="", *, batch_size=4, row_length=112):
  return sides.setting(SMALL + arg, batch_size=batch_size, row_length=row_length, seed=0)


def jax_flops(function, *shapes):
  """FLOPs of all of a function, by our counter."""
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return sum(counter.count(jax.make_jaxpr(function)(*arguments).jaxpr).values())


def meta(*shape):
  return torch.empty(shape, device="meta", requires_grad=True)


def test_both_counters_on_a_small_model():
  # x [5, 3] -> relu(x a) [5, 7] -> h b [5, 2]: 2*5*3*7 + 2*5*7*2 forward; backward the gradients of
  # both matrices and of h, as x needs none.
  first, second = 2 * 5 * 3 * 7, 2 * 5 * 7 * 2
  want = 2 * first + 3 * second

  def loss(a, b, x):
    return jnp.sum(jax.nn.relu(x @ a) @ b)

  gradient = jax.value_and_grad(loss, argnums=(0, 1))
  assert jax_flops(jax.jit(gradient), (3, 7), (7, 2), (5, 3)) == want
  model = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2))
  model, x = model.to("meta"), torch.empty(5, 3, device="meta")
  assert costs.torch_flops(lambda: model(x)) == want


@pytest.mark.parametrize("causal", [False, True])
def test_both_counters_on_attention(causal):
  # Queries [2, 10, 4, 8], keys and values [2, 12, 4, 8]: two products forward, four backward.
  want = 3 * 2 * (2 * 4 * 10 * 12 * 8) * 2

  def attend(q, k, v):
    return jnp.sum(jax.nn.dot_product_attention(q, k, v, is_causal=causal))

  gradient = jax.value_and_grad(attend, argnums=(0, 1, 2))
  assert jax_flops(gradient, (2, 10, 4, 8), (2, 12, 4, 8), (2, 12, 4, 8)) == want
  q, k, v = meta(2, 4, 10, 8), meta(2, 4, 12, 8), meta(2, 4, 12, 8)
  attention = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
  assert costs.torch_flops(attention) == want


def test_both_counters_on_a_convolution():
  # [3, 2, 4, 4] with [5, 2, 2, 2], stride 2 -> [3, 5, 2, 2], each the sum of 2*2*2 products.
  want = 3 * 2 * (3 * 5 * 2 * 2) * (2 * 2 * 2)

  def loss(x, w):
    return jnp.sum(jax.lax.conv(x, w, (2, 2), "VALID"))

  assert jax_flops(jax.value_and_grad(loss, argnums=(0, 1)), (3, 2, 4, 4), (5, 2, 2, 2)) == want
  x, w = meta(3, 2, 4, 4), meta(5, 2, 2, 2)
  assert costs.torch_flops(lambda: F.conv2d(x, w, stride=2)) == want


def test_our_counter_looks_into_everything():
  one = 2 * 4 * 4 * 4  # [4, 4] @ [4, 4]
  square = (4, 4)

  def scanned(x, w):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, length=6)[0]

  assert jax_flops(scanned, square, square) == 6 * one
  gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(scanned(x, w))), argnums=(0, 1))
  assert jax_flops(gradient, square, square) == 3 * 6 * one

  def block(x):
    return jnp.sin(jnp.sin(x @ x) @ x)

  plain, again = (
    jax_flops(jax.grad(lambda x, f=f: jnp.sum(f(x))), square) for f in (block, jax.remat(block))
  )
  assert (plain, again) == (6 * one, 8 * one)  # both products a second time

  @jax.custom_vjp
  def custom(x):
    return x @ x

  custom.defvjp(lambda x: (custom(x), x), lambda x, g: (g @ x @ x,))
  assert jax_flops(jax.value_and_grad(lambda x: jnp.sum(custom(x))), square) == 3 * one

  def branches(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert jax_flops(branches, square) == 2 * one
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    sharded = jax.shard_map(lambda x: x @ x.T, in_specs=P(("a",)), out_specs=P("a"))
    assert jax_flops(sharded, (8, 4)) == 8 * (2 * 2 * 2 * 4)
  with pytest.raises(ValueError, match="a while loop with a matrix product has no FLOP count"):
    jax_flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x), square)


def test_torch_is_counted_on_the_meta_device_alone():
  with pytest.raises(ValueError, match="on the meta device, not on cpu"):
    costs.torch_flops(lambda: torch.ones(2, requires_grad=True))


def test_flops_of_the_sides_are_the_formula():
  config = small(",model.image.depth=2,model.text.depth=3")
  batch = sides.host_batch(config)
  flops, samples = costs.report(config, batch), config.batch_size
  text = {side: parts["text tower"] * samples for side, parts in flops.items()}
  lengths = sides.text_lengths(batch)
  longest = np.where(np.arange(6) == 0, lengths[:, 0].max(), lengths[:, 1:].max())
  assert_allclose(text["padded"], costs.text_flops(config, np.full((samples, 6), 77)))
  assert_allclose(text["trimmed"], costs.text_flops(config, np.tile(longest, samples)))
  assert_allclose(text["unpadded"], costs.text_flops(config, lengths))
  # A row is one text to the tower; its five others are projected too.
  rows = costs.text_flops(config, np.full(samples, 112)) + 5 * samples * 3 * 2 * 32 * 16
  # Of its last block the 6 tokens that end texts, whose heads read all 112 as they are.
  whole = 112 * (8 * 32 * 32 + 4 * 32 * 128) + 4 * 112 * 112 * 32
  last = 6 * (8 * 32 * 32 + 4 * 32 * 128) + 4 * 6 * config.model.text.heads * 112 * 32
  # The gradient of our attention computes its logits again, in the other two blocks.
  again = 2 * 2 * 112 * 112 * 32
  assert_allclose(text["ours"], rows - samples * (3 * (whole - last) - again))
  # By hand: 2 layers of 5 tokens, the patch embedding without a gradient of the image.
  layer = 5 * (4 * 2 * 32 * 32 + 2 * 2 * 32 * 128) + 2 * 2 * 5 * 5 * 32
  for side in sides.SIDES:
    again = 2 * 2 * 5 * 5 * 32 if side == "ours" else 0
    assert_allclose(flops[side]["image tower"], 3 * 2 * layer + again + 2 * 2 * 4 * 768 * 32)
  rest = [flops[side][costs.REST] for side in sides.SIDES]
  assert rest[1] == rest[2] and 1 <= rest[0] / rest[1] < 1.05
  counts = [sum(flops[side].values()) for side in ("unpadded", "trimmed", "ours", "padded")]
  assert counts == sorted(counts)


def test_the_batch_has_the_texts_it_promises_and_both_sides_get_them():
  config = small(batch_size=64)
  batch = sides.host_batch(config)
  lengths = sides.text_lengths(batch)
  assert (lengths[:, 0].min(), lengths[:, 0].max()) == sides.CAPTION_TOKENS == (12, 40)
  assert (lengths[:, 1:].min(), lengths[:, 1:].max()) == sides.DESCRIPTION_TOKENS == (6, 14)
  assert lengths.sum(axis=1).max() <= config.data.row_length
  padded, trimmed = (sides.peer_batch(batch, config, form=f) for f in ("padded", "trimmed"))
  assert [ids.shape for ids, _ in padded.texts] == [(64 * 6, 77)]
  assert [ids.shape for ids, _ in trimmed.texts] == [(64, 40), (64 * 5, 14)]
  assert_allclose(padded.image, batch["image"].transpose(0, 3, 1, 2))
  assert_allclose(padded.boxes, batch["boxes"].reshape(-1, 4))
  for theirs in (padded, trimmed):
    rows = [row for ids, ends in theirs.texts for row in zip(ids, ends, strict=True)]
    for i, text in [(0, 0), (63, 0), (0, 1), (0, 5), (7, 3), (63, 5)]:
      ids, end = rows[i if text == 0 else 64 + 5 * i + text - 1]
      want = batch["tokens"][i][batch["segments"][i] == text + 1]
      assert (want[0], want[-1]) == (498, 499) and batch["tokens"][i, batch["ends"][i, text]] == 499
      assert ids[: end + 1].tolist() == want.tolist() and not ids[end + 1 :].any()
  with pytest.raises(ValueError, match="regions that all have their description"):
    batch["text_mask"][3, 2] = False
    sides.peer_batch(batch, config, form="padded")


@pytest.mark.parametrize(
  "arg, row_length, match",
  [
    ("", 109, "--row_length=109: texts of up to 110 tokens an image would be dropped"),
    (",model.text.context=32", 112, "config.model.text.context = 32 is shorter than the captions"),
    (",loss.aux_box_loss=True", 112, "config.loss.aux_box_loss = True is nothing the PyTorch peer"),
    (",optimizer.clip_norm=1.0", 112, "config.optimizer.clip_norm = 1.0 is nothing the PyTorch"),
    (",data.max_regions=0", 112, "leaves the peer no regions"),
  ],
)
def test_settings_that_cannot_be_compared_end_in_one_line(arg, row_length, match):
  with pytest.raises(ValueError, match=match) as error:
    small(arg, row_length=row_length)
  assert "\n" not in str(error.value)


def test_sides_take_turns_and_warm_up_first(monkeypatch):
  order, closed = [], []

  class Worker:
    def __init__(self, side, config):
      self.side = side

    def ask(self, command):
      order.append((self.side, command))
      return {"seconds": float(len(order)), "loss": 1.0, "peak_bytes": 7e9}

    def close(self):
      closed.append(self.side)

  monkeypatch.setattr(bench, "Worker", Worker)
  found = bench.measure(None, rounds=2, warmup=1, say=lambda line: None)
  turn = [(side, "step") for side in sides.SIDES]
  assert order == turn * 3 + [(side, "end") for side in sides.SIDES]
  assert found["seconds"] == {"ours": [4, 7], "padded": [5, 8], "trimmed": [6, 9]}
  assert closed == list(sides.SIDES) and found["peak_memory_bytes"]["ours"] == 7e9


def test_ratios_and_table():
  flops = {
    "ours": {"image tower": 60e9, "text tower": 70e9}, "padded": {"image tower": 200e9},
    "trimmed": {"image tower": 125e9}, "unpadded": {"image tower": 120e9},
  }  # fmt: skip
  for side in ("padded", "trimmed", "unpadded"):
    flops[side]["text tower"] = 0.0
  measured = {
    "seconds": {"ours": [4.0, 2.0, 1.0], "padded": [8.0, 8.0, 9.0], "trimmed": [4.0, 4.0, 1.0]},
    "peak_memory_bytes": {"ours": 3, "padded": 5, "trimmed": 4},
  }
  found = bench.summary(flops, measured, {"batch_size": 8})
  assert found == {
    "flops_per_sample": {
      "ours": 130e9, "padded": 200e9, "trimmed": 125e9, "ratio": 0.65, "ratio_trimmed": 1.04
    },
    "samples_per_s": {
      "ours": 4.0, "padded": 1.0, "trimmed": 2.0, "ratio": 4.0, "ratio_trimmed": 2.0
    },
    "peak_memory_bytes": {"ours": 3, "padded": 5, "trimmed": 4},
    "settings": {"batch_size": 8},
  }  # fmt: skip
  text = bench.table(flops, measured, {"batch_size": 8})
  assert "| total | 130.00 | 200.00 | 125.00 | 120.00 |" in text
  assert "| of padded | 0.650 | 1.000 | 0.625 | 0.600 |" in text
  assert "| ours | 2.000 (1.000-4.000) | 4.000 | 0.00 |" in text
  untimed = bench.summary(flops, None, {"batch_size": 8})
  assert untimed["samples_per_s"]["ratio"] is None and untimed["peak_memory_bytes"]["ours"] is None
  assert "samples/s" not in bench.table(flops, None, {"batch_size": 8})


@pytest.mark.long
def test_the_command_prints_one_json_object(monkeypatch):
  monkeypatch.setenv(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  )
  command = [sys.executable, "-m", "bench.train_step", f"--config={SMALL}", "--json"]
  command += ["--batch_size=2", "--steps=2", "--warmup=1", "--seed=3"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  keys = {"ours", "padded", "trimmed"}
  assert set(found) == {"flops_per_sample", "samples_per_s", "peak_memory_bytes", "settings"}
  assert set(found["flops_per_sample"]) == keys | {"ratio", "ratio_trimmed"}
  assert set(found["samples_per_s"]) == keys | {"ratio", "ratio_trimmed"}
  assert set(found["peak_memory_bytes"]) == keys
  assert all(value > 0 for group in found.values() for k, value in group.items() if k in keys)
  assert found["flops_per_sample"]["ratio"] < 1
  settings = found["settings"]
  assert (settings["batch_size"], settings["seed"], settings["dropped_texts"]) == (2, 3, 0)
  assert "round 2 of 2" in done.stderr


def test_the_command_ends_in_one_line():
  command = [sys.executable, "-m", "bench.train_step", "--row_length=100"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith("ValueError: --row_length=100: ") and done.stderr.count("\n") == 1
