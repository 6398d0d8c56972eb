"""HLO read back: hand-written programs with hand-worked counts, and XLA's own of real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose

from grain_jax import config as configs
from grain_jax.plan import chips as plan_chips
from grain_jax.plan import hlo as plan_hlo
from grain_jax.plan import traffic as plan_traffic

# A loop of 12 iterations, on 4 chips: each reads a row of a stacked weight and sums it over chips.
LOOP = """HloModule jit_step, is_scheduled=true, num_partitions=4

%fused_slice (p0: f32[12,256], p1: s32[]) -> f32[256] {
  %p0 = f32[12,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,256}
  ROOT %flat = f32[256]{0} bitcast(%row)
}

%fused_update (q0: f32[12,256], q1: f32[256], q2: s32[]) -> f32[12,256] {
  %q0 = f32[12,256]{1,0} parameter(0)
  %q1 = f32[256]{0} parameter(1)
  %row1 = f32[1,256]{1,0} bitcast(%q1)
  %q2 = s32[] parameter(2)
  %zero1 = s32[] constant(0)
  ROOT %put = f32[12,256]{1,0} dynamic-update-slice(%q0, %row1, %q2, %zero1)
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (s: (s32[], f32[12,256], f32[12,256])) -> (s32[], f32[12,256], f32[12,256]) {
  %s = (s32[], f32[12,256]{1,0}, /*index=2*/f32[12,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = f32[12,256]{1,0} get-tuple-element(%s), index=1
  %out = f32[12,256]{1,0} get-tuple-element(%s), index=2
  %read = f32[256]{0} fusion(%w, %i), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(step)/jvp(Grain)/image_tower/while/body/mlp/fc1/slice"}
  %reduced = f32[256]{0} all-reduce(%read), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add, metadata={op_name="jit(step)/transpose(jvp(Grain))/image_tower/while/body/mlp/fc1/psum"}
  %write = f32[12,256]{1,0} fusion(%out, %reduced, %i), kind=kLoop, calls=%fused_update, metadata={op_name="jit(step)/jvp(Grain)/image_tower/while/body/put"}
  %one = s32[] constant(STEP)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[12,256]{1,0}, f32[12,256]{1,0}) tuple(%next, %w, %write)
}

%cond (c: (s32[], f32[12,256], f32[12,256])) -> pred[] {
  %bound = s32[] constant(12)
  %c = (s32[], f32[12,256]{1,0}, f32[12,256]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (x: f32[12,256], y: f32[12,256]) -> f32[12,256] {
  %x = f32[12,256]{1,0} parameter(0)
  %y = f32[12,256]{1,0} parameter(1)
  %start = s32[] constant(START)
  %start_copy = s32[] copy(%start)
  %init = (s32[], f32[12,256]{1,0}, f32[12,256]{1,0}) tuple(%start_copy, %x, %y)
  %loop = (s32[], f32[12,256]{1,0}, f32[12,256]{1,0}) while(%init), condition=%cond, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %result = f32[12,256]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501
ROW = 256 * 4


def loop(start=0, step=1):
  return plan_hlo.parse(LOOP.replace("START", str(start)).replace("STEP", str(step)))


@pytest.mark.parametrize(("start", "step", "trip_count"), [(0, 1, 12), (3, 1, 9), (0, 5, 3)])
def test_trip_counts_are_read_from_bound_start_and_step(start, step, trip_count):
  module = loop(start, step)
  assert [times for _, times in module.executed()] == [1, trip_count]
  assert module.unknown_loops() == []


def test_the_compilers_trip_count_goes_before_the_bound():
  text = LOOP.replace("START", "0").replace("STEP", "1")
  text = text.replace("body=%body,", 'body=%body, backend_config={"known_trip_count":{"n":"7"}},')
  assert [times for _, times in plan_hlo.parse(text).executed()] == [1, 7]


@pytest.mark.parametrize(
  ("known", "unknown"),
  [
    ("direction=LT", "direction=NE"),
    ("constant(START)", "parameter(2)"),
    ("constant(STEP)", "parameter(2)"),
    ("constant(STEP)", "constant(0)"),
    ("s32[] add(%i, %one)", "s32[] multiply(%i, %one)"),
  ],
)
def test_a_loop_without_bound_start_or_step_counts_once_and_is_named(known, unknown):
  assert known in LOOP
  text = LOOP.replace(known, unknown).replace("START", "2").replace("STEP", "1")
  module = plan_hlo.parse(text)
  assert [times for _, times in module.executed()] == [1, 1]
  assert module.unknown_loops() == ["jit(step)/while"]


def test_traffic_of_slices_in_a_loop_by_hand():
  """An iteration reads, writes and exchanges a row and puts it in place; a scalar is read twice."""
  found = plan_traffic.traffic(loop())
  by_op = {item.op + item.path[-3:]: item.bytes for item in found}
  assert by_op["fusionice"] == 12 * (2 * ROW + 4)
  assert by_op["all-reducesum"] == 12 * 2 * ROW
  assert by_op["fusionput"] == 12 * (2 * ROW + 4)
  once = plan_traffic.traffic(loop(), trip_counts=False)
  assert sum(i.bytes for i in once if i.path) * 12 == sum(i.bytes for i in found if i.path)


def test_a_fusion_within_a_fusion_reads_no_more_than_its_slice():
  outer = """%outer (o0: f32[12,256], o1: s32[]) -> f32[256] {
  %o0 = f32[12,256]{1,0} parameter(0)
  %o1 = s32[] parameter(1)
  ROOT %inner = f32[256]{0} fusion(%o0, %o1), kind=kLoop, calls=%fused_slice
}

%fused_update ("""
  text = LOOP.replace("calls=%fused_slice", "calls=%outer").replace("%fused_update (", outer, 1)
  text = text.replace("START", "0").replace("STEP", "1")
  assert plan_traffic.traffic(plan_hlo.parse(text)) == plan_traffic.traffic(loop())


def test_collectives_in_a_loop_count_each_turn():
  (found,) = plan_traffic.collectives(loop())
  assert (found.kind, found.payload, found.times, found.group) == ("all-reduce", ROW, 12, (0, 1))
  assert found.sent == 12 * ROW  # 2 (n - 1) / n of it, n = 2


@pytest.mark.parametrize(
  ("kind", "path", "gradients"),
  [
    ("all-reduce", "jit(train_step)/transpose(jvp(Grain))/image_tower/mlp/fc1/dot_general", True),
    ("reduce-scatter", "jit(train_step)/transpose(jvp(Grain))/box_head/fc2/reduce_sum", True),
    ("all-gather", "jit(train_step)/transpose(jvp(Grain))/image_tower/mlp/fc1", False),
    ("all-reduce", "jit(train_step)/jvp()/reduce_sum", False),
    ("all-reduce", "jit(train_step)/transpose(jvp())/add_any", False),
    ("all-reduce", "", False),
  ],
)
def test_exchanges_of_gradients_by_name(kind, path, gradients):
  exchange = plan_chips.Collective(kind, 8, (0, 1), name=path)
  assert plan_traffic.is_gradient_reduction(exchange) is gradients


# A TPU's form: one all-gather whose parts stand in three fusions, one of them within a loop.
SPREAD = """HloModule jit_step, num_partitions=4

%start (g0: bf16[8]) -> bf16[32] {
  %g0 = bf16[8]{0:T(1024)} parameter(0)
  ROOT %ag = bf16[32]{0:T(1024)S(1)} all-gather(%g0), channel_id=5, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}
}

%step (h0: bf16[8]) -> bf16[32] {
  %h0 = bf16[8]{0:T(1024)} parameter(0)
  ROOT %ag1 = bf16[32]{0:T(1024)S(1)} all-gather(%h0), channel_id=5, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}
}

%all-reduce-scatter.1 (r0: f32[64]) -> f32[16] {
  %r0 = f32[64]{0} parameter(0)
  %ar = f32[64]{0} all-reduce(%r0), channel_id=6, replica_groups={{0,1,2,3}}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %mine = f32[16]{0} dynamic-slice(%ar, %id), dynamic_slice_sizes={16}
}

%body (s: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %s = (s32[], bf16[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = bf16[8]{0} get-tuple-element(%s), index=1
  %mid = bf16[32]{0:S(1)} fusion(%v), kind=kLoop, calls=%step
  %one = s32[] constant(1)
  %n = s32[] add(%i, %one)
  ROOT %t = (s32[], bf16[8]{0}) tuple(%n, %v)
}

%cond (c: (s32[], bf16[8])) -> pred[] {
  %bound = s32[] constant(9)
  %c = (s32[], bf16[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (x: bf16[8], y: f32[64]) -> f32[16] {
  %x = bf16[8]{0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %zero = s32[] constant(0)
  %begin = bf16[32]{0:S(1)} fusion(%x), kind=kLoop, calls=%start
  %init = (s32[], bf16[8]{0}) tuple(%zero, %x)
  %loop = (s32[], bf16[8]{0}) while(%init), condition=%cond, body=%body
  %copy-start = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%y)
  %copy-done = f32[64]{0:S(1)} copy-done(%copy-start)
  ROOT %scattered = f32[16]{0:S(1)} fusion(%copy-done), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_parts_of_one_exchange_count_once_and_a_fused_scatter_is_one():
  found = {c.kind: c for c in plan_traffic.collectives(plan_hlo.parse(SPREAD))}
  assert sorted(found) == ["all-gather", "reduce-scatter"]
  assert (found["all-gather"].payload, found["all-gather"].times) == (64, 1)
  assert found["all-gather"].sent == 48
  assert found["reduce-scatter"].sent == 0.75 * 256


def test_attentions_operands_by_hand(tiny):
  """Float32, width 32, 16 patches and a class token, rows of 64: 4 arrays forward, 8 backward."""
  tiny.model.image.patch = 8
  layer = {"image": 17 * 32 * 4, "text": 64 * 32 * 4}

  def total(**changes):
    for key, value in changes.items():
      configs.set_key(tiny, key.replace("__", "."), value)
    return plan_traffic.attention_bytes(tiny, images=3, align=1) / 3

  assert total() == 12 * (2 * layer["image"] + layer["text"])  # the last text layer has no keys
  assert total(model__text__kind="t5") == 12 * 2 * (layer["image"] + layer["text"])
  dropped = 5 * 32 * 4  # a quarter of 16 patches, and the class token
  assert total(model__image__patch_dropout=0.75) == 12 * 2 * (dropped + layer["text"])
  again = total(accumulate=2, model__remat="block")
  assert again == 20 * 2 * (dropped + layer["text"])
  assert total(loss__anchor=1.0) == again + 4 * 2 * (layer["image"] + layer["text"])


def test_arrays_in_on_chip_memory_are_no_traffic():
  """Of the copy into on-chip memory and its use, the read from HBM alone remains."""
  module = plan_hlo.parse(SPREAD)
  copies = [t.bytes for t in plan_traffic.traffic(module) if t.op == "copy-start"]
  assert copies == [256]
  both = [t.bytes for t in plan_traffic.traffic(module, hbm_only=False) if t.op == "copy-start"]
  assert both == [512]
  assert not [t for t in plan_traffic.traffic(module) if t.bytes == 64 * 4 + 64]


@pytest.mark.parametrize(
  ("text", "group"),
  [
    ("replica_groups={{1,3},{0,2}}", (1, 3)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
    ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
    ("replica_groups={}", tuple(range(8))),
  ],
)
def test_groups_of_every_notation(text, group):
  assert plan_traffic.first_group(f", channel_id=1, {text}", 8) == group


@pytest.mark.parametrize(
  ("text", "size"), [("bf16[3,5]{1,0}", 30), ("s4[8]", 4), ("pred[]", 1), ("f8e4m3fn[7]", 7)]
)
def test_bytes_of_a_type(text, size):
  line = f"  ROOT %x = {text} parameter(0)"
  module = plan_hlo.parse(f"HloModule m\n\nENTRY %m (x: f32[]) -> f32[] {{\n{line}\n}}\n")
  assert module.computations["m"].root.types[0].bytes == size


def compiled(function, *shapes, shardings=None):
  arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  jitted = jax.jit(function) if shardings is None else jax.jit(function, in_shardings=shardings)
  return jitted.lower(*arguments).compile()


def mlp(x, w):
  for _ in range(3):
    x = jnp.tanh(x @ w)
  return jnp.sum(x**2)


def test_traffic_agrees_with_xlas_own_count():
  """Gradient of three layers, unrolled: XLA counts loops once, and here there are none."""
  done = compiled(jax.grad(mlp, argnums=1), (64, 128), (128, 128))
  ours = sum(t.bytes for t in plan_traffic.traffic(plan_hlo.parse(done.as_text())))
  assert_allclose(ours, done.cost_analysis()["bytes accessed"], rtol=0.1)


@pytest.mark.parametrize("unroll", [1, 2])
def test_each_layer_of_a_scan_moves_as_much_as_the_next(unroll):
  """From 4 to 8 layers a program gains half of what it gains from 8 to 16."""

  def moved(layers):
    def scanned(x, w):
      return jax.lax.scan(lambda c, v: (jnp.tanh(c @ v), None), x, w, unroll=unroll)[0]

    text = compiled(scanned, (64, 256), (layers, 256, 256)).as_text()
    return sum(t.bytes for t in plan_traffic.traffic(plan_hlo.parse(text)))

  four, eight, sixteen = moved(4), moved(8), moved(16)
  assert_allclose(sixteen - eight, 2 * (eight - four), rtol=1e-3)
  assert (sixteen - eight) / 8 >= 256 * 256 * 4


def test_the_gradients_all_reduce_of_a_real_program():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
  spec = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
  layer = jax.grad(lambda x, w: jnp.sum(jnp.tanh(x @ w) ** 2), argnums=1)
  module = plan_hlo.parse(compiled(layer, (64, 128), (128, 128), shardings=spec).as_text())
  found = [c for c in plan_traffic.collectives(module) if c.kind == "all-reduce"]
  assert sum(c.payload * c.times for c in found) == 128 * 128 * 4
  assert {len(c.group) for c in found} == {8}


def test_a_workspace_of_cublas_is_no_traffic():
  text = """HloModule m

ENTRY %m (a: bf16[4,8], b: bf16[8,4]) -> bf16[4,4] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %call = (bf16[4,4]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  ROOT %c = bf16[4,4]{1,0} get-tuple-element(%call), index=0
}
"""
  assert [t.bytes for t in plan_traffic.traffic(plan_hlo.parse(text))] == [64 + 64 + 32]


@pytest.mark.parametrize(
  ("path", "name"),
  [
    (
      "jit(train_step)/transpose(jvp(Grain))/Grain.encode_text/text_tower/while/body/norm1/mul",
      "text_tower/norm1/mul (backward)",
    ),
    ("jit(train_step)/jvp(Grain)/Grain.encode_regions/image_tower/add", "image_tower/add"),
    ("jit(train_step)", "optimizer and rest"),
  ],
)
def test_names_of_causes(path, name):
  assert plan_traffic.module_and_op(path) == name


def test_causes_are_the_largest_first():
  item = plan_traffic.Traffic
  found = [item("jit(f)/a/mul", "fusion", 5), item("", "copy-start", 9), item("a/mul", "dot", 6)]
  assert plan_traffic.causes(found, 2) == [("a/mul", 11), ("compiler's copy", 9)]
