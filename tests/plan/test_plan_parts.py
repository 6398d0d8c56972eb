"""What a plan is made of: chips and machines, the roofline, FLOPs, the search for a batch."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from numpy.testing import assert_allclose

from grain_jax import flops as counter
from grain_jax.plan import chips as plan_chips
from grain_jax.plan import estimate as plan_estimate
from grain_jax.plan import useful as plan_useful
from grain_jax.runtime import distributed


@pytest.mark.parametrize(
  ("name", "chips"), [("v5e:4x4", 16), ("v5e:16x16", 256), ("v5p:2x4x4", 32), ("h100:16", 16)]
)
def test_machines_by_name(name, chips):
  machine = plan_chips.parse(name)
  assert (machine.num_chips, machine.chip.name) == (chips, name.partition(":")[0])


@pytest.mark.parametrize("name", ["v5e:3x5", "v5e", "h100:12", "h100:0", "a100:8", "v5e:4x4x4", ""])
def test_an_unknown_machine_lists_those_there_are(name):
  with pytest.raises(ValueError, match="is unknown. Known are: v5e:2x2.*v5p:.*h100:") as error:
    plan_chips.parse(name)
  assert "\n" not in str(error.value)


def test_published_figures_of_the_chips():
  v5e, h100 = plan_chips.CHIPS["v5e"], plan_chips.CHIPS["h100"]
  assert (v5e.peak_flops, v5e.memory_bandwidth, v5e.memory_bytes) == (197e12, 819e9, 15.75 * 2**30)
  assert v5e.link_bandwidth == 1600e9 / 8
  assert (h100.peak_flops, h100.memory_bandwidth) == (989e12, 3.35e12)
  assert (h100.link_bandwidth, h100.node_bandwidth) == (450e9, 50e9)


def test_a_plan_for_gpus_has_the_memory_that_a_run_takes(tiny, monkeypatch):
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")  # so that what `prepare` sets goes again
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
  distributed.prepare(tiny)
  fraction = float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
  h100 = plan_chips.CHIPS["h100"].memory_bytes
  assert abs(h100 - fraction * 79.11 * 2**30) < 1e7 and 78.1e9 < h100 < 78.2e9


@pytest.mark.parametrize(
  ("kind", "sent"),
  [("all-reduce", 1.5), ("all-gather", 0.75), ("reduce-scatter", 0.75), ("collective-permute", 1)],
)
def test_bytes_that_a_ring_of_four_sends(kind, sent):
  exchange = plan_chips.Collective(kind, 1000, (0, 1, 2, 3), times=2)
  assert exchange.sent == 2 * 1000 * sent
  assert plan_chips.Collective(kind, 1000, (3,)).sent == 0


def test_an_exchange_between_nodes_is_bound_by_its_adapters():
  """16 H100s: each of 8 adapters a node carries an eighth, 2 x 1/2 of it out of the node."""
  machine = plan_chips.parse("h100:16")
  within = plan_chips.Collective("all-reduce", 8 * 10**9, tuple(range(8)))
  across = plan_chips.Collective("all-reduce", 8 * 10**9, tuple(range(16)))
  assert_allclose(within.seconds(machine), 2 * 7 / 8 * 8e9 / 450e9)
  assert_allclose(across.seconds(machine), max(2 * 15 / 16 * 8e9 / 450e9, 1e9 / 50e9))
  pair = plan_chips.Collective("all-reduce", 8 * 10**9, (0, 8))  # one adapter carries all of it
  assert_allclose(pair.seconds(machine), 8e9 / 50e9)


def test_roofline_by_hand():
  machine = plan_chips.parse("v5e:4x4")
  exchange = plan_chips.Collective("all-gather", 160, tuple(range(16)))
  found = plan_chips.roofline(
    machine, pass_flops=197e12, memory_bytes=2 * 819e9, collectives=[exchange, exchange]
  )
  assert_allclose(found["arithmetic"], 1)
  assert_allclose(found["memory"], 2)
  assert_allclose(found["interconnect"], 300 / 200e9)


@pytest.mark.parametrize(
  ("name", "key", "value"),
  [
    ("v5e:4x4", "TPU_ACCELERATOR_TYPE", "v5litepod-16"),
    ("v5p:2x2x1", "TPU_ACCELERATOR_TYPE", "v5p-8"),
    ("v5e:4x4", "TPU_SKIP_MDS_QUERY", "1"),
    ("cpu:6", "XLA_FLAGS", "--xla_force_host_platform_device_count=6"),
    ("h100:8", "JAX_PLATFORMS", "cpu"),
  ],
)
def test_variables_for_a_machine(name, key, value, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  assert plan_chips.environment(plan_chips.parse(name))[key] == value


def test_flops_of_a_scan_count_each_turn():
  """12 products of [8, 16] x [16, 16] are 12 x 2 x 8 x 16 x 16."""

  def scanned(x, w):
    return jax.lax.scan(lambda c, v: (c @ v, None), x, w)[0]

  jaxpr = jax.make_jaxpr(scanned)(jnp.zeros((8, 16)), jnp.zeros((12, 16, 16))).jaxpr
  assert sum(counter.count(jaxpr).values()) == 12 * 2 * 8 * 16 * 16
  assert sum(counter.count(jaxpr, trip_counts=False).values()) == 2 * 8 * 16 * 16


def test_flops_count_what_is_computed_again_and_every_shard():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = PartitionSpec("data")
  w = jnp.ones((16, 16))

  def loss(x):
    layer = jax.shard_map(lambda x: jnp.sin(x @ w), in_specs=spec, out_specs=spec, mesh=mesh)
    return jax.checkpoint(layer)(x).sum()

  with jax.set_mesh(mesh):
    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((32, 16))).jaxpr
  assert sum(counter.count(jaxpr).values()) == 3 * 2 * 32 * 16 * 16  # forward, again, gradient


def test_text_without_padding_by_hand(tiny):
  """Width 32, 2 heads, 2 layers: one whole, one of the last token of each text alone."""
  tiny.data.max_regions = 1
  dense = 8 * 32**2 + 4 * 32 * 128
  whole = 10 * dense + 4 * 10**2 * 32 + 6 * dense + 4 * 6**2 * 32
  last = 2 * dense + 4 * 16 * 2 * 32  # both heads read all 16 tokens as they are
  expected = 3 * (whole + last + 2 * 2 * 32 * 16)
  assert_allclose(plan_useful.text_tower_flops(tiny, caption=10, description=6), expected)


def test_false_texts_are_as_long_as_the_true_ones(tiny):
  """2 regions, K = 3 and N = 2: four captions, six descriptions."""
  lengths = {"caption": 10.0, "description": 6.0}

  def flops_of(regions, negatives, each):
    tiny.data.update(max_regions=regions, negatives=negatives, negatives_per_region=each)
    return plan_useful.text_tower_flops(tiny, **lengths)

  caption = flops_of(0, 0, 0)
  description = flops_of(1, 0, 0) - caption
  assert_allclose(flops_of(2, 3, 2), 4 * caption + 6 * description)
  tiny.method = "clip"
  assert_allclose(flops_of(2, 3, 0), 4 * caption)


def test_a_teachers_texts_take_a_third_of_the_models(tiny):
  """Its forward pass beside forward and the gradient's two."""
  counts, lengths = (
    {"jvp(Grain)/text_tower/fc1": 10**15, "loss": 7},
    {"caption": 9, "description": 4},
  )
  text = 8 * plan_useful.text_tower_flops(tiny, **lengths)
  assert plan_useful.useful_flops(counts, tiny, batch=8, **lengths) == 7 + text
  tiny.loss.anchor = 1.0
  assert_allclose(plan_useful.useful_flops(counts, tiny, batch=8, **lengths), 7 + text * 4 / 3)


@pytest.mark.parametrize("start", [8, 64, 5000])
@pytest.mark.parametrize(("fixed", "each"), [(2e9, 1e7), (0, 3.3e6), (15e9, 9e6), (1e9, 5e8)])
def test_search_finds_the_largest_in_few_probes(fixed, each, start):
  asked = []

  def probe(batch):
    assert batch not in asked and batch % 8 == 0
    asked.append(batch)
    need = fixed + each * batch + 1e3 * batch**1.5
    return need <= 16e9, int(need)

  found = plan_estimate.largest_batch(probe, capacity=int(16e9), start=start)
  exact = max(b for b in range(0, 20000, 8) if fixed + each * b + 1e3 * b**1.5 <= 16e9)
  assert exact - max(8, exact // 32) <= found <= exact
  assert len(asked) <= 8


def test_search_says_when_nothing_fits():
  assert plan_estimate.largest_batch(lambda b: (False, 10**12), capacity=1, start=64) == 0


def test_passes_of_a_product_are_those_of_its_type_and_precision():
  """2 x 8 x 16 x 4 in bfloat16, in float32 by default and exactly."""
  x, w = jnp.zeros((8, 16)), jnp.zeros((16, 4))

  def products(x, w):
    half = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
    return half, x @ w, jnp.matmul(x, w, precision="high"), jnp.matmul(x, w, precision="highest")

  jaxpr = jax.make_jaxpr(products)(x, w).jaxpr
  once = 2 * 8 * 16 * 4
  assert sum(counter.count(jaxpr).values()) == 4 * once
  for name, passes in (("v5e", 1 + 1 + 3 + 6), ("h100", 1 + 2 + 2 + 989 / 67), ("cpu", 4)):
    got = sum(counter.count(jaxpr, passes=plan_chips.CHIPS[name].passes).values())
    assert_allclose(got, passes * once, rtol=1e-3)
